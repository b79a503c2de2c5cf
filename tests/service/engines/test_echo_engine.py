from __future__ import annotations

import asyncio
import zlib

import pytest
from tiny import read, text

from service.engines.base import Guide, Message, Piece, PromptError, Sampling, Tokens, UnsupportedError
from service.engines.echo import EchoEngine


def test_it_answers_with_the_prompts_words_a_word_a_piece() -> None:
    engine = EchoEngine(("owl",))
    job = engine.prepare({"owl": 1.0}, "héllo dark  world", Sampling(16))
    pieces = asyncio.run(read(engine.generate(job)))
    assert [(piece.text, piece.tokens, piece.finish) for piece in pieces] == [
        ("héllo", 1, None),
        (" dark", 1, None),
        ("  world", 1, "stop"),
    ]


def test_of_a_chat_it_repeats_the_last_user_turn() -> None:
    engine = EchoEngine(("owl",))
    chat = (Message("user", "one"), Message("assistant", "two"), Message("user", "three four"))
    assert text(asyncio.run(read(engine.generate(engine.prepare({"owl": 1.0}, chat, Sampling(16)))))) == "three four"


@pytest.mark.parametrize(
    ("max_tokens", "answer", "finish"), [(2, "a b", "length"), (3, "a b c", "stop"), (0, "", "length")]
)
def test_max_tokens_cuts_the_answer(max_tokens: int, answer: str, finish: str) -> None:
    engine = EchoEngine(("owl",))
    pieces = asyncio.run(read(engine.generate(engine.prepare({"owl": 1.0}, "a b c", Sampling(max_tokens)))))
    assert (text(pieces), sum(piece.tokens for piece in pieces), pieces[-1].finish) == (answer, max_tokens, finish)


def test_an_empty_prompt_gets_an_empty_answer() -> None:
    engine = EchoEngine(("owl",))
    pieces = asyncio.run(read(engine.generate(engine.prepare({"owl": 1.0}, "", Sampling(4)))))
    assert [(piece.text, piece.tokens, piece.finish) for piece in pieces] == [("", 0, "stop")]


def test_prompt_and_answer_over_the_window_are_refused() -> None:
    engine = EchoEngine(("owl",), window=4)
    engine.prepare({"owl": 1.0}, "a b c", Sampling(1))
    with pytest.raises(PromptError, match=r"3 tokens of prompt and 2 of answer .* window of 4"):
        engine.prepare({"owl": 1.0}, "a b c", Sampling(2))


def test_a_reader_who_leaves_ends_the_answer() -> None:
    async def leave() -> tuple[int, int, int]:
        engine = EchoEngine(("owl",))
        pieces = engine.generate(engine.prepare({"owl": 1.0}, "a b c", Sampling(16)))
        await anext(pieces)
        during = engine.running
        await pieces.aclose()
        return during, engine.running, engine.finished

    assert asyncio.run(leave()) == (1, 0, 1)


def answer(prompt: str, sampling: Sampling) -> list[Piece]:
    engine = EchoEngine(("owl",))
    return asyncio.run(read(engine.generate(engine.prepare({"owl": 1.0}, prompt, sampling))))


def test_a_seed_says_where_an_answer_begins_unless_it_is_greedy() -> None:
    assert text(answer("a b c", Sampling(seed=1))) == " b ca"
    assert text(answer("a b c", Sampling(seed=5, max_tokens=2))) == " ca"
    assert text(answer("a b c", Sampling(seed=1, temperature=0))) == "a b c"


def test_a_words_score_is_of_the_word_alone_and_the_likeliest_come_first() -> None:
    pieces = answer("one two three", Sampling(logprobs=2, prompt_logprobs=1))
    prompt, scored = pieces[0].prompt, [each for piece in pieces for each in piece.scored]
    assert [each.text for each in prompt] == [each.text for each in scored] == ["one", " two", " three"]
    assert [each.logprob for each in scored] == [-zlib.crc32(each.raw) / 2**32 for each in scored]
    assert [each.logprob for each in prompt] == [None, *(each.logprob for each in scored[1:])]
    for each in scored:
        assert sorted(top.logprob or 0 for top in each.top) == [top.logprob for top in reversed(each.top)]
        assert {top.text for top in each.top} == {each.text, "~"}
    assert [len(each.top) for each in prompt] == [0, 1, 1]
    assert not any(piece.prompt for piece in pieces[1:])


def test_without_logprobs_there_are_none() -> None:
    assert not any(piece.scored or piece.prompt for piece in answer("a b", Sampling()))


def test_a_stop_token_ends_the_answer() -> None:
    pieces = answer("a b c", Sampling(stop_tokens=(int.from_bytes(b" c"),)))
    assert (text(pieces), pieces[-1].finish) == ("a b", "stop")


def test_tokens_that_are_no_text_are_echoed_all_the_same() -> None:
    engine = EchoEngine(("owl",))
    job = engine.prepare({"owl": 1.0}, Tokens((0xC3, 0)), Sampling())
    assert text(asyncio.run(read(engine.generate(job)))) == engine.decode("owl", (0xC3, 0)) == "\ufffd"


def test_experts_that_do_not_mix_and_forms_are_refused_by_name() -> None:
    engine = EchoEngine(("owl", "cat"), mixes=False)
    with pytest.raises(UnsupportedError) as mixed:
        engine.prepare({"owl": 0.5, "cat": 0.5}, "a", Sampling())
    with pytest.raises(UnsupportedError) as formed:
        engine.prepare({"owl": 1.0}, "a", Sampling(guide=Guide("regex", "a")))
    assert (mixed.value.param, formed.value.param) == ("k", "response_format")
    assert EchoEngine(("owl", "cat")).prepare({"owl": 0.5, "cat": 0.5}, "a", Sampling()).expert == "owl"
