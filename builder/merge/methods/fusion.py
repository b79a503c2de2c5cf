"""Arcee Fusion: take from the other model only what matters most."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from builder import kernels
from builder.merge.inputs import Inputs, Piece, Values

EPSILON = 1e-8


def arcee_fusion(inputs: Inputs) -> Iterator[Values]:
    """b + d where importance >= median + 1.5 (q3 - q1); importance = |d| KL(softmax of x's row, softmax of b's row).

    arcee.ai. The quartiles are exact; mergekit draws them from an unseeded sample above 1e6 elements. The divergence is
    computed in fp64: in fp32 that of a fine-tune and its base is mostly rounding.
    """
    n = inputs.size

    def importance(piece: Piece) -> list[Values]:
        return [inputs.arrays.device(_importance(inputs, piece))]

    places = [n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)]
    cuts = inputs.borders(lambda piece: importance(piece) * 3, places, magnitude=False, row=inputs.columns)
    first, median, third = (kernels.value_of(cut.key) for cut in cuts)
    threshold = median + 1.5 * (third - first)
    for piece in inputs.pieces(row=inputs.columns):
        important = importance(piece)[0] >= threshold
        yield piece.base + inputs.arrays.masked(piece.deltas[0], important)


def _importance(inputs: Inputs, piece: Piece) -> NDArray[np.float32]:
    """|d| times the divergence of its row, flat."""
    p, q = (
        _softmax(inputs.arrays.host(piece.matrix(values)).astype(np.float64)) + EPSILON
        for values in (piece.values[0], piece.base)
    )
    divergence = np.sum(p * np.log(p / q), axis=1, keepdims=True)
    importance = np.abs(inputs.arrays.host(piece.matrix(piece.deltas[0]))) * divergence
    found: NDArray[np.float32] = importance.astype(np.float32).reshape(-1)
    return found


def _softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares
