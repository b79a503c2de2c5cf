"""What answers look like: several prompts and choices, log-probabilities, streams, the route in them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from held import Held
from httpx2 import Response
from serving import serve

from routers.bundle import Bundle
from routers.prompt import PromptRouter
from service.app import create_app
from service.engines.base import EngineError, Guide, Job, Piece, Prompt, Sampling, Scored
from service.engines.echo import EchoEngine
from service.schemas.answers import NEVER, Offsets, finite, legacy

CHAT = {"messages": [{"role": "user", "content": "write a python loop"}]}


class Asked(EchoEngine):
    """Keeps what it is asked for, and takes any form for granted."""

    def __init__(self, experts: tuple[str, ...]) -> None:
        super().__init__(experts)
        self.asked: list[tuple[Mapping[str, float], Prompt, Sampling]] = []

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        self.asked.append((experts, prompt, sampling))
        return super().prepare(experts, prompt, Sampling(sampling.max_tokens))


def logprob(word: str) -> float:
    return -zlib.crc32(word.encode()) / 2**32


def ids(*words: str) -> list[int]:
    return [int.from_bytes(word.encode()) for word in words]


def choices(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


def events(response: Response) -> list[dict[str, Any]]:
    """The events of a stream."""
    return events_of(response.text)


def events_of(stream: str) -> list[dict[str, Any]]:
    """Its events; it must end as OpenAI's do."""
    *parts, done, end = stream.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts if not part.startswith(":")]


def test_several_prompts_are_routed_each_by_itself_and_answered_in_order(client: TestClient) -> None:
    body = {"prompt": ["python loop", "owl princess", "python list"], "max_tokens": 2}
    response = client.post("/v1/completions", json=body)
    answer = response.json()
    assert [choice["text"] for choice in answer["choices"]] == body["prompt"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["expert"] for choice in answer["choices"]] == ["code", "story", "code"]
    assert (answer["model"], response.headers["x-route-expert"]) == ("auto", "code, story")
    assert answer["usage"]["total_tokens"] == 12


def test_several_prompts_that_go_to_one_expert_name_it(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": ["python loop", "python list"]}).json()
    assert (answer["model"], [choice["expert"] for choice in answer["choices"]]) == ("code", ["code", "code"])


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (ids("python", " loop"), ["python loop"]),
        ([ids("python", " loop")], ["python loop"]),
        ([ids("python"), ids("the", " owl")], ["python", "the owl"]),
    ],
)
def test_prompts_may_be_tokens(client: TestClient, prompt: list[Any], texts: list[str]) -> None:
    assert [choice["text"] for choice in choices(client, prompt=prompt)] == texts


def test_tokens_are_routed_like_their_text(client: TestClient) -> None:
    for prompt in ("python loop", ids("python", " loop")):
        assert client.post("/v1/completions", json={"prompt": prompt}).headers["x-route-expert"] == "code"
        assert client.post("/route", json={"prompt": prompt}).json()["text"] == "python loop"


def test_n_answers_are_counted_with_their_prompt_once(client: TestClient) -> None:
    answer = client.post(
        "/v1/completions", json={"prompt": ["a b c", "d e f"], "n": 2, "seed": 0, "max_tokens": 1}
    ).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a", " b", "d", " e"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 4


def test_the_best_of_several_answers_is_the_likeliest(client: TestClient) -> None:
    words = ["one", " two", " three", " four"]
    response = client.post("/v1/completions", json={"prompt": "".join(words), "seed": 0, "max_tokens": 1, "best_of": 4})
    (choice,) = response.json()["choices"]
    assert choice["text"] == max(words, key=logprob)
    assert choice["logprobs"] is None
    assert response.json()["usage"]["completion_tokens"] == 4


def test_log_probabilities_come_in_the_legacy_shape(client: TestClient) -> None:
    (choice,) = choices(client, prompt="one two three", logprobs=2, max_tokens=2)
    assert choice["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [logprob("one"), logprob(" two")],
        "top_logprobs": [{"one": logprob("one"), "~": -0.5}, {" two": logprob(" two"), "~": -0.5}],
        "text_offset": [0, 3],
    }


@pytest.mark.parametrize("top", [0, 1, 20])
def test_the_token_itself_is_always_among_its_alternatives(client: TestClient, top: int) -> None:
    (choice,) = choices(client, prompt="one two three four five", logprobs=top)
    found = choice["logprobs"]
    for token, value, alternatives in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert alternatives[token] == value
        assert len(alternatives) <= top + 1
        assert top == 0 or max(alternatives.values()) == max(value, -0.5)


def test_an_echo_has_the_prompt_and_its_log_probabilities_first(client: TestClient) -> None:
    (choice,) = choices(client, prompt="one two three", logprobs=1, echo=True, max_tokens=1)
    assert choice["text"] == "one two threeone"
    found = choice["logprobs"]
    assert found["tokens"] == ["one", " two", " three", "one"]
    assert found["token_logprobs"] == [None, logprob(" two"), logprob(" three"), logprob("one")]
    assert found["top_logprobs"][0] is None
    assert found["text_offset"] == [0, 3, 7, 13]


@pytest.mark.parametrize("prompt", ["one two", ids("one", " two")])
def test_an_echo_without_an_answer_is_the_prompt(client: TestClient, prompt: object) -> None:
    response = client.post("/v1/completions", json={"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0})
    (choice,) = response.json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, logprob(" two")]
    assert response.json()["usage"]["completion_tokens"] == 0
    (plain,) = choices(client, prompt=prompt, echo=True, max_tokens=1)
    assert (plain["text"], plain["logprobs"]) == ("one twoone", None)


def test_a_stop_string_leaves_no_log_probabilities_behind_it(client: TestClient) -> None:
    (choice,) = choices(client, prompt="one two three four", stop="thr", logprobs=0)
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("one two ", ["one", " two", " three"])
    (kept,) = choices(client, prompt="one two three four", stop="two", include_stop_str_in_output=True)
    assert kept["text"] == "one two"


def test_offsets_are_in_characters_also_where_a_token_is_half_of_one() -> None:
    offsets = Offsets()
    assert [offsets.next(raw) for raw in ("é".encode(), b"\xe2\x82", b"\xac", b"x", b"")] == [0, 1, 1, 2, 3]


def test_tokens_that_are_no_text_are_written_by_their_bytes() -> None:
    assert legacy(Scored(1, b"\xe2\x82", -1.0)) == "bytes:\\xe2\\x82"
    assert legacy(Scored(1, "é".encode(), -1.0)) == "é"


def test_what_cannot_be_has_a_number_in_json() -> None:
    assert (finite(-math.inf), finite(-1.5)) == (NEVER, -1.5)


def test_chats_log_probabilities_have_bytes_and_alternatives(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "hé ho"}], "logprobs": True, "top_logprobs": 1}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("hé", logprob("hé"), list("hé".encode()))
    (top,) = first["top_logprobs"]
    assert top["logprob"] == max(logprob("hé"), -0.5)
    assert choice["logprobs"]["refusal"] is None
    bare = client.post("/v1/chat/completions", json=body | {"top_logprobs": 0}).json()["choices"][0]
    assert bare["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_stream_of_several_choices_says_whose_each_bit_is(client: TestClient) -> None:
    body = {"prompt": ["python loop", "owl princess night"], "n": 2, "seed": 0, "stream": True}
    response = client.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}})
    *chunks, last = events(response)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        assert chunk["model"] == choice["expert"] == ("code", "code", "story", "story")[choice["index"]]
        assert chunk["usage"] is None
    assert list(texts.values()) == ["python loop", " looppython", "owl princess night", " princess nightowl"]
    assert (last["model"], last["choices"]) == ("auto", [])
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (5, 10)
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks) == 4


def test_choices_are_interleaved_not_one_after_the_other(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, EchoEngine(bundle.router.experts, delay=0.01))) as client:
        response = client.post("/v1/completions", json={"prompt": "a b c d", "n": 2, "stream": True})
    order = [chunk["choices"][0]["index"] for chunk in events(response)]
    assert order not in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    assert sorted(order) == [0] * 4 + [1] * 4


def test_a_streams_log_probabilities_are_those_of_the_whole(client: TestClient) -> None:
    body = {"prompt": "one two three", "logprobs": 1, "echo": True}
    (whole,) = choices(client, **body)
    parts = [chunk["choices"][0] for chunk in events(client.post("/v1/completions", json=body | {"stream": True}))]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][name]] == values


def test_a_chat_streams_each_choices_role_once_and_its_log_probabilities(client: TestClient) -> None:
    body = CHAT | {"n": 2, "stream": True, "logprobs": True}
    deltas: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for chunk in events(client.post("/v1/chat/completions", json=body)):
        (choice,) = chunk["choices"]
        deltas[choice["index"]].append(choice["delta"])
        tokens[choice["index"]] += [each["token"] for each in choice["logprobs"]["content"]]
    for index in (0, 1):
        assert ["role" in delta for delta in deltas[index]] == [True, False, False, False]
        assert "".join(tokens[index]) == "write a python loop"


class HalfCharacters(EchoEngine):
    """Writes an é in two tokens, after one without text."""

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        asked = job.sampling.logprobs is not None
        for raw, text in ((b"", ""), (b"\xc3", ""), (b"\xa9", "é")):
            yield Piece(text, 1, "length" if text else None, (Scored(0, raw, -1.0),) if asked else ())


def test_tokens_without_text_are_in_a_stream_only_with_their_log_probabilities(bundle: Bundle) -> None:
    with TestClient(create_app(bundle, HalfCharacters(bundle.router.experts))) as client:
        body = CHAT | {"stream": True}
        plain = events(client.post("/v1/chat/completions", json=body))
        scored = events(client.post("/v1/chat/completions", json=body | {"logprobs": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in plain]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "é"}]  # the first tells that it has begun
    tokens = [token["bytes"] for chunk in scored for token in chunk["choices"][0]["logprobs"]["content"]]
    assert tokens == [[], [0xC3], [0xA9]]


def test_a_stream_counts_as_it_goes_when_asked(client: TestClient) -> None:
    body = {
        "prompt": "one two",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(client.post("/v1/completions", json=body))]
    assert counts[-2:] == [2, 2]
    assert counts == sorted(counts)


def test_everything_that_is_asked_of_sampling_reaches_the_engine(bundle: Bundle) -> None:
    engine = Asked(bundle.router.experts)
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -1,
        "frequency_penalty": 1.5, "seed": 3, "ignore_eos": True, "min_tokens": 2,
    }  # fmt: skip
    asked = {"logit_bias": {"5": -100, "7": 1.5}, "stop_token_ids": [9], "max_tokens": 4}
    with TestClient(create_app(bundle, engine)) as client:
        client.post("/v1/completions", json={"prompt": "hi", "logprobs": 3, "echo": True} | sampling | asked)
        client.post("/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 9} | sampling | asked)
    expected = sampling | {"max_tokens": 4, "logit_bias": ((5, -100), (7, 1.5)), "stop_tokens": (9,)}
    got, chat = (dataclass_fields(each[2]) for each in engine.asked)
    assert got == expected | {"logprobs": 3, "prompt_logprobs": 3, "guide": None}
    assert chat == expected | {"logprobs": 9, "prompt_logprobs": None, "guide": None}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("asked", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", "{}"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            SCHEMA,
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            "json_schema",
            SCHEMA,
        ),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_schema", "{}"),
        ({"guided_regex": "[ab]+"}, "regex", "[ab]+"),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
    ],
)
def test_the_form_of_an_answer_reaches_the_engine(
    bundle: Bundle, asked: dict[str, Any], kind: str, text: str | dict[str, Any]
) -> None:
    engine = Asked(bundle.router.experts)
    with TestClient(create_app(bundle, engine)) as client:
        assert client.post("/v1/completions", json={"prompt": "hi"} | asked).status_code == 200
        assert client.post("/v1/chat/completions", json=CHAT | asked).status_code == 200
    for _, _, sampling in engine.asked:
        assert isinstance(sampling.guide, Guide)
        assert sampling.guide.kind == kind
        assert (sampling.guide.text if isinstance(text, str) else json.loads(sampling.guide.text)) == text


def test_an_engine_that_has_no_grammar_says_so(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"prompt": "hi", "guided_regex": "a"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


def test_every_role_reaches_the_engine_and_developer_is_system(bundle: Bundle) -> None:
    engine = Asked(bundle.router.experts)
    roles = ["developer", "system", "user", "assistant", "tool"]
    messages = [{"role": role, "content": f"{role} says"} for role in roles]
    messages[-1]["tool_call_id"] = "call-1"
    with TestClient(create_app(bundle, engine)) as client:
        assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    (_, prompt, _), *_ = engine.asked
    assert isinstance(prompt, tuple)
    assert [message.role for message in prompt] == ["system", "system", "user", "assistant", "tool"]


def test_names_and_hints_are_taken_and_change_nothing(client: TestClient) -> None:
    hints = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "safety_identifier": "x", "prompt_cache_key": "x",
        "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}, "service_tier": "flex",
        "reasoning_effort": "none", "request_id": "x", "x_own": [1, 2], "modalities": ["text"],
    }  # fmt: skip
    answer = client.post("/v1/chat/completions", json=CHAT | hints).json()
    assert answer["choices"][0]["message"]["content"] == "write a python loop"
    assert answer["service_tier"] == "default"


def test_several_experts_answer_as_one_and_the_first_is_named(bundle: Bundle, router: PromptRouter) -> None:
    engine = Asked(bundle.router.experts)
    with TestClient(create_app(bundle, engine)) as client:
        response = client.post("/v1/completions", json={"prompt": "python loop", "k": 2})
    second = router.route("python loop").ranking[1].expert
    assert list(engine.asked[0][0]) == ["code", second]
    assert response.json()["model"] == response.headers["x-route-expert"] == "code"


def test_bodies_limit_the_route_and_route_shows_it(client: TestClient) -> None:
    body = {"prompt": "python loop", "deny": ["code"], "cost_weight": 0.5}
    served = client.post("/v1/completions", json=body)
    assert served.headers["x-route-expert"] != "code"
    for route in (
        client.post("/v1/route", json=body).json(),
        client.get("/route", params={"prompt": "python loop", "deny": ["code"], "cost_weight": 0.5}).json(),
    ):
        assert route["expert"] == served.headers["x-route-expert"]
        assert {each["expert"]: each["excluded"] for each in route["experts"]}["code"] == "denied"


def test_a_header_pins_an_expert_like_model_does(client: TestClient) -> None:
    served = client.post("/v1/completions", json={"prompt": "python loop"}, headers={"x-expert": "math"})
    assert (served.json()["model"], served.headers["x-route-reason"]) == ("math", "pinned")
    route = client.get("/route", params={"prompt": "python loop"}, headers={"x-expert": "math"}).json()
    assert (route["expert"], route["reason"]) == ("math", "pinned")


def test_a_session_stays_with_its_expert_until_another_is_clearly_better(client: TestClient) -> None:
    mine = {"x-session-id": "mine"}

    def turn(prompt: str, headers: Mapping[str, str] = mine) -> tuple[str, str]:
        served = client.post("/v1/completions", json={"prompt": prompt}, headers=headers)
        return served.headers["x-route-expert"], served.headers["x-route-reason"]

    assert turn("python loop") == ("code", "top_score")
    assert client.get("/route", params={"prompt": "of"}, headers=mine).json()["reason"] == "retained"
    assert turn("") == ("code", "retained")
    assert turn("", {}) == ("story", "no_evidence")
    assert turn("owl princess night") == ("story", "switched")


def test_a_chat_stays_with_its_expert_by_its_first_messages(client: TestClient) -> None:
    messages = [{"role": "user", "content": "python loop"}]
    answer = client.post("/v1/chat/completions", json={"messages": messages})
    messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "and python function"}]
    again = client.post("/v1/chat/completions", json={"messages": messages})
    assert (again.headers["x-route-expert"], again.headers["x-route-reason"]) == ("code", "retained")


@pytest.mark.parametrize("counted", [False, True])
def test_the_decision_comes_with_the_last_part_when_asked(client: TestClient, counted: bool) -> None:
    headers = {"x-route-debug": "1"}
    expected = client.post("/route", json={"prompt": "python loop"}).json()
    whole = client.post("/v1/completions", json={"prompt": "python loop"}, headers=headers).json()
    body = {"prompt": "python loop", "stream": True} | ({"stream_options": {"include_usage": True}} if counted else {})
    *chunks, last = events(client.post("/v1/completions", json=body, headers=headers))
    assert not any("route" in chunk for chunk in chunks)
    for route in (whole["route"], last["route"]):
        untimed = {"ms": 0, "steps_ms": {}}
        assert route | untimed == expected | untimed
    assert "route" not in client.post("/v1/completions", json={"prompt": "python loop"}).json()


def test_the_decisions_of_several_prompts_are_a_list(client: TestClient) -> None:
    body = {"prompt": ["python loop", "the owl"]}
    answer = client.post("/v1/completions", json=body, headers={"x-route-debug": "1"}).json()
    assert [route["text"] for route in answer["route"]] == body["prompt"]
    assert [route["text"] for route in client.post("/route", json=body).json()] == body["prompt"]


class Mortal(Held):
    """Dies when it is let, if it is told of what."""

    failure: Exception | None = None

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        async for piece in super().generate(job):
            if self.failure:
                raise self.failure
            yield piece


def heard(bundle: Bundle, engine: Held) -> str:
    """The whole stream of an answer that is held until it has said twice that it lives."""
    app, text = create_app(bundle, engine, patience=0.01, heartbeat=0.05), ""
    with (
        serve(app) as (url, _),
        httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "hi", "stream": True}, timeout=60) as response,
    ):
        assert response.status_code == 200
        for part in response.iter_text():
            text += part
            if text.count(": waiting\n\n") >= 2:
                engine.gate.release()
    return text


def test_a_stream_that_waits_says_that_it_lives(bundle: Bundle) -> None:
    text = heard(bundle, Mortal(bundle.router.experts))
    assert text.startswith(": waiting\n\n: waiting\n\n")
    assert [chunk["choices"][0]["text"] for chunk in events_of(text)] == ["hi"]


def test_a_failure_after_the_wait_is_an_error_event(bundle: Bundle) -> None:
    engine = Mortal(bundle.router.experts)
    engine.failure = EngineError("code died")
    (error,) = events_of(heard(bundle, engine))
    assert error["error"]["message"] == "code died"


def test_another_expert_steps_in_and_the_answer_says_so(bundle: Bundle) -> None:
    class CodeIsDead(EchoEngine):
        async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
            if job.expert == "code":
                raise EngineError("code died")
            async for piece in super().generate(job):
                yield piece

    with TestClient(create_app(bundle, CodeIsDead(bundle.router.experts))) as client:
        for stream in (False, True):
            response = client.post("/v1/completions", json={"prompt": "python loop", "stream": stream})
            assert (response.status_code, response.headers["x-route-reason"]) == (200, "fallback")
            assert response.headers["x-route-expert"] != "code"
            pinned = client.post("/v1/completions", json={"prompt": "python loop", "model": "code", "stream": stream})
            assert pinned.status_code == 503
        assert 'reason="fallback"' in client.get("/metrics").text


def dataclass_fields(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in Sampling.__slots__}
