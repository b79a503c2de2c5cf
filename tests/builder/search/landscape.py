"""A search without models: scores come from a function of the weights, and what was asked is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from builder.candidate import Candidate, Kin
from builder.config import Search
from builder.evaluate import Result
from builder.executors import Failed
from builder.search.problem import Problem

Score = Callable[[Mapping[str, float]], float | str]
"""A score, or the reason why there is none."""


def kin(*names: str, layers: int = 4, base: str | None = None) -> Kin:
    return Kin(names, base, "model.layers", layers, False)


class Landscape:
    """Scores every candidate by its weights; `asked` keeps the batches in order."""

    def __init__(self, score: Score, samples: int = 4) -> None:
        self.score, self.samples = score, samples
        self.asked: list[list[Candidate]] = []

    def __call__(self, candidates: Sequence[Candidate]) -> Iterator[Result]:
        self.asked.append(list(candidates))
        for candidate in candidates:
            found = self.score(candidate.weights)
            yield Failed(found) if isinstance(found, str) else np.full(self.samples, found)

    @property
    def candidates(self) -> list[Candidate]:
        return [candidate for batch in self.asked for candidate in batch]


def problem(singles: Mapping[str, float], landscape: Landscape, base: str | None = None, **settings: object) -> Problem:
    scores = {name: np.full(landscape.samples, score) for name, score in singles.items()}
    search = Search.model_validate({"constraint": "raw", **settings})  # what is asked is what is scored
    return Problem(kin(*singles, base=base), scores, search, 42, landscape)
