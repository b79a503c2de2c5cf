"""Heuristic-Average (PAPER.md 4): take the next best model into the uniform mean if the score does not fall."""

from __future__ import annotations

from collections.abc import Sequence

from builder.search.problem import Outcome, Problem


def average(problem: Problem) -> Outcome:
    """Rank by score; M = the best single; each next model m joins the uniform mean if F(M') is accepted.

    One evaluation for each model but the best.
    """
    best = problem.best_single()
    for name in problem.ranked[1:]:
        candidate = problem.kin.linear(uniform([*best.candidate.members, name]))
        (trial,) = problem.score("average", [name], [candidate])
        if problem.keep(trial, trial.scores is not None and problem.accept(trial.scores, best.scores)):
            assert trial.scores is not None
            best = Outcome(candidate, trial.scores)
    return best


def uniform(members: Sequence[str]) -> dict[str, float]:
    """Equal weights that sum to one."""
    return dict.fromkeys(members, 1 / len(members))
