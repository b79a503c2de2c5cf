"""The one thread that computes. Experts take turns; in a turn one step of all its requests is run.

A step gives every request that writes one token more, and reads a bounded number of the tokens of prompts, so a long
prompt holds nobody up. A request that needs a page where none is left takes those of the request that came last, which
is computed again later: it goes on with the same numbers, and so the same text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import torch
from torch import Tensor

from service.engines.base import EngineError, Load, UnsupportedError
from service.engines.local import ops
from service.engines.local.expert import Expert
from service.engines.local.lane import Lane, Part
from service.engines.local.memory import Memory
from service.engines.local.request import Context, News, Prompted, Request, Token
from service.engines.local.residence import Residence, Tell
from service.engines.local.sampler import Pick, blend, pick, prompt_scores

log = logging.getLogger(__name__)

POLL = 0.05
"""Seconds between two looks at who waits for memory."""
Delivery = tuple[Request, News]


class Worker:
    """Runs requests on a thread of its own; its methods may be called from any thread and never wait for a model.

    `deliver` is called on that thread with what a step brought, `tell` with the states of experts. Every request that
    is not cancelled gets a finish or an error, whatever happens. `failure` says why nothing runs any more. most:
    requests of an expert at a time; chunk: tokens of prompts in a round of all experts, half of it while somebody
    writes. memory_bytes, patience: residence.py.
    """

    def __init__(
        self,
        deliver: Callable[[list[Delivery]], None],
        tell: Tell = lambda name, status: None,
        *,
        most: int,
        chunk: int,
        threads: int,
        memory_bytes: int | None = None,
        patience: float = 5.0,
    ) -> None:
        self.failure = ""
        self._residence = Residence(memory_bytes, patience, self._wake, tell)
        self._deliver = deliver
        self._most, self._chunk, self._threads = most, chunk, threads
        self._lanes: dict[str, Lane] = {}
        self._arrived: deque[Request] = deque()
        self._waiting: list[Request] = []  # by arrival
        self._arrivals = count()
        self._change = threading.Condition()  # guards `failure`, the lanes' dict, and what has arrived
        self._added: deque[Lane] = deque()
        self._turn = 0
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Begin; experts and requests may come at any time."""
        self._thread.start()

    def add(self, expert: Expert, memory: Memory) -> None:
        """Take an expert in, and load its weights if there is room."""
        lane = Lane(expert, memory)
        with self._change:
            self._lanes[expert.name] = lane
            self._added.append(lane)
            self._change.notify()

    def fits(self, experts: Iterable[str], tokens: int) -> bool:
        """Whether the memory could hold so many tokens in all of these experts, if nobody else were there."""
        shelves = [self._lanes[expert].shelf for expert in experts]
        return sum(shelf.chunks_for(tokens) for shelf in shelves) <= shelves[0].memory.chunks

    def submit(self, request: Request) -> None:
        """Queue a request. Raises EngineError when nothing runs any more."""
        with self._change:
            if self.failure:
                raise EngineError(self.failure)
            request.arrival, request.came = next(self._arrivals), time.monotonic()
            self._arrived.append(request)
            self._change.notify()

    def cancel(self, request: Request) -> None:
        """Forget a request, after the step that runs."""
        request.cancelled = True
        self._wake()

    def loads(self) -> dict[str, Load]:
        """Every expert's load, but who runs and who waits."""
        with self._change:
            return {name: _load(lane) for name, lane in self._lanes.items()}

    def stop(self) -> None:
        """End all requests, after this step."""
        with self._change:
            self.failure = self.failure or "the engine is closed"
            self._change.notify()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end, at most so long."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _wake(self) -> None:
        with self._change:
            self._change.notify()

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._threads)
            ops.set_threads(self._threads)
            while self._wait():
                self._round(list(self._lanes.values()))
        except BaseException as exc:  # whatever it was, no reader may wait for ever
            log.exception("the device thread died")
            with self._change:
                self.failure = f"the device thread died: {exc!r}"
        finally:
            self._residence.close()
            with self._change:
                left = dict.fromkeys([*self._running(), *self._waiting, *self._arrived])
                self._lanes.clear()
            self._deliver([(request, EngineError(self.failure)) for request in left])

    def _wait(self) -> bool:
        """Take in who has arrived; waits until there is something to do. False: stop."""
        with self._change:
            while not self.failure:
                while self._added:
                    self._residence.begin(self._added.popleft())
                while self._arrived:
                    self._waiting.append(self._arrived.popleft())
                self._sweep()
                self._settle()
                if self._running() or any(_open(self._lanes_of(request)) for request in self._waiting):
                    return True
                # Who waits for memory that others use is looked after now and then.
                self._change.wait(POLL if self._waiting else self._residence.due())
            return False

    def _sweep(self) -> None:
        """Drop those whose reader has left."""
        for request in [each for each in (*self._running(), *self._waiting) if each.cancelled]:
            self._end(request)

    def _settle(self) -> None:
        """See to it that the experts come that are waited for; who waits for one that does not load fails."""
        waiting = [(request, self._lanes_of(request)) for request in self._waiting]
        for request, expert, failure in self._residence.settle(waiting):
            self._fail(expert, request, failure)

    def _round(self, lanes: Sequence[Lane]) -> None:
        """One step of every expert that has something to do; each is the first in its turn."""
        self._turn += 1
        first = self._turn % len(lanes) if lanes else 0
        self._admit()
        writing = any(request.count for request in self._running())
        budget = max(self._chunk // 2, 1) if writing else self._chunk
        for lane in [*lanes[first:], *lanes[:first]]:
            if lane.busy:
                budget -= self._step(lane, max(budget, 1))

    def _admit(self) -> None:
        """Let in who waits and has all its experts, as they arrived; one without room holds up those behind it."""
        full: set[Lane] = set()
        for request in list(self._waiting):
            lanes = self._lanes_of(request)
            if lanes[0] in full or not _open(lanes):
                continue
            try:
                if self._enter(request, lanes):
                    continue
                if self._running():
                    full.add(lanes[0])
                    continue
                lanes[0].memory.clear()  # what is known may lie scattered over more chunks than it needs
                if not self._enter(request, lanes):
                    raise EngineError("its prompt does not fit into the key-value memory")
            except Exception as exc:
                self._fail(request.job.expert, request, exc)

    def _enter(self, request: Request, lanes: Sequence[Lane]) -> bool:
        if any(len(lane.running) >= self._most for lane in lanes):
            return False
        if not request.contexts:
            tokens = request.job.tokens
            request.contexts = [
                Context(lane.expert.name, lane.shelf, list(tokens), lane.model.route(tokens))
                for lane in lanes
                if lane.model is not None
            ]
        for context in request.contexts:
            # What is scored is computed anew.
            context.take_over(request.told if request.scoring else None)
        if not all(context.make_room(context.pending) for context in request.contexts):
            for context in request.contexts:
                context.leave()
            return False
        self._waiting.remove(request)
        for lane, context in zip(lanes, request.contexts, strict=True):
            lane.enter(request, context)
        self._residence.use(lanes)
        if not request.preempted:
            request.queued = time.monotonic() - request.came
        return True

    def _step(self, lane: Lane, budget: int) -> int:
        """Run one; how many tokens of prompts it read."""
        parts = self._with_room(lane, lane.parts(budget))
        if not parts:
            return 0
        try:
            self._run_parts(lane, parts)
        except Exception as exc:
            if len(parts) == 1:
                self._fail(lane.expert.name, parts[0].request, exc)
            else:  # one of them may be to blame
                for part in parts:
                    self._step_alone(lane, part, exc)
        return sum(part.count for part in parts if part.count > 1)

    def _step_alone(self, lane: Lane, part: Part, failure: Exception) -> None:
        try:
            if part.context.computed != part.start:  # it was not the model that failed
                raise failure
            self._run_parts(lane, [part])
        except Exception as exc:
            self._fail(lane.expert.name, part.request, exc)

    def _run_parts(self, lane: Lane, parts: Sequence[Part]) -> None:
        """Raises what the model raises; the contexts are as before then."""
        news: list[Delivery] = []
        ready: list[tuple[Request, Tensor]] = []
        for part, logits_RV in lane.run(parts):
            try:
                ready += self._result(part, logits_RV, news)
            except Exception as exc:  # the others' results are as good as ever
                self._fail(lane.expert.name, part.request, exc)
        self._pick(ready, news)
        self._deliver(news)

    def _with_room(self, lane: Lane, parts: Sequence[Part]) -> list[Part]:
        """The parts whose tokens have pages; those of later requests are taken away where they lack."""
        for part in sorted(parts, key=lambda part: part.request.arrival):
            while part.context.pages and not part.context.make_room(part.count):
                self._preempt(max(self._running(), key=lambda request: request.arrival))
        return [part for part in parts if part.context.pages]

    def _result(self, part: Part, logits_RV: Tensor, news: list[Delivery]) -> list[tuple[Request, Tensor]]:
        """What is ready to be picked from after a part; scores of the prompt go into the news."""
        request, context = part.request, part.context
        top = request.job.sampling.prompt_logprobs
        if top is not None and request.scoring:
            first = max(request.told - part.start, 0)  # those before were told before it gave way
            following = context.tokens[part.start + first + 1 : context.computed + 1]
            if following:
                scores = prompt_scores(logits_RV[first : first + len(following)], following, top)
                news.append((request, Prompted(scores)))
                request.told += len(following)
        if context.pending or not part.rows:
            return []
        if not request.most:
            request.over = True
            news.append((request, Token(None, "length", request.cached, request.queued)))
            self._end(request)
            return []
        context.logits_V = logits_RV[-1]
        found = [each.logits_V for each in request.contexts if each.logits_V is not None]
        if len(found) < len(request.contexts):
            return []
        for each in request.contexts:
            each.logits_V = None
        return [(request, blend(found, list(request.job.experts.values())))]

    def _pick(self, ready: Sequence[tuple[Request, Tensor]], news: list[Delivery]) -> None:
        if not ready:
            return
        try:
            picks = pick([request.row for request, _ in ready], torch.stack([logits_V for _, logits_V in ready]))
        except Exception as exc:
            if len(ready) == 1:
                self._fail(ready[0][0].job.expert, ready[0][0], exc)
            else:  # one of them is to blame, and none has gone on
                for each in ready:
                    self._pick([each], news)
            return
        for (request, _), found in zip(ready, picks, strict=True):
            if isinstance(found, Pick):
                news.append((request, request.take(found)))
            else:
                own = isinstance(found, UnsupportedError)
                news.append((request, found if own else EngineError(f"{request.job.expert} failed: {found}")))
                request.over = True
            if request.over:
                self._end(request)

    def _preempt(self, request: Request) -> None:
        """Take a request's pages away; it waits again, before all that came later."""
        self._lanes[request.job.expert].preemptions += 1
        request.preempted = True
        self._end(request)
        self._waiting.append(request)
        self._waiting.sort(key=lambda each: each.arrival)

    def _end(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        for lane in self._lanes_of(request):
            lane.forget(request)
        for context in request.contexts:
            context.leave()

    def _fail(self, expert: str, request: Request, exc: Exception) -> None:
        log.error("%s failed a request", expert, exc_info=exc)
        request.over = True
        self._end(request)
        self._deliver([(request, EngineError(f"{expert} failed: {exc}"))])

    def _lanes_of(self, request: Request) -> list[Lane]:
        return [self._lanes[name] for name in request.job.experts]

    def _running(self) -> list[Request]:
        return [request for lane in self._lanes.values() for request, _ in lane.running]


def _open(lanes: Iterable[Lane]) -> bool:
    return all(lane.open for lane in lanes)


def _load(lane: Lane) -> Load:
    memory = lane.memory
    held = lane.shelf.in_use * lane.shelf.page / (memory.chunks * memory.chunk)
    return Load(
        kv=held,
        queries=lane.queries,
        hits=lane.hits,
        preemptions=lane.preemptions,
        evictions=lane.evictions,
        resident=lane.model is not None,
    )
