"""The one thread that computes. Experts take turns; in a turn one prompt is read, then all its rows step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from service.engines.base import EngineError
from service.engines.local.expert import Expert
from service.engines.local.lane import Delivery, Lane, Request

log = logging.getLogger(__name__)


class Traffic(NamedTuple):
    """How many requests of an expert run and wait."""

    running: int
    waiting: int


class Worker:
    """Runs requests on a thread of its own; its methods may be called from any thread and never wait for a model.

    `deliver` is called on that thread with what a step brought. Every request that is not cancelled gets a finish or
    an error, whatever happens. `failure` says why nothing runs any more.
    """

    def __init__(self, deliver: Callable[[list[Delivery]], None], max_batch: int, threads: int) -> None:
        self.failure = ""
        self._deliver = deliver
        self._max_batch = max_batch
        self._threads = threads
        self._lanes: dict[str, Lane] = {}
        self._change = threading.Condition()  # guards `failure`, the lanes and who waits in them
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Begin; experts and requests may come at any time."""
        self._thread.start()

    def add(self, expert: Expert) -> None:
        """Take an expert in."""
        lane = Lane(expert, self._max_batch)
        with self._change:
            self._lanes[expert.name] = lane

    def submit(self, request: Request) -> None:
        """Queue a request. Raises EngineError when nothing runs any more."""
        with self._change:
            if self.failure:
                raise EngineError(self.failure)
            self._lanes[request.job.expert].waiting.append(request)
            self._change.notify()

    def cancel(self, request: Request) -> None:
        """Forget a request: at once when it waits, after this step when it runs."""
        request.cancelled = True
        with self._change:
            lane = self._lanes.get(request.job.expert)
            if lane and request in lane.waiting:
                lane.waiting.remove(request)

    def traffic(self, expert: str) -> Traffic:
        """An expert's requests; none while it isn't there."""
        with self._change:
            lane = self._lanes.get(expert)
            return Traffic(len(lane.running), len(lane.waiting)) if lane else Traffic(0, 0)

    def stop(self) -> None:
        """End all requests, after this step."""
        with self._change:
            self.failure = self.failure or "the engine is closed"
            self._change.notify()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end, at most so long."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._threads)
            while lanes := self._busy():
                for lane in lanes:
                    self._turn(lane)
        except BaseException as exc:  # whatever it was, no reader may wait for ever
            log.exception("the device thread died")
            with self._change:
                self.failure = f"the device thread died: {exc!r}"
        finally:
            with self._change:
                left = [request for lane in self._lanes.values() for request in (*lane.running, *lane.waiting)]
                self._lanes.clear()
            self._deliver([(request, EngineError(self.failure)) for request in left])

    def _busy(self) -> list[Lane]:
        """The lanes with something to do; waits until there is one. An empty list: stop."""
        with self._change:
            while not self.failure:
                if lanes := [lane for lane in self._lanes.values() if lane.running or lane.waiting]:
                    return lanes
                self._change.wait()
            return []

    def _turn(self, lane: Lane) -> None:
        with self._change:
            request = lane.waiting.popleft() if lane.waiting and not lane.full else None
        if request is not None:
            self._deliver(lane.admit(request))
        self._deliver(lane.step())
