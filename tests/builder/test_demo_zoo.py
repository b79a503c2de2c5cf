"""What the demo zoo's own text promises: nothing that adapters learned from is among what they are scored on."""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path

import pytest

from builder.checkpoints import Safetensors
from builder.config import load_zoo
from builder.proxy.demo import DOMAINS
from builder.sources import adapter_folder

WRITTEN = Path(str(resources.files("builder.zoos.demo"))) / "written"


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """Every run of `length` words."""
    words = text.lower().split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_training_text_of_ours_is_in_a_set(domain: str) -> None:
    rows = [json.loads(line) for line in (WRITTEN / f"{domain}.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 200
    asked = DOMAINS[domain].items(range(DOMAINS[domain].count), random.Random(0))
    for row in rows:
        assert all(row["prompt"] not in item.prompt for item in asked)
    answers = {run for row in rows for run in runs(row["answer"], 9)}
    rights = {run for item in asked for run in runs(item.choices[item.label], 9)}
    # Code and sums have idioms that any two hands share.
    if domain in ("story", "chat"):
        assert not answers & rights


def test_every_adapter_is_a_few_megabytes_for_every_linear_layer() -> None:
    for model in load_zoo("demo").models:
        assert model.adapter is not None
        file = adapter_folder(model.adapter) / "adapter_model.safetensors"
        assert 1_000_000 < file.stat().st_size < 6_000_000
        assert len(Safetensors(file).tensors) == 30 * 7 * 2
