from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ENDLESS_WINDOW, save_llama
from transformers import AutoModelForCausalLM

from service.engines.local.expert import Expert, Loading, read


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by sharing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert with a window for answers that outlast every test."""
    return save_llama(tmp_path_factory.mktemp("endless"), max_position_embeddings=ENDLESS_WINDOW)


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("faulty"), seed=1, faulty=True)


@pytest.fixture(scope="session")
def expert(llama: Path) -> Expert:
    return read("llama", llama, Loading(torch.float32, torch.device("cpu")))


@pytest.fixture(scope="session")
def reference(llama: Path) -> Any:
    """The same model as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
