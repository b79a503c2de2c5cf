"""When a merge is better: as in the paper, or beyond luck. N samples, B bootstrap resamples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from builder.config import Search

Accept = Callable[[NDArray[np.float64], NDArray[np.float64]], bool]
"""Whether new scores [N] may replace old ones [N] of the same samples."""
RESAMPLES = 2000


def acceptance(settings: Search, seed: int) -> Accept:
    """The rule that the settings name."""
    if settings.accept == "paper":
        return no_worse
    return lambda new, old: gain_at(new, old, settings.level, seed) > 0


def no_worse(new_N: NDArray[np.float64], old_N: NDArray[np.float64]) -> bool:
    """F' >= F (PAPER.md 4)."""
    return bool(new_N.mean() >= old_N.mean())


def gain_at(new_N: NDArray[np.float64], old_N: NDArray[np.float64], level: float, seed: int) -> float:
    """The gain that a one-sided paired bootstrap puts at `level`: above zero, new beats old beyond luck.

    Samples are drawn with replacement, the same ones for both (Efron and Tibshirani 1993, chapter 13).
    """
    gains_N = new_N - old_N
    rng = np.random.default_rng(seed)
    means_B = gains_N[rng.integers(0, len(gains_N), (RESAMPLES, len(gains_N)))].mean(axis=1)
    return float(np.quantile(means_B, level))
