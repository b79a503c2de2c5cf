from __future__ import annotations

import pytest
import torch

from service.engines.base import EngineError, Sampling
from service.engines.local.sampling import Sampler

CPU = torch.device("cpu")
LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -torch.inf])


def picks(sampling: Sampling, logits: torch.Tensor = LOGITS, count: int = 400) -> list[int]:
    sampler = Sampler(sampling, CPU)
    return [sampler.pick(logits) for _ in range(count)]


def test_temperature_0_takes_the_best_and_of_equals_the_first() -> None:
    assert set(picks(Sampling(1, temperature=0), torch.tensor([1.0, 2.0, 2.0], dtype=torch.bfloat16))) == {1}


def test_shares_follow_the_softmax() -> None:
    got = torch.bincount(torch.tensor(picks(Sampling(1, seed=0), count=4000)), minlength=5) / 4000
    assert torch.allclose(got, LOGITS.softmax(-1), atol=0.03)


def test_the_seed_decides() -> None:
    assert picks(Sampling(1, seed=-7)) == picks(Sampling(1, seed=-7))
    assert picks(Sampling(1, seed=1)) != picks(Sampling(1, seed=2))
    assert picks(Sampling(1)) != picks(Sampling(1))
    picks(Sampling(1, seed=2**64 + 3))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {1}), (0.6, {1}), (0.7, {1, 2}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(picks(Sampling(1, top_p=top_p, seed=0))) == kept


def test_a_tiny_temperature_is_greedy_rather_than_nan() -> None:
    assert set(picks(Sampling(1, temperature=1e-40, seed=0))) == {1}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(EngineError, match="not finite"):
        picks(Sampling(1, temperature=temperature), torch.tensor([0.0, bad, 1.0]))
