"""Candidates scored on this machine: in this process on one device, by a process each on several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from builder.executors import Failed, Job
from builder.proxy import programs
from builder.proxy.bench import Bench, Place, Scored
from routers.errors import ModelGlueError

TRIES = 3
"""How often a job is given to a worker that dies on it."""
_FAILURES = (ModelGlueError, ArithmeticError, MemoryError, RuntimeError, ValueError)
"""What a candidate may do to its trial: torch's errors are RuntimeErrors, out of memory included."""


def attempt(bench: Bench, job: Job, done: Callable[[int], None] = lambda _: None) -> Scored | Failed:
    """The job's result; what goes wrong with the candidate is its failure."""
    try:
        return bench.score(job.candidate, job.specs, done)
    except _FAILURES as exc:
        bench.forget()
        return Failed(f"{type(exc).__name__}: {exc}")


class InProcess:
    """One device, this process."""

    workers = 1

    def __init__(self, places: Mapping[str, Place], device: str | None = None) -> None:
        self._bench = Bench(places, device)

    def run(self, jobs: Sequence[Job], done: Callable[[int], None]) -> Iterator[tuple[int, Scored | Failed]]:
        """One after another."""
        for place, job in enumerate(jobs):
            yield place, attempt(self._bench, job, done)

    def close(self) -> None:
        """Free the model."""
        self._bench.forget()


class Processes:
    """A process a device; the trial of one that dies is given to another."""

    def __init__(self, places: Mapping[str, Place], devices: Sequence[str], *, unsafe_code: bool = False) -> None:
        self._arguments, self._devices = (dict(places), unsafe_code), list(devices)
        self._pool = self._start()

    @property
    def workers(self) -> int:
        """One a device."""
        return len(self._devices)

    def run(self, jobs: Sequence[Job], done: Callable[[int], None]) -> Iterator[tuple[int, Scored | Failed]]:
        """As they end."""
        left, tries = dict(enumerate(jobs)), dict.fromkeys(range(len(jobs)), 0)
        while left:
            pending = {self._pool.submit(_work, job): place for place, job in left.items()}
            broken = False
            for future in as_completed(pending):
                place = pending[future]
                result = _result(future)
                if result is not None:
                    del left[place]
                    yield place, result
                else:
                    broken = True
            if broken:
                # Whose worker died cannot be told: all that were left have one try less.
                self._pool = self._start()
                for place in list(left):
                    tries[place] += 1
                    if tries[place] == TRIES:
                        del left[place]
                        yield place, Failed(f"the process that scored it died {TRIES} times: out of memory?")

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        devices: Any = context.Queue()
        for device in self._devices:
            devices.put(device)
        return ProcessPoolExecutor(
            len(self._devices), mp_context=context, initializer=_prepare, initargs=(*self._arguments, devices)
        )


_bench: Bench | None = None
"""A worker process's own."""


def _prepare(places: Mapping[str, Place], unsafe_code: bool, devices: Any) -> None:
    global _bench
    if unsafe_code:
        programs.allow_unsafe()
    _bench = Bench(places, devices.get())


def _work(job: Job) -> Scored | Failed:
    assert _bench is not None
    return attempt(_bench, job)


def _result(future: Future[Scored | Failed]) -> Scored | Failed | None:
    """None where the worker died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None


def gpus() -> list[str]:
    """The CUDA devices of this machine; none without a driver, which is asked before torch is loaded."""
    if not Path("/dev/nvidia0").exists():
        return []
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
