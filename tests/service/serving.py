"""A real server around an app, for what a test client cannot show."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from service.server import UNREAD_SECONDS, configure, listen

GRACE = 1


@contextmanager
def serve(app: FastAPI, unread: float = UNREAD_SECONDS) -> Iterator[tuple[str, uvicorn.Server]]:
    """The address of a server on a free port, in a thread, for as long as the context lasts; and the server."""
    listening = listen("127.0.0.1", 0, unread)
    server = uvicorn.Server(configure(app, GRACE))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Return as soon as the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
