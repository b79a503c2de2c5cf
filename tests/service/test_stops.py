"""Stop strings: where an answer ends, and what of it is shown."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from service.engines.base import Piece, Scored
from service.stops import until


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


def scored(stops: list[str], texts: list[str], *, keep: bool = False, after: int = 0) -> list[tuple[str, list[str]]]:
    """Every piece's text and tokens, a token a piece."""

    async def pieces() -> AsyncGenerator[Piece, None]:
        for i, text in enumerate(texts):
            yield Piece(text, 1, "length" if i == len(texts) - 1 else None, (Scored(i, text.encode(), -1.0),))

    async def read() -> list[tuple[str, list[str]]]:
        return [
            (piece.text, [each.text for each in piece.scored])
            async for piece in until(stops, pieces(), keep=keep, after=after)
        ]

    return asyncio.run(read())


def test_tokens_go_with_the_text_that_they_are() -> None:
    assert scored(["END"], ["a", " E", "N", "x", " b"]) == [
        ("a", ["a"]),
        (" ", [" E"]),
        ("", []),
        ("ENx", ["N", "x"]),
        (" b", [" b"]),
    ]


def test_the_tokens_of_a_stop_string_are_not_shown_but_one_that_begins_before_it_is() -> None:
    assert scored(["END"], ["a", " E", "N", "D", "b"]) == [("a", ["a"]), (" ", [" E"]), ("", []), ("", [])]


def test_a_stop_string_may_be_kept_and_nothing_after_it() -> None:
    assert scored(["END"], ["a", " E", "N", "Dxyz", "b"], keep=True)[-1] == ("END", ["N", "Dxyz"])


def test_a_stop_string_before_the_least_number_of_tokens_ends_nothing() -> None:
    assert [text for text, _ in scored(["b"], ["a", "b", "c", "b", "d"], after=3)] == ["a", "b", "c", ""]


def test_a_token_without_text_goes_with_the_text_before_it() -> None:
    assert scored(["END"], ["a", "", "b"]) == [("a", ["a"]), ("", [""]), ("b", ["b"])]
    assert scored(["END"], ["a", ""]) == [("a", ["a"]), ("", [""])]


def joined(read: Sequence[tuple[str, list[str]]]) -> tuple[str, list[str]]:
    return "".join(text for text, _ in read), [token for _, tokens in read for token in tokens]


@given(
    texts=st.lists(st.text("ab#", min_size=1, max_size=3), min_size=1, max_size=6),
    stop=st.text("ab#", min_size=1, max_size=3),
)
def test_no_token_that_is_shown_begins_after_the_text_that_is(texts: list[str], stop: str) -> None:
    text, tokens = joined(scored([stop], texts))
    assert tokens == texts[: len(tokens)]
    assert "".join(tokens[:-1]) == text[: len("".join(tokens[:-1]))]
    assert len("".join(tokens)) >= len(text)
