"""What every strategy works on: members, their scores, and a way to score candidates that remembers each trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from builder.candidate import Candidate, Kin, whole
from builder.config import Search
from builder.errors import SearchError
from builder.evaluate import Result, Scores
from builder.executors import Failed
from builder.search.accept import Accept, acceptance

Evaluate = Callable[[Sequence[Candidate]], Iterable[Result]]
"""A result a candidate, in order, each as soon as it is there."""


@dataclass(frozen=True)
class Trial:
    """A candidate that was tried, and what became of it.

    tried: what is new in it, a member's name or the trial's number. scores: [N], None where it failed.
    """

    strategy: str
    tried: str
    candidate: Candidate
    scores: Scores | None
    failure: str | None
    accepted: bool = False

    @property
    def score(self) -> float | None:
        """F, the mean over samples (PAPER.md 4)."""
        return None if self.scores is None else float(self.scores.mean())


@dataclass(frozen=True)
class Outcome:
    """The best that a strategy found; a lone model means that nothing helped the best single one."""

    candidate: Candidate
    scores: Scores

    @property
    def score(self) -> float:
        """F."""
        return float(self.scores.mean())


Hear = Callable[[Trial], None]


@dataclass
class Problem:
    """One cluster to search.

    singles: every member's scores [N]. dots: their weights' dot products [M, M] in the order of `kin.names`, for
    similarities. storage: an Optuna storage URL that several machines share; None keeps trials to this process.
    hear: told of each trial as it ends. took: told of each that was accepted. Raises SearchError where too many trials
    in a row fail.
    """

    kin: Kin
    singles: Mapping[str, Scores]
    settings: Search
    seed: int
    evaluate: Evaluate
    dots: NDArray[np.float64] | None = None
    storage: str | None = None
    study: str = "study"
    hear: Hear = lambda _: None
    took: Hear = lambda _: None
    trials: list[Trial] = field(default_factory=list)
    _failures: int = field(default=0, init=False)
    _found: dict[str, Outcome] = field(default_factory=dict, init=False)

    @property
    def accept(self) -> Accept:
        """Whether new scores are good enough to replace old ones."""
        return acceptance(self.settings, self.seed)

    @property
    def ranked(self) -> list[str]:
        """The members by F, the best first; ties keep their order."""
        return sorted(self.kin.names, key=lambda name: -float(self.singles[name].mean()))

    def single(self, name: str) -> Outcome:
        """A member as it is."""
        return Outcome(whole(name), self.singles[name])

    def best_single(self) -> Outcome:
        """The member of highest F."""
        return self.single(self.ranked[0])

    def once(self, name: str, strategy: Callable[[Problem], Outcome]) -> Outcome:
        """What a strategy finds here, searched for once."""
        if name not in self._found:
            self._found[name] = strategy(self)
        return self._found[name]

    def score(self, strategy: str, tried: Sequence[str], candidates: Sequence[Candidate]) -> Iterator[Trial]:
        """A trial each, in order, as they end; none of them accepted yet."""
        for name, candidate, result in zip(tried, candidates, self.evaluate(candidates), strict=True):
            if isinstance(result, Failed):
                trial = Trial(strategy, name, candidate, None, result.reason)
            else:
                trial = Trial(strategy, name, candidate, result, None)
            self.hear(trial)
            self._failures = self._failures + 1 if trial.failure else 0
            if self._failures >= self.settings.failures:
                raise SearchError(
                    f"{self._failures} trials in a row failed, the last with: {trial.failure}. Mend that and run it "
                    "again; what was scored is kept (search.failures sets how many may fail, --retry tries failed ones "
                    "again)"
                )
            yield trial

    def keep(self, trial: Trial, accepted: bool) -> bool:
        """Remember a trial with its verdict, which is returned."""
        self.trials.append(replace(trial, accepted=accepted))
        if accepted:
            self.took(self.trials[-1])
        return accepted
