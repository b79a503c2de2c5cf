"""A search's trials as a reader wants them: by strategy, by member that was tried, and the best so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from builder.record import ClusterRecord, TrialRecord

EVOLVED = ("evolution", "heuristic+evolution")
"""Strategies that try numbers; the others try members."""
WITH_GRID = ("coefficient", "similarity")
"""Strategies that try a member at several c of c M + (1 - c) m."""


@dataclass(frozen=True, slots=True)
class Step:
    """A member that a heuristic tried to take in; with a grid of coefficients these are several trials.

    beat: the score of the merge before it. best: the trial of the highest score, the first of equals; None where all
    failed.
    """

    member: str
    trials: tuple[TrialRecord, ...]
    beat: float
    best: TrialRecord | None

    @property
    def taken(self) -> bool:
        """Whether the member is in the merge from here on."""
        return any(trial.accepted for trial in self.trials)

    @property
    def share(self) -> float | None:
        """c of the best trial."""
        return None if self.best is None else share(self.best)

    @property
    def failures(self) -> tuple[tuple[str, int], ...]:
        """Why trials failed, and how many."""
        return failures(self.trials)


def share(trial: TrialRecord) -> float:
    """c of c M + (1 - c) m, where the trial added the member m to the merge M."""
    return 1 - trial.weights[trial.tried]


def by_strategy(trials: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """In the order of the search."""
    found: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        found.setdefault(trial.strategy, []).append(trial)
    return found


def steps(trials: Sequence[TrialRecord], start: float) -> list[Step]:
    """One heuristic's trials by the member that each tried, in order; it began with a model that scores `start`."""
    found, beat = [], start
    for member, group in groupby(trials, key=lambda trial: trial.tried):
        tried = tuple(group)
        best = top(tried)
        found.append(Step(member, tried, beat, best))
        if found[-1].taken and best is not None and best.score is not None:
            beat = best.score.mean
    return found


def top(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial of the highest score, the first of equals."""
    scored = [(trial.score.mean, trial) for trial in trials if trial.score is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def best_so_far(trials: Sequence[TrialRecord]) -> list[float | None]:
    """After each trial the highest score until then; None before the first that was scored."""
    found: list[float | None] = []
    best: float | None = None
    for trial in trials:
        if trial.score is not None:
            best = trial.score.mean if best is None else max(best, trial.score.mean)
        found.append(best)
    return found


def failures(trials: Sequence[TrialRecord]) -> tuple[tuple[str, int], ...]:
    """Why trials failed, and how many, the commonest reason first."""
    return tuple(Counter(trial.failure for trial in trials if trial.failure is not None).most_common())


def kept(cluster: ClusterRecord) -> TrialRecord | None:
    """The trial that found the cluster's merge; None where a model was kept whole."""
    same = (trial for trial in cluster.trials if trial.score is not None and trial.said == cluster.said)
    return next(same, None)
