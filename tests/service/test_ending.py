"""Requests that are ended from without: by signals, in a real process, and by a deadline."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from held import Held
from serving import echoing, serve
from waiting import wait_until

from routers.base import Estimate, Vector
from routers.bundle import Bundle
from routers.fixed import FixedRouter
from service.app import create_app
from service.ending import BODY_BYTES, Upload
from service.engines.echo import EchoEngine
from service.errors import SlowBodyError

STREAM: dict[str, Any] = {"prompt": "word " * 30, "max_tokens": 30, "stream": True}


def test_told_to_stop_it_refuses_what_is_new_and_lets_streams_end(folder: Path) -> None:
    gate = folder / "gate"
    with (
        echoing(folder, "--gate", gate, "--grace", 600) as echo,
        echo.client.stream("POST", "/v1/completions", json=STREAM) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        echo.process.send_signal(signal.SIGTERM)
        wait_until(lambda: echo.client.get("/readyz").status_code == 503)
        assert echo.client.get("/readyz").json()["stopping"]
        assert echo.client.get("/healthz").status_code == 200
        refused = echo.client.post("/v1/completions", json=STREAM)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert int(refused.headers["retry-after"]) > 0
        gate.touch()
        events = [line for line in lines if line]
        assert "error" not in events[-2]
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
        assert echo.process.wait(30) == 0


def test_streams_longer_than_the_grace_end_with_an_error_event(folder: Path) -> None:
    with (
        echoing(folder, "--gate", folder / "gate", "--grace", 0.5) as echo,
        echo.client.stream("POST", "/v1/completions", json=STREAM) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        began = time.monotonic()
        echo.process.send_signal(signal.SIGTERM)
        *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "stopping"
        assert done == "data: [DONE]"
        assert echo.process.wait(30) == 0
        assert 0.4 < time.monotonic() - began < 20


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(folder: Path, sent: signal.Signals) -> None:
    with (
        echoing(folder, "--gate", folder / "gate", "--grace", 600) as echo,
        echo.client.stream("POST", "/v1/completions", json=STREAM) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        echo.process.send_signal(sent)
        wait_until(lambda: echo.client.get("/readyz").status_code == 503)
        began = time.monotonic()
        echo.process.send_signal(sent)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert echo.process.wait(30) == 0
        assert time.monotonic() - began < 20


def test_idle_it_ends_at_once(folder: Path) -> None:
    with echoing(folder, "--grace", 600) as echo:  # whose client keeps its connection
        began = time.monotonic()
        echo.process.send_signal(signal.SIGTERM)
        assert echo.process.wait(30) == 0
        assert time.monotonic() - began < 20


def test_a_stream_over_its_deadline_ends_with_an_error_event(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "service.requests")
    engine = Held(bundle.router.experts, free=3)
    with TestClient(create_app(bundle, engine, deadline=1)) as client:
        response = client.post("/v1/completions", json=STREAM)
        assert client.get("/healthz").status_code == 200
    *pieces, error, done, _ = response.text.split("\n\n")
    assert len(pieces) == 3
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert done == "data: [DONE]"
    assert engine.running == 0
    assert "code=deadline_exceeded" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_has_not_begun_by_its_deadline_is_504(bundle: Bundle, stream: bool) -> None:
    engine = Held(bundle.router.experts)
    with TestClient(create_app(bundle, engine, deadline=1)) as client:
        response = client.post("/v1/completions", json=STREAM | {"stream": stream})
        assert response.status_code == 504
        assert response.json()["error"]["message"] == "the request took longer than 1 seconds"
        assert response.headers["x-should-retry"] == "false"
        assert engine.running == 0
        assert client.post("/v1/completions", json=STREAM).status_code == 504  # nothing is left of the first


class Thorough(FixedRouter):
    """Takes its time over every prompt."""

    def estimate(self, vector_D: Vector) -> Estimate:
        time.sleep(0.05)
        return super().estimate(vector_D)


def test_lines_that_are_not_all_told_by_their_deadline_break_off(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of them must not look like all."""
    caplog.set_level("INFO", "service.requests")
    experts = bundle.router.experts
    slow = replace(bundle, router=replace(bundle.router, router=Thorough.always(experts, "math")))
    with serve(create_app(slow, EchoEngine(experts), deadline=1)) as (url, _):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{url}/route/batch", content=b'{"prompt": "python"}\n' * 100, timeout=60)
        wait_until(lambda: " 504 " in caplog.text)


def test_a_request_within_its_deadline_is_untouched(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, EchoEngine(bundle.router.experts), deadline=60)) as client:
        assert client.post("/v1/completions", json=STREAM).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("limit", [{"deadline": 0.5}, {"upload": 0.5}])
def test_a_body_that_does_not_come_is_408(bundle: Bundle, limit: dict[str, float]) -> None:
    app = create_app(bundle, EchoEngine(bundle.router.experts), **limit)  # type: ignore[arg-type]
    with serve(app) as (url, _), socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"prompt"')
        assert connection.recv(9999).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(("size", "refused"), [(BODY_BYTES, False), (1, True)])
def test_a_large_body_may_take_its_time_and_one_that_drips_may_not(size: int, refused: bool) -> None:
    """By a clock of its own: fifty seconds go by before each message."""
    now, left = 1000.0, 9

    async def receive() -> dict[str, Any]:
        nonlocal now, left
        now, left = now + 50, left - 1
        for _ in range(3):  # turns of the loop, in which what is due happens
            await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x" * size, "more_body": left > 0}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def story() -> None:
        asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]
        await Upload(app, 60)({"type": "http"}, receive, None)  # type: ignore[arg-type]

    with pytest.raises(SlowBodyError, match="1 bytes came in 60") if refused else nullcontext():
        asyncio.run(story())
    assert (left == 0) != refused


def test_an_answer_may_take_its_time_once_its_body_is_here(bundle: Bundle) -> None:
    engine = EchoEngine(bundle.router.experts, delay=0.7)
    with TestClient(create_app(bundle, engine, upload=0.5)) as client:
        assert client.post("/v1/completions", json=STREAM | {"max_tokens": 1}).text.endswith("data: [DONE]\n\n")


def test_a_head_that_is_too_large_is_refused(folder: Path) -> None:
    with echoing(folder) as echo, socket.create_connection(("127.0.0.1", echo.client.base_url.port)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-large: ".ljust(1 << 16, b"x"))
        connection.sendall(b"xx")
        assert connection.recv(9999).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(("deadline", "unread", "status"), [(3, 60, 504), (None, 1, 499)])
def test_a_reader_that_stands_still_does_not_hold_its_answer_for_ever(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, deadline: float | None, unread: float, status: int
) -> None:
    """With its buffers full nothing can be sent to it, not even why it ends."""
    caplog.set_level("INFO", "service.requests")
    engine = EchoEngine(bundle.router.experts, window=10**9)
    word = "x" * 10_000 + " "
    body = json.dumps({"prompt": word * 60, "max_tokens": 60, "stream": True, "n": 100}).encode()
    with serve(create_app(bundle, engine, deadline=deadline), unread) as (url, _), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: engine.running > 0)
        wait_until(lambda: f" {status} " in caplog.text, seconds=30)
    assert (engine.running, engine.finished) == (0, 100)
