"""The real service on a real bundle, asked by real clients: a toy bundle, and in `make test-all` the demo's."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from processes import service_process
from transformers import AutoModelForCausalLM, AutoTokenizer

from routers import bundle
from routers.prompt import PromptRouter
from service.engines.local.expert import best_dtype

PROMPTS = (
    "Question: Eve has 9 pens and gets 3 more. How many now?",
    "def clip(a, b):\n    if a > b:",
    "Once upon a time there was a brave fox who lived near the river.",
    "User: how can I grow herbs?",
    "What is the sum of 3 and 4?",
    "",
)


@dataclass(frozen=True)
class Served:
    """A running service, and the bundle it serves."""

    client: httpx.Client
    url: str
    path: Path
    router: PromptRouter


@pytest.fixture(scope="module", params=["micro", pytest.param("demo", marks=pytest.mark.slow)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = request.getfixturevalue("micro_bundle") if request.param == "micro" else demo_bundle(tmp_path_factory)
    command = [sys.executable, "-m", "service", "--bundle", path, "--port", 0, "--log-level", "warning"]
    with service_process(command, {"OMP_NUM_THREADS": "1"}) as service:
        assert service.client.get("/readyz").status_code == 200
        yield Served(service.client, service.url, path, bundle.read(path).router)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0


def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "bundle"
    subprocess.run([sys.executable, "-m", "builder", "build", "--zoo", "demo", "--out", str(out)], check=True)
    return out


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the service has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generated(folder: Path, prompt: str, tokens: int) -> str:
    """What transformers' own generate says, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=best_dtype(torch.device("cpu")))
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.usefixtures("one_thread")
def test_every_expert_answers_greedily_as_transformers_generate_does(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    for expert in served.router.experts:
        for prompt in PROMPTS[:3]:
            answer = client.completions.create(model=expert, prompt=prompt, max_tokens=24, temperature=0)
            assert answer.choices[0].text == generated(served.path / bundle.EXPERTS / expert, prompt, 24)


def test_a_routed_chat_streams_and_every_chunk_names_the_expert(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    ask = {"messages": [{"role": "user", "content": PROMPTS[2]}], "max_tokens": 16, "temperature": 0}
    chunks = list(client.chat.completions.create(model="auto", stream=True, **ask))  # type: ignore[call-overload]
    whole = client.chat.completions.create(model="auto", **ask)  # type: ignore[call-overload]
    assert {chunk.model for chunk in chunks} == {whole.model} == {served.router.route(PROMPTS[2]).expert}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_route_is_one_alone_in_a_crowd_by_command_and_by_http(served: Served) -> None:
    alone = [served.router.route(prompt) for prompt in PROMPTS]
    crowd = asyncio.run(crowded(served.url))
    for prompt, route, served_by in zip(PROMPTS, alone, crowd, strict=True):
        told = served.client.get("/route", params={"prompt": prompt}).json()
        command = [sys.executable, "-m", "builder", "route", str(served.path), "--", prompt]
        printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        expected = [(ranked.expert, ranked.score, ranked.weight) for ranked in route.ranking]
        for answer in (told, printed):
            assert [(r["expert"], r["score"], r["weight"]) for r in answer["experts"]] == expected
            assert answer["reason"] == route.reason
        if prompt:
            assert served_by == {route.expert}


async def crowded(url: str) -> list[set[str]]:
    """The experts that answered each prompt, every prompt asked several times at once."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def ask(prompt: str) -> str:
            return (await client.completions.create(model="auto", prompt=prompt or "x", max_tokens=4)).model

        answers = await asyncio.gather(*(ask(prompt) for prompt in PROMPTS for _ in range(4)))
    return [set(answers[i * 4 : i * 4 + 4]) for i in range(len(PROMPTS))]


def test_the_service_counts_what_it_routed(served: Served) -> None:
    metrics = served.client.get("/metrics").text
    assert re.search(r"vllm:generation_tokens_total\{[^}]*\} [1-9]", metrics)


def test_a_thousand_prompts_take_one_route_alone_in_batches_by_http_and_by_the_command(
    served: Served, tmp_path: Path
) -> None:
    """In processes of other hash seeds, one after the other and sixteen at a time."""
    rng = random.Random(0)
    words = [word for prompt in PROMPTS for word in prompt.split()] + ["\n", "äöü", "你好", "DEF", "3.5", "<|user|>"]
    prompts = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(1000)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), "utf-8")
    alone = [served.router.route(prompt) for prompt in prompts]
    expected = [(route.expert, route.reason, [one.score for one in route.ranking]) for route in alone]
    command = (sys.executable, "-m", "builder", "route", str(served.path), "--prompts", str(file))
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    assert [facts(json.loads(line)) for line in told] == expected
    assert asyncio.run(routes(served.url, prompts)) == expected


async def routes(url: str, prompts: list[str]) -> list[tuple[str, str, list[float]]]:
    limits = httpx.Limits(max_connections=16)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        posts = (client.post("/route", json={"prompt": prompt}) for prompt in prompts)
        return [facts(answer.json()) for answer in await asyncio.gather(*posts)]


def facts(route: dict[str, Any]) -> tuple[str, str, list[float]]:
    return route["expert"], route["reason"], [one["score"] for one in route["experts"]]
