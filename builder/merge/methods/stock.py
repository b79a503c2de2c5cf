"""Model Stock: how far to go from the base to the mean, from the angle between the fine-tunes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from builder.merge.inputs import Inputs, Values
from builder.merge.methods.spherical import row_gram


def model_stock(inputs: Inputs, *, filter_wise: bool = False) -> Iterator[Values]:
    """t mean(x) + (1-t) b, t = n c / (1 + (n-1) c), c = the mean of the pairwise cosines of d_i.

    Jang et al. 2024, arXiv 2403.19522. `filter_wise`: a cosine for every row. Updates of any size count; mergekit
    divides by at least 1e-6, which throws away those of low learning rates. Where 1 + (n-1) c is 0, the base.
    """
    n = len(inputs.sources)
    if filter_wise:
        for piece in inputs.pieces(row=inputs.columns):
            shares = ratio(row_gram(inputs, piece.deltas, piece.rows)).astype(np.float32)
            update = inputs.arrays.combine(piece.deltas, [1 / n] * n)
            column = inputs.arrays.device(shares).reshape(-1, 1)
            yield piece.base + (piece.matrix(update) * column).reshape(-1)
        return
    share = float(ratio(inputs.gram(lambda piece: piece.deltas)))
    for piece in inputs.pieces():
        yield piece.base + inputs.arrays.combine(piece.deltas, [share / n] * n)


def ratio(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """t from dot products [n, n, ...]; a zero update has cosine 0 with all others."""
    n = len(gram)
    cosines = []
    for i in range(n):
        for j in range(i + 1, n):
            product = np.sqrt(gram[i, i]) * np.sqrt(gram[j, j])
            cosines.append(
                np.clip(np.divide(gram[i, j], product, out=np.zeros_like(product), where=product > 0), -1, 1)
            )
    cosine = np.mean(cosines, axis=0)
    below = 1 + (n - 1) * cosine
    singular = np.abs(below) < 1e-6
    return np.where(singular, 0, n * cosine / np.where(singular, 1, below))
