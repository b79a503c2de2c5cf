"""What ends requests from without: a service that is told to stop, a body that does not come, a time that is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from routers.errors import ModelGlueError
from service import errors
from service.errors import DeadlineError, SlowBodyError, StoppingError

LAST_WORDS: Final = 1.0
"""Seconds that a request which is cut short has to say so."""

BODY_SECONDS: Final = 60.0
BODY_BYTES: Final = 1 << 16
"""So many bytes of a body, or its end, have to come in so many seconds, and again in the next."""


class Drain:
    """Whether the service is to end, and whether what it had begun is over.

    It takes nothing new once `begin` was called; what runs then may go on for `grace` seconds.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self.running = 0
        self._grace = grace
        self._until: float | None = None

    @property
    def begun(self) -> bool:
        """Whether the end has begun."""
        return self._until is not None

    @property
    def over(self) -> bool:
        """Whether it has come."""
        return self._until is not None and (not self.running or time.monotonic() >= self._until)

    @contextmanager
    def request(self) -> Iterator[None]:
        """One that is waited for."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def begin(self) -> None:
        """Take nothing new; told again, wait for nothing more."""
        self._until = time.monotonic() + (0 if self.begun else self._grace)


def cause(scope: Scope) -> ModelGlueError:
    """Why the request in this scope was cancelled: its time is over, or the service's is."""
    found: ModelGlueError | None = scope.get("ended_by")
    return found or StoppingError("the service is stopping")


class Upload:
    """Refuses a body that stands still or only drips: it would hold its request for ever."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        clock = asyncio.get_running_loop().time
        until: float | None = clock() + self._seconds
        came = 0

        async def hear() -> Message:
            nonlocal until, came
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as exc:
                raise SlowBodyError(f"the body stands still: {came} bytes came in {self._seconds:g} seconds") from exc
            came += len(message.get("body", b""))
            if not message.get("more_body", False):
                until = None
            elif came >= BODY_BYTES:
                until, came = clock() + self._seconds, 0
            return message

        return await self._app(scope, hear, send)


class Deadline:
    """Ends a request that takes longer than `seconds`, by an answer that says so; a stream says it in an event."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        task = asyncio.current_task()
        assert task is not None
        heard = begun = False

        async def hear() -> Message:
            nonlocal heard
            message = await receive()
            heard = heard or not message.get("more_body", False)
            return message

        async def say(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        def end() -> None:
            took = f"the request took longer than {self._seconds:g} seconds"
            scope["ended_by"] = DeadlineError(took) if heard else SlowBodyError(f"{took}, and its body is not here yet")
            task.cancel()

        timer = asyncio.get_running_loop().call_later(self._seconds, end)
        try:
            await self._app(scope, hear, say)
        except asyncio.CancelledError:
            if begun or "ended_by" not in scope:
                raise
            task.uncancel()
            await errors.answer(scope["ended_by"], scope)(scope, receive, send)
        else:
            if "ended_by" in scope:
                task.uncancel()
        finally:
            timer.cancel()
