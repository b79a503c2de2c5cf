from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil
import pytest
import torch

from service.engines.local import room


@pytest.mark.parametrize(
    ("most", "used", "left"),
    [("1000000", "400000", 600000), ("1000", "2000", 0), ("max", "5", None), (None, None, None)],
)
def test_a_containers_limit_counts_before_the_machines(
    tmp_path: Path, most: str | None, used: str | None, left: int | None
) -> None:
    for name, value in (("memory.max", most), ("memory.current", used)):
        if value is not None:
            (tmp_path / name).write_text(f"{value}\n")
    found = room.free(tmp_path)
    if left is None:
        assert found == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    else:
        assert found == left


def test_keys_and_values_take_a_part_of_what_is_free() -> None:
    assert 0 < room.for_keys_and_values(torch.device("cpu")) <= min(room.MOST, room.free())


@pytest.mark.parametrize(
    ("share", "cores"),
    [("50000 100000", 1), ("100000 100000", 1), ("99999999 100000", None), ("max 100000", None), (None, None)],
)
def test_a_containers_share_of_the_processors_counts_before_their_number(
    tmp_path: Path, share: str | None, cores: int | None
) -> None:
    if share is not None:
        (tmp_path / "cpu.max").write_text(f"{share}\n")
    assert room.cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))


def test_a_part_of_a_core_counts_as_one(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100001 100000\n")
    assert room.cores(tmp_path) == min(2, len(os.sched_getaffinity(0)))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this is for glibc")
def test_what_was_freed_is_given_back_to_the_system() -> None:
    kept, freed = [], []
    for _ in range(1000):  # small enough for the heap, of which only the end goes back by itself
        freed.append(torch.ones(16_000))
        kept.append(torch.ones(16))
    process = psutil.Process()
    before = process.memory_info().rss
    freed.clear()
    room.give_back()
    assert before - process.memory_info().rss > 32_000_000
    assert sum(float(each.sum()) for each in kept) == 16_000
