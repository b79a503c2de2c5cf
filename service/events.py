"""An answer as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Final

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from routers.errors import ModelGlueError
from service import errors
from service.completions import Completion
from service.ending import LAST_WORDS, cause
from service.schemas.answers import Writer

HEARTBEAT: Final = 10.0
"""Seconds of silence after which a comment tells proxies and clients that the stream lives."""

HEADERS: Final = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE: Final = "data: [DONE]\n\n"
WAITING: Final = ": waiting\n\n"

logger = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """A completion as server-sent events. However the response ends, the engine's work ends with it."""

    def __init__(
        self,
        completion: Completion,
        writer: Writer,
        headers: Mapping[str, str],
        counted: bool,
        heartbeat: float,
    ) -> None:
        """counted: a last chunk has the token counts."""
        events = _events(completion, writer, counted, heartbeat)
        super().__init__(events, headers={**headers, **HEADERS}, media_type="text/event-stream")
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._completion):
            try:
                await self._stream(scope, receive, send)
            except asyncio.CancelledError:  # not by a client that leaves: that is noticed above
                with suppress(TimeoutError):  # one that does not read does not hold up the end
                    async with asyncio.timeout(LAST_WORDS):
                        await send(_last(cause(scope), scope))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except Exception as exc:
            experts = ", ".join(part.decision.route.expert for part in self._completion.parts)
            # What is ours to explain was logged where it happened.
            logger.error("a stream of expert %s broke: %r", experts, exc, exc_info=not isinstance(exc, ModelGlueError))
            await send(_last(exc, scope))


async def _events(completion: Completion, writer: Writer, counted: bool, heartbeat: float) -> AsyncGenerator[str, None]:
    async with aclosing(completion.pieces(heartbeat)) as pieces:
        begun = set[int]()
        async for came in pieces:
            told = ""
            for index, piece in came:
                if index not in begun or piece.text or piece.finish or piece.scored:
                    told += _event(writer.chunk(index, piece))
                    begun.add(index)
            if told or not came:
                yield told or WAITING
    if counted:
        yield _event(writer.count())
    yield DONE


def _last(exc: Exception, scope: Scope) -> Message:
    """Of a stream that breaks: its status is sent, so that an event is all that can still tell."""
    return {"type": "http.response.body", "body": (_event(errors.told(exc, scope)) + DONE).encode()}


def _event(data: object) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
