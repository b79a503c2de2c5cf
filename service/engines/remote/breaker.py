"""Leaves a server alone that fails again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from service.engines.base import BusyError, EngineError, PromptError, UnsupportedError


class Breaker:
    """Opens after `failures` in a row, for `pause` seconds; then lets one request through to try.

    clock: seconds that never go back.
    """

    def __init__(self, failures: int, pause: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._pause = pause
        self._clock = clock
        self._failures = 0
        self._until = 0.0
        self._trying: object = None
        self._why = ""

    @property
    def refusal(self) -> str:
        """Why no request is let through; empty when one is."""
        wait = self._until - self._clock()
        if self._failures < self._limit or (wait <= 0 and self._trying is None):
            return ""
        next_try = f"tried again in {wait:.1f} s" if wait > 0 else "being tried now"
        return f"failed {self._failures} times in a row and is {next_try}; the last time: {self._why}"

    @contextmanager
    def attempt(self) -> Generator[None, None, None]:
        """Around one request that `refusal` does not forbid; learns from how it ends.

        A request that is closed or cancelled says nothing; one that is refused was read by a server that lives.
        """
        this = object() if self._failures >= self._limit else None
        self._trying = this or self._trying
        try:
            yield
        except (BusyError, PromptError, UnsupportedError):
            self._failures = 0
            raise
        except EngineError as exc:
            self._failures += 1
            self._until = self._clock() + self._pause
            self._why = str(exc)
            raise
        else:
            self._failures = 0
        finally:
            if this is self._trying:
                self._trying = None

    def answered(self) -> None:
        """A first byte came: others may ask too. Until an answer is whole, one more failure opens it again."""
        self._failures = min(self._failures, self._limit - 1)
        self._trying = None  # however long its answer takes: should it open again, the next may try
