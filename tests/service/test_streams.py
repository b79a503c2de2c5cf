"""Clients over a real connection: who leaves, what breaks in mid-answer, and a server that stops."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from held import Held
from serving import asked, serve
from waiting import wait_until

from routers.bundle import Bundle
from service.api import MAX_BODY
from service.app import create_app
from service.engines.base import EngineError, Job, Piece
from service.engines.echo import EchoEngine

BODY: dict[str, Any] = {"prompt": "word " * 30, "max_tokens": 30}


class Breaking(EchoEngine):
    """Gives one piece, then raises."""

    def __init__(self, experts: tuple[str, ...], failure: Exception) -> None:
        super().__init__(experts)
        self._failure = failure

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        yield Piece("one", 1)
        raise self._failure


def test_a_client_who_leaves_a_stream_ends_the_engines_work(bundle: Bundle) -> None:
    engine = Held(bundle.router.experts, free=1)
    with (
        serve(create_app(bundle, engine)) as (url, _),
        httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        assert engine.running == 1
        response.close()
        wait_until(lambda: engine.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_who_leaves_before_the_answer_ends_the_engines_work(bundle: Bundle, stream: bool) -> None:
    engine = Held(bundle.router.experts)
    with serve(create_app(bundle, engine)) as (url, _):
        with asked(url, BODY | {"stream": stream}):
            wait_until(lambda: engine.running == 1)
        wait_until(lambda: engine.finished == 1)
        assert engine.running == 0
        assert 'finished_reason="abort"' in httpx.get(f"{url}/metrics", timeout=60).text


def test_a_client_who_leaves_in_the_middle_of_its_body_is_no_error(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.requests")
    with serve(create_app(bundle, EchoEngine(bundle.router.experts))) as (url, _):
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
            connection.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"prompt"')
        wait_until(lambda: bool(caplog.records))
        assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_pieces_arrive_as_they_are_made(bundle: Bundle) -> None:
    engine = Held(bundle.router.experts, free=1)
    with (
        serve(create_app(bundle, engine)) as (url, _),
        httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as response,
    ):
        events = (line for line in response.iter_lines() if line)
        for _ in range(29):
            assert '"text":' in next(events)
            engine.gate.release()
        assert len(list(events)) == 2  # the last piece, and the end


def test_an_engine_that_fails_in_mid_stream_is_an_error_event_and_done(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.requests")
    with TestClient(create_app(bundle, Breaking(bundle.router.experts, EngineError("code died")))) as client:
        response = client.post("/v1/completions", json=BODY | {"stream": True})
    piece, error, done, _ = response.text.split("\n\n")
    assert json.loads(piece.removeprefix("data: "))["choices"][0]["text"] == "one"
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "code died"
    assert done == "data: [DONE]"
    assert "code=expert_failed" in caplog.text


def test_a_bug_in_mid_stream_tells_nothing_of_the_inside(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, Breaking(bundle.router.experts, KeyError("/secret/path")))) as client:
        response = client.post("/v1/completions", json=BODY | {"stream": True})
    assert '"type":"server_error"' in response.text
    assert "secret" not in response.text
    assert response.text.endswith("data: [DONE]\n\n")


def test_an_engine_that_fails_in_mid_answer_is_a_503(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, Breaking(bundle.router.experts, EngineError("code died")))) as client:
        response = client.post("/v1/completions", json=BODY)
        assert 'finished_reason="error"' in client.get("/metrics").text
    assert (response.status_code, response.json()["error"]["message"]) == (503, "code died")


def test_a_server_that_stops_ends_its_streams_with_an_error_event(bundle: Bundle) -> None:
    engine = Held(bundle.router.experts, free=1)
    with (
        serve(create_app(bundle, engine)) as (url, server),
        httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as response,
    ):
        server.should_exit = True
        *_, error, _, done, _ = response.iter_lines()
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the service is stopping"
    assert done == "data: [DONE]"
    assert engine.running == 0


def test_a_server_that_stops_answers_who_waits(bundle: Bundle) -> None:
    engine = Held(bundle.router.experts)
    got: list[httpx.Response] = []

    def ask() -> None:
        got.append(httpx.post(f"{url}/v1/completions", json=BODY, timeout=60))

    with serve(create_app(bundle, engine)) as (url, server):
        waiting = threading.Thread(target=ask)
        waiting.start()
        wait_until(lambda: engine.running == 1)
        server.should_exit = True
        waiting.join()
    assert got[0].status_code == 503
    assert got[0].json()["error"]["message"] == "the service is stopping"
    assert engine.running == 0


def test_a_body_over_the_limit_is_refused_without_reading_it_all(bundle: Bundle) -> None:
    with serve(create_app(bundle, EchoEngine(bundle.router.experts))) as (url, _):
        response = httpx.post(f"{url}/v1/completions", content=b"x" * 50 * MAX_BODY, timeout=60)
        assert response.status_code == 413
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "hi"}, timeout=60).status_code == 200


def test_many_streams_at_once_do_not_mix(bundle: Bundle) -> None:
    answers: dict[int, str] = {}

    def read(i: int, url: str) -> None:
        body = {"prompt": f"{i} " * 20, "max_tokens": 20, "model": bundle.router.experts[i % 3]}
        answers[i] = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    with serve(create_app(bundle, EchoEngine(bundle.router.experts, delay=0.005))) as (url, _):
        readers = [threading.Thread(target=read, args=(i, url)) for i in range(12)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert answers == {i: " ".join([str(i)] * 20) for i in range(12)}
