"""The line of each request, the metrics of all, and the traces."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from held import Held
from serving import asked, serve
from waiting import wait_until

from routers.bundle import Bundle
from service.app import create_app
from service.engines.base import BusyError, Job, Load, Piece, Prompt, Sampling, Status
from service.engines.echo import EchoEngine
from service.logs import JsonLines
from service.tracing import tracer

BODY: dict[str, Any] = {"prompt": "write a python loop", "max_tokens": 3}


class Full(EchoEngine):
    """Has no room."""

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        raise BusyError("5 requests wait for code: come again later", after=1.5)


class Loaded(EchoEngine):
    """Tells a load."""

    def load(self) -> dict[str, Load]:
        return {name: Load(2, 3, 0.25, 100, 40, 1, 5, name != "math") for name in super().status()}


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.requests")


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The requests' lines as they are written in JSON."""
    return [json.loads(JsonLines().format(line)) for line in caplog.records if line.name == "service.requests"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_without_its_prompt(
    client: TestClient, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    client.post("/v1/completions", json=BODY | {"stream": stream}, headers={"x-request-id": "mine"})
    (told,) = lines(caplog)
    assert told["level"] == "info"
    assert {name: told[name] for name in ("request_id", "method", "path", "status", "expert", "reason")} == {
        "request_id": "mine",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "expert": "code",
        "reason": "top_score",
    }
    assert (told["prompt_tokens"], told["tokens"], told["finish"]) == (4, 3, "length")
    assert 0 <= told["first_ms"] <= told["ms"]
    assert "python" not in caplog.text


def test_prompts_are_logged_where_that_is_asked_for(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(create_app(bundle, EchoEngine(bundle.router.experts), log_prompts=True)) as client:
        client.post("/v1/completions", json=BODY)
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "an owl"}]})
    assert [told["prompts"] for told in lines(caplog)] == [
        ["write a python loop"],
        [[{"role": "user", "content": "an owl"}]],
    ]


def test_a_query_is_not_logged(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.get("/route", params={"prompt": "python secrets"})
    assert lines(caplog)[0]["path"] == "/route"
    assert "secrets" not in caplog.text


def test_a_refusal_says_its_code(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(create_app(bundle, Full(bundle.router.experts))) as client:
        client.post("/v1/completions", json=BODY)
        client.post("/v1/completions", json=BODY | {"model": "nobody"})
        metrics = client.get("/metrics").text
    told = [(line["status"], line["code"]) for line in lines(caplog)]
    assert told == [(429, "rate_limit_exceeded"), (404, "model_not_found")]
    assert 'vllm:admission_rejections_total{reason="rate_limit_exceeded"} 1.0' in metrics
    assert 'modelglue_http_requests_total{endpoint="/v1/completions",status="404"} 1.0' in metrics


def test_a_client_that_left_before_its_answer_is_499(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    engine = Held(bundle.router.experts)
    with serve(create_app(bundle, engine)) as (url, _):
        with asked(url, BODY):
            wait_until(lambda: engine.running == 1)
        wait_until(lambda: bool(lines(caplog)))
    assert lines(caplog)[0]["status"] == 499


def test_a_client_that_left_a_stream_is_499(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": "word " * 30, "max_tokens": 30, "stream": True}
    with serve(create_app(bundle, Held(bundle.router.experts, free=1))) as (url, _):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
            response.close()
        wait_until(lambda: bool(lines(caplog)))
    told = lines(caplog)[0]
    assert (told["status"], told["finish"], told["tokens"]) == (499, "abort", 1)


def test_probes_are_not_worth_a_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        client.get(path)
    assert not lines(caplog)


def test_a_failure_of_ours_is_logged_with_where_it_was(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger("service.requests").exception("broke")
    (told,) = lines(caplog)
    assert "ValueError: x" in told["exception"]


@pytest.mark.parametrize("name", ["x" * 201, "", "a key=admin expert=zzz", "\x1b[31ma", "\xa0"])
def test_a_request_id_that_a_log_cannot_bear_is_replaced(
    client: TestClient, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    response = client.get("/version", headers={b"x-request-id": name.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert not name or name not in caplog.text


def test_metrics_show_what_the_engine_counts(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, Loaded(bundle.router.experts))) as client:
        values = numbers(client)
    for name, value in {
        "vllm:num_requests_running": 2,
        "vllm:num_requests_waiting": 3,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prefix_cache_queries_total": 100,
        "vllm:prefix_cache_hits_total": 40,
        "vllm:num_preemptions_total": 1,
        "modelglue_expert_evictions_total": 5,
        "modelglue_expert_resident": 1,
    }.items():
        assert values[f'{name}{{model_name="code"}}'] == value
    assert values['modelglue_expert_resident{model_name="math"}'] == 0


def test_metrics_show_what_was_asked_for_and_how_long_it_took(client: TestClient) -> None:
    client.post("/v1/completions", json=BODY | {"n": 2})
    values = numbers(client)
    assert values['vllm:request_params_n_sum{model_name="code"}'] == 2
    assert values['vllm:request_params_max_tokens_sum{model_name="code"}'] == 3
    assert values['vllm:request_prompt_tokens_sum{model_name="code"}'] == 8
    assert values['vllm:request_decode_time_seconds_count{model_name="code"}'] == 2
    assert values['vllm:request_time_per_output_token_seconds_count{model_name="code"}'] == 2
    assert values['modelglue_http_requests_total{endpoint="/v1/completions",status="200"}'] == 1


def test_metrics_tell_waiting_from_reading_where_the_engine_does(bundle: Bundle) -> None:
    class Queued(EchoEngine):
        async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
            await asyncio.sleep(0.03)
            async for piece in super().generate(job):
                yield replace(piece, usage=piece.usage and replace(piece.usage, queued=0.01))

    with TestClient(create_app(bundle, Queued(bundle.router.experts))) as client:
        client.post("/v1/completions", json=BODY)
        values = numbers(client)
    of = '_seconds_sum{model_name="code"}'
    assert values[f"vllm:request_queue_time{of}"] == 0.01
    assert values[f"vllm:request_prefill_time{of}"] == pytest.approx(values[f"vllm:time_to_first_token{of}"] - 0.01)


def test_metrics_show_how_long_an_expert_took_to_load(bundle: Bundle) -> None:
    engine = EchoEngine(bundle.router.experts)
    states = engine.status() | {"math": Status("loading")}
    engine.status = lambda: dict(states)  # type: ignore[method-assign]
    with TestClient(create_app(bundle, engine)) as client:
        wait_until(lambda: 'modelglue_expert_load_seconds{model_name="code"}' in numbers(client))
        assert 'modelglue_expert_load_seconds{model_name="math"}' not in numbers(client)
        states["math"] = Status("ready")
        wait_until(lambda: numbers(client).get('modelglue_expert_load_seconds{model_name="math"}', 0) > 0)


def test_a_request_is_traced_below_its_clients_span(bundle: Bundle) -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    tell, traces = tracer(memory)
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with TestClient(create_app(bundle, EchoEngine(bundle.router.experts, delay=0.01), tell=[tell])) as client:
        client.post("/v1/completions", json=BODY, headers=parent)
        client.get("/healthz")
    traces.shutdown()
    spans = {span.name: span for span in memory.get_finished_spans()}
    assert set(spans) == {"POST /v1/completions", "route", "first piece", "rest"}
    whole = spans.pop("POST /v1/completions")
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert (whole.attributes["http.response.status_code"], whole.attributes["gen_ai.usage.output_tokens"]) == (200, 3)
    for span in spans.values():
        assert span.parent.span_id == whole.context.span_id
        assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time
    assert spans["first piece"].end_time == spans["rest"].start_time
    assert spans["route"].attributes["modelglue.expert"] == "code"


def numbers(client: TestClient) -> dict[str, float]:
    found = (line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[:1] != "#")
    return {name: float(value) for name, value in found}
