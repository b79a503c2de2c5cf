"""How good a router is, on prompts whose scores under every expert are known. N prompts, E experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RESAMPLES = 2000


class Scorecard(BaseModel):
    """Mean scores on held-out prompts; `gain` is routed minus best single, with its 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: int
    routed: float
    best_single: float
    best_single_expert: str
    oracle: float
    random: float
    gain: float
    gain_low: float
    gain_high: float
    picks: dict[str, int]

    @property
    def proven(self) -> bool:
        """Whether routing beats the best single expert beyond chance."""
        return self.gain_low > 0


def scorecard(
    experts: tuple[str, ...], scores_NE: NDArray[np.float64], picks_N: NDArray[np.intp], seed: int
) -> Scorecard:
    """The scorecard of a router that picked expert `picks_N[i]` for prompt i.

    The best single expert is chosen in hindsight on the same prompts, which favours it; the interval resamples prompts.
    """
    routed_N = scores_NE[np.arange(len(scores_NE)), picks_N]
    best = int(np.argmax(scores_NE.mean(axis=0)))
    low, high = interval(routed_N - scores_NE[:, best], seed)
    return Scorecard(
        prompts=len(scores_NE),
        routed=float(routed_N.mean()),
        best_single=float(scores_NE[:, best].mean()),
        best_single_expert=experts[best],
        oracle=float(scores_NE.max(axis=1).mean()),
        random=float(scores_NE.mean()),
        gain=float((routed_N - scores_NE[:, best]).mean()),
        gain_low=low,
        gain_high=high,
        picks={expert: int(np.sum(picks_N == e)) for e, expert in enumerate(experts)},
    )


def interval(values_N: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    means = values_N[rng.integers(0, len(values_N), (RESAMPLES, len(values_N)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
