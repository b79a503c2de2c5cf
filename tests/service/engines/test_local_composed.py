"""Composed experts, whose routes go with the rows of a batch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from test_local_lane import TRAFFIC, run
from tiny import SHAPE, answer, generated, greedy, job, save_llama, serving, sliding_window_model
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from composed import ComposedConfig, ComposedForCausalLM
from service.engines.local.batch import Batch, batchable
from service.engines.local.expert import Expert, load
from service.engines.local.lane import Lane, Request

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
def composed(folder: Path) -> Expert:
    return load("composed", folder, torch.float32, torch.device("cpu"))


def prompts() -> list[list[int]]:
    choose = torch.Generator().manual_seed(1)
    return [torch.randint(2, 300, (length,), generator=choose).tolist() for length, _, _ in TRAFFIC]


def test_it_loads_as_ours_without_code_of_its_own(composed: Expert) -> None:
    assert type(composed.model) is ComposedForCausalLM
    assert composed.window == 512


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_greedy_is_transformers_own_whoever_joins_and_leaves(composed: Expert, max_batch: int) -> None:
    arrivals = [
        (turn, Request(job(tokens, greedy(count), "composed")))
        for tokens, (_, count, turn) in zip(prompts(), TRAFFIC, strict=True)
    ]
    for request, tokens in run(Lane(composed, max_batch), arrivals).items():
        expected = generated(composed.model, request.job.tokens, request.job.sampling.max_tokens)
        assert len(set(expected)) > 2
        assert tokens == expected


def test_rows_of_different_routes_are_in_one_batch_and_keep_theirs(composed: Expert) -> None:
    model, rows = composed.model, prompts()
    if model.config.routing == "token":
        pytest.skip("no routes are pinned")
    routes = torch.cat([model.route(torch.tensor([tokens])).weights for tokens in rows])
    assert len({tuple(row) for row in routes.argmax(-1).tolist()}) > 1
    assert batchable(model)
    batch = Batch(model)
    for tokens in rows:
        batch.join(batch.read(tokens)[1], len(tokens))
    batch.step([1] * len(rows))
    assert torch.equal(batch._cache.routes, routes)
    batch.keep([4, 1])
    batch.step([1, 1])
    assert torch.equal(batch._cache.routes, routes[[4, 1]])


def test_answers_are_generates_alone_and_together(folder: Path, composed: Expert) -> None:
    async def ask() -> tuple[list[str], list[str]]:
        async with serving({"llama": folder}, max_batch=4) as engine:
            alone = [await answer(engine, prompt, greedy(12)) for prompt in PROMPTS]
            return alone, await asyncio.gather(*(answer(engine, prompt, greedy(12)) for prompt in PROMPTS))

    expected = []
    for prompt in PROMPTS:
        tokens = generated(composed.model, tuple(composed.tokenizer(prompt)["input_ids"]), 12)
        expected.append(composed.tokenizer.decode(tokens, skip_special_tokens=True))
    alone, together = asyncio.run(ask())
    assert alone == together == expected


@pytest.mark.parametrize("level", ["ffn", "block", "model"])
def test_experts_that_cannot_share_a_batch_do_not(level: str) -> None:
    model = compose(sliding_window_model().config, level=level)
    assert not batchable(model)
    lane = Lane(Expert("owl", model, None, 512, frozenset()), 16)
    arrivals = [(turn, Request(job(tokens, greedy(12)))) for turn, tokens in enumerate(prompts()[:3])]
    for request, tokens in run(lane, arrivals).items():
        assert tokens == generated(model, request.job.tokens, 12)
    stretched = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not batchable(compose(LlamaConfig(**SHAPE, rope_parameters=stretched), level=level))
