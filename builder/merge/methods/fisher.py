"""Fisher merging: every element is averaged by how much each model depends on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from builder.merge.inputs import Inputs, Values
from builder.merge.methods.linear import linear


def fisher(inputs: Inputs, *, weight: Sequence[float]) -> Iterator[Values]:
    """sum w_i F_i x_i / sum w_i F_i, F_i the diagonal Fisher information (`builder stats --kind fisher`).

    Matena and Raffel 2022, arXiv 2111.09832. Where no model depends on an element, its weighted mean; so for tensors
    without statistics.
    """
    if None in inputs.statistics:
        yield from linear(inputs, weight=weight)
        return
    xp, sum_of_weights = inputs.arrays.xp, sum(weight)
    for piece in inputs.pieces():
        top = bottom = piece.values[0] * 0
        for value, information, each in zip(piece.values, piece.statistics, weight, strict=True):
            top = top + information * each * value
            bottom = bottom + information * each
        mean = inputs.arrays.combine(piece.values, [each / sum_of_weights for each in weight])
        known = bottom > 0
        yield xp.where(known, top / xp.where(known, bottom, bottom + 1), mean)
