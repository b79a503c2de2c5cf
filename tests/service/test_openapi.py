"""The OpenAPI document: it tells all endpoints, and what they answer is what it says, to anything that is sent."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from fastapi.testclient import TestClient
from fuzzing import SETTINGS, fuzzed
from hypothesis import given, settings
from serving import serve

from routers.bundle import Bundle
from service.api import PAGES
from service.app import create_app
from service.engines.echo import EchoEngine

CHAT = [{"role": "user", "content": "write a python loop"}]


@pytest.fixture(scope="module")
def url(bundle: Bundle) -> Iterator[str]:
    with serve(create_app(bundle, EchoEngine(bundle.router.experts))) as (url, _):
        yield url


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


@pytest.mark.parametrize("examples", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_nothing_that_the_document_allows_or_forbids_gets_what_it_does_not_tell(url: str, examples: int) -> None:
    statuses = fuzzed(url, examples)
    assert min(statuses[status] for status in (200, 400, 404)) > examples


def test_lines_of_bodies_get_the_routes_that_each_gets_alone(url: str) -> None:
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")["/route"]["POST"]
    bodies: list[Any] = []

    @settings(max_examples=40, **SETTINGS)
    @given(case=operation.as_strategy())
    def collect(case: Any) -> None:
        bodies.append(case.body)

    collect()
    lines = "".join(json.dumps(body) + "\n" for body in bodies)
    together = httpx.post(f"{url}/route/batch", content=lines).text.splitlines()
    alone = [httpx.post(f"{url}/route", json=body).json() for body in bodies]
    assert [untimed(json.loads(line)) for line in together] == [untimed(route) for route in alone]


def untimed(routes: Any) -> Any:
    if isinstance(routes, list):
        return [untimed(route) for route in routes]
    return {name: value for name, value in routes.items() if name not in ("ms", "steps_ms")}


def test_every_endpoint_but_the_pages_is_in_the_document(client: TestClient, document: dict[str, Any]) -> None:
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    served = {
        (method, route.path_format)
        for included in client.app.routes  # type: ignore[attr-defined]
        for route in included.original_router.routes
        for method in route.methods
    }
    assert {(method, path) for method, path in served if path not in PAGES} == told


def test_every_name_that_the_document_refers_to_is_in_it(document: dict[str, Any]) -> None:
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert referred <= document["components"]["schemas"].keys()
    jsonschema.Draft202012Validator.check_schema({"$defs": document["components"]["schemas"]})


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        (
            "/v1/completions",
            {"prompt": ["python loop", "an owl"], "n": 2, "logprobs": 2, "echo": True},
            "CompletionChunk",
        ),
        ("/v1/completions", {"prompt": "python loop"}, "CompletionChunk"),
        ("/v1/chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 1}, "ChatChunk"),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
def test_events_have_the_shape_that_the_document_tells(
    client: TestClient, document: dict[str, Any], path: str, body: dict[str, Any], shape: str, options: dict[str, bool]
) -> None:
    response = client.post(
        path, json=body | {"stream": True, "stream_options": options}, headers={"x-route-debug": "1"}
    )
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    schema = {"$ref": f"#/components/schemas/{shape}", "components": document["components"]}
    for event in events:
        jsonschema.validate(json.loads(event.removeprefix("data: ")), schema)


def test_the_examples_of_the_document_are_answered(client: TestClient, document: dict[str, Any]) -> None:
    asked = 0
    for path, methods in document["paths"].items():
        for media_type, content in methods.get("post", {}).get("requestBody", {}).get("content", {}).items():
            example = content["example"]
            raw = example if isinstance(example, str) else json.dumps(example)
            response = client.post(path, content=raw, headers={"content-type": media_type})
            assert response.status_code == (404 if path == "/v1/feedback" else 200)  # of an answer that was not given
            asked += 1
    assert asked >= 10


def test_the_commands_of_the_page_send_the_examples(client: TestClient, document: dict[str, Any]) -> None:
    commands = [html.unescape(each) for each in re.findall(r"<pre>(curl [^<]*)</pre>", client.get("/docs").text)]
    sent = [shlex.split(command)[-1] for command in commands]
    told = [
        content["example"]
        for methods in document["paths"].values()
        for operation in methods.values()
        for content in operation.get("requestBody", {}).get("content", {}).values()
    ]
    assert sent == [each if isinstance(each, str) else json.dumps(each) for each in told]
    assert any("'" in each for each in sent)


def test_the_page_tells_every_endpoint_and_type_and_loads_nothing_from_elsewhere(
    client: TestClient, document: dict[str, Any]
) -> None:
    response = client.get("/docs")
    page = response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"<script|<style|\sstyle=|\son\w+=", page)
    links = set(re.findall(r'(?:href|src)="([^"]*)"', page))
    assert {link for link in links if not link.startswith("#")} == {"docs.css", "./", "openapi.json"}
    anchors = re.findall(r'id="([^"]*)"', page)
    assert {link[1:] for link in links if link.startswith("#")} <= set(anchors)
    assert len(anchors) == len(set(anchors))
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
    assert document["components"]["schemas"].keys() <= set(anchors)


@pytest.mark.parametrize("digits", [11, 5000])
def test_a_bias_of_a_number_that_is_no_token_is_refused(client: TestClient, digits: int) -> None:
    response = client.post("/v1/completions", json={"prompt": "hi", "logit_bias": {"1" * digits: 1}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "logit_bias")
