"""Candidates scored by the workers of a Ray cluster; the extra `ray` installs it.

The models' folders must be at the same paths on every machine. A worker keeps its live model between trials.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from builder.errors import SearchError
from builder.executors import Failed, Job
from builder.executors.local import TRIES, attempt
from builder.proxy import programs
from builder.proxy.bench import Bench, Place, Scored

Facts = tuple[tuple[tuple[str, Place], ...], bool]


class Ray:
    """Ray tasks, one a GPU or, without GPUs, one a processor core.

    address: of a running cluster; None starts one on this machine, or joins the one that RAY_ADDRESS names. Raises
    SearchError where Ray is not installed or the cluster cannot be reached.
    """

    def __init__(self, places: Mapping[str, Place], address: str | None = None, *, unsafe_code: bool = False) -> None:
        try:
            import ray
        except ImportError as exc:
            raise SearchError("--executor ray needs Ray: pip install 'modelglue[ray]'") from exc
        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            _check(address)
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
            except ConnectionError as exc:
                raise SearchError(
                    f"no Ray cluster at {address}: start it (ray start --head), or leave the address out"
                ) from exc
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.workers = gpus or max(int(resources.get("CPU", 1)), 1)
        self._facts = ray.put((tuple(places.items()), unsafe_code))
        self._task: Any = ray.remote(_work).options(
            num_gpus=1 if gpus else 0, num_cpus=1, max_retries=TRIES - 1, retry_exceptions=False
        )

    def run(self, jobs: Sequence[Job], done: Callable[[int], None]) -> Iterator[tuple[int, Scored | Failed]]:
        """As they end; Ray gives a lost worker's job to another."""
        pending = {self._task.remote(self._facts, job): place for place, job in enumerate(jobs)}
        while pending:
            (ended,), _ = self._ray.wait(list(pending), num_returns=1)
            place = pending.pop(ended)
            try:
                result = self._ray.get(ended)
            except self._ray.exceptions.RayTaskError:
                raise  # our own bug, not a lost worker
            except self._ray.exceptions.RayError as exc:
                result = Failed(f"the worker that scored it was lost {TRIES} times ({type(exc).__name__})")
            yield place, result

    def close(self) -> None:
        """Leave the cluster, or end the one that was started here."""
        if self._own:
            self._ray.shutdown()


def _check(address: str | None) -> None:
    """Raises SearchError for an address where nobody listens: Ray would wait for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as exc:
        raise SearchError(f"no Ray cluster at {address} ({exc.strerror or exc}): start it (ray start --head)") from exc


@cache
def _bench(facts: Facts) -> Bench:
    places, unsafe_code = facts
    if unsafe_code:
        programs.allow_unsafe()
    return Bench(dict(places))


def _work(facts: Facts, job: Job) -> Scored | Failed:
    return attempt(_bench(facts), job)
