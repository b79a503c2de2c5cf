"""Linear: the weighted mean of the weights (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from builder.checkpoints import Array


def linear(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    """sum_i w_i x_i / sum_i w_i, in fp32."""
    total = sum(weights)
    merged = np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        merged += np.float32(weight / total) * tensor
    return merged
