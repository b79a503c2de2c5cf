"""Heuristic-Average (PAPER.md 4): take the next best model into the uniform mean if the score does not fall."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Weights = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate merge and what became of it."""

    tried: str
    weights: Weights
    score: float
    accepted: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """The best merge found: weights sum to one; a lone weight means that nothing helped the best single."""

    weights: Weights
    score: float
    trials: tuple[Trial, ...]


def average(singles: Mapping[str, float], evaluate: Callable[[Weights], float]) -> Outcome:
    """Rank by score; M = the best single; each next model m joins the uniform mean if F(M') >= F(M).

    One evaluation for each model but the best. Ties in the ranking keep the order of `singles`.
    """
    ranked = sorted(singles, key=lambda name: -singles[name])
    members, best = [ranked[0]], singles[ranked[0]]
    trials = []
    for name in ranked[1:]:
        weights = uniform([*members, name])
        score = evaluate(weights)
        trials.append(Trial(name, weights, score, accepted=score >= best))
        if score >= best:
            members, best = [*members, name], score
    return Outcome(uniform(members), best, tuple(trials))


def uniform(members: Sequence[str]) -> dict[str, float]:
    """Equal weights that sum to one."""
    return dict.fromkeys(members, 1 / len(members))
