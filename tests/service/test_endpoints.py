"""What each endpoint answers when all is well."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from routers.bundle import Bundle
from routers.prompt import AUTO, PromptRouter
from service.app import create_app
from service.engines.base import Status
from service.engines.echo import EchoEngine

CHAT = {"messages": [{"role": "user", "content": "write a python loop"}]}


class HalfReady(EchoEngine):
    """`story`, the default, answers; `math` is still loading and `code` is broken."""

    def status(self) -> dict[str, Status]:
        return {"math": Status("loading"), "code": Status("failed", "no weights"), "story": Status("ready")}


def test_a_completion_continues_the_text_and_names_its_expert(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "one two three", "model": "math"}).json()
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "math")
    assert answer["choices"] == [{"index": 0, "text": "one two three", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_completion_has_sixteen_tokens_unless_told_otherwise(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "word " * 20}).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_chat_answers_the_last_turn(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "code")
    message = {"role": "assistant", "content": "write a python loop", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]


def test_content_may_come_in_text_parts(client: TestClient) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]}).json()
    assert answer["choices"][0]["message"]["content"] == "one\ntwo"


def test_an_answer_can_be_sent_back_as_it_came(client: TestClient) -> None:
    own = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]
    again = [*CHAT["messages"], own | {"annotations": []}, {"role": "user", "content": "again"}]
    assert client.post("/v1/chat/completions", json={"messages": again}).status_code == 200


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_a_chats_limit_work(client: TestClient, name: str) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT | {name: 2}).json()
    assert answer["choices"][0]["message"]["content"] == "write a"


@pytest.mark.parametrize("stop", ["three", ["three"], ["x", "three"]])
def test_stop_strings_end_an_answer(client: TestClient, stop: str | list[str]) -> None:
    answer = client.post("/v1/completions", json={"prompt": "one two three four", "stop": stop}).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("one two ", "stop")
    assert answer["usage"]["completion_tokens"] == 3


def test_fields_at_their_neutral_values_are_taken(client: TestClient) -> None:
    neutral: dict[str, Any] = {
        "n": 1, "best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0,
        "suffix": None, "logit_bias": {}, "user": "me", "stop": None, "seed": None, "stream_options": None, "k": 1,
        "response_format": {"type": "text"}, "tools": [], "top_k": -1, "repetition_penalty": 1.0, "ignore_eos": False,
    }  # fmt: skip
    assert client.post("/v1/completions", json={"prompt": "one", "model": AUTO} | neutral).status_code == 200
    assert client.post("/v1/chat/completions", json=CHAT | {"model": AUTO} | neutral).status_code == 200


def test_every_answer_has_a_request_id_the_clients_own_or_a_new_one(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    ids = {client.get(path).headers["x-request-id"] for path in ("/healthz", "/nowhere", "/v1/models/nobody")}
    assert len(ids) == 3


@pytest.mark.parametrize("prompt", ["write a python loop", "the owl of the forest", "add a fraction", "nothing known"])
@pytest.mark.parametrize("chat", [False, True])
def test_route_headers_answer_and_router_agree(
    client: TestClient, router: PromptRouter, prompt: str, chat: bool
) -> None:
    expected = router.route(prompt)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    served = client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    assert served.headers["x-route-expert"] == served.json()["model"] == expected.expert
    assert served.headers["x-route-reason"] == expected.reason
    assert float(served.headers["x-route-ms"]) > 0
    for route in (client.get("/route", params={"prompt": prompt}).json(), client.post("/route", json=body).json()):
        assert (route["expert"], route["reason"], route["margin"]) == (
            expected.expert,
            expected.reason,
            expected.margin,
        )
        ranking = [(one["expert"], one["score"], one["selected"], one["weight"]) for one in route["experts"]]
        assert ranking == [(one.expert, one.score, one.selected, one.weight) for one in expected.ranking]
        assert [one["rank"] for one in route["experts"]] == [1, 2, 3]


def test_route_says_which_words_pulled_and_what_it_read(client: TestClient, router: PromptRouter) -> None:
    messages = [{"role": "system", "content": "owl"}, {"role": "user", "content": "write a python loop"}]
    route = client.post("/route", json={"messages": messages}).json()
    assert route["text"] == "write a python loop"
    pulls = router.explain(route["text"])
    assert pulls
    assert [(word["word"], word["score"]) for word in route["words"]] == [(pull.word, pull.score) for pull in pulls]


def test_route_tells_as_much_as_it_is_asked(client: TestClient) -> None:
    """basic has the choice, scores every expert's estimate, full what it rests on; all say the same choice."""
    asked = {"prompt": "write a python loop"}
    basic, scores, full = (
        client.post("/route", params={"detail": detail}, json=asked).json() for detail in ("basic", "scores", "full")
    )
    assert "experts" not in basic
    assert "evidence" not in scores
    assert scores["experts"][0].keys() >= {"expected_quality", "std", "cost", "excluded"}
    assert full["evidence"]["kind"] == "gates"
    assert full["evidence"]["near"][0]["experts"] == ["code"]
    without = next(each for each in full["counterfactuals"] if each["if"] == "without code")
    assert without["expert"] == scores["experts"][1]["expert"]
    for name in basic.keys() - {"ms", "steps_ms"}:
        assert basic[name] == scores[name] == full[name]
    assert list(full["steps_ms"]) == ["features", "estimate", "policy"]
    assert 0 < sum(full["steps_ms"].values()) <= full["ms"] + 0.002
    refused = client.post("/route", params={"detail": "all"}, json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "detail")


def test_route_selects_k_experts(client: TestClient) -> None:
    for route in (
        client.get("/route", params={"prompt": "python", "k": 2}).json(),
        client.post("/route", json={"prompt": "python", "k": 2}).json(),
    ):
        assert route["k"] == 2
        assert [one["selected"] for one in route["experts"]] == [True, True, False]
        assert sum(one["weight"] for one in route["experts"]) == pytest.approx(1)


def test_a_pinned_expert_answers_whatever_the_prompt(client: TestClient) -> None:
    served = client.post("/v1/completions", json={"prompt": "python loop", "model": "math"})
    assert (served.json()["model"], served.headers["x-route-reason"]) == ("math", "pinned")
    route = client.get("/route", params={"prompt": "python loop", "model": "math"}).json()
    assert (route["expert"], route["reason"], route["words"]) == ("math", "pinned", [])


def test_models_are_auto_its_policies_and_every_expert(client: TestClient) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == [AUTO, "auto:best", "auto:cheap", "math", "code", "story"]
    for model in models:
        assert client.get(f"/v1/models/{model['id']}").json() == model
    assert (models[3]["object"], models[3]["state"], models[3]["window"]) == ("model", "ready", 64)
    assert models[3]["facts"] == {"engine": "echo"}


def test_ready_when_every_expert_is(client: TestClient) -> None:
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert ready.json()["experts"]["code"] == {"state": "ready"}


def test_not_ready_while_an_expert_loads_and_says_how_far_each_is(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, HalfReady(bundle.router.experts))) as client:
        ready = client.get("/readyz")
        models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
        assert client.get("/healthz").status_code == 200
    assert ready.status_code == 503
    assert ready.json()["experts"]["code"] == {"state": "failed", "detail": "no weights"}
    assert (models["math"]["state"], models["math"]["window"]) == ("loading", None)


def test_ready_once_none_loads_and_any_can_answer(bundle: Bundle) -> None:
    class Settled(EchoEngine):
        def status(self) -> dict[str, Status]:
            return super().status() | {"story": Status("failed", "no weights")}  # the default

    with TestClient(create_app(bundle, Settled(bundle.router.experts))) as client:
        assert client.get("/readyz").status_code == 200
        assert client.post("/v1/completions", json={"prompt": ""}).json()["model"] != "story"


def test_metrics_count_answers_and_routes_by_expert(client: TestClient) -> None:
    client.post("/v1/completions", json={"prompt": "python loop", "max_tokens": 1})
    client.post("/v1/completions", json={"prompt": "python loop", "model": "math"})
    client.get("/route", params={"prompt": "python loop"})
    client.post("/v1/completions", json={"prompt": "python loop", "max_tokens": 100})
    values = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[:1] != "#")
    assert values['vllm:prompt_tokens_total{model_name="code"}'] == "2.0"
    assert values['vllm:generation_tokens_total{model_name="code"}'] == "1.0"
    assert values['vllm:request_success_total{finished_reason="length",model_name="code"}'] == "1.0"
    assert values['vllm:num_requests_running{model_name="code"}'] == "0.0"
    assert values['vllm:time_to_first_token_seconds_count{model_name="math"}'] == "1.0"
    assert values['vllm:inter_token_latency_seconds_count{model_name="math"}'] == "1.0"
    assert values['modelglue_route_decisions_total{model_name="code",reason="top_score"}'] == "1.0"
    assert values['modelglue_route_decisions_total{model_name="math",reason="pinned"}'] == "1.0"
    assert values["modelglue_route_margin_count"] == "1.0"
    assert values['modelglue_expert_ready{model_name="story"}'] == "1.0"


def test_two_apps_count_apart(client: TestClient, bundle: Bundle, engine: EchoEngine) -> None:
    client.post("/v1/completions", json={"prompt": "python", "model": "code"})
    with TestClient(create_app(bundle, engine)) as other:
        assert 'vllm:prompt_tokens_total{model_name="code"} 0.0' in other.get("/metrics").text


def test_an_answer_streams_as_events(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"prompt": "python loop of", "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-route-expert"] == "code"
    chunks = events(response)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["python", " loop", " of"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["model"] for chunk in chunks} == {"code"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_a_chat_streams_its_role_first(client: TestClient) -> None:
    chunks = events(client.post("/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 2}))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "write"},
        {"content": " a"},
    ]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_counts_its_tokens_when_asked(client: TestClient) -> None:
    body = {"prompt": "one two", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.post("/v1/completions", json=body))
    assert [chunk["usage"] for chunk in chunks] == [None, None]
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 4)


def test_a_stream_holds_back_what_may_become_a_stop_string(client: TestClient) -> None:
    body = {"prompt": "one two three four", "stream": True, "stop": "wo thr"}
    chunks = events(client.post("/v1/completions", json=body))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["one", " t", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def events(response: Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end as OpenAI's do."""
    *parts, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]
