"""Processes that tests start: none outlives its test, and what one wrote on its way down is told with a failure."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from waiting import wait_until

ROOT = Path(__file__).parents[1]
SECONDS = 60


@dataclass(frozen=True)
class Service:
    """A service in a process of its own. client: asks it, and gives it time."""

    url: str
    client: httpx.Client
    process: subprocess.Popen[str]


@contextmanager
def process(command: Sequence[object], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """One whose output can be read line by line."""
    said = os.environ | (environment or {})
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=said
        ) as started,
    ):
        try:
            yield started
        except BaseException as exc:
            errors.seek(0)
            exc.add_note(f"the process's standard error:\n{errors.read()[-4000:]}")
            raise
        finally:
            started.kill()


def read_until(word: str, started: subprocess.Popen[str]) -> str:
    """What a process says up to the line with this word; one that does not come to it is ended."""
    assert started.stdout is not None
    late, said = threading.Timer(SECONDS, started.kill), ""
    late.start()
    try:
        while word not in said:
            line = started.stdout.readline()
            assert line, f"the process ended without {word!r}: {said}"
            said += line
    finally:
        late.cancel()
    return said


@contextmanager
def service_process(command: Sequence[object], environment: Mapping[str, str] | None = None) -> Iterator[Service]:
    """The service whose first line tells its address, as soon as no expert is loading."""
    said = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
    with process(command, said) as started:
        address = re.search(r"http://\S+:\d+", read_until("http://", started))
        assert address is not None, "the service told no address"

        def is_loaded() -> bool:
            assert started.poll() is None, "the service ended while it loaded"
            return "loading" not in client.get("/readyz").text

        with httpx.Client(base_url=address[0], timeout=SECONDS) as client:
            wait_until(is_loaded)
            yield Service(address[0], client, started)
