"""Experts in fewer bits: what they cost is measured and told."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import answer, greedy, save_llama, serving
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from service.engines.base import EngineError
from service.engines.local import loss
from service.engines.local.bits import BitsAndBytes
from service.engines.local.expert import Loading, read

KINDS = ("int8", "int4", "bnb-int8", "bnb-nf4")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose weights are multiples of the blocks that share a scale."""
    return save_llama(tmp_path_factory.mktemp("wide"), intermediate_size=128)


@pytest.fixture(scope="module")
def reference(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_in_fewer_bits_answers_and_tells_its_loss(llama: Path, kind: str, reference: Any) -> None:
    async def ask() -> dict[str, Any]:
        async with serving({"llama": llama, "whole": llama}, kinds={"llama": kind}) as engine:
            assert await answer(engine, "the owl", greedy(8))
            assert "perplexity" not in engine.about("whole").facts
            return dict(engine.about("llama").facts)

    facts = asyncio.run(ask())
    assert facts["dtype"] == kind
    tokens = read("llama", llama, Loading(torch.float32, CPU)).tokenizer(loss.TEXT)["input_ids"][: loss.MOST]
    with torch.inference_mode():
        logits = reference(torch.tensor([tokens])).logits[0]
    expected = math.exp(float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]))))
    assert facts["before"] == pytest.approx(expected, rel=1e-4)
    assert facts["perplexity"] != facts["before"]
    assert facts["tokens"] == len(tokens)
    assert 0.2 < facts["same_choice"] <= 1


@pytest.mark.parametrize(("kind", "most"), [("bnb-int8", 0.02), ("bnb-nf4", 0.12)])
def test_bitsandbytes_layers_are_near_the_weights(kind: Any, most: float) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(64, 128), torch.randn(64), torch.randn(5, 128)
    with torch.inference_mode():
        found = BitsAndBytes(weight, bias, kind)(x)
    exact = x @ weight.T + bias
    assert (found - exact).norm() < most * exact.norm()


def test_nf4_is_what_transformers_makes_of_the_same_checkpoint(llama: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, quantization_config=config).eval()
    expert = read("llama", llama, Loading(torch.float32, CPU, {"llama": "bnb-nf4"}))
    model, tokens = expert.load(), expert.tokenizer("the owl was afraid")["input_ids"]
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    found = loss._logits(model, tokens, torch.float32, CPU)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_what_does_not_divide_into_blocks_is_named() -> None:
    with pytest.raises(EngineError, match="96 inputs cannot be bnb-nf4: it takes multiples of 64"):
        BitsAndBytes(torch.zeros(64, 96), None, "bnb-nf4")


def test_a_model_of_another_family_says_that_it_has_no_fewer_bits(tmp_path: Path) -> None:
    faulty = save_llama(tmp_path, faulty=True)

    async def ask() -> None:
        async with serving({"faulty": faulty}, kinds={"faulty": "int8"}) as engine:
            with pytest.raises(EngineError, match="cannot be served in int8"):
                engine.prepare({"faulty": 1.0}, "the owl", greedy(1))

    asyncio.run(ask())
