from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosting import Hosted, hosted
from tiny import ENDLESS_WINDOW, save_llama


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by sharing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three experts of one vocabulary, so that they can be mixed."""
    names = ("math", "code", "story")
    return {name: save_llama(tmp_path_factory.mktemp(name), seed=seed) for seed, name in enumerate(names)}


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert with a window for answers that outlast every test."""
    return save_llama(tmp_path_factory.mktemp("endless"), max_position_embeddings=ENDLESS_WINDOW)


@pytest.fixture(scope="module")
def service(llamas: dict[str, Path]) -> Iterator[Hosted]:
    with hosted(llamas) as found:
        yield found
