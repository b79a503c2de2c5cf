"""RegMean: the linear layer whose outputs are closest to every model's own, on that model's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from builder import kernels
from builder.errors import MergeError
from builder.merge.inputs import Inputs, Source, Values
from builder.merge.methods.linear import linear

STRIPE = 256
"""Rows that are worked on at a time."""


def regmean(inputs: Inputs, *, weight: Sequence[float], reduction: float = 0.9) -> Iterator[Values]:
    """W^T = (sum w_i G_i)^-1 sum w_i G_i W_i^T, G_i = X_i^T X_i with its off-diagonals times `reduction`.

    Jin et al. 2023, arXiv 2212.09849; G_i [in, in] from `builder stats --kind regmean`, W_i [out, in]. In fp64; the
    sum of the G_i is held, so memory grows with the square of `in`. Tensors without statistics are the weighted mean;
    so are the columns of features that were 0 in every model. Raises MergeError for statistics that leave others open.
    """
    if None in inputs.statistics:
        yield from linear(inputs, weight=weight)
        return
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    normal = np.zeros((inputs.columns, inputs.columns))
    for source, each in zip(inputs.statistics, weight, strict=True):
        for stripe, rows in _stripes(source, reduction):
            normal[stripe] += each * rows
    unseen = np.flatnonzero(np.diagonal(normal) == 0)
    normal[unseen, unseen] = sum(weight)
    try:
        factor = cho_factor(normal, overwrite_a=True)
    except LinAlgError as exc:
        raise MergeError(
            f"the statistics of {inputs.name} leave its merge open (their sum is singular): measure more text, or give "
            "regmean a reduction below 1"
        ) from exc
    # Pieces of one size, whatever was asked for: a matrix product's rounding may depend on its shape.
    for piece in dataclasses.replace(inputs, piece=STRIPE * inputs.columns).pieces(row=inputs.columns):
        right = np.zeros((inputs.columns, piece.rows))
        for source, value, each in zip(inputs.statistics, piece.values, weight, strict=True):
            own = inputs.arrays.host(piece.matrix(value)).astype(np.float64)
            for stripe, rows in _stripes(source, reduction):
                right[stripe] += each * (rows @ own.T)
            right[unseen] += each * own.T[unseen]
        solved = cho_solve(factor, right).T.astype(np.float32)
        yield inputs.arrays.device(np.ascontiguousarray(solved).reshape(-1))


def _stripes(source: Source | None, reduction: float) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """G with its off-diagonals reduced, some rows at a time, in fp64."""
    assert source is not None
    columns = source.shape[1]
    for start in range(0, columns, STRIPE):
        stop = min(start + STRIPE, columns)
        values, finite = kernels.load(source.stored(start * columns, stop * columns))
        if not finite:
            raise MergeError(f"{source.label} holds NaN or inf: measure the model again")
        rows = values.astype(np.float64).reshape(-1, columns)
        diagonal = np.arange(start, stop)
        kept = rows[diagonal - start, diagonal]
        rows *= reduction
        rows[diagonal - start, diagonal] = kept
        yield slice(start, stop), rows
