from __future__ import annotations

from typing import Any

import pytest
import torch
from composing import CONFIGS, assert_close, compose, expert, padded, prompts
from torch import Tensor
from transformers import DynamicCache, set_seed

from composed import ComposedCache, ComposedForCausalLM

SAMPLE = ("ffn", "block", "model")
KINDS = [("ffn", "token"), *((level, "sample") for level in SAMPLE)]
ROWS = prompts(9, 4, 17, 2, 9)


def composition(level: str, routing: str = "sample", **choices: Any) -> ComposedForCausalLM:
    kind = choices.pop("architecture", "llama")
    own = {"architecture": "mistral", "sliding_window": 5} if kind == "sliding" else {"architecture": kind}
    return compose([expert(seed, **own) for seed in range(3)], level, routing=routing, **choices)


def generated(model: Any, inputs: dict[str, Tensor], count: int = 16, **options: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=count, **{"do_sample": False, **options})


def naive(model: Any, row: list[int], count: int) -> list[int]:
    """Greedy by whole passes, one token each, with the prompt's route kept by hand."""
    pinned = {} if model.config.routing == "token" else {"routes": model.route(torch.tensor([row])).weights}
    tokens = list(row)
    with torch.inference_mode():
        for _ in range(count):
            output = model(torch.tensor([tokens]), use_cache=False, **pinned)
            tokens.append(int(output.logits[0, -1].argmax()))
    return tokens[len(row) :]


@pytest.mark.parametrize(("architecture", "k"), [("llama", 1), ("llama", 2), ("sliding", 2)])
@pytest.mark.parametrize(("level", "routing"), KINDS)
def test_greedy_answers_are_those_of_whole_passes_in_any_batch_with_or_without_cache(
    level: str, routing: str, k: int, architecture: str
) -> None:
    model = composition(level, routing, architecture=architecture, trunk_layers=1, experts_per_token=k)
    expected = [naive(model, row, 10) for row in ROWS]
    assert len({tuple(answer) for answer in expected}) == len(ROWS)
    alone = [generated(model, padded([row]), 10)[0, len(row) :].tolist() for row in ROWS]
    assert alone == expected
    inputs = padded(ROWS)
    for cached in (True, False):
        assert generated(model, inputs, 10, use_cache=cached)[:, 17:].tolist() == expected


@pytest.mark.parametrize("trunk", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("level", "routing"), KINDS)
def test_cached_logits_are_those_of_a_whole_pass(level: str, routing: str, k: int, trunk: int) -> None:
    model = composition(level, routing, experts_per_token=k, trunk_layers=trunk)
    inputs = padded(ROWS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.inference_mode():
        prompt = model(input_ids=ids[:, :12], attention_mask=mask[:, :12] | 1)
        whole = model(input_ids=ids, attention_mask=mask | 1, routes=prompt.routes).logits
        cache = prompt.cache
        some = [prompt.logits]
        for start, stop in ((12, 13), (13, 14), (14, 17)):  # one token, one token, three at once
            output = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop] | 1, cache=cache)
            some.append(output.logits)
    assert cache.get_seq_length() == 17
    assert_close(torch.cat(some, 1), whole)


@pytest.mark.parametrize(("level", "routing"), KINDS)
def test_positions_are_counted_by_the_mask_so_that_a_prompt_may_be_padded_behind(level: str, routing: str) -> None:
    model = composition(level, routing)
    row, behind = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0]])
    with torch.inference_mode():
        plain = model(row).cache
        gap = model(behind, attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).cache
        expected = model(torch.tensor([[8, 9]]), cache=plain).logits
        mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1]])
        assert_close(model(torch.tensor([[8, 9]]), attention_mask=mask, cache=gap).logits, expected)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("level", SAMPLE)
def test_identical_experts_answer_as_the_expert(level: str, architecture: str) -> None:
    same = expert(architecture=architecture)
    model = compose([same] * 3, level)
    assert torch.equal(generated(model, padded(ROWS)), generated(same, padded(ROWS)))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("level", SAMPLE)
def test_the_prompts_route_is_kept_where_the_answer_would_take_another(level: str, cached: bool) -> None:
    model = composition(level)
    drifts = 0
    for row in prompts(*[3] * 8):
        prompt = torch.tensor([row])
        before = model.route(prompt)
        output = generated(model, padded([row]), return_dict_in_generate=True, output_logits=True, use_cache=cached)
        drifts += not torch.equal(model.route(output.sequences).experts, before.experts)
        with torch.inference_mode():
            pinned = model(output.sequences[:, :-1], routes=before.weights).logits[0, 2:]
        assert_close(torch.cat(output.logits), pinned)
        if cached:
            torch.testing.assert_close(output.cache.routes, before.weights)
    assert drifts > 2


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("level", SAMPLE)
def test_beams_are_those_of_each_prompt_alone(level: str, cached: bool) -> None:
    model = composition(level, experts_per_token=2)
    beams = {"num_beams": 3, "num_return_sequences": 2, "use_cache": cached, "length_penalty": 0.0}
    together = generated(model, padded(ROWS), 8, **beams)[:, 17:].view(len(ROWS), 2, 8)
    for place, row in enumerate(ROWS):
        alone = generated(model, padded([row]), 8, **beams)[:, len(row) :]
        assert torch.equal(together[place], alone)


@pytest.mark.parametrize("level", SAMPLE)
def test_a_seed_gives_the_same_samples_with_and_without_cache(level: str) -> None:
    model = composition(level)
    answers = []
    for cached in (True, False, True):
        set_seed(len(answers) // 2)
        options = {"do_sample": True, "num_return_sequences": 2, "use_cache": cached}
        answers.append(generated(model, padded(ROWS), 10, **options))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("level", SAMPLE)
def test_a_conversation_goes_on_in_its_cache_with_its_first_route(level: str) -> None:
    model = composition(level)
    first = generated(model, padded(ROWS[:1]), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    more = generated(model, inputs, cache=first.cache)
    pinned = generated(model, inputs, routes=model.route(torch.tensor(ROWS[:1])).weights)
    assert torch.equal(more, pinned)


def test_routes_given_are_followed_whatever_the_prompt_says() -> None:
    models = [expert(seed) for seed in range(3)]
    model = compose(models, "model")
    for choice, own in enumerate(models):
        routes = torch.eye(3)[[choice]][:, None]
        assert torch.equal(generated(model, padded(ROWS[:1]), routes=routes), generated(own, padded(ROWS[:1])))


def test_rows_of_a_cache_take_their_routes_along() -> None:
    model = composition("model", experts_per_token=2)
    with torch.inference_mode():
        cache = model(**padded(ROWS)).cache
        before = cache.routes
        assert len(before.unique(dim=0)) == len(ROWS)
        cache.batch_select_indices(torch.tensor([4, 1, 1]))
        assert torch.equal(cache.routes, before[[4, 1, 1]])
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.routes, before[[4, 4, 1, 1, 1, 1]])
        cache.reorder_cache(torch.tensor([5, 0, 0, 0, 0, 0]))
        assert torch.equal(cache.routes, before[[1, 4, 4, 4, 4, 4]])
        assert {layer.keys.shape[0] for layer in cache.layers} == {6}
        cache.reset()
    assert (cache.routes, cache.get_seq_length()) == (None, 0)


def test_a_cache_holds_k_layers_where_experts_attend() -> None:
    for level, layers in (("ffn", 3), ("block", 5), ("model", 5)):
        model = composition(level, experts_per_token=2, trunk_layers=1)
        assert len(ComposedCache(model.config).layers) == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk_size": 2}, "prefill_chunk_size hides the prompt's end"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation would route by its guesses"),
        ({"cache_implementation": "static"}, "a static cache holds no routes"),
        ({"cache": DynamicCache()}, "DynamicCache holds no routes"),
    ],
)
def test_what_would_lose_the_route_is_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generated(composition("block"), padded(ROWS[:1]), **options)


@pytest.mark.parametrize("option", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("level", SAMPLE)
def test_with_its_route_given_a_prompt_may_come_in_pieces(level: str, option: dict[str, int]) -> None:
    model, inputs = composition(level), padded(ROWS[2:3])
    routes = model.route(**inputs).weights
    assert torch.equal(generated(model, inputs, routes=routes, **option), generated(model, inputs))
