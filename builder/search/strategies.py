"""Which members, and which coefficients: the paper's strategies (PAPER.md 4), one a file, all in STRATEGIES."""

from __future__ import annotations

from collections.abc import Callable

from builder.search.auto import auto
from builder.search.average import average
from builder.search.coefficient import coefficient, similarity
from builder.search.evolution import evolution, refined
from builder.search.problem import Outcome, Problem

STRATEGIES: dict[str, Callable[[Problem], Outcome]] = {
    "average": average,
    "coefficient": coefficient,
    "similarity": similarity,
    "evolution": evolution,
    "heuristic+evolution": refined,
    "auto": auto,
}


def search(problem: Problem) -> Outcome:
    """The best that the problem's strategy finds; a model alone is its own best."""
    if len(problem.kin.names) == 1:
        return problem.single(problem.kin.names[0])
    return STRATEGIES[problem.settings.strategy](problem)
