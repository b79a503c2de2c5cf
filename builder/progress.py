"""Progress bars for people, silence for machines: a step has a name and a total, and hears how much was done."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Advance = Callable[[int], None]
Facts = Mapping[str, Any]
Hear = Callable[[Facts], None]
"""Told of a search's events: each `trial` as it ends, with its score or failure, and each that was `accepted`."""


class Progress(Protocol):
    """What the steps of a build report to."""

    def step(self, name: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """A step of `total` units; the block advances it."""
        ...

    def trials(self, name: str, total: int) -> contextlib.AbstractContextManager[Hear]:
        """A search of `total` trials at most."""
        ...

    def say(self, line: str) -> None:
        """A line for the reader."""
        ...


class Quiet:
    """Reports nothing."""

    @contextlib.contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        """A step that nobody watches."""
        yield lambda _: None

    @contextlib.contextmanager
    def trials(self, name: str, total: int) -> Iterator[Hear]:
        """A search that nobody watches."""
        yield lambda _: None

    def say(self, line: str) -> None:
        """Nothing."""


class Lines(Quiet):
    """A JSON object a line on stdout for every trial, for machines."""

    @contextlib.contextmanager
    def trials(self, name: str, total: int) -> Iterator[Hear]:
        """A line when it begins, one a trial, one at the end."""
        started, number, best = time.monotonic(), 0, None
        _print({"event": "search", "name": name, "trials": total})

        def hear(facts: Facts) -> None:
            nonlocal number, best
            if facts["event"] == "trial":
                number, best = number + 1, _better(best, facts["score"])
            _print({**facts, "number": number, "best": best, "seconds": round(time.monotonic() - started, 3)})

        yield hear
        _print({"event": "searched", "name": name, "trials": number, "best": best})

    def say(self, line: str) -> None:
        """The line as an event."""
        _print({"event": "note", "text": line})


class Terminal:
    """Bars on stderr, so that stdout holds results alone."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)

    @contextlib.contextmanager
    def step(self, name: str, total: int) -> Iterator[Advance]:
        """A bar that stays, with its time, when the step is over."""
        columns = (TextColumn("{task.description:<38}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, console=self._console) as bars:
            task = bars.add_task(name, total=max(total, 1))
            yield lambda done: bars.advance(task, done)
            bars.update(task, completed=max(total, 1))

    @contextlib.contextmanager
    def trials(self, name: str, total: int) -> Iterator[Hear]:
        """A bar with the best score so far, trials an hour and the time left."""
        columns = (
            TextColumn("{task.description:<38}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("best {task.fields[best]}  {task.fields[rate]}/h"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        if not total:
            yield lambda _: None
            return
        with Bars(*columns, console=self._console) as bars:
            task, started, best = bars.add_task(name, total=total, best="-", rate="-"), time.monotonic(), None

            def hear(facts: Facts) -> None:
                nonlocal best
                if facts["event"] != "trial":
                    return
                best = _better(best, facts["score"])
                if facts["failure"]:
                    bars.console.print(f"{facts['tried']}: {facts['failure']}", highlight=False, markup=False)
                done = bars.tasks[task].completed + 1
                rate = f"{3600 * done / max(time.monotonic() - started, 1e-9):,.0f}"
                bars.update(task, advance=1, best="-" if best is None else f"{best:.4f}", rate=rate)

            yield hear
            bars.update(task, total=bars.tasks[task].completed)

    def say(self, line: str) -> None:
        """A line above the bars."""
        self._console.print(line, highlight=False, markup=False)


def _better(best: float | None, score: float | None) -> float | None:
    return score if best is None or (score is not None and score > best) else best


def _print(facts: Facts) -> None:
    print(json.dumps(facts), flush=True)
