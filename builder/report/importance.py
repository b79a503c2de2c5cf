"""Which of evolution's numbers its scores hang on: functional ANOVA over forests, each grown from trials drawn anew.

PED-ANOVA would need no forest, but of 30 trials it named a number that did nothing; fANOVA found the one that did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builder.record import TrialRecord
from builder.report.coefficients import labels, numbers
from builder.search.evolution import RANGES

if TYPE_CHECKING:
    import optuna

ENOUGH = 10
"""Fewer scored trials say nothing."""
FORESTS, TREES, DEPTH = 8, 8, 8


@dataclass(frozen=True, slots=True)
class Importance:
    """A number's share of the scores' variance: the mean over forests, the lowest and the highest."""

    label: str
    mean: float
    low: float
    high: float


def importance(trials: Sequence[TrialRecord], search: Mapping[str, Any], seed: int) -> list[Importance]:
    """Of one evolution, the most important first; none of too few trials, or of scores that are all equal."""
    scored = [(trial.said, trial.score.mean) for trial in trials if trial.score is not None]
    if len(scored) < ENOUGH:
        return []
    said, groups, bounds = scored[0][0], search["groups"], dict(RANGES) | search["ranges"]
    words = {name: label for name, label in labels(said, groups).items() if name.split(" ")[0] in bounds}
    names = list(words)
    read = [numbers(each, groups) for each, _ in scored]
    values_TP = np.array([[each[name] for name in names] for each in read])
    scores_T = np.array([score for _, score in scored])
    shares_FP = _forests(names, values_TP, scores_T, [bounds[name.split(" ")[0]] for name in names], seed)
    if not len(shares_FP):
        return []
    found = [
        Importance(words[name], float(share_F.mean()), float(share_F.min()), float(share_F.max()))
        for name, share_F in zip(names, shares_FP.T, strict=True)
    ]
    return sorted(found, key=lambda each: -each.mean)


def _forests(
    names: Sequence[str],
    values_TP: NDArray[np.float64],
    scores_T: NDArray[np.float64],
    bounds: Sequence[Sequence[float]],
    seed: int,
) -> NDArray[np.float64]:
    """Shares [F, P] of P numbers, as each of F forests sees them; a draw that has nothing to say gives none."""
    rng, found = np.random.default_rng(seed), []
    for forest in range(FORESTS):
        drawn = rng.integers(0, len(scores_T), len(scores_T))
        shares = _fanova(_study(names, values_TP[drawn], scores_T[drawn], bounds), seed + forest)
        if shares is not None:
            found.append([shares[name] for name in names])
    return np.array(found)


def _study(
    names: Sequence[str],
    values_TP: NDArray[np.float64],
    scores_T: NDArray[np.float64],
    bounds: Sequence[Sequence[float]],
) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    known: dict[str, Any] = {
        name: optuna.distributions.FloatDistribution(low, high) for name, (low, high) in zip(names, bounds, strict=True)
    }
    study.add_trials(
        [
            optuna.trial.create_trial(
                params=dict(zip(names, map(float, row_P), strict=True)), distributions=known, value=float(score)
            )
            for row_P, score in zip(values_TP, scores_T, strict=True)
        ]
    )
    return study


def _fanova(study: optuna.Study, seed: int) -> dict[str, float] | None:
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    evaluator = FanovaImportanceEvaluator(n_trees=TREES, max_depth=DEPTH, seed=seed)
    try:
        return get_param_importances(study, evaluator=evaluator)
    except RuntimeError:  # the scores that were drawn are all equal
        return None
