"""What each expert of a bundle is worth: the gain that goes with it, the smallest set that keeps nearly all of it.

N prompts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from routers.scorecard import Scores

NEARLY = 0.01
"""Of the full gain that the smallest set may lose."""


@dataclass(frozen=True, slots=True)
class Worth:
    """An expert: what the routed score loses without it, its share of the prompts, its bytes."""

    expert: str
    loss: float
    share: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Portfolio:
    """gain: of routing all experts over the best single one. smallest: the fewest experts within 1 % of that gain;
    freed: bytes of the others."""

    worth: tuple[Worth, ...]
    gain: float
    smallest: tuple[str, ...]
    smallest_gain: float
    freed: int


def portfolio(experts: Sequence[str], quality_NE: Scores, scores_NE: Scores, sizes: Mapping[str, int]) -> Portfolio:
    """From held-out estimates and scores. The smallest set is found by leaving out, one by one, who is missed least."""
    everyone = list(range(len(experts)))
    best = float(scores_NE.mean(axis=0).max())

    def routed(kept: Sequence[int]) -> float:
        picks_N = np.array(kept)[np.argmax(quality_NE[:, kept], axis=1)]
        return float(scores_NE[np.arange(len(scores_NE)), picks_N].mean())

    full = routed(everyone)
    picks_N = np.argmax(quality_NE, axis=1)
    worth = []
    for e in everyone:
        others = [other for other in everyone if other != e]
        loss = full - routed(others) if others else full
        worth.append(Worth(experts[e], loss, float((picks_N == e).mean()), sizes.get(experts[e], 0)))
    kept, gain = everyone, full - best
    while len(kept) > 1:
        without = max(([other for other in kept if other != e] for e in kept), key=routed)
        if routed(without) - best < gain - NEARLY * abs(gain):
            break
        kept = without
    names = tuple(experts[e] for e in kept)
    freed = sum(sizes.get(name, 0) for name in experts if name not in names)
    return Portfolio(tuple(worth), gain, names, routed(kept) - best, freed)
