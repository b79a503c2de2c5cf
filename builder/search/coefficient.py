"""Heuristic-Coefficient and Heuristic-Similarity (PAPER.md 4): how much of the next model, by a grid of nine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from builder.candidate import Weights
from builder.errors import SearchError
from builder.search.problem import Outcome, Problem

GRID = tuple(round(0.1 * step, 1) for step in range(1, 10))
"""c of c M + (1 - c) m."""
Next = Callable[[Weights, Sequence[str]], str]
"""Which of the models left is tried on the merge of these weights."""


def coefficient(problem: Problem) -> Outcome:
    """The next best single model each time."""
    return _grow(problem, "coefficient", lambda _, left: left[0])


def similarity(problem: Problem) -> Outcome:
    """The model most, or least, similar to the current merge each time. Raises SearchError without dot products."""
    if problem.dots is None:
        raise SearchError("the similarity strategy needs the dot products of the members' weights")
    dots, sign = _by_name(problem.kin.names, problem.dots), 1 if problem.settings.similar == "most" else -1

    def following(weights: Weights, left: Sequence[str]) -> str:
        return max(left, key=lambda name: sign * cosine(weights, name, dots))

    return _grow(problem, "similarity", following)


def _grow(problem: Problem, strategy: str, following: Next) -> Outcome:
    """M = the best single; for each next m, c* = argmax F(c M + (1 - c) m); M = that merge if it is accepted.

    Nine evaluations for each model but the best; of equal scores the smallest c is taken.
    """
    best = problem.best_single()
    left = problem.ranked[1:]
    while left:
        name = following(best.candidate.weights, left)
        left.remove(name)
        candidates = [problem.kin.linear(mixed(best.candidate.weights, name, c)) for c in GRID]
        trials = list(problem.score(strategy, [name] * len(GRID), candidates))
        scored = [trial for trial in trials if trial.score is not None]
        top = max(scored, key=lambda trial: trial.score or -np.inf, default=None)
        taken = top is not None and top.scores is not None and problem.accept(top.scores, best.scores)
        for trial in trials:
            problem.keep(trial, taken and trial is top)
        if taken and top is not None and top.scores is not None:
            best = Outcome(top.candidate, top.scores)
    return best


def mixed(weights: Weights, name: str, c: float) -> dict[str, float]:
    """The effective weights of c M + (1 - c) m."""
    return {member: c * weight for member, weight in weights.items()} | {name: 1 - c}


def cosine(weights: Weights, name: str, dots: Mapping[tuple[str, str], float]) -> float:
    """The cosine of the merge of `weights` and a model, over all attention and MLP weights, from dot products."""
    across = sum(weight * dots[member, name] for member, weight in weights.items())
    square = sum(u * v * dots[a, b] for a, u in weights.items() for b, v in weights.items())
    return float(across / np.sqrt(square * dots[name, name]))


def _by_name(names: Sequence[str], dots: NDArray[np.float64]) -> dict[tuple[str, str], float]:
    return {(a, b): float(dots[i, j]) for i, a in enumerate(names) for j, b in enumerate(names)}
