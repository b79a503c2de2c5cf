"""Composed experts, whose routes go with the rows of a batch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SHAPE, answer, generated, greedy, save_llama, serving
from transformers import AutoConfig, AutoTokenizer, Qwen2Config

from composed import ComposedConfig, ComposedForCausalLM
from service.engines.local.expert import Loading, read

LEVELS: list[dict[str, Any]] = [
    {"level": "ffn", "routing": "token"},
    {"level": "ffn", "gate": "mlp", "gate_width": 8},
    {"level": "block", "trunk_layers": 1},
    {"level": "block", "experts_per_token": 2},
    {"level": "model"},
    {"level": "model", "experts_per_token": 2, "trunk_layers": 1},
]
PROMPTS = ["the owl", "def largest(numbers): return", "a", "日本語 👍", "the fox was afraid of the dark and", "max"]


def ids(choices: dict[str, Any]) -> str:
    return "-".join(map(str, choices.values()))


def compose(inner: Any, **choices: Any) -> ComposedForCausalLM:
    torch.manual_seed(3)
    model = ComposedForCausalLM(ComposedConfig(inner=inner, experts=["a", "b", "c"], **choices)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("lm_head.weight"):
                tensor[inner.eos_token_id] = 0  # no answer ends by itself
            elif ".gate." in name and name.endswith("weight"):
                tensor *= 5
    return model


def save_composed(folder: Path, **choices: Any) -> Path:
    """Three random experts, in a folder as a bundle has it."""
    llama = save_llama(folder / "llama")
    model = compose(AutoConfig.from_pretrained(llama), **choices)
    model.save_pretrained(folder / "composed")
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder / "composed")
    return folder / "composed"


@pytest.fixture(scope="module", params=LEVELS, ids=ids)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_composed(tmp_path_factory.mktemp("composed"), **request.param)


@pytest.fixture(scope="module")
def reference(folder: Path) -> ComposedForCausalLM:
    return ComposedForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_answers_are_generates_alone_and_together(folder: Path, reference: ComposedForCausalLM) -> None:
    async def ask() -> tuple[list[str], list[str]]:
        async with serving({"llama": folder}, most=4) as engine:
            alone = [await answer(engine, prompt, greedy(12)) for prompt in PROMPTS]
            return alone, await asyncio.gather(*(answer(engine, prompt, greedy(12)) for prompt in PROMPTS))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt in PROMPTS:
        tokens = generated(reference, tuple(tokenizer(prompt)["input_ids"]), 12)
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True))
    alone, together = asyncio.run(ask())
    assert alone == together == expected


def test_the_prompts_take_different_ways(folder: Path, reference: ComposedForCausalLM) -> None:
    """Else the test above could not tell a mixed-up route."""
    if reference.config.routing == "token":
        pytest.skip("no routes are pinned")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ways = [reference.route(torch.tensor([tokenizer(prompt)["input_ids"]])).weights.argmax(-1) for prompt in PROMPTS]
    assert len({tuple(way.flatten().tolist()) for way in ways}) > 1


def test_long_prompts_are_read_in_parts_by_the_route_of_the_whole(folder: Path, reference: ComposedForCausalLM) -> None:
    prompt = "the owl was afraid of the dark and the fox was not. def largest(numbers): return max(numbers)"

    async def ask() -> str:
        async with serving({"llama": folder}, chunk=7) as engine:
            return await answer(engine, prompt, greedy(12))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = generated(reference, tuple(tokenizer(prompt)["input_ids"]), 12)
    assert asyncio.run(ask()) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_layers_that_see_a_window_are_served_where_they_are_composed(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_llama(tmp_path / "llama"))
    inner = Qwen2Config(
        **SHAPE,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
    )
    compose(inner, level="block", experts_per_token=2, trunk_layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = read("it", tmp_path, Loading(torch.float32, torch.device("cpu"))).load()
    assert model.shape.layers == 3
