"""All routers on one matrix: cross-validated, and on tasks that none of their prompts came from.

N prompts, E experts, D features.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from builder.routing.crossval import Fit, Parts, by_chance, by_task, consistency, predict, prove
from builder.routing.gate import fits
from builder.routing.matrix import Matrix
from routers.base import Vector
from routers.features import Features
from routers.scorecard import Scorecard, Scores, interval, scorecard


@dataclass(frozen=True)
class Elsewhere:
    """A router on tasks that it never saw. gain: over the expert that was best on the other tasks, with its interval;
    hindsight: over the best expert of all, which nobody could have known."""

    routed: float
    gain: float
    low: float
    high: float
    hindsight: float


@dataclass(frozen=True)
class Row:
    """One router. seconds: of its last fit; p50, p99: microseconds of an estimate, features apart."""

    kind: str
    card: Scorecard
    elsewhere: Elsewhere | None
    by_task: dict[str, float]
    fit_seconds: float
    p50: float
    p99: float

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        told = self.card.model_dump(mode="json")
        told |= {"relative": self.card.relative, "oracle_share": self.card.oracle_share, "by_task": self.by_task}
        told |= {"fit_seconds": self.fit_seconds, "p50_us": self.p50, "p99_us": self.p99}
        if self.elsewhere:
            told["unseen_tasks"] = {name: getattr(self.elsewhere, name) for name in Elsewhere.__dataclass_fields__}
        return told


@dataclass(frozen=True)
class Evaluation:
    """singles: what each expert scores alone."""

    matrix: Matrix
    rows: tuple[Row, ...]
    singles: dict[str, float]
    feature_p50: float


def evaluate(
    matrix: Matrix, features: Features, *, kinds: Sequence[str], parts: int, seed: int, unseen_tasks: bool = True
) -> Evaluation:
    """Every kind of router, cross-validated in `parts` and by leaving out one task at a time."""
    vectors_ND, feature_seconds = vectors(matrix.prompts, features)
    made = {kind: fit for kind, fit in fits(matrix.experts, seed).items() if kind in kinds}
    tasks = by_task(matrix.tasks) if unseen_tasks and len(set(matrix.tasks)) > 1 else None
    rows = [
        _row(kind, fit, matrix, features, vectors_ND, by_chance(len(vectors_ND), parts, seed), tasks, seed)
        for kind, fit in made.items()
    ]
    return _evaluation(matrix, rows, feature_seconds)


def hold_out(fitted_on: Matrix, held: Matrix, features: Features, *, kinds: Sequence[str], seed: int) -> Evaluation:
    """Every kind of router, fitted on one matrix and scored on another with the same experts."""
    seen_ND, _ = vectors(fitted_on.prompts, features)
    vectors_ND, feature_seconds = vectors(held.prompts, features)
    rows = []
    for kind, fit in fits(fitted_on.experts, seed).items():
        if kind in kinds:
            started = time.perf_counter()
            router = fit(seen_ND, fitted_on.scores_NE)
            took = time.perf_counter() - started
            every = np.ones(len(vectors_ND), bool)
            predicted = predict(lambda *_, known=router: known, vectors_ND, held.scores_NE, [every])
            stays = consistency(router, features, held.prompts, seed)
            card = scorecard(
                held.experts,
                held.scores_NE,
                predicted.picks_N,
                seed,
                quality_NE=predicted.quality_NE,
                consistency=stays,
            )
            rows.append(_told(kind, card, None, held, predicted.picks_N, took, predicted.seconds_N))
    return _evaluation(held, rows, feature_seconds)


def vectors(prompts: Sequence[str], features: Features) -> tuple[Vector, Scores]:
    """Every prompt's vector [N, D], and the seconds [N] that it took."""
    found, seconds = [], []
    for prompt in prompts:
        started = time.perf_counter()
        found.append(features.vector(prompt))
        seconds.append(time.perf_counter() - started)
    return np.stack(found), np.array(seconds)


def _evaluation(matrix: Matrix, rows: Sequence[Row], feature_seconds: Scores) -> Evaluation:
    singles = dict(zip(matrix.experts, map(float, matrix.scores_NE.mean(axis=0)), strict=True))
    return Evaluation(matrix, tuple(rows), singles, 1e6 * float(np.median(feature_seconds)))


def _row(
    kind: str,
    fit: Fit,
    matrix: Matrix,
    features: Features,
    vectors_ND: Vector,
    parts: Parts,
    tasks: Parts | None,
    seed: int,
) -> Row:
    started = time.perf_counter()
    whole = fit(vectors_ND, matrix.scores_NE)
    took = time.perf_counter() - started
    stays = consistency(whole, features, matrix.prompts, seed)
    proven = prove(matrix.experts, fit, vectors_ND, matrix.scores_NE, parts=parts, seed=seed, consistency=stays)
    elsewhere = _elsewhere(fit, matrix, vectors_ND, tasks, seed) if tasks else None
    predicted = proven.predicted
    return _told(kind, proven.card, elsewhere, matrix, predicted.picks_N, took, predicted.seconds_N)


def _told(
    kind: str,
    card: Scorecard,
    elsewhere: Elsewhere | None,
    matrix: Matrix,
    picks_N: Any,
    took: float,
    seconds_N: Scores,
) -> Row:
    routed_N, tasks_N = matrix.scores_NE[np.arange(len(picks_N)), picks_N], np.array(matrix.tasks)
    means = {task: float(routed_N[tasks_N == task].mean()) for task in dict.fromkeys(matrix.tasks)}
    p50, p99 = (1e6 * float(np.quantile(seconds_N, share)) for share in (0.5, 0.99))
    return Row(kind, card, elsewhere, means, took, p50, p99)


def _elsewhere(fit: Fit, matrix: Matrix, vectors_ND: Vector, tasks: Parts, seed: int) -> Elsewhere:
    scores_NE = matrix.scores_NE
    predicted = predict(fit, vectors_ND, scores_NE, tasks)
    routed_N = scores_NE[np.arange(len(scores_NE)), predicted.picks_N]
    known_N = np.empty(len(scores_NE))
    for held_N in tasks:
        known_N[held_N] = scores_NE[held_N, int(np.argmax(scores_NE[~held_N].mean(axis=0)))]
    low, high = interval(routed_N - known_N, seed)
    best = float(scores_NE.mean(axis=0).max())
    return Elsewhere(
        float(routed_N.mean()), float((routed_N - known_N).mean()), low, high, float(routed_N.mean()) - best
    )
