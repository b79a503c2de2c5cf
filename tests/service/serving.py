"""Real servers, for what a test client cannot show: in a thread, or in a process for signals."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from processes import Service, service_process
from waiting import wait_until

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


def asked(url: str, body: Mapping[str, Any], **headers: str) -> socket.socket:
    """The connection of a client that has asked for a completion, and may leave without its answer."""
    content = json.dumps(body)
    sent = {"host": "x", "content-length": str(len(content))} | headers
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n{content}".encode())
    return connection


def echoing(folder: Path, *options: object) -> AbstractContextManager[Service]:
    """A service of this bundle that echoes, in a process of its own."""
    return service_process([sys.executable, Path(__file__).with_name("echo_service.py"), folder, *options])
