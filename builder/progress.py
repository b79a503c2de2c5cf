"""Progress bars for people, silence for machines: a step has a name and a total, and hears how much was done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Advance = Callable[[int], None]


class Progress(Protocol):
    """What the steps of a build report to."""

    def step(self, name: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """A step of `total` units; the block advances it."""
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

    def say(self, line: str) -> None:
        """Nothing."""


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

    def say(self, line: str) -> None:
        """A line above the bars."""
        self._console.print(line, highlight=False, markup=False)
