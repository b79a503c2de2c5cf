"""How good a router is, on prompts whose scores under every expert are known. N prompts, E experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from routers.policy import Calibration

RESAMPLES = 2000
BINS = 10
DEAD = 0.01
"""An expert that answers a smaller share than this is dead."""
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
CLOSE = 0.05
"""How much of the scores' deviation an expert may be behind and still count as the best."""

Scores = NDArray[np.float64]


class Risk(NamedTuple):
    """If only the share `coverage` of prompts with the highest confidence is routed: their mean lead over the best
    single expert on the same prompts, and the share of them whose expert was the best."""

    coverage: float
    gain: float
    right: float


class Scorecard(BaseModel):
    """A router on prompts that it was not fitted on.

    best_single: the expert with the highest mean on these very prompts, so it is chosen in hindsight, against the
    router. gain: routed minus best single, with its paired 95 % bootstrap interval; relative: as a share of it.
    oracle: every prompt to its best expert; oracle_share: the part of the way from best single to there.
    entropy_bits: of the picks; dead: experts that get less than 1 %. calibration_error: of the confidence that no
    other expert is better (ECE, ten bins). consistency: the share of choices that stay under changes of a prompt that
    mean nothing, by kind of change. apgr: of two experts, the share of the stronger's lead that is kept, over all
    shares of calls to it (RouteLLM, arXiv 2406.18665).
    """

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
    entropy_bits: float = 0.0
    dead: tuple[str, ...] = ()
    calibration_error: float | None = None
    risk: tuple[Risk, ...] = ()
    consistency: dict[str, float] = {}
    apgr: float | None = None

    @property
    def proven(self) -> bool:
        """Whether routing beats the best single expert beyond chance."""
        return self.gain_low > 0

    @property
    def relative(self) -> float:
        """The gain as a share of the best single expert's score."""
        return self.gain / abs(self.best_single) if self.best_single else 0.0

    @property
    def oracle_share(self) -> float:
        """The part of the way from the best single expert to the oracle that was gone."""
        gap = self.oracle - self.best_single
        return self.gain / gap if gap > 0 else 0.0


def scorecard(
    experts: Sequence[str],
    scores_NE: Scores,
    picks_N: NDArray[np.intp],
    seed: int,
    *,
    confidence_N: Scores | None = None,
    quality_NE: Scores | None = None,
    consistency: dict[str, float] | None = None,
) -> Scorecard:
    """The scorecard of a router that picked expert `picks_N[i]` for prompt i, with that confidence and estimate."""
    rows = np.arange(len(scores_NE))
    routed_N = scores_NE[rows, picks_N]
    best = int(np.argmax(scores_NE.mean(axis=0)))
    low, high = interval(routed_N - scores_NE[:, best], seed)
    counts_E = np.bincount(picks_N, minlength=len(experts))
    right_N = is_best(scores_NE, picks_N)
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
        picks={expert: int(counts_E[e]) for e, expert in enumerate(experts)},
        entropy_bits=_entropy(counts_E),
        dead=tuple(expert for e, expert in enumerate(experts) if counts_E[e] < DEAD * len(scores_NE)),
        calibration_error=None if confidence_N is None else calibration_error(confidence_N, right_N),
        risk=() if confidence_N is None else risk_coverage(routed_N - scores_NE[:, best], right_N, confidence_N),
        consistency=consistency or {},
        apgr=apgr(scores_NE, quality_NE) if quality_NE is not None and len(experts) == 2 else None,
    )


def interval(values_N: Scores, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    rng = np.random.default_rng(seed)
    size = len(values_N)
    # A few resamples at a time: all at once, 10^5 values would take gigabytes.
    parts = max(1, min(RESAMPLES, 4_000_000 // size))
    means = [
        values_N[rng.integers(0, size, (min(parts, RESAMPLES - at), size))].mean(axis=1)
        for at in range(0, RESAMPLES, parts)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def is_best(scores_NE: Scores, picks_N: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether no expert scored better than the one picked, but for a sliver of the scores' deviation."""
    picked_N = scores_NE[np.arange(len(scores_NE)), picks_N]
    right_N: NDArray[np.bool_] = picked_N >= scores_NE.max(axis=1) - CLOSE * float(scores_NE.std())
    return right_N


def calibrate(leads_N: Scores, right_N: NDArray[np.bool_]) -> Calibration:
    """Platt's logistic curve from leads to the frequency of being right, by Newton's method with a weak prior."""
    design_N2 = np.stack([np.ones(len(leads_N)), leads_N], axis=1)
    weights_2 = np.zeros(2)
    prior_22 = np.diag([1e-3, 1e-1])
    for _ in range(50):
        chance_N = 1 / (1 + np.exp(-np.clip(design_N2 @ weights_2, -60, 60)))
        slope_2 = design_N2.T @ (chance_N - right_N) + prior_22 @ weights_2
        curve_22 = (design_N2 * (chance_N * (1 - chance_N))[:, None]).T @ design_N2 + prior_22
        move_2 = np.linalg.solve(curve_22, slope_2)
        weights_2 = weights_2 - move_2
        if float(np.abs(move_2).max()) < 1e-9:
            break
    return Calibration(float(weights_2[0]), float(weights_2[1]))


def calibration_error(confidence_N: Scores, right_N: NDArray[np.bool_]) -> float:
    """Expected calibration error: |confidence - frequency| in bins of equal width, weighed by their sizes."""
    bin_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    gaps = [abs(float((confidence_N - right_N)[bin_N == each].sum())) for each in range(BINS)]
    return sum(gaps) / len(confidence_N)


def risk_coverage(gains_N: Scores, right_N: NDArray[np.bool_], confidence_N: Scores) -> tuple[Risk, ...]:
    """The curve of answering only what the router is surest of."""
    order = np.argsort(-confidence_N, kind="stable")
    found = []
    for coverage in COVERAGES:
        kept = order[: max(1, round(coverage * len(order)))]
        found.append(Risk(coverage, float(gains_N[kept].mean()), float(right_N[kept].mean())))
    return tuple(found)


def apgr(scores_N2: Scores, quality_N2: Scores) -> float | None:
    """The average performance gap recovered of two experts, calls going to the stronger where its lead is highest."""
    weak, strong = np.argsort(scores_N2.mean(axis=0), kind="stable")
    gap = float(scores_N2[:, strong].mean() - scores_N2[:, weak].mean())
    if gap <= 0:
        return None
    order = np.argsort(-(quality_N2[:, strong] - quality_N2[:, weak]), kind="stable")
    won_N = np.concatenate([[0.0], np.cumsum((scores_N2[:, strong] - scores_N2[:, weak])[order])]) / len(scores_N2)
    return float(np.trapezoid(won_N, dx=1 / len(scores_N2)) / gap)


def _entropy(counts_E: NDArray[np.intp]) -> float:
    shares_E = counts_E[counts_E > 0] / counts_E.sum()
    return float(-(shares_E * np.log2(shares_E)).sum()) + 0.0
