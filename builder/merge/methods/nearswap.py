"""NearSwap: move towards the other model, by no more than t."""

from __future__ import annotations

from collections.abc import Iterator

from builder.merge.inputs import Inputs, Values


def nearswap(inputs: Inputs, *, t: float) -> Iterator[Values]:
    """b + clip(t / |d|, 0, 1) d = b + clip(d, -t, t): small differences are taken whole, large ones up to t.

    alchemonaut, QuartetAnemoi-70B-t0.0001.
    """
    for piece in inputs.pieces():
        yield piece.base + inputs.arrays.xp.clip(piece.deltas[0], -t, t)
