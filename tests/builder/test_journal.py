from __future__ import annotations

from pathlib import Path

import pytest

from builder.errors import BuildError
from builder.journal import Journal


def test_a_result_is_computed_once_and_outlives_the_process_that_made_it(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[float]:
        calls.append(1)
        return [0.1, 0.2]

    for _ in range(2):
        with Journal(tmp_path / "journal.sqlite") as journal:
            assert journal.once("score", {"a": 1}, compute) == [0.1, 0.2]
    assert len(calls) == 1


def test_other_inputs_and_other_kinds_are_other_results(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert journal.once("score", {"a": 1}, lambda: 1) == 1
        assert journal.once("score", {"a": 2}, lambda: 2) == 2
        assert journal.once("other", {"a": 1}, lambda: 3) == 3


def test_the_order_of_members_is_part_of_the_inputs(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert journal.once("score", {"members": [["a", 0.5], ["b", 0.5]]}, lambda: 1) == 1
        assert journal.once("score", {"members": [["b", 0.5], ["a", 0.5]]}, lambda: 2) == 2


def test_a_failed_computation_is_not_a_result(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        with pytest.raises(ZeroDivisionError):
            journal.once("score", {"a": 1}, lambda: 1 / 0)
        assert journal.once("score", {"a": 1}, lambda: 5) == 5


def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database, but long enough to be taken for one" * 40)
    with pytest.raises(BuildError, match=r"journal\.sqlite cannot be used .*: remove it"):
        Journal(tmp_path / "journal.sqlite")
