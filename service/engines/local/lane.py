"""One expert's requests: who waits, who runs, and one step of theirs. Knows no threads."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from service.engines.base import EngineError, Finish, Job
from service.engines.local.batch import Batch, batchable
from service.engines.local.expert import Expert
from service.engines.local.sampling import Sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer; with a finish it is the last, and with "stop" it is no text."""

    id: int
    finish: Finish | None


@dataclass(eq=False, slots=True)
class Request:
    """A job and the way back to its reader: tokens up to one with a finish, or an error."""

    job: Job
    inbox: asyncio.Queue[Token | EngineError] = field(default_factory=asyncio.Queue)
    cancelled: bool = False


Delivery = tuple[Request, Token | EngineError]


@dataclass(eq=False, slots=True)
class _Row:
    request: Request
    sampler: Sampler = field(init=False)
    count: int = 0
    last: int = -1
    done: bool = False


class Lane:
    """Its rows are those of the batch, in order. What fails ends with an EngineError and leaves the lane working."""

    def __init__(self, expert: Expert, max_batch: int) -> None:
        self.waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        self._expert = expert
        self._batch = Batch(expert.model)
        self._limit = max_batch if batchable(expert.model) else 1

    @property
    def running(self) -> list[Request]:
        """The requests of the rows."""
        return [row.request for row in self._rows]

    @property
    def full(self) -> bool:
        """Whether nobody can be admitted."""
        return len(self._rows) >= self._limit

    def admit(self, request: Request) -> list[Delivery]:
        """Read a prompt alone and pick its first token; if that fails, it fails alone."""
        row = _Row(request)
        self._rows.append(row)  # first of all: should the thread die from here on, its reader is told
        try:
            row.sampler = Sampler(request.job.sampling, self._expert.model.device)
            logits_V, cache = self._batch.read(request.job.tokens)
        except Exception as exc:
            self._rows.pop()
            return [(request, self._error(exc))]
        first = self._pick(row, logits_V)
        if row.done:
            self._rows.pop()
            return [first]
        try:
            self._batch.join(cache, len(request.job.tokens))
        except Exception as exc:
            return [first, *self._abandon(exc)]
        return [first]

    def step(self) -> list[Delivery]:
        """The next token of every row that is still wanted."""
        try:
            self._leave(row for row in self._rows if row.request.cancelled)
            if not self._rows:
                return []
            logits_BV = self._batch.step([row.last for row in self._rows])
            picks = [self._pick(row, logits_V) for row, logits_V in zip(self._rows, logits_BV, strict=True)]
        except Exception as exc:
            return self._abandon(exc)
        try:
            self._leave(row for row in self._rows if row.done)
        except Exception as exc:
            return [*picks, *self._abandon(exc)]
        return picks

    def _pick(self, row: _Row, logits_V: Tensor) -> Delivery:
        try:
            row.last = row.sampler.pick(logits_V)
        except Exception as exc:
            row.done = True
            return row.request, self._error(exc)
        row.count += 1
        finish: Finish | None = None
        if row.last in self._expert.eos:
            finish = "stop"
        elif row.count >= (row.request.job.sampling.max_tokens or 0):
            finish = "length"
        row.done = finish is not None
        return row.request, Token(row.last, finish)

    def _leave(self, rows: Iterable[_Row]) -> None:
        gone = set(rows)
        stay = [place for place, row in enumerate(self._rows) if row not in gone]
        self._batch.keep(stay)
        self._rows = [self._rows[place] for place in stay]

    def _abandon(self, exc: Exception) -> list[Delivery]:
        """End every row: nobody knows what the cache holds after a step that failed."""
        ended: list[Delivery] = [(row.request, self._error(exc)) for row in self._rows if not row.done]
        self._rows = []
        self._batch.clear()
        return ended

    def _error(self, exc: Exception) -> EngineError:
        log.error("%s failed", self._expert.name, exc_info=exc)
        return EngineError(f"{self._expert.name} failed: {exc}")
