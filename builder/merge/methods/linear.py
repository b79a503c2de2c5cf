"""Weighted means and copies of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from builder.merge.inputs import Inputs, Values


def linear(inputs: Inputs, *, weight: Sequence[float], normalize: bool = True) -> Iterator[Values]:
    """sum_i w_i x_i / sum_i w_i; without `normalize` the plain sum.

    Model soups, Wortsman et al. 2022, arXiv 2203.05482.
    """
    factors = shares(weight) if normalize else list(weight)
    yield from inputs.combined(factors)


def passthrough(inputs: Inputs, *, scale: Sequence[float | None]) -> Iterator[Values]:
    """s x_1, or x_1 as it is; with a recipe's slices, layer stacking (frankenmerges, depth up-scaling)."""
    for piece in inputs.pieces():
        yield piece.values[0] if scale[0] is None else piece.values[0] * scale[0]


def shares(weight: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    total = sum(weight)
    return [each / total for each in weight]
