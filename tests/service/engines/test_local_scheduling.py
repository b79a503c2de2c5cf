"""What requests notice of each other: nothing but the time."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    BREAKS_LOGITS,
    CORPUS,
    answer,
    byte_level_tokenizer,
    generated,
    greedy,
    read,
    save_llama,
    serving,
    text,
    until,
)

from service.engines.base import (
    BusyError,
    EngineError,
    Guide,
    Job,
    Load,
    Piece,
    PromptError,
    Sampling,
    Tokens,
    UnsupportedError,
)
from service.engines.local import LocalEngine
from service.engines.local.expert import Expert

LONG = " ".join(CORPUS * 4)
PROMPTS = ["the owl", "def largest(numbers): return", "a", "日本語 👍", "the fox was afraid of the dark and", "max"]
PAGE_BYTES = 2 * 2 * 2 * 16 * 16 * 4
"""Two layers, keys and values, two heads, sixteen tokens, sixteen wide, fp32."""
CHUNK_BYTES = 8 * PAGE_BYTES


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert whose logits are wider than its tokenizer, as padded ones are."""
    from transformers import AutoModelForCausalLM

    folder = save_llama(tmp_path_factory.mktemp("padded"), seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(320)
    model.save_pretrained(folder)
    return folder


def asked(engine: LocalEngine, prompt: Any, sampling: Sampling, **experts: float) -> Any:
    return engine.generate(engine.prepare(experts or {"llama": 1.0}, prompt, sampling))


async def whole(engine: LocalEngine, prompt: Any, sampling: Sampling, **experts: float) -> list[Piece]:
    return await read(asked(engine, prompt, sampling, **experts))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_prompt_read_in_parts_has_the_same_answer(llama: Path, expert: Expert, reference: Any, chunk: int) -> None:
    async def ask() -> list[str]:
        async with serving({"llama": llama}, chunk=chunk) as engine:
            return await asyncio.gather(*(answer(engine, prompt, greedy(8)) for prompt in (LONG, *PROMPTS)))

    for prompt, found in zip((LONG, *PROMPTS), asyncio.run(ask()), strict=True):
        ids = tuple(expert.tokenizer(prompt)["input_ids"])
        assert found == expert.tokenizer.decode(generated(reference, ids, 8), skip_special_tokens=True)


def test_a_long_prompt_does_not_hold_up_who_writes(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}, chunk=8) as engine:
            writing = asked(engine, "the owl", greedy(400))
            await anext(writing)
            long = asyncio.create_task(whole(engine, Tokens(tuple(3 + place % 290 for place in range(350))), greedy(1)))
            tokens = 0
            while not long.done():
                tokens += (await anext(writing)).tokens
            await writing.aclose()
            assert tokens > 350 // 4 - 2

    asyncio.run(ask())


def test_a_prompt_that_begins_like_another_computes_only_the_rest(llama: Path, expert: Expert, reference: Any) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}) as engine:
            first = await whole(engine, LONG, greedy(8))
            assert first[-1].usage is not None
            assert first[-1].usage.cached == 0
            again = await whole(engine, LONG, greedy(8))
            assert again[-1].usage is not None
            length = again[-1].usage.prompt
            assert again[-1].usage.cached == (length - 1) // 16 * 16
            assert text(again) == text(first)
            other = await whole(engine, f"{LONG} and more", greedy(8))
            assert other[-1].usage is not None
            assert other[-1].usage.cached >= length // 16 * 16 - 16
            ids = tuple(expert.tokenizer(f"{LONG} and more")["input_ids"])
            assert text(other) == expert.tokenizer.decode(generated(reference, ids, 8), skip_special_tokens=True)
            load = engine.load()["llama"]
            assert load.hits == again[-1].usage.cached + other[-1].usage.cached
            assert load.queries == 2 * length + len(ids)

    asyncio.run(ask())


def test_who_needs_memory_takes_it_from_who_came_last_and_all_answers_are_the_same(llama: Path) -> None:
    async def ask(kv_bytes: int) -> tuple[list[str], int]:
        async with serving({"llama": llama}, kv_bytes=kv_bytes) as engine:
            samplings = [
                greedy(200),
                Sampling(200, temperature=1.0, seed=3),
                greedy(200),
                Sampling(200, top_p=0.9, seed=4),
            ]
            found = await asyncio.gather(
                *(answer(engine, prompt, each) for prompt, each in zip(PROMPTS, samplings, strict=False))
            )
            await until(lambda: engine.load()["llama"].kv == 0)
            return found, engine.load()["llama"].preemptions

    roomy, none = asyncio.run(ask(100 * CHUNK_BYTES))
    tight, some = asyncio.run(ask(4 * CHUNK_BYTES))
    assert none == 0
    assert some > 0
    assert tight == roomy


@pytest.mark.parametrize("scored", [False, True])
def test_who_gives_way_while_its_prompt_is_read_is_told_and_counted_once(llama: Path, scored: bool) -> None:
    sampling = Sampling(1, temperature=0, prompt_logprobs=0 if scored else None)
    first, last = (Tokens(tuple(3 + place * by % 290 for place in range(count))) for by, count in ((7, 100), (1, 380)))

    async def ask(kv_bytes: int) -> tuple[list[Piece], Load]:
        async with serving({"llama": llama}, kv_bytes=kv_bytes, chunk=8) as engine:
            _, found = await asyncio.gather(whole(engine, first, greedy(100)), whole(engine, last, sampling))
            return found, engine.load()["llama"]

    roomy, none = asyncio.run(ask(100 * CHUNK_BYTES))
    tight, some = asyncio.run(ask(4 * CHUNK_BYTES))
    assert (none.preemptions, some.preemptions) == (0, 1)
    scores = [[each for piece in pieces for each in piece.prompt] for pieces in (roomy, tight)]
    assert [each.id for each in scores[1]] == [*last.ids] * scored
    assert [each.logprob for each in scores[1][1:]] == pytest.approx([each.logprob for each in scores[0][1:]], abs=1e-4)
    assert (some.queries, some.hits) == (none.queries, none.hits) == (480, 0)
    assert tight[-1].usage is not None
    assert tight[-1].usage.cached == 0


def test_prompts_that_are_the_same_are_read_once_though_they_come_together(llama: Path) -> None:
    prompt = Tokens(tuple(3 + place % 290 for place in range(350)))

    async def ask() -> None:
        async with serving({"llama": llama}, chunk=64) as engine:
            together = await asyncio.gather(*(whole(engine, prompt, greedy(8)) for _ in range(3)))
            cached = [pieces[-1].usage.cached for pieces in together if pieces[-1].usage]
            assert sorted(each >= 320 for each in cached) == [False, True, True]
            assert engine.load()["llama"].hits == sum(cached)
            again = await whole(engine, prompt, greedy(8))
            assert again[-1].usage is not None
            assert again[-1].usage.cached == 336
            assert {text(pieces) for pieces in (*together, again)} == {text(again)}

    asyncio.run(ask())


def test_what_lies_scattered_keeps_out_no_mixture_that_would_fit(llama: Path) -> None:
    def prompt(length: int, by: int) -> Tokens:
        return Tokens(tuple(3 + place * by % 290 for place in range(length)))

    async def ask() -> None:
        async with serving({"llama": llama, "twin": llama}, kv_bytes=2 * CHUNK_BYTES) as engine:
            for each in (prompt(100, 1), prompt(60, 7)):  # the second one's pages are in both chunks
                await whole(engine, each, greedy(1))
            assert text(await whole(engine, prompt(60, 7), greedy(4), llama=0.5, twin=0.5))

    asyncio.run(ask())


def test_what_can_never_fit_is_refused_and_disturbs_nobody(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}, kv_bytes=CHUNK_BYTES) as engine:
            running = asyncio.create_task(answer(engine, "the owl", greedy(60)))
            with pytest.raises(PromptError, match=r"300 tokens are more than the key-value memory holds"):
                engine.prepare({"llama": 1.0}, Tokens((5,) * 200), greedy(100))
            assert await running

    asyncio.run(ask())


def test_a_full_queue_refuses_and_says_when_to_come_again(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}, most=1, queue=2) as engine:
            running = asked(engine, "the owl", greedy(480))
            await anext(running)
            waiting = [asyncio.create_task(whole(engine, "a", greedy(2))) for _ in range(2)]
            await until(lambda: engine.load()["llama"].waiting == 2)
            with pytest.raises(BusyError, match="3 requests are running at llama or wait") as refused:
                await answer(engine, "a", greedy(2))
            assert refused.value.after > 0
            await running.aclose()
            await asyncio.gather(*waiting)
            assert await answer(engine, "a", greedy(2))

    asyncio.run(ask())


def test_a_mixture_of_one_and_of_two_alike_is_the_expert_itself(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama, "twin": llama}) as engine:
            for sampling in (greedy(24), Sampling(24, temperature=1.0, top_p=0.9, seed=1)):
                alone = text(await whole(engine, LONG, sampling))
                assert text(await whole(engine, LONG, sampling, llama=1.0)) == alone
                assert text(await whole(engine, LONG, sampling, llama=0.3, twin=0.7)) == alone
                assert text(await whole(engine, LONG, sampling, llama=1.0, twin=0.0)) == alone

    asyncio.run(ask())


def test_a_mixture_writes_what_the_mean_of_the_distributions_says(llama: Path, reference: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = save_llama(tmp_path, seed=9)
    second = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    prompt = tuple(byte_level_tokenizer()("the owl was")["input_ids"])
    tokens, expected = list(prompt), []
    with torch.inference_mode():
        for _ in range(16):
            mean = 0.6 * reference(torch.tensor([tokens])).logits[0, -1].softmax(-1)
            mean += 0.4 * second(torch.tensor([tokens])).logits[0, -1].softmax(-1)
            expected.append(int(mean.argmax()))
            tokens.append(expected[-1])

    async def ask() -> list[Piece]:
        async with serving({"llama": llama, "other": other}, chunk=2) as engine:
            company = asyncio.gather(*(answer(engine, each, greedy(40)) for each in PROMPTS))
            sampling = Sampling(16, temperature=0, logprobs=0)
            found = await whole(engine, Tokens(prompt), sampling, llama=0.6, other=0.4)
            await company
            return found

    assert [each.id for piece in asyncio.run(ask()) for each in piece.scored] == expected


def test_experts_of_different_vocabularies_are_not_mixed(llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")

    async def ask() -> None:
        async with serving({"llama": llama, "other": other}) as engine:
            with pytest.raises(UnsupportedError, match="llama, other have different vocabularies") as refused:
                engine.prepare({"llama": 0.5, "other": 0.5}, "a", greedy(1))
            assert refused.value.param == "k"

    asyncio.run(ask())


def test_experts_whose_logits_differ_in_width_are_not_mixed(llama: Path, padded: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama, "padded": padded}) as engine:
            with pytest.raises(UnsupportedError, match="llama, padded have different vocabularies") as refused:
                engine.prepare({"llama": 0.5, "padded": 0.5}, "a", greedy(1))
            assert refused.value.param == "k"

    asyncio.run(ask())


def test_a_mixture_does_not_score_prompts(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama, "twin": llama}) as engine:
            with pytest.raises(UnsupportedError, match="llama, twin together score no prompts") as refused:
                engine.prepare({"llama": 0.5, "twin": 0.5}, "a", Sampling(1, prompt_logprobs=0))
            assert refused.value.param == "echo"

    asyncio.run(ask())


SEEDED = [Sampling(40, seed=seed, top_k=top_k) for seed, top_k in enumerate([0, 0, 9, 9])]


@pytest.mark.parametrize(
    ("experts", "sampling"),
    [
        ({"llama": 0.5, "padded": 0.5}, greedy(9)),
        ({"padded": 0.0, "llama": 1.0}, Sampling(9, logit_bias=((310, 1.0),))),
        ({"llama": 1.0}, Sampling(9, top_k=9, min_p=2.0)),
    ],
    ids=["blending breaks", "picking breaks", "picking breaks after others have drawn"],
)
def test_what_cannot_be_picked_for_fails_alone(
    llama: Path, padded: Path, experts: dict[str, float], sampling: Sampling
) -> None:
    async def ask() -> None:
        async with serving({"llama": llama, "padded": padded}) as engine:
            seeded = list(zip(PROMPTS, SEEDED, strict=False))

            def company() -> list[Any]:
                return [answer(engine, *each, name) for name in ("llama", "padded") for each in seeded]

            alone = [await each for each in company()]
            tokens = tuple(byte_level_tokenizer()("the owl")["input_ids"])
            bad = read(engine.generate(Job(experts, tokens, sampling)))
            failure, *found = await asyncio.gather(bad, *company(), return_exceptions=True)
            assert isinstance(failure, EngineError)
            assert found == alone

    asyncio.run(ask())


def test_log_probabilities_are_the_models_own(llama: Path, reference: Any) -> None:
    async def ask() -> list[Piece]:
        async with serving({"llama": llama}, chunk=4) as engine:
            company = asyncio.gather(*(answer(engine, each, greedy(20)) for each in PROMPTS))
            found = await whole(engine, LONG, Sampling(6, temperature=0.7, seed=1, logprobs=3, prompt_logprobs=2))
            await company
            return found

    pieces = asyncio.run(ask())
    prompt = byte_level_tokenizer()(LONG)["input_ids"]
    scored = [each for piece in pieces for each in piece.scored]
    told = [each for piece in pieces for each in piece.prompt]
    assert [each.id for each in told] == prompt
    assert len(scored) == 6
    with torch.inference_mode():
        logs = reference(torch.tensor([[*prompt, *(each.id for each in scored)]])).logits[0].log_softmax(-1)
    assert told[0].logprob is None
    for place, each in enumerate([*told[1:], *scored]):
        assert each.logprob == pytest.approx(float(logs[place, each.id]), abs=1e-4)
        top = logs[place].topk(len(each.top))
        assert [one.id for one in each.top] == top.indices.tolist()
        assert [one.logprob for one in each.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert [len(each.top) for each in (*told[1:], *scored)] == [2] * len(told[1:]) + [3] * 6
    assert b"".join(each.raw for each in told).decode() == LONG


def test_a_prompt_can_be_scored_without_an_answer(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}) as engine:
            (piece,) = await whole(engine, "the owl was", Sampling(0, prompt_logprobs=0))
            assert (piece.text, piece.tokens, piece.finish) == ("", 0, "length")
            assert len(piece.prompt) == len(byte_level_tokenizer()("the owl was")["input_ids"])

    asyncio.run(ask())


def test_a_prompt_whose_scores_are_no_numbers_fails_alone(faulty: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": faulty}) as engine:
            alone = [await answer(engine, prompt, greedy(20)) for prompt in PROMPTS]
            company = [answer(engine, prompt, greedy(20)) for prompt in PROMPTS]
            bad = whole(engine, f"the {BREAKS_LOGITS} owl", Sampling(4, prompt_logprobs=1))
            failure, *found = await asyncio.gather(bad, *company, return_exceptions=True)
            assert isinstance(failure, EngineError)
            assert "not finite" in str(failure)
            assert found == alone

    asyncio.run(ask())


def test_a_guided_answer_has_its_form_beside_free_ones(llama: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}},
        "required": ["a"],
        "additionalProperties": False,
    }

    async def ask() -> None:
        async with serving({"llama": llama}) as engine:
            alone = await answer(engine, "the owl", greedy(40))
            guided = Sampling(60, temperature=1.0, seed=2, guide=Guide("json_schema", json.dumps(schema)))
            found, free = await asyncio.gather(whole(engine, "the", guided), answer(engine, "the owl", greedy(40)))
            assert json.loads(text(found))["a"] in ("x", "yy")
            assert found[-1].finish == "stop"
            assert free == alone
            with pytest.raises(UnsupportedError, match="regular expression"):
                await whole(engine, "the", Sampling(5, guide=Guide("regex", "(")))

    asyncio.run(ask())


def test_stop_tokens_end_an_answer_but_not_before_its_least_length(llama: Path, reference: Any) -> None:
    ids = generated(reference, tuple(byte_level_tokenizer()("the owl")["input_ids"]), 12)
    stop = ids[4]
    first = ids.index(stop)

    async def ask() -> None:
        async with serving({"llama": llama}) as engine:
            found = await whole(engine, "the owl", Sampling(12, temperature=0, stop_tokens=(stop,)))
            assert (found[-1].finish, sum(piece.tokens for piece in found)) == ("stop", first + 1)
            least = Sampling(12, temperature=0, stop_tokens=(stop,), min_tokens=first + 3)
            found = await whole(engine, "the owl", least)
            assert sum(piece.tokens for piece in found) >= first + 3

    asyncio.run(ask())
