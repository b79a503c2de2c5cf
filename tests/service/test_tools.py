"""The endpoints beside completions: vectors, tokens, many routes at once, the release."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from routers.bundle import Bundle
from routers.prompt import PromptRouter
from service.api import MAX_BATCH
from service.app import create_app
from service.engines.base import About, BusyError, Job, Piece, Prompt, UnsupportedError
from service.engines.echo import EchoEngine


class Marked(EchoEngine):
    """Begins every text, also an empty one, with a mark, as many tokenizers do."""

    def encode(self, expert: str, prompt: Prompt) -> tuple[int, ...]:
        text = prompt if isinstance(prompt, str) else "a chat"
        return super().encode(expert, f"<s> {text}")


def test_embeddings_are_the_vectors_that_prompts_are_routed_by(client: TestClient, router: PromptRouter) -> None:
    texts = ["python loop", "the owl"]
    answer = client.post("/v1/embeddings", json={"input": texts, "model": "router"}).json()
    assert [each["index"] for each in answer["data"]] == [0, 1]
    for text, each in zip(texts, answer["data"], strict=True):
        np.testing.assert_array_equal(np.float32(each["embedding"]), router.features.vector(text))
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    one = client.post("/v1/embeddings", json={"input": texts[0], "encoding_format": "base64"}).json()
    raw = base64.b64decode(one["data"][0]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), router.features.vector(texts[0]))


def test_tokens_there_and_back(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"prompt": "python loop"}).json()
    assert answer["count"] == len(answer["tokens"]) == 2
    assert (answer["model"], answer["max_model_len"]) == ("story", 64)
    back = client.post("/detokenize", json={"tokens": answer["tokens"], "model": "code"}).json()
    assert back == {"prompt": "python loop"}
    again = client.post("/v1/completions", json={"prompt": answer["tokens"]})
    assert again.json()["choices"][0]["text"] == "python loop"


def test_a_chat_has_tokens_too(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "write a loop"}], "model": "code"}
    assert client.post("/tokenize", json=body).json()["count"] == 3


def test_a_text_over_every_window_has_tokens_too_and_no_queue_is_in_their_way(bundle: Bundle) -> None:
    class Full(EchoEngine):
        async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
            raise BusyError("all places are taken: come again later")
            yield

    with TestClient(create_app(bundle, Full(bundle.router.experts))) as client:
        assert client.post("/v1/completions", json={"prompt": "word"}).status_code == 429
        assert client.post("/tokenize", json={"prompt": "word " * 100}).json()["count"] == 100


def test_what_only_another_server_can_make_tokens_of_is_refused(bundle: Bundle) -> None:
    class Elsewhere(EchoEngine):
        def encode(self, expert: str, prompt: Prompt) -> tuple[int, ...]:
            raise UnsupportedError(f"only {expert}'s server has its tokenizer: ask it there", "model")

    with TestClient(create_app(bundle, Elsewhere(bundle.router.experts))) as client:
        for answer in (client.post("/tokenize", json={"prompt": "word"}), client.get("/tokenizer_info")):
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_a_tokenizers_own_marks_and_template_are_told(bundle: Bundle) -> None:
    told = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": "?", "chat_template": "{{ x }}"}

    class Telling(EchoEngine):
        def about(self, expert: str) -> About:
            return replace(super().about(expert), tokenizer=told)

    with TestClient(create_app(bundle, Telling(bundle.router.experts))) as client:
        assert client.get("/tokenizer_info").json() == {"model": "story", **told}
        assert client.get("/tokenizer_info", params={"model": "math"}).json() == {"model": "math", **told}
        assert client.get("/tokenizer_info", params={"model": "gpt"}).status_code == 404


def test_special_tokens_can_be_left_out(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, Marked(bundle.router.experts))) as client:
        counts = [
            client.post("/tokenize", json={"prompt": prompt, "add_special_tokens": marks}).json()["count"]
            for prompt in ("one two", "")
            for marks in (True, False)
        ]
        chat = {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": False}
        assert client.post("/tokenize", json=chat).json()["count"] == 3  # the template's own mark stays
    assert counts == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("path", "field"), [("/detokenize", "tokens"), ("/v1/completions", "prompt"), ("/route", "prompt")]
)
def test_a_number_that_is_too_large_for_a_token_is_refused(bundle: Bundle, path: str, field: str) -> None:
    class Real(EchoEngine):
        """Reads tokens as real tokenizers do."""

        def decode(self, expert: str, ids: Sequence[int]) -> str:
            array("L", ids)
            return ""

    with TestClient(create_app(bundle, Real(bundle.router.experts))) as client:
        response = client.post(path, json={field: [10**30]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_a_tokens_model_must_be_there(client: TestClient) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})):
        assert client.post(path, json=body | {"model": "gpt"}).status_code == 404


def test_a_line_of_a_batch_is_no_longer_than_a_body(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, EchoEngine(bundle.router.experts), max_body=100)) as client:
        lines = [json.dumps({"prompt": "word " * count}) for count in (1, 100)]
        first, second = map(json.loads, client.post("/route/batch", content="\n".join(lines)).text.splitlines())
    assert first["object"] == "route"
    assert second["error"]["code"] == "line_too_large"


@pytest.mark.parametrize("path", ["/route/batch", "/v1/route/batch"])
def test_a_batch_has_a_route_or_an_error_for_every_line_in_order(client: TestClient, path: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "python loop"},
        {"messages": [{"role": "user", "content": "the owl"}]},
        {"prompt": "hi", "k": 9},
        {"prompt": "hi", "model": "gpt"},
        {"prompt": "owl", "model": "math"},
    ]
    lines = [*map(json.dumps, bodies), "not JSON", ""]
    response = client.post(path, params={"detail": "basic"}, content="\n".join(lines))
    assert (response.status_code, response.headers["content-type"]) == (200, "application/jsonl")
    first, second, wrong, unknown, pinned, garbled = map(json.loads, response.text.splitlines())
    untimed = {"ms": 0, "steps_ms": {}}
    assert first | untimed == client.post("/route?detail=basic", json=bodies[0]).json() | untimed
    assert (second["text"], pinned["reason"]) == ("the owl", "pinned")
    assert [each["error"]["code"] for each in (unknown, garbled)] == ["model_not_found", "invalid_json"]
    assert wrong["error"]["param"] == "k"


def test_a_thousand_routes_in_a_batch_are_those_of_each_alone(client: TestClient, router: PromptRouter) -> None:
    words = ["python", "owl", "add", "castle", "loop", "sum"]
    prompts = [f"{words[i % 6]} {words[i // 6 % 6]} {i}" for i in range(1000)]
    content = "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts)
    response = client.post("/route/batch?detail=basic", content=content)
    got = [json.loads(line)["expert"] for line in response.text.splitlines()]
    assert got == [router.route(prompt).expert for prompt in prompts]


def test_a_batch_over_the_limit_is_refused(client: TestClient) -> None:
    response = client.post("/route/batch", content=b"\n" * (MAX_BATCH + 1))
    assert response.status_code == 413


def test_the_release_and_its_bundle_are_told(client: TestClient, bundle: Bundle) -> None:
    told = client.get("/version").json()
    assert (told["version"], told["bundle"]) == (version("modelglue"), bundle.manifest.zoo)


def test_vllms_name_for_health_works_too(client: TestClient) -> None:
    assert client.get("/health").json() == client.get("/healthz").json()
