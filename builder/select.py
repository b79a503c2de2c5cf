"""Which candidates become experts: greedily, by what each adds under a perfect router. N items, E candidates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def choose(scores: Mapping[str, NDArray[np.float64]], most: int, *, stop_early: bool = True) -> dict[str, float]:
    """Up to `most` candidates, each with the mean score [N] of a perfect router over those chosen so far.

    Stops when no candidate adds anything, unless `stop_early` is off; ties keep the order of `scores`.
    """
    chosen: dict[str, float] = {}
    best_N = np.full(len(next(iter(scores.values()))), -np.inf)
    while len(chosen) < min(most, len(scores)):
        reach = {name: float(np.maximum(best_N, own_N).mean()) for name, own_N in scores.items() if name not in chosen}
        name = max(reach, key=lambda name: reach[name])
        if stop_early and chosen and reach[name] <= best_N.mean():
            break
        chosen[name] = reach[name]
        best_N = np.maximum(best_N, scores[name])
    return chosen
