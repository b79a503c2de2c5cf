"""Who scores candidates: this process, one process a device, or the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from builder.candidate import Candidate
from builder.proxy.bench import Scored
from builder.proxy.task import Spec


@dataclass(frozen=True, slots=True)
class Failed:
    """A candidate without a score, and why; never a score of 0."""

    reason: str


@dataclass(frozen=True, slots=True)
class Job:
    """A candidate, and the tasks that it has no scores on yet."""

    candidate: Candidate
    specs: tuple[Spec, ...]


class Executor(Protocol):
    """Runs jobs on whatever it has."""

    @property
    def workers(self) -> int:
        """How many jobs run at a time."""
        ...

    def run(self, jobs: Sequence[Job], done: Callable[[int], None]) -> Iterator[tuple[int, Scored | Failed]]:
        """Each job's place and result, as they end; `done` hears of requests answered, where that can be heard."""
        ...

    def close(self) -> None:
        """Let go of the workers."""
        ...
