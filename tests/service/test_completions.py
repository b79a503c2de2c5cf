"""The story of a request, without HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import ClassVar, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.base import Router, Vector
from routers.prompt import PromptRouter
from service.completions import Completion, Request, decide, start, text_to_route, until
from service.engines.base import Message, Piece, PromptError
from service.engines.echo import EchoEngine
from service.errors import RequestError
from service.metrics import Metrics


class CountingRouter:
    """Counts how often the router behind it is asked."""

    kind: ClassVar[str] = "counting"

    def __init__(self, router: Router) -> None:
        self.estimates = 0
        self.experts = router.experts
        self.arrays = router.arrays
        self._router = router

    def estimate(self, vector_D: Vector) -> Vector:
        self.estimates += 1
        return self._router.estimate(vector_D)

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Mapping[str, Vector]) -> Self:
        raise NotImplementedError


def cut(stops: list[str], texts: list[str]) -> Piece:
    """What a reader of the pieces gets in all; asserts that no piece follows the last."""

    async def pieces() -> AsyncGenerator[Piece, None]:
        for text in texts[:-1]:
            yield Piece(text, 1)
        yield Piece(texts[-1], 1, "length")

    async def read() -> Piece:
        got = [piece async for piece in until(stops, pieces())]
        assert [piece.finish is None for piece in got[:-1]] == [True] * (len(got) - 1)
        return Piece("".join(piece.text for piece in got), sum(piece.tokens for piece in got), got[-1].finish)

    return asyncio.run(read())


def test_a_stop_string_ends_the_answer_and_is_not_in_it() -> None:
    assert cut(["wo"], ["hello ", "world"]) == Piece("hello ", 2, "stop")


def test_a_stop_string_over_the_borders_of_three_pieces_is_never_shown() -> None:
    assert cut(["END"], ["one E", "N", "D two", "three"]) == Piece("one ", 3, "stop")


def test_text_that_only_began_like_a_stop_string_is_given_back() -> None:
    assert cut(["END"], ["one E", "N", "ough"]) == Piece("one ENough", 3, "length")


def test_an_answer_that_ends_in_half_a_stop_string_keeps_it() -> None:
    assert cut(["END"], ["one ", "EN"]) == Piece("one EN", 2, "length")


def test_of_two_stop_strings_the_one_that_is_complete_first_counts() -> None:
    assert cut(["abcd", "c"], ["ab", "cd"]).text == cut(["abcd", "c"], ["abcd"]).text == "ab"


@given(
    text=st.text("ab#", max_size=12),
    stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    borders=st.sets(st.integers(0, 12), max_size=6),
)
def test_where_the_pieces_end_makes_no_difference(text: str, stops: list[str], borders: set[int]) -> None:
    ends = [0, *sorted(borders), len(text)]
    pieces = [text[i:j] for i, j in itertools.pairwise(ends)]
    letters = list(text) or [""]
    assert cut(stops, pieces).text == cut(stops, letters).text


def test_the_engine_is_done_when_the_stop_string_is_found_not_when_the_reader_returns(router: PromptRouter) -> None:
    engine = EchoEngine(router.experts)

    async def read() -> None:
        completion = await begin(Request("one two three", stop=("two",), max_tokens=3), router, engine)
        async for piece in completion.pieces():
            assert engine.running == (0 if piece.finish else 1)

    asyncio.run(read())


def test_an_answer_closed_before_it_is_read_ends_the_engines_work(router: PromptRouter) -> None:
    engine = EchoEngine(router.experts)

    async def leave() -> None:
        completion = await begin(Request("one two three", max_tokens=3), router, engine)
        assert engine.running == 1
        await completion.aclose()
        assert engine.running == 0

    asyncio.run(leave())


def test_a_prompt_over_the_window_is_refused_before_the_first_piece(router: PromptRouter) -> None:
    with pytest.raises(PromptError, match="window of 4"):
        asyncio.run(begin(Request("one two three", max_tokens=2), router, EchoEngine(router.experts, window=4)))


def test_an_answer_without_a_limit_may_fill_the_window(router: PromptRouter) -> None:
    async def answer(window: int) -> Piece:
        return await (await begin(Request("one two three four"), router, EchoEngine(router.experts, window))).whole()

    assert asyncio.run(answer(7)) == Piece("one two three", 3, "length")
    assert asyncio.run(answer(8)) == Piece("one two three four", 4, "stop")


def test_more_than_one_expert_is_refused_with_a_sentence(router: PromptRouter) -> None:
    with pytest.raises(RequestError, match="k=2 would mix"):
        asyncio.run(begin(Request("python", max_tokens=1, k=2), router, EchoEngine(router.experts)))


def test_of_a_chat_the_last_three_user_turns_are_routed() -> None:
    turns = ("system", "Be brief."), ("user", "1"), ("user", "2"), ("assistant", "Hm."), ("user", "3"), ("user", "4")
    assert text_to_route(tuple(Message(*turn) for turn in turns)) == "2\n3\n4"


def test_a_chat_without_a_user_goes_to_the_default(router: PromptRouter) -> None:
    route = decide(Request((Message("system", "python"),)), router).route
    assert (route.expert, route.reason) == ("story", "no_evidence")


def test_a_route_is_made_once(router: PromptRouter) -> None:
    counting = CountingRouter(router.router)
    engine = EchoEngine(router.experts)
    completion = asyncio.run(begin(Request("python loop", max_tokens=2), replace(router, router=counting), engine))
    assert (completion.decision.route.expert, counting.estimates) == ("code", 1)


async def begin(request: Request, router: PromptRouter, engine: EchoEngine) -> Completion:
    return await start(request, router, engine, Metrics(router.experts))
