"""What is known of one HTTP request, from its first byte to its last: log, metrics, route log and traces read it."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from routers.bundle import Bundle
from service.completions import Answer, Completion, Part
from service.errors import CLIENT_LEFT

NAME: Final = re.compile("[\x21-\x7e]{1,200}")
"""A client's own request id; any other, which might forge fields of a line of the log, is replaced."""


@dataclass(slots=True, eq=False)
class Record:
    """One request. began, ended: by time.perf_counter; at: by the clock, in seconds.

    endpoint: the path's pattern, "" where there is none. code: OpenAI's, of a refusal. key: the name of the client's.
    completion: what it came to, where it is for answers. bundle: the one that decided it.
    """

    id: str
    method: str
    path: str
    traceparent: str | None = None
    began: float = field(default_factory=time.perf_counter)
    at: float = field(default_factory=time.time)
    ended: float | None = None
    endpoint: str = ""
    status: int = 0
    code: str | None = None
    key: str | None = None
    completion: Completion | None = None
    bundle: Bundle | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.ended or time.perf_counter()) - self.began

    @property
    def parts(self) -> Sequence[Part]:
        """One for every prompt; none of a request that was refused, or is for no answers."""
        return self.completion.parts if self.completion else ()

    @property
    def answers(self) -> list[Answer]:
        """Of all its prompts."""
        return [answer for part in self.parts for answer in part.answers]

    @property
    def first_seconds(self) -> float | None:
        """Until the first piece of any answer."""
        firsts = [answer.first_at for answer in self.answers if answer.first_at is not None]
        return min(firsts) - self.began if firsts else None


Tell = Callable[[Record], None]


def of(scope: Scope) -> Record:
    """The record of the request in this scope."""
    record: Record = scope["record"]
    return record


class Requests:
    """Names each request as its client does, or anew, says the name in the answer, and tells its record at its end."""

    def __init__(self, app: ASGIApp, open_requests: set[asyncio.Task[None]], tell: Sequence[Tell]) -> None:
        self._app = app
        self._open = open_requests
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        named = headers.get("x-request-id", "")
        name = named if NAME.fullmatch(named) else uuid.uuid4().hex
        record = scope["record"] = Record(name, scope["method"], scope["path"], headers.get("traceparent"))
        whole = False

        async def noted(message: Message) -> None:
            nonlocal whole
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            return await self._app(scope, receive, noted)
        except Exception:
            record.status, whole = record.status or 500, True
            raise
        finally:
            self._open.discard(task)
            record.ended = time.perf_counter()
            record.endpoint = getattr(scope.get("route"), "path", "")
            if not whole:
                record.status = 504 if "ended_by" in scope else CLIENT_LEFT
            for tell in self._tell:
                tell(record)
