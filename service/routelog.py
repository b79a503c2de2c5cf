"""Writes the route log (routers/routelog.py) in a thread of its own: no request waits for it, or fails with it.

SQLite and not JSON lines: feedback finds its decision, batches appear whole, and a replay reads while it is written.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from routers import routelog
from routers.bundle import Bundle
from routers.routelog import COLUMNS, Logged, RouteLogError
from service.completions import Part
from service.errors import UnavailableError, UnknownRequestError
from service.record import Record

MOST_ROWS: Final = 1_000_000
"""Decisions that are kept, about 2 KB each; the oldest go first."""
MOST_WAITING: Final = 10_000
"""Decisions that may wait for the disk; more are lost, and counted."""
BATCH_SECONDS: Final = 0.1
LAST_SECONDS: Final = 10.0
"""Seconds that a disk has for what still waits at the end; a disk that hangs holds nothing up."""
CERTAIN: Final = 1.0
"""The propensity of what nothing was left to chance in."""

INSERT: Final = f"INSERT INTO decision ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
FIND: Final = "SELECT id FROM decision WHERE request = ? AND prompt = ? AND key IS ? ORDER BY id DESC LIMIT 1"
RATE: Final = "INSERT INTO feedback (decision, at, score, comment) VALUES (?, ?, ?, ?)"
# By number: to count the rows would be to read them all.
FORGET: Final = "DELETE FROM decision WHERE id <= (SELECT max(id) FROM decision) - ?"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Decided:
    """A decision to be written: one prompt of a request."""

    record: Record
    bundle: Bundle
    number: int
    part: Part


@dataclass(frozen=True, slots=True, eq=False)
class _Rated:
    """Feedback to be written; `known` is told whether there was such a decision."""

    request: str
    prompt: int
    key: str | None
    score: float
    comment: str | None
    known: Future[bool] = field(default_factory=Future)


class RouteLog:
    """A log that is open; to be closed. `lost` is told how many decisions could not be written."""

    def __init__(self, path: Path, *, texts: bool = False, most: int = MOST_ROWS) -> None:
        """texts: keep the prompts too. Raises RouteLogError where there can be no log."""
        self.lost: Callable[[int], None] = lambda _: None
        self._path, self._texts, self._most = path, texts, most
        self._open().close()
        self._queue: queue.Queue[_Decided | _Rated | None] = queue.Queue(MOST_WAITING)
        self._space: tuple[Bundle, str] | None = None
        self._thread = threading.Thread(target=self._run, name="route log", daemon=True)
        self._thread.start()

    def decided(self, record: Record) -> None:
        """Log the decisions of a request that has ended: only put into a queue here."""
        for number, part in enumerate(record.parts):
            assert record.bundle is not None
            try:
                self._queue.put_nowait(_Decided(record, record.bundle, number, part))
            except queue.Full:
                self.lost(1)

    async def rated(self, request: str, prompt: int, key: str | None, score: float, comment: str | None) -> None:
        """Keep feedback on a decision. Raises UnknownRequestError, or UnavailableError where the log is broken."""
        rated = _Rated(request, prompt, key, score, comment)
        try:
            self._queue.put_nowait(rated)
            known = await asyncio.wrap_future(rated.known)
        except (queue.Full, sqlite3.Error, RouteLogError) as exc:
            raise UnavailableError("the route log cannot be written now: send the feedback again later") from exc
        if not known:
            raise UnknownRequestError(f"no request {request!r} is in the route log: send an answer's x-request-id")

    def close(self, seconds: float = LAST_SECONDS) -> None:
        """Write what waits, then end; what is not on the disk by then is lost."""
        until = time.monotonic() + seconds
        with suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(max(until - time.monotonic(), 0))
        if self._thread.is_alive():
            logger.error("the route log %s could not be written to its end in %g seconds", self._path, seconds)

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        going = True
        while going:
            batch, going = self._batch()
            try:
                connection = connection or self._open()
                self._write(connection, batch)
            except Exception as exc:  # whatever is wrong with the log is no request's affair
                logger.error("%d entries of the route log are lost: %s", len(batch), exc)
                self._give_up(batch, exc)
                if connection is not None:
                    with suppress(sqlite3.Error):
                        connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def _open(self) -> sqlite3.Connection:
        try:
            return routelog.create(self._path)
        except sqlite3.Error as exc:
            raise RouteLogError(f"the route log {self._path} cannot be written: {exc}") from exc

    def _batch(self) -> tuple[list[_Decided | _Rated], bool]:
        """What is there, once anything is and a moment has passed for others to join it; and whether to go on."""
        batch: list[_Decided | _Rated] = []
        until = None
        while until is None or (left := until - time.monotonic()) > 0:
            try:
                each = self._queue.get(timeout=None if until is None else left)
            except queue.Empty:
                break
            if each is None:
                return batch, False
            # Feedback whose request was cut short is not kept; what is kept cannot be cancelled, and so is answered.
            if isinstance(each, _Decided) or each.known.set_running_or_notify_cancel():
                batch.append(each)
                until = until or time.monotonic() + BATCH_SECONDS
        return batch, True

    def _write(self, connection: sqlite3.Connection, batch: Sequence[_Decided | _Rated]) -> None:
        known: list[tuple[Future[bool], bool]] = []
        with connection:
            for each in batch:
                if isinstance(each, _Decided):
                    connection.execute(INSERT, self._logged(each).row())
                else:
                    known.append((each.known, _rate(connection, each)))
            connection.execute(FORGET, (self._most,))
        for future, found in known:  # only now it is on the disk
            future.set_result(found)

    def _give_up(self, batch: Sequence[_Decided | _Rated], exc: Exception) -> None:
        self.lost(sum(isinstance(each, _Decided) for each in batch))
        for each in batch:
            if isinstance(each, _Rated) and not each.known.done():
                each.known.set_exception(sqlite3.OperationalError(str(exc)))

    def _logged(self, decided: _Decided) -> Logged:
        record, part, bundle = decided.record, decided.part, decided.bundle
        decision, limits = part.decision, part.decision.limits
        return Logged(
            at=record.at,
            request=record.id,
            prompt=decided.number,
            key=record.key,
            digest=routelog.text_digest(decision.text),
            text=decision.text if self._texts else None,
            space=self._space_of(bundle),
            vector_D=bundle.router.features.vector(decision.text),
            router=routelog.router_digest(bundle),
            expert=decision.route.expert,
            reason=decision.route.reason,
            propensity=CERTAIN,
            k=limits.k,
            cost_weight=limits.cost_weight,
            experts=decision.route.ranking,
            tokens=sum(answer.tokens for answer in part.answers),
            finish=part.answers[0].finish,
        )

    def _space_of(self, bundle: Bundle) -> str:
        """Of the last bundle it is kept: a table of embeddings takes a moment to hash."""
        if self._space is None or self._space[0] is not bundle:
            self._space = bundle, routelog.space_digest(bundle)
        return self._space[1]


def _rate(connection: sqlite3.Connection, rated: _Rated) -> bool:
    found = connection.execute(FIND, (rated.request, rated.prompt, rated.key)).fetchone()
    if found is None:
        return False
    connection.execute(RATE, (found[0], time.time(), rated.score, rated.comment))
    return True
