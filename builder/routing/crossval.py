"""Routers on prompts that they were not fitted on: each part of a matrix in turn, or each of its tasks.

N prompts, E experts, D features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builder.routing.perturb import PERTURBATIONS
from routers.base import Router, Vector
from routers.features import Features
from routers.folds import folds
from routers.policy import Calibration, lead
from routers.scorecard import Scorecard, Scores, calibrate, interval, is_best, scorecard

Fit = Callable[[Vector, Scores], Router]
"""Vectors [N, D] and scores [N, E] to a router."""
Parts = Sequence[NDArray[np.bool_]]
MOST_PERTURBED = 1000
"""Prompts that are perturbed, the first of a shuffled order."""


@dataclass(frozen=True)
class Predicted:
    """What routers expected of prompts that they did not see; seconds of each estimate."""

    quality_NE: Scores
    std_NE: Scores
    seconds_N: Scores

    @property
    def picks_N(self) -> NDArray[np.intp]:
        """The expert of each prompt; ties go to the first."""
        picks_N: NDArray[np.intp] = np.argmax(self.quality_NE, axis=1)
        return picks_N

    @property
    def leads_N(self) -> Scores:
        """How far the first expert is ahead, in standard deviations."""
        order_NE = np.argsort(-self.quality_NE, axis=1, kind="stable")
        quality_NE = np.take_along_axis(self.quality_NE, order_NE, axis=1).astype(np.float32)
        std_NE = np.take_along_axis(self.std_NE, order_NE, axis=1).astype(np.float32)
        return np.array([lead(*pair) for pair in zip(quality_NE, std_NE, strict=True)])


@dataclass(frozen=True)
class Proven:
    """A router's scorecard by cross-validation, and what its policy takes from it.

    threshold: of the confidence, below which the default expert answers; 0 where that does not pay beyond chance.
    """

    card: Scorecard
    calibration: Calibration | None
    threshold: float
    predicted: Predicted


def predict(fit: Fit, vectors_ND: Vector, scores_NE: Scores, parts: Parts) -> Predicted:
    """Every part estimated by a router that was fitted on all others."""
    found = Predicted(np.zeros(scores_NE.shape), np.zeros(scores_NE.shape), np.zeros(len(scores_NE)))
    for held_N in parts:
        router = fit(vectors_ND[~held_N], scores_NE[~held_N])
        for row in np.flatnonzero(held_N):
            started = time.perf_counter()
            estimate = router.estimate(vectors_ND[row])
            found.seconds_N[row] = time.perf_counter() - started
            found.quality_NE[row], found.std_NE[row] = estimate.quality_E, estimate.std_E
    return found


def prove(
    experts: Sequence[str],
    fit: Fit,
    vectors_ND: Vector,
    scores_NE: Scores,
    *,
    parts: Parts,
    seed: int,
    consistency: Mapping[str, float] | None = None,
) -> Proven:
    """The scorecard of what `fit` makes. The confidence of a part is calibrated on the other parts too."""
    predicted = predict(fit, vectors_ND, scores_NE, parts)
    constant = len(experts) < 2 or not np.ptp(predicted.leads_N)
    confidence_N, calibration, threshold = None, None, 0.0
    if not constant:
        right_N, leads_N = is_best(scores_NE, predicted.picks_N), predicted.leads_N
        confidence_N = np.empty(len(leads_N))
        for held_N in parts:
            held_out = calibrate(leads_N[~held_N], right_N[~held_N])
            confidence_N[held_N] = [held_out.confidence(each) for each in leads_N[held_N]]
        calibration = calibrate(leads_N, right_N)
        threshold = _threshold(scores_NE, predicted.picks_N, confidence_N, seed)
    card = scorecard(
        experts,
        scores_NE,
        predicted.picks_N,
        seed,
        confidence_N=confidence_N,
        quality_NE=predicted.quality_NE,
        consistency=dict(consistency or {}),
    )
    return Proven(card, calibration, threshold, predicted)


def _threshold(scores_NE: Scores, picks_N: NDArray[np.intp], confidence_N: Scores, seed: int) -> float:
    """The confidence below which the best single expert does better, if it does so beyond chance."""
    best = int(np.argmax(scores_NE.mean(axis=0)))
    lost_N = scores_NE[:, best] - scores_NE[np.arange(len(picks_N)), picks_N]
    tried = np.quantile(confidence_N, np.linspace(0.05, 0.5, 10))
    threshold = max(tried, key=lambda each: float(lost_N[confidence_N < each].sum()))
    abstained_N = np.where(confidence_N < threshold, lost_N, 0.0)
    return float(threshold) if interval(abstained_N, seed)[0] > 0 else 0.0


def by_task(tasks: Sequence[str]) -> Parts:
    """Each task held out in turn."""
    names_N = np.array(tasks)
    return [names_N == name for name in dict.fromkeys(tasks)]


def by_chance(size: int, parts: int, seed: int) -> Parts:
    """Parts of equal size."""
    return folds(size, parts, seed)


def consistency(router: Router, features: Features, prompts: Sequence[str], seed: int) -> dict[str, float]:
    """For each kind of change, and all together, the share of prompts whose expert stays."""
    chosen = np.random.default_rng(seed).permutation(len(prompts))[:MOST_PERTURBED]

    def pick(text: str) -> int:
        return int(np.argmax(router.estimate(features.vector(text)).quality_E))

    plain = [pick(prompts[row]) for row in chosen]
    found = {
        name: float(np.mean([pick(change(prompts[row])) == was for row, was in zip(chosen, plain, strict=True)]))
        for name, change in PERTURBATIONS.items()
    }
    return found | {"all": float(np.mean(list(found.values())))}
