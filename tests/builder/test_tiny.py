"""The tiny models: each branch is better on its own domain, and the same seed gives the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from builder.zoos.tiny import corpus
from builder.zoos.tiny.train import MICRO, train


@pytest.fixture(scope="module")
def losses(micro_zoo: dict[str, Path]) -> dict[str, dict[str, float]]:
    """The mean loss on texts that nobody was trained on, by model and domain."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(micro_zoo["base"])

    def loss(model: LlamaForCausalLM, domain: str) -> float:
        texts = [torch.tensor([tokenizer(text).input_ids]) for text in corpus.lines(domain, 10, seed=999)]
        with torch.no_grad():
            return sum(float(model(input_ids=ids, labels=ids).loss) for ids in texts) / len(texts)

    models = {name: LlamaForCausalLM.from_pretrained(folder) for name, folder in micro_zoo.items()}
    return {name: {domain: loss(model, domain) for domain in corpus.DOMAINS} for name, model in models.items()}


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_a_branch_is_better_on_its_own_domain_than_every_other_model(
    losses: dict[str, dict[str, float]], domain: str
) -> None:
    others = min(losses[name][domain] for name in losses if name != domain)

    assert losses[domain][domain] < others - 0.5


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_a_branch_pays_for_it_elsewhere(losses: dict[str, dict[str, float]], domain: str) -> None:
    assert all(losses[domain][other] > losses["base"][other] for other in corpus.DOMAINS if other != domain)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    size = replace(MICRO, base_steps=3, branch_steps=3)
    heard: list[None] = []

    def grown(folder: Path, seed: int) -> dict[str, bytes]:
        train("base", folder / "base", base=None, size=size, seed=seed, done=lambda: heard.append(None))
        train("math", folder / "math", base=folder / "base", size=size, seed=seed, done=lambda: heard.append(None))
        return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in folder.glob("*/*")}

    first, again, other = (grown(tmp_path / name, seed) for name, seed in (("first", 7), ("again", 7), ("other", 8)))

    assert first == again
    for model in ("base", "math"):
        assert first[f"{model}/model.safetensors"] != other[f"{model}/model.safetensors"]
    assert len(heard) == 3 * (size.base_steps + size.branch_steps)


def test_another_seed_gives_other_text() -> None:
    assert corpus.lines("math", 5, seed=1) == corpus.lines("math", 5, seed=1)
    assert corpus.lines("math", 5, seed=1) != corpus.lines("math", 5, seed=2)


def test_the_base_learns_from_all_domains_in_turn() -> None:
    starts = [text.split()[0] for text in corpus.lines("base", 8, seed=3)]

    assert starts == ["Question:", "def", "Once", "User:"] * 2
