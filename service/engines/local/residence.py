"""Which experts' weights are in memory: at most so many bytes of them, the longest unused go first.

An expert that is asked for and not there is loaded on another thread, while the others go on. If nothing that is idle
can make way, the longest unused one lets nobody in any more once it was waited for long enough: so a stream of requests
for one expert cannot keep another out, nor do two take turns at every request.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.engines.base import EngineError, Status
from service.engines.local import room
from service.engines.local.forward import Model
from service.engines.local.lane import Lane
from service.engines.local.request import Request

log = logging.getLogger(__name__)

LOADERS = 2
Tell = Callable[[str, Status], None]


def failed_to_load(folder: Path, exc: Exception) -> Status:
    """The state of an expert whose folder does not load; transformers raises whatever it meets there."""
    return Status("failed", str(exc) if isinstance(exc, EngineError) else f"{folder} does not load: {exc!r}")


class Residence:
    """Loads and drops the models of lanes. All but `wake` and `tell` is called on the device thread.

    limit: bytes of all weights, None is any. patience: seconds after which who waits for memory is let in. wake: called
    on a loader's thread when a model has come. tell: called with every change of an expert's state.
    """

    def __init__(self, limit: int | None, patience: float, wake: Callable[[], None], tell: Tell) -> None:
        self._limit, self._patience, self._wake, self._tell = limit, patience, wake, tell
        self._pool = ThreadPoolExecutor(LOADERS, "loader")
        self._coming: dict[str, Lane] = {}
        self._come: deque[tuple[Lane, Model | Exception]] = deque()
        self._resident: list[Lane] = []
        self._since: dict[str, float] = {}

    def begin(self, lane: Lane) -> None:
        """Load a new lane's model, if there is room for it now."""
        if self._limit is not None and lane.expert.bytes > self._limit:
            need, room = lane.expert.bytes / 1e9, self._limit / 1e9
            reason = f"its weights are {need:.2f} GB, the memory budget is {room:.2f} GB: give --memory-budget more"
            self._tell(lane.expert.name, Status("failed", reason))
        elif self._room(lane.expert.bytes):
            self._start(lane)
        else:
            self._tell(lane.expert.name, Status("ready", "not in memory"))

    def settle(self, lanes: Iterable[Lane]) -> list[tuple[Lane, Exception]]:
        """Take in the models that have come; those of all lanes whose models could not be loaded."""
        failed = []
        if not any(lane.waiting and lane.model is None for lane in lanes):
            for lane in self._resident:  # whoever it closed for has left
                lane.closing = False
        while self._come:
            lane, found = self._come.popleft()
            del self._coming[lane.expert.name]
            if isinstance(found, Exception):
                log.error("%s failed to load", lane.expert.name, exc_info=found)
                failed.append((lane, found))
                self._tell(lane.expert.name, failed_to_load(lane.expert.folder, found))
            else:
                lane.model = found
                self._resident.append(lane)
                self._tell(lane.expert.name, Status("ready"))
        return failed

    def summon(self, lanes: Sequence[Lane], request: Request) -> bool:
        """Whether all lanes of a request that wants to run are there; if not, see to it that they will be."""
        missing = [lane for lane in lanes if lane.model is None]
        for lane in missing:
            if lane.expert.name not in self._coming:
                since = self._since.setdefault(lane.expert.name, time.monotonic())
                if self._make_room(lane, lanes, patient=time.monotonic() - since < self._patience):
                    self._start(lane)
        for lane in lanes:
            if lane.model is not None:
                self._use(lane)
        return not missing

    def close(self) -> None:
        """Load nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, lane: Lane) -> None:
        self._since.pop(lane.expert.name, None)
        self._coming[lane.expert.name] = lane
        self._pool.submit(self._load, lane, first=lane.model is None and not lane.loads)
        lane.loads += 1

    def _load(self, lane: Lane, *, first: bool) -> None:
        name = lane.expert.name

        def progress(share: float) -> None:
            if first:  # later, requests wait for it as for anything else
                self._tell(name, Status("loading", f"{round(100 * share)} % of the weights"))

        try:
            found: Model | Exception = lane.expert.load(progress)
        except Exception as exc:  # transformers raises whatever it meets in the folder
            found = exc
        room.give_back()
        self._come.append((lane, found))
        self._wake()

    def _make_room(self, lane: Lane, keep: Collection[Lane], *, patient: bool) -> bool:
        while not self._room(lane.expert.bytes):
            others = [each for each in self._resident if each not in keep]
            idle = [each for each in others if not each.running and (each.closing or not each.waiting)]
            if not idle:
                if not patient and others and not any(each.closing for each in others):
                    others[0].closing = True
                return False
            self._drop(idle[0])
        return True

    def _room(self, need: int) -> bool:
        taken = sum(lane.expert.bytes for lane in (*self._resident, *self._coming.values()))
        return self._limit is None or taken + need <= self._limit

    def _use(self, lane: Lane) -> None:
        """The longest unused is first in the list."""
        self._resident.remove(lane)
        self._resident.append(lane)

    def _drop(self, lane: Lane) -> None:
        self._resident.remove(lane)
        lane.model, lane.closing = None, False
        lane.evictions += 1
