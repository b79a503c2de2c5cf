"""What goes wrong is told to those whom it concerns, by HTTP, and to nobody else."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hosting import Hosted, hosted
from processes import Service, service_process
from serving import asked
from tiny import (
    BREAKS_LOGITS,
    BREAKS_READING,
    ENDLESS,
    ENDLESS_KV_BYTES,
    HELD,
    HOLDS,
    KILLS,
    holding,
    save_llama,
    until,
)
from waiting import wait_until

LONG: dict[str, Any] = {"prompt": "the owl", "max_tokens": 480, "temperature": 0}
WITHOUT_END = LONG | {"max_tokens": ENDLESS.max_tokens}


@pytest.fixture(scope="module")
def folders(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    faulty = save_llama(tmp_path_factory.mktemp("faulty"), seed=1, faulty=True)
    return {"math": endless, "faulty": faulty}


@pytest.fixture
def service(folders: dict[str, Path]) -> Iterator[Hosted]:
    with hosted(folders, kv_bytes=ENDLESS_KV_BYTES) as found:
        yield found


def post(service: Hosted, **body: Any) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/completions", json={"temperature": 0} | body, timeout=60)


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *found, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found if not event.startswith(":")]


def idle(service: Hosted) -> bool:
    return all((load.running, load.waiting, load.kv) == (0, 0, 0) for load in service.engine.load().values())


@pytest.mark.parametrize(("prompt", "reason"), [(BREAKS_READING, "on fire"), (BREAKS_LOGITS, "not finite")])
@pytest.mark.parametrize("stream", [False, True])
def test_an_expert_that_fails_at_a_prompt_is_a_503_and_all_others_stream_on(
    service: Hosted, prompt: str, reason: str, stream: bool
) -> None:
    undisturbed = post(service, **LONG, model="math").json()["choices"][0]["text"]
    ask = WITHOUT_END | {"model": "math", "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=ask, timeout=60) as other:
        lines = (line for line in other.iter_lines() if line)
        text = text_of(next(lines))
        failed = post(service, model="faulty", prompt=prompt, stream=stream)
        assert failed.status_code == 503
        assert failed.headers["x-should-retry"] == "false"
        error = failed.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "expert_failed")
        assert error["message"].startswith("faulty failed")
        assert reason in error["message"]
        while len(text) < len(undisturbed):
            text += text_of(next(lines))
        assert text.startswith(undisturbed)
        assert service.engine.load()["math"].running == 1
    whole = events(post(service, **LONG, model="math", stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in whole) == undisturbed
    assert httpx.get(f"{service.url}/readyz", timeout=60).status_code == 200
    assert post(service, model="faulty", prompt="the owl", max_tokens=3).status_code == 200
    wait_until(lambda: idle(service))


def text_of(line: str) -> str:
    return str(json.loads(line.removeprefix("data: "))["choices"][0]["text"])


def test_a_failure_in_mid_stream_is_an_event_that_clients_raise(service: Hosted) -> None:
    ask = LONG | {"model": "faulty"}  # which breaks at BREAKS_STEP_AT tokens
    *chunks, last = events(post(service, **ask, stream=True))
    assert chunks
    assert last["error"]["code"] == "expert_failed"
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(**ask, stream=True)
        for chunk in chunks:
            assert next(stream).choices[0].text == chunk["choices"][0]["text"]
        with pytest.raises(openai.APIError, match="faulty failed"):
            next(stream)
    wait_until(lambda: idle(service))


def test_where_the_routed_expert_fails_the_next_one_answers(service: Hosted) -> None:
    answer = post(service, model="auto", prompt=f"faulty {BREAKS_READING}", max_tokens=3)
    assert answer.status_code == 200
    assert (answer.json()["model"], answer.headers["x-route-reason"]) == ("math", "fallback")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_rules_every_token_out_is_refused_and_tried_nowhere_else(service: Hosted, stream: bool) -> None:
    impossible = {"stop_token_ids": list(range(2000)), "min_tokens": 2, "max_tokens": 3, "stream": stream}
    refused = post(service, model="auto", prompt="math", **impossible)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("min_tokens", "unsupported_value")
    wait_until(lambda: idle(service))


def test_every_answer_of_a_request_takes_a_place_in_the_queue(folders: dict[str, Path]) -> None:
    with hosted(folders, most=1, queue=2) as service:
        for answers in ({"n": 4}, {"prompt": ["a"] * 4}, {"best_of": 4}):
            refused = post(service, **{"model": "math", "prompt": "the owl", "max_tokens": 3} | answers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            wait_until(lambda: idle(service))
        assert post(service, model="math", prompt="the owl", max_tokens=3, n=3, temperature=1).status_code == 200


def test_a_dead_device_thread_fails_readiness_and_all_requests_at_once(folders: dict[str, Path]) -> None:
    async def ask(service: Hosted) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            bodies = [WITHOUT_END | {"model": "math", "stream": stream} for stream in (False, True)] * 8
            asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
            await until(
                lambda: (service.engine.load()["math"].running, service.engine.load()["math"].waiting) == (2, 14)
            )
            killer = await client.post("/v1/completions", json={"model": "faulty", "prompt": KILLS})
            return [killer, *await asyncio.gather(*asked)]

    with hosted(folders, most=2, kv_bytes=ENDLESS_KV_BYTES) as service:  # so that some run and some wait
        for answer in asyncio.run(ask(service)):
            told = answer.json() if answer.status_code == 503 else events(answer)[-1]
            assert "device thread died" in told["error"]["message"]
        ready = httpx.get(f"{service.url}/readyz", timeout=60)
        assert ready.status_code == 503
        assert {each["state"] for each in ready.json()["experts"].values()} == {"failed"}
        assert httpx.get(f"{service.url}/healthz", timeout=60).status_code == 200
        assert post(service, prompt="the owl").status_code == 503


def test_a_client_that_leaves_the_queue_leaves_nothing(folders: dict[str, Path]) -> None:
    with hosted(folders, most=1, kv_bytes=ENDLESS_KV_BYTES) as service:
        body = WITHOUT_END | {"model": "math", "stream": True}
        with asked(service.url, body) as first:
            first.recv(1)
            with asked(service.url, body):
                wait_until(lambda: service.engine.load()["math"].waiting == 1)
            wait_until(lambda: service.engine.load()["math"].waiting == 0)
            assert service.engine.load()["math"].running == 1
        wait_until(lambda: idle(service))


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_the_time_to_come_again_and_no_harm_to_who_waits(
    folders: dict[str, Path], stream: bool
) -> None:
    async def ask(service: Hosted) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            body = LONG | {"model": "math", "stream": stream}
            with holding():
                held = asyncio.create_task(client.post("/v1/completions", json={"model": "faulty", "prompt": HOLDS}))
                await until(HELD.is_set)
                asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(3)]
                await until(lambda: service.engine.load()["math"].waiting == 3)
                refused = await client.post("/v1/completions", json=body)
            return [refused, *await asyncio.gather(held, *asked)]

    with hosted(folders, most=1, queue=2) as service:
        refused, *answers = asyncio.run(ask(service))
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200]
    assert len({answer.text.count("text_completion") for answer in answers[1:]}) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"prompt": "x" * 200, "max_tokens": 100}, "key-value memory"),
        ({"prompt": "x" * 500, "max_tokens": 13}, "window of 512"),
        ({"prompt": [5, 300]}, "not one of math's 300"),
        ({"prompt": "x", "logit_bias": {"300": 1}}, "logit_bias"),
        ({"prompt": "x", "guided_regex": "("}, "regular expression"),
    ],
)
def test_what_can_never_be_is_refused_before_a_byte_of_an_answer(
    service_of_little_memory: Hosted, asked: dict[str, Any], reason: str, stream: bool
) -> None:
    refused = post(service_of_little_memory, **asked, model="math", stream=stream)
    assert refused.status_code == 400
    assert reason in refused.json()["error"]["message"]
    assert idle(service_of_little_memory)


@pytest.fixture(scope="module")
def service_of_little_memory(llamas: dict[str, Path]) -> Iterator[Hosted]:
    page = 2 * 2 * 2 * 16 * 16 * 4  # layers, keys and values, heads, tokens, width, bytes
    with hosted({"math": llamas["math"]}, kv_bytes=8 * page) as found:
        yield found


def test_told_to_stop_under_load_every_stream_ends_with_its_end_or_the_reason(
    folder: Path, llamas: dict[str, Path], endless: Path
) -> None:
    for name, source in (llamas | {"math": endless}).items():
        shutil.copytree(source, folder / "experts" / name)
    options = ("--dtype", "float32", "--kv-memory", "0.1", "--grace", "0.5", "--log-level", "warning")
    with service_process([sys.executable, "-m", "service", "--bundle", folder, "--port", 0, *options]) as service:
        lasts = asyncio.run(stop_under_load(service))
        assert service.process.wait(30) == 0
    assert set(lasts) <= {"length", "stop", "stopping"}
    assert "stopping" in lasts
    assert len(set(lasts)) > 1


async def stop_under_load(service: Service) -> list[str]:
    """How each stream ended; half of them are short, and half would never end."""
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        bodies = [WITHOUT_END | {"model": "math", "stream": True} | more for more in ({}, {"max_tokens": 5})] * 40
        asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        service.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*asked)
    assert {answer.status_code for answer in answers} <= {200, 503}
    lasts = [events(answer)[-1] if answer.status_code == 200 else answer.json() for answer in answers]
    return [last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"] for last in lasts]
