"""Parts of a data set that take turns at being held out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def folds(size: int, parts: int, seed: int) -> list[NDArray[np.bool_]]:
    """Which of `size` rows each part holds out; every row once. Fewer parts where rows lack."""
    shuffled = np.random.default_rng(seed).permutation(size)
    part_N = np.empty(size, int)
    part_N[shuffled] = np.arange(size) % parts
    return [part_N == part for part in range(min(parts, size))]
