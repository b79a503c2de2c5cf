"""Everything that is refused, each with OpenAI's error body that names the thing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient

from routers.bundle import Bundle
from service.api import MAX_BODY
from service.app import create_app
from service.engines.base import BusyError, EngineError, Job, NotReadyError, Piece, Prompt, Sampling
from service.engines.echo import EchoEngine
from service.schemas.bodies import ChatBody, CompletionBody
from service.schemas.fields import Strict
from service.schemas.queries import DetokenizeBody, EmbeddingsBody, TokenizeBody

USER = {"role": "user", "content": "hi"}
TEXT = {"type": "text", "text": "hi"}
CACHED = "content[1].cache_control"


class Refusing(EchoEngine):
    """Raises in `prepare`."""

    def __init__(self, experts: tuple[str, ...], failure: Exception) -> None:
        super().__init__(experts)
        self._failure = failure

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        raise self._failure


class Stillborn(EchoEngine):
    """Dies before its first piece."""

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        raise EngineError("code is out of memory")
        yield


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "end"), ("use_beam_search", True), ("length_penalty", 2), ("skip_special_tokens", False),
        ("spaces_between_special_tokens", False), ("truncate_prompt_tokens", 5), ("truncation_side", "left"),
        ("allowed_token_ids", [1]), ("prompt_logprobs", 1), ("logprob_token_ids", [1]), ("bad_words", ["no"]),
        ("prompt_embeds", "x"), ("add_special_tokens", False), ("priority", 1), ("session_id", "x"),
        ("return_tokens_as_token_ids", True), ("return_token_ids", True), ("return_token_offsets", True),
        ("cache_salt", "x"), ("kv_transfer_params", {}), ("vllm_xargs", {"a": 1}), ("repetition_detection", {}),
        ("thinking_token_budget", 1), ("stream_interval", 2), ("guided_choice", ["a"]), ("guided_grammar", "x"),
        ("tools", [{}]), ("top_logprobs", 1),
    ],
)  # fmt: skip
def test_a_completions_field_that_is_not_served(client: TestClient, field: str, value: object) -> None:
    error = refused(client, "/v1/completions", {"prompt": "hi", field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert field in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{}]), ("tool_choice", "required"), ("functions", [{}]), ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]), ("audio", {}), ("store", True), ("reasoning_effort", "high"),
        ("verbosity", "low"), ("prediction", {}), ("web_search_options", {}), ("moderation", {}), ("best_of", 2),
        ("echo", True), ("suffix", "x"), ("add_special_tokens", True), ("chat_template", "x"),
        ("chat_template_kwargs", {"a": 1}), ("continue_final_message", True), ("add_generation_prompt", False),
        ("documents", [{}]), ("mm_processor_kwargs", {"a": 1}), ("include_reasoning", False), ("priority", 1),
    ],
)  # fmt: skip
def test_a_chats_field_that_is_not_served(client: TestClient, field: str, value: object) -> None:
    error = refused(client, "/v1/chat/completions", {"messages": [USER], field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", 2.1), ("temperature", "0.5"), ("top_p", 0), ("top_p", 7),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("seed", 2**63), ("seed", "1"),
        ("stop", ["a"] * 65), ("stop", ""), ("stop", [1]), ("stop", {}), ("stream", "yes"), ("user", 1),
        ("model", 1), ("k", 0), ("k", "2"), ("k", 4), ("mixture", "some"), ("allow", "code"), ("allow", ["gpt"]),
        ("deny", ["gpt"]), ("cost_weight", -1),
        ("prompt", 1), ("prompt", {}), ("prompt", []), ("prompt", ["a", 1]), ("prompt", [1, True]), ("prompt", [-1]),
        ("prompt", [[1], []]), ("prompt", [[1], "a"]), ("prompt", [1.5]),
        ("n", 0), ("n", 129), ("n", True), ("best_of", 0), ("logprobs", -1), ("logprobs", 21), ("logprobs", True),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("logit_bias", {"1": 101}), ("logit_bias", {"a": 1}),
        ("logit_bias", [1]), ("top_k", -2), ("min_p", 1.5), ("repetition_penalty", 0), ("min_tokens", -1),
        ("min_tokens", 17), ("stop_token_ids", ["a"]), ("ignore_eos", 1), ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}), ("guided_regex", 1),
        ("metadata", {"a": 1}), ("service_tier", "gold"),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds(client: TestClient, field: str, value: object) -> None:
    error = refused(client, "/v1/completions", {"prompt": "hi"} | {field: value})
    assert error["param"].startswith(field)
    assert error["message"].startswith(field)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "function", "content": "4"}], "messages[0].role"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content"),
        ([USER | {"mood": "glad"}], "messages[0].mood"),
        ([{"role": "user", "content": 4}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["hi"]}], "messages[0].content[0]"),
    ],
)
def test_messages_that_are_none(client: TestClient, messages: object, param: str) -> None:
    assert refused(client, "/v1/chat/completions", {"messages": messages})["param"] == param


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        (USER | {"name": "Tom"}, "name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "tool_calls"),
        ({"role": "assistant", "function_call": {}}, "function_call"),
        ({"role": "assistant", "audio": {"id": "x"}}, "audio"),
        ({"role": "user", "content": [TEXT, TEXT | {"cache_control": {"type": "ephemeral"}}]}, CACHED),
    ],
)
@pytest.mark.parametrize("before", [USER, {"role": "nobody"}])
def test_a_field_of_a_message_that_is_not_served_is_told_before_anything_else(
    client: TestClient, before: object, turn: object, field: str
) -> None:
    error = refused(client, "/v1/chat/completions", {"messages": [before, turn], "max_tokens": "many"})
    assert (error["param"], error["code"]) == (f"messages[1].{field}", "unsupported_parameter")
    assert error["message"] == f"messages[1].{field} is not served here: leave it out"


def test_a_message_goes_back_as_it_came_with_fields_that_say_nothing(client: TestClient) -> None:
    parts = [TEXT | {"cache_control": None}]
    nothing = {"name": None, "tool_calls": [], "annotations": [], "audio": None, "refusal": None, "images": []}
    body = {"messages": [USER | nothing, {"role": "assistant", "content": parts} | nothing]}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(("path", "needed"), [("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")])
def test_nothing_to_answer(client: TestClient, path: str, needed: str) -> None:
    for body in ({}, {needed: None}):
        error = refused(client, path, body)
        assert (error["message"], error["param"]) == (f"{needed} is missing", needed)


def test_an_unknown_field_is_named_with_the_nearest_known_one(client: TestClient) -> None:
    error = refused(client, "/v1/completions", {"prompt": "hi", "max_token": 5})
    assert (error["message"], error["param"]) == ("there is no field max_token; did you mean max_tokens?", "max_token")
    error = refused(client, "/v1/chat/completions", {"messages": [USER], "zzz": 5})
    assert (error["message"], error["code"]) == ("there is no field zzz", "unknown_parameter")


def test_an_unknown_field_inside_another_is_named_with_it(client: TestClient) -> None:
    error = refused(client, "/v1/completions", {"prompt": "hi", "structured_outputs": {"choice": ["a"]}})
    assert error["message"] == "there is no field structured_outputs.choice"


def test_a_chat_with_two_limits(client: TestClient) -> None:
    error = refused(client, "/v1/chat/completions", {"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2})
    assert "send one of them" in error["message"]


def test_stream_options_without_a_stream(client: TestClient) -> None:
    error = refused(client, "/v1/completions", {"prompt": "hi", "stream_options": {"include_usage": True}})
    assert error["message"] == "stream_options need stream: true"


def test_an_unknown_stream_option(client: TestClient) -> None:
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_route": True}}
    assert refused(client, "/v1/completions", body)["param"] == "stream_options.include_route"


@pytest.mark.parametrize("stream", [False, True])
def test_experts_that_cannot_be_mixed(bundle: Bundle, stream: bool) -> None:
    with TestClient(create_app(bundle, EchoEngine(bundle.router.experts, mixes=False))) as client:
        error = refused(client, "/v1/completions", {"prompt": "hi", "k": 2, "stream": stream})
        assert (error["param"], error["code"]) == ("k", "unsupported_value")
        best = client.post("/v1/completions", json={"prompt": "hi", "k": 2, "mixture": "best"})
    assert best.status_code == 200


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"n": 128, "prompt": ["a"] * 9}, "n"),
        ({"guided_regex": "a", "guided_json": {}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),  # an echo has no grammar
    ],
)
def test_what_cannot_be_together(client: TestClient, asked: dict[str, Any], param: str) -> None:
    assert refused(client, "/v1/completions", {"prompt": "hi"} | asked)["param"] == param


def test_alternatives_of_tokens_that_are_not_reported(client: TestClient) -> None:
    body = {"messages": [USER], "top_logprobs": 2}
    assert refused(client, "/v1/chat/completions", body)["param"] == "top_logprobs"
    body = {"messages": [USER], "logprobs": True, "top_logprobs": 21}
    assert refused(client, "/v1/chat/completions", body)["param"] == "top_logprobs"


def test_a_model_beside_a_header_that_pins_another(client: TestClient) -> None:
    body = {"prompt": "hi", "model": "code"}
    response = client.post("/v1/completions", json=body, headers={"x-expert": "math"})
    assert failure(response, 400)["param"] == "model"
    response = client.post("/v1/completions", json=body | {"model": "automatic"}, headers={"x-expert": "math"})
    assert failure(response, 400)["param"] == "model"
    response = client.post("/v1/completions", json={"prompt": "hi"}, headers={"x-expert": "gpt"})
    assert failure(response, 404)["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_again(bundle: Bundle, stream: bool) -> None:
    engine = Refusing(bundle.router.experts, BusyError("code has 64 waiting", after=1.2))
    with TestClient(create_app(bundle, engine)) as client:
        response = client.post("/v1/completions", json={"prompt": "hi", "stream": stream})
    assert response.status_code == 429
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("2", "1200")
    assert response.json()["error"] == {
        "message": "code has 64 waiting", "type": "requests", "param": None, "code": "rate_limit_exceeded"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input[1]"),
        ("/v1/embeddings", {"input": [[1, 2]]}, "input[0]"),
        ("/v1/embeddings", {"input": "a", "dimensions": 4}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "model": 1}, "model"),
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, None),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_the_other_endpoints_bodies(client: TestClient, path: str, body: dict[str, Any], param: str | None) -> None:
    assert refused(client, path, body)["param"] == param


def test_more_than_one_expert(client: TestClient) -> None:
    assert refused(client, "/v1/completions", {"prompt": "hi", "k": 9})["param"] == "k"
    assert refused(client, "/route", {"prompt": "hi", "k": 9})["param"] == "k"
    assert refused(client, "/route", {"prompt": "hi", "k": 2, "model": "code"})["param"] == "k"


def test_a_model_that_is_not_there(client: TestClient) -> None:
    for error in (
        refused(client, "/v1/completions", {"prompt": "hi", "model": "gpt-9"}, 404),
        refused(client, "/route", {"prompt": "hi", "model": "gpt-9"}, 404),
        failure(client.get("/v1/models/gpt-9"), 404),
        failure(client.get("/v1/models/some/where"), 404),
    ):
        assert error["code"] == "model_not_found"
        assert "there are: auto, auto:best, auto:cheap, math, code, story" in error["message"]


def test_a_model_that_embeds_nothing(client: TestClient) -> None:
    error = refused(client, "/v1/embeddings", {"input": "hi", "model": "text-embedding-3-small"}, 404)
    assert (error["code"], error["param"]) == ("model_not_found", None)
    assert error["message"] == "no model 'text-embedding-3-small' embeds; there are: router, auto"


def test_a_prompt_over_the_window(client: TestClient) -> None:
    for stream in (False, True):
        error = refused(client, "/v1/completions", {"prompt": "word " * 60, "model": "code", "stream": stream})
        assert "code's window of 64" in error["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"hi"', b"\xff", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 9999]
)
def test_a_body_that_is_no_json_object(client: TestClient, raw: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/route"):
        assert failure(client.post(path, content=raw), 400)["code"] == "invalid_json"


def test_a_body_over_the_limit(client: TestClient) -> None:
    error = refused(client, "/v1/completions", {"prompt": "x" * MAX_BODY}, 413)
    assert str(MAX_BODY) in error["message"]


def test_an_unknown_path(client: TestClient) -> None:
    assert failure(client.get("/v1/images"), 404)["message"] == "there is no GET /v1/images"


def test_a_wrong_method(client: TestClient) -> None:
    response = client.get("/v1/completions")
    assert failure(response, 405)["message"] == "GET /v1/completions is not possible"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(("query", "param"), [("", "prompt"), ("prompt=a&k=x", "k"), ("prompt=a&top=1", "top")])
def test_a_query_that_is_wrong(client: TestClient, query: str, param: str) -> None:
    assert failure(client.get(f"/route?{query}"), 400)["param"] == param


def test_a_route_of_neither_prompt_nor_chat(client: TestClient) -> None:
    assert refused(client, "/route", {"model": "auto"})["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_an_expert_that_is_loading_asks_to_come_again(bundle: Bundle, stream: bool) -> None:
    engine = Refusing(bundle.router.experts, NotReadyError("code is still loading"))
    with TestClient(create_app(bundle, engine)) as client:
        response = client.post("/v1/completions", json={"prompt": "hi", "stream": stream})
    assert failure(response, 503) == {
        "message": "code is still loading", "type": "server_error", "param": None, "code": "loading"
    }  # fmt: skip
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_expert_that_failed_says_so_before_any_200(bundle: Bundle, stream: bool) -> None:
    for engine in (
        Refusing(bundle.router.experts, EngineError("code is out of memory")),
        Stillborn(bundle.router.experts),
    ):
        with TestClient(create_app(bundle, engine)) as client:
            response = client.post("/v1/completions", json={"prompt": "hi", "stream": stream})
        assert failure(response, 503)["message"] == "code is out of memory"
        assert response.headers["x-should-retry"] == "false"


def test_a_bug_of_ours_tells_nothing_of_the_inside(bundle: Bundle) -> None:
    engine = Refusing(bundle.router.experts, KeyError("/secret/path"))
    with TestClient(create_app(bundle, engine), raise_server_exceptions=False) as client:
        response = client.post("/v1/completions", json={"prompt": "hi"}, headers={"x-request-id": "mine"})
    assert failure(response, 500)["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "mine"


ODD: list[Any] = [
    True, 0, -1, 10**30, 1e308, "", "\x00", "code", [], [None], [[]], ["a", 1], {}, {"type": "json_schema"}, {"a": [1]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "base"),
    [
        ("/v1/completions", CompletionBody, {"prompt": "hi"}),
        ("/v1/chat/completions", ChatBody, {"messages": [USER]}),
        ("/v1/embeddings", EmbeddingsBody, {"input": "hi"}),
        ("/tokenize", TokenizeBody, {"prompt": "hi"}),
        ("/detokenize", DetokenizeBody, {"tokens": [1]}),
    ],
)
def test_no_value_of_any_field_is_a_failure_of_ours(
    client: TestClient, path: str, body: type[Strict], base: dict[str, Any]
) -> None:
    for field in (*body.model_fields, *body.neutral):
        for value in ODD:
            response = client.post(path, json=base | {field: value})
            assert response.status_code in (200, 400, 404), (field, value, response.text)
            if response.status_code != 200:
                failure(response, response.status_code)


def refused(client: TestClient, path: str, body: object, status: int = 400) -> dict[str, Any]:
    return failure(client.post(path, json=body), status)


def failure(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which must have this status and OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    if status < 500:
        assert error["type"] == "invalid_request_error"
    return error
