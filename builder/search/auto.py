"""The best of the strategies on the proxy."""

from __future__ import annotations

from builder.search.average import average
from builder.search.coefficient import coefficient, similarity
from builder.search.evolution import evolution, refined
from builder.search.problem import Outcome, Problem


def auto(problem: Problem) -> Outcome:
    """Every strategy in turn, what each scored known to the next; of equal outcomes the earliest is taken."""
    found = [average(problem), problem.once("coefficient", coefficient)]
    if problem.dots is not None:
        found.append(similarity(problem))
    found += [evolution(problem), refined(problem)]
    return max(found, key=lambda outcome: outcome.score)
