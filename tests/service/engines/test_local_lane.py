"""Rows that join and leave while others run: without threads, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BREAKS_LOGITS, BREAKS_READING, BREAKS_STEP_AT, generated, greedy, job, sliding_window_model

from service.engines.base import EngineError, Sampling
from service.engines.local.batch import Batch, batchable
from service.engines.local.expert import Expert
from service.engines.local.lane import Lane, Request, Token

# Prompt length, answer length, and the turn it comes in.
TRAFFIC = [(9, 40, 0), (30, 12, 0), (3, 25, 2), (17, 8, 5), (60, 5, 6), (9, 20, 14)]


def prompts() -> list[list[int]]:
    choose = torch.Generator().manual_seed(0)
    return [torch.randint(2, 300, (length,), generator=choose).tolist() for length, _, _ in TRAFFIC]


def run(lane: Lane, arrivals: list[tuple[int, Request]]) -> dict[Request, list[int]]:
    """The tokens of every request, each admitted in its turn or when there is room."""
    answers: dict[Request, list[int]] = {request: [] for _, request in arrivals}
    turn = 0
    while arrivals or lane.running:
        due = [arrival for arrival in arrivals if arrival[0] <= turn]
        deliveries = []
        if due and not lane.full:
            arrivals.remove(due[0])
            deliveries += lane.admit(due[0][1])
        deliveries += lane.step()
        for request, token in deliveries:
            assert isinstance(token, Token)
            answers[request].append(token.id)
        turn += 1
    return answers


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_greedy_is_transformers_own_whoever_joins_and_leaves(expert: Expert, max_batch: int) -> None:
    arrivals = [
        (turn, Request(job(tokens, greedy(count)))) for tokens, (_, count, turn) in zip(prompts(), TRAFFIC, strict=True)
    ]
    for request, answer in run(Lane(expert, max_batch), arrivals).items():
        expected = generated(expert.model, request.job.tokens, request.job.sampling.max_tokens)
        assert len(set(expected)) > 2  # a model that repeats itself proves little
        assert answer == expected


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(expert: Expert) -> None:
    def seeded(seed: int) -> Request:
        return Request(job(prompts()[0], Sampling(30, temperature=0.9, top_p=0.95, seed=seed)))

    alone, together = seeded(7), seeded(7)
    company = [(turn, Request(job(tokens, Sampling(20, seed=1)))) for turn, tokens in enumerate(prompts()[1:])]
    first = run(Lane(expert, 8), [(0, alone)])[alone]
    assert run(Lane(expert, 8), [*company, (3, together)])[together] == first
    other = seeded(8)
    assert run(Lane(expert, 8), [(0, other)])[other] != first


def test_a_row_alone_gets_generates_very_numbers(expert: Expert) -> None:
    tokens = prompts()[1]
    batch = Batch(expert.model)
    logits_V, cache = batch.read(tokens)
    batch.join(cache, len(tokens))
    ours = [logits_V, *(batch.step([token])[0] for token in generated(expert.model, tuple(tokens), 5)[:-1])]
    theirs = expert.model.generate(
        torch.tensor([tokens]), max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True,
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long), pad_token_id=0,
    )  # fmt: skip
    for ours_V, theirs_BV in zip(ours, theirs.logits, strict=True):
        assert torch.equal(ours_V, theirs_BV[0])


def test_padding_goes_with_the_row_that_needed_it(expert: Expert) -> None:
    batch = Batch(expert.model)
    for tokens in ([5, 6, 7], [8] * 50):
        batch.join(batch.read(tokens)[1], len(tokens))
    batch.step([1, 1])
    batch.keep([0])
    assert batch._cache.layers[0].keys.shape[2] == 4


def test_a_cancelled_row_is_gone_after_the_step(expert: Expert) -> None:
    lane = Lane(expert, 4)
    stays, leaves = Request(job([5, 6], greedy(100))), Request(job([7, 8, 9], greedy(100)))
    lane.admit(stays)
    lane.admit(leaves)
    assert [request for request, _ in lane.step()] == [stays, leaves]
    leaves.cancelled = True
    assert [request for request, _ in lane.step()] == [stays]
    assert lane.running == [stays]


def test_a_prompt_that_fails_takes_no_row(faulty_expert: Expert) -> None:
    lane = Lane(faulty_expert, 4)
    neighbour = Request(job([5, 6], greedy(9)))
    lane.admit(neighbour)
    ids = faulty_expert.tokenizer(BREAKS_READING + BREAKS_LOGITS)["input_ids"]
    odd: Any = "a seed that is no number"
    for failing in (
        Request(job(ids[:1], greedy(9))),
        Request(job(ids[1:], greedy(9))),
        Request(job([5], Sampling(9, seed=odd))),
    ):
        [(request, error)] = lane.admit(failing)
        assert (request, type(error), lane.running) == (failing, EngineError, [neighbour])
        assert [(request, type(token)) for request, token in lane.step()] == [(neighbour, Token)]


def test_layers_with_a_sliding_window_are_served_one_request_at_a_time(expert: Expert) -> None:
    model = sliding_window_model()
    assert batchable(expert.model)
    assert not batchable(model)
    lane = Lane(Expert("owl", model, None, 512, frozenset()), 16)
    arrivals = [(0, Request(job(tokens, greedy(12)))) for tokens in prompts()[:3]]
    for request, answer in run(lane, arrivals).items():
        assert answer == generated(model, request.job.tokens, 12)


def test_positions_that_the_longest_row_stretches_are_not_shared(expert: Expert) -> None:
    class Stretched:
        config = type(expert.model.config)(**{**expert.model.config.to_dict(), "rope_parameters": None})
        forward = expert.model.forward

    assert batchable(Stretched)
    Stretched.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not batchable(Stretched)


def test_a_step_that_fails_ends_its_rows_and_the_lane_goes_on(faulty_expert: Expert) -> None:
    lane = Lane(faulty_expert, 4)
    short, long = Request(job([5, 6], greedy(9))), Request(job([7] * (BREAKS_STEP_AT - 1), greedy(9)))
    lane.admit(short)
    lane.admit(long)
    assert all(isinstance(token, Token) for _, token in lane.step())
    ended: list[Any] = lane.step()
    assert [request for request, _ in ended] == [short, long]
    assert all(isinstance(error, EngineError) and "on fire" in str(error) for _, error in ended)
    assert lane.running == []
    again, same = Request(job([9, 8, 7], greedy(9))), Request(job([9, 8, 7], greedy(9)))
    assert run(lane, [(0, again)])[again] == run(Lane(faulty_expert, 4), [(0, same)])[same]
