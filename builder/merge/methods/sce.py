"""SCE: select what varies between the inputs, calculate weights from it, erase the minority's signs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from builder.merge.inputs import EVERYTHING, Inputs, Piece, Top, Values, total


def sce(inputs: Inputs, *, select_topk: float = 1.0) -> Iterator[Values]:
    """b + sum w_i d_i / sum w_i over the inputs that agree with the sign of sum d_i, w_i = mean(d_i^2).

    Wan et al. 2024, arXiv 2408.07990. Before all, d_i keeps the int(select_topk m) elements of largest variance over
    the inputs, m = the elements whose variance is not 0. Updates of any size are weighted; mergekit takes all weights
    as equal where their sum is below 1e-6.
    """
    arrays = inputs.arrays
    keep = EVERYTHING
    if select_topk < 1:
        varying = sum(int((_variance(inputs, piece) > 0).sum()) for piece in inputs.pieces())
        (keep,) = inputs.cuts(lambda piece: [_variance(inputs, piece)], [int(select_topk * varying)])

    def selected(piece: Piece, top: Top) -> list[Values]:
        if keep == EVERYTHING:
            return piece.deltas
        mask = top.mask(_variance(inputs, piece))
        return [arrays.masked(delta, mask) for delta in piece.deltas]

    squares: list[list[np.ndarray]] = [[] for _ in inputs.sources]
    top = Top(arrays, keep)
    for piece in inputs.pieces():
        for sums, delta in zip(squares, selected(piece, top), strict=True):
            sums.append(arrays.dots(delta, delta))
    means = [total(sums) for sums in squares]
    weights = [mean / sum(means) for mean in means] if sum(means) > 0 else [1 / len(means)] * len(means)
    top = Top(arrays, keep)
    for piece in inputs.pieces():
        yield piece.base + arrays.consensus(selected(piece, top), weights, [1.0] * len(weights), normalize=True)


def _variance(inputs: Inputs, piece: Piece) -> Values:
    """Over the inputs, of every element; exactly 0 where all are equal, for sums of float32 are exact in fp64."""
    deltas = [inputs.arrays.doubles(delta) for delta in piece.deltas]
    mean = sum(deltas[1:], deltas[0]) / len(deltas)
    squares = [(delta - mean) * (delta - mean) for delta in deltas]
    return inputs.arrays.singles(sum(squares[1:], squares[0]) / len(deltas))
