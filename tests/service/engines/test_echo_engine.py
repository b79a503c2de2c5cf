from __future__ import annotations

import asyncio

import pytest
from tiny import read, text

from service.engines.base import Message, PromptError, Sampling
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
