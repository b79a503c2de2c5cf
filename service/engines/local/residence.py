"""Which experts' weights are in memory: at most so many bytes of them, the longest unused go first.

An expert that is asked for and not there is loaded on another thread, while the others go on. If nothing that is idle
can make way, the longest unused one lets nobody in any more once it was waited for long enough: so a stream of requests
for one expert cannot keep another out, nor do two take turns at every request. Who waits the longest comes first, and
what was fetched for a request stays until it is let in: so one that needs several experts gets them together.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.engines.base import EngineError, Status
from service.engines.local import room
from service.engines.local.forward import Model
from service.engines.local.lane import Lane
from service.engines.local.request import Request

log = logging.getLogger(__name__)

LOADERS = 2
RETRY = 30.0
"""Seconds after a load that failed until the next: memory or files may have been short for a moment only."""
Tell = Callable[[str, Status], None]
Wait = tuple[Request, Sequence[Lane]]
"""Who waits, and for which experts."""


def failed_to_load(folder: Path, exc: Exception) -> Status:
    """The state of an expert whose folder does not load; transformers raises whatever it meets there."""
    return Status("failed", str(exc) if isinstance(exc, EngineError) else f"{folder} does not load: {exc!r}")


class Residence:
    """Loads and drops the models of lanes. All but `wake` and `tell` is called on the device thread.

    limit: bytes of all weights, None is any. patience: seconds after which who waits for memory is let in. wake: called
    on a loader's thread when a model has come. tell: called with every change of an expert's state. retry: RETRY.
    """

    def __init__(
        self, limit: int | None, patience: float, wake: Callable[[], None], tell: Tell, retry: float = RETRY
    ) -> None:
        self._limit, self._patience, self._wake, self._tell, self._retry = limit, patience, wake, tell, retry
        self._pool = ThreadPoolExecutor(LOADERS, "loader")
        self._coming: set[Lane] = set()
        self._come: deque[tuple[Lane, Model | Exception, bool]] = deque()
        self._failed: dict[Lane, tuple[float, Exception]] = {}
        self._resident: list[Lane] = []
        self._since: dict[Lane, float] = {}
        self._fetched_for: set[Request] = set()

    def begin(self, lane: Lane) -> None:
        """Load a new lane's model, if there is room for it now."""
        if self._limit is not None and lane.expert.bytes > self._limit:
            need, room = lane.expert.bytes / 1e9, self._limit / 1e9
            reason = f"its weights are {need:.2f} GB, the memory budget is {room:.2f} GB: give --memory-budget more"
            self._tell(lane.expert.name, Status("failed", reason))
        elif self._room(lane.expert.bytes):
            self._start(lane, asked=False)
        else:
            self._tell(lane.expert.name, Status("ready", "not in memory"))

    def settle(self, waiting: Sequence[Wait]) -> list[tuple[Request, str, Exception]]:
        """Take in what has come, and fetch what is missing for who waits; the longest waiting is the first of them.

        Returns those who wait for an expert that did not load, with its name and the reason.
        """
        self._take_in()
        lost = {request: lane for request, lanes in waiting for lane in lanes if lane in self._failed}
        self._fetch([(request, lanes) for request, lanes in waiting if request not in lost])
        return [(request, lane.expert.name, self._failed[lane][1]) for request, lane in lost.items()]

    def use(self, lanes: Sequence[Lane]) -> None:
        """Note that they are used now: the longest unused is first in the list."""
        for lane in lanes:
            self._resident.remove(lane)
            self._resident.append(lane)

    def due(self) -> float | None:
        """Seconds until an expert that did not load may be tried again, if there is one."""
        return max(min(until for until, _ in self._failed.values()) - time.monotonic(), 0) if self._failed else None

    def close(self) -> None:
        """Load nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take_in(self) -> None:
        for lane, (until, exc) in list(self._failed.items()):
            if time.monotonic() >= until:
                del self._failed[lane]
                self._tell(lane.expert.name, Status("ready", f"not in memory; when it was last loaded: {exc}"))
        while self._come:
            lane, found, asked = self._come.popleft()
            self._coming.remove(lane)
            if not isinstance(found, Exception):
                lane.model = found
                self._resident.append(lane)
                self._tell(lane.expert.name, Status("ready"))
                continue
            log.error("%s failed to load", lane.expert.name, exc_info=found)
            self._tell(lane.expert.name, failed_to_load(lane.expert.folder, found))
            if asked:  # what does not load at the start is broken, and stays so
                self._failed[lane] = time.monotonic() + self._retry, found

    def _fetch(self, waiting: Sequence[Wait]) -> None:
        now = time.monotonic()
        wanted = {lane for _, lanes in waiting for lane in lanes}
        self._since = {lane: since for lane, since in self._since.items() if lane in wanted}
        self._fetched_for &= {request for request, _ in waiting}
        for lane in self._resident:  # unless somebody still needs it to close
            lane.closing = False
        keep: set[Lane] = set()
        for request, lanes in waiting:
            if request in self._fetched_for or any(lane.model is None for lane in lanes):
                keep.update(lanes)
            for lane in lanes:
                if lane.model is not None or lane in self._coming:
                    continue
                patient = now - self._since.setdefault(lane, now) < self._patience
                if self._make_room(lane, keep, wanted, patient=patient):
                    self._start(lane, asked=True)
                    self._fetched_for.add(request)
                elif not patient:
                    return  # what gets free from now on is for it

    def _start(self, lane: Lane, *, asked: bool) -> None:
        self._since.pop(lane, None)
        self._coming.add(lane)
        self._pool.submit(self._load, lane, asked=asked)

    def _load(self, lane: Lane, *, asked: bool) -> None:
        name = lane.expert.name

        def progress(share: float) -> None:
            if not asked:  # else requests wait for it as for anything else
                self._tell(name, Status("loading", f"{round(100 * share)} % of the weights"))

        try:
            found: Model | Exception = lane.expert.load(progress)
        except Exception as exc:  # transformers raises whatever it meets in the folder
            found = exc
        room.give_back()
        self._come.append((lane, found, asked))
        self._wake()

    def _make_room(self, lane: Lane, keep: Collection[Lane], wanted: Collection[Lane], *, patient: bool) -> bool:
        """Whether there is room for a lane's model. Who is no longer patient also drops, and closes, what is wanted."""
        while not self._room(lane.expert.bytes):
            others = [each for each in self._resident if each not in keep]
            idle = [each for each in others if not each.running and not (patient and each in wanted)]
            if not idle:
                if not patient and others:
                    others[0].closing = True
                return False
            self._drop(min(idle, key=lambda each: each in wanted))
        return True

    def _room(self, need: int) -> bool:
        taken = sum(lane.expert.bytes for lane in (*self._resident, *self._coming))
        return self._limit is None or taken + need <= self._limit

    def _drop(self, lane: Lane) -> None:
        self._resident.remove(lane)
        lane.model, lane.closing = None, False
        lane.evictions += 1
