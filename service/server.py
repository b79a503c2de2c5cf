"""Listens, serves, and ends as signals say: SIGTERM or SIGINT drains, a second one ends at once, SIGHUP reloads."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from routers.errors import ModelGlueError
from service.ending import Drain

UNREAD_SECONDS: Final = 60.0
"""A client that so long takes nothing of what it is sent has left."""

logger = logging.getLogger(__name__)


class ListenError(ModelGlueError):
    """The service cannot listen where it should."""


def listen(host: str, port: int, unread: float = UNREAD_SECONDS) -> socket.socket:
    """A socket that listens already. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as exc:
        reason = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be opened ({exc.strerror})"
        raise ListenError(f"port {port} of {host} {reason}: stop what is there, or choose another with --port") from exc
    # asyncio does this for sockets that it makes; without it every answer waits 40 ms for the client's ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux's, for every connection: only the kernel sees what is taken
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * unread))
    return listening


def address(host: str, listening: socket.socket) -> str:
    """Where a browser on this machine finds the playground."""
    name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{listening.getsockname()[1]}/"


async def run(app: FastAPI, listening: socket.socket, drain: Drain, beside: Coroutine[None, None, None]) -> None:
    """Serve on a socket until signals end it; `beside` is done meanwhile, and given up at the end."""
    server = Server(configure(app), drain, asyncio.create_task(beside))
    reload = app.state.reload
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: server.keep(_reload(reload)))
    await server.serve(sockets=[listening])


def configure(app: FastAPI, grace: int = 1) -> uvicorn.Config:
    """uvicorn's part: no log of its own, for what the process logs goes one way; its grace comes after the drain's."""
    # httptools, which uvicorn takes where it is installed, bounds no head of a request; h11's are 64 KB at most.
    return uvicorn.Config(
        app, http="h11", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=grace
    )


class Server(uvicorn.Server):
    """Goes on listening while the app drains, so that whoever comes is told, and ends when that is over.

    Gives up what is done beside before the app ends, which that may ask.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, beside: asyncio.Task[None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._beside = beside
        self._signal: int = signal.SIGTERM
        self._kept = set[asyncio.Task[None]]()

    def keep(self, work: Coroutine[None, None, None]) -> None:
        """Do this meanwhile; the loop alone would forget it."""
        task = asyncio.create_task(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # the third: not even the engine is waited for
            self.force_exit = True
        self._signal = sig
        self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        if self._drain.over and not self.should_exit:
            if self._drain.running:  # they have had their time
                self.config.timeout_graceful_shutdown = 0
            super().handle_exit(self._signal, None)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._beside.cancel()
        await super().shutdown(sockets)


async def _reload(reload: Callable[[], Awaitable[str]]) -> None:
    with suppress(ModelGlueError):  # which is logged
        await reload()
