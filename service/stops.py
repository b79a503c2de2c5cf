"""Ends an answer at a stop string, whatever pieces it comes in."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from service.engines.base import Piece, Scored


async def until(
    stops: Sequence[str], pieces: AsyncGenerator[Piece, None], *, keep: bool = False, after: int = 0
) -> AsyncGenerator[Piece, None]:
    """The pieces up to the first stop string to be complete, whatever the borders; none of it is ever yielded.

    Text that may be the beginning of a stop string is held back until the next piece settles it, and so are its tokens'
    log-probabilities. keep: the stop string is part of the answer. after: tokens before which nothing ends it.
    """
    async with aclosing(pieces):
        text, scored, tokens = "", tuple[Scored, ...](), 0
        async for piece in pieces:
            tokens += piece.tokens
            if tokens < after and not piece.finish:
                yield piece
                continue
            text, scored = text + piece.text, scored + piece.scored
            cut = _first_stop(text, stops, keep)
            if cut is not None:
                await pieces.aclose()  # before the yield: the reader may take its time
                yield replace(piece, text=text[:cut], scored=_before(scored, len(text) - cut), finish="stop")
                return
            settled = len(text) if piece.finish else len(text) - _pending(text, stops)
            certain = _before(scored, len(text) - settled)
            yield replace(piece, text=text[:settled], scored=certain)
            text, scored = text[settled:], scored[len(certain) :]


def _first_stop(text: str, stops: Sequence[str], keep: bool) -> int | None:
    """Where the stop string begins (`keep`: ends) that ends first: the one that a reader of characters would meet."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[0 if keep else 1] if found else None


def _pending(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    sizes = (
        size for stop in stops for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])
    )
    return max(sizes, default=0)


def _before(scored: tuple[Scored, ...], characters: int) -> tuple[Scored, ...]:
    """The tokens without those that lie wholly in the last `characters` of their text."""
    left = len(scored)
    while left and 0 < characters >= len(scored[left - 1].text):
        characters -= len(scored[left - 1].text)
        left -= 1
    return scored[:left]
