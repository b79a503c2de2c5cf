"""Clients that people use, unmodified, against the service over the local engine: OpenAI's, LangChain's and curl."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from hosting import Hosted, hosted
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel
from tiny import ENDLESS, ENDLESS_KV_BYTES, generated
from transformers import AutoModelForCausalLM, AutoTokenizer
from waiting import wait_until

PROMPTS = ["the owl was afraid", "def largest(numbers): return", "日本語 👍", "max"]
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "the fox"},
    {"role": "user", "content": "the owl was afraid of the dark"},
]
CHAT = [SystemMessage("the fox"), HumanMessage("the owl was afraid of the dark")]


@pytest.fixture(scope="module")
def client(service: Hosted) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(llamas: dict[str, Path]) -> Any:
    """transformers' greedy continuation of a text, or its answer to a chat, by `math`."""
    model = AutoModelForCausalLM.from_pretrained(llamas["math"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llamas["math"])

    def answer(prompt: Any, count: int) -> str:
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return str(tokenizer.decode(generated(model, ids, count), skip_special_tokens=True))

    return answer


class TestOpenAI:
    def test_lists_of_prompts_are_continued_in_order(self, client: openai.OpenAI, expected: Any) -> None:
        answer = client.completions.create(model="math", prompt=PROMPTS, max_tokens=12, temperature=0)
        assert [choice.text for choice in answer.choices] == [expected(prompt, 12) for prompt in PROMPTS]

    def test_a_streamed_chat_is_the_whole_one(self, client: openai.OpenAI, expected: Any) -> None:
        ask: dict[str, Any] = {"model": "math", "messages": MESSAGES, "max_completion_tokens": 20, "temperature": 0}
        *chunks, last = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == expected(MESSAGES, 20) == client.chat.completions.create(**ask).choices[0].message.content
        assert last.usage.completion_tokens == 20
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_log_probabilities_are_alike_in_both_shapes_whole_and_streamed(self, client: openai.OpenAI) -> None:
        ask: dict[str, Any] = {"model": "math", "temperature": 0, "max_tokens": 8}
        legacy = client.completions.create(prompt="the owl", logprobs=3, echo=True, **ask).choices[0].logprobs
        assert legacy is not None
        assert legacy.token_logprobs is not None
        assert legacy.token_logprobs[0] is None
        assert len(legacy.tokens or []) == len(legacy.token_logprobs) == len(legacy.text_offset or [])
        whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=4, **ask)
        streamed = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=4, stream=True, **ask)
        tokens = [
            token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
        ]
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [token.model_dump() for token in tokens] == [token.model_dump() for token in logprobs.content]
        for token in tokens:
            assert token.top_logprobs[0].token == token.token  # greedy
            assert len(token.top_logprobs) == 4

    def test_n_and_seed(self, client: openai.OpenAI) -> None:
        ask: dict[str, Any] = {"model": "math", "prompt": "the owl", "max_tokens": 12, "n": 4, "top_p": 0.95}
        first, again, other = (client.completions.create(seed=seed, **ask) for seed in (7, 7, 8))
        assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
        assert [choice.text for choice in first.choices] != [choice.text for choice in other.choices]
        assert len({choice.text for choice in first.choices}) == 4

    def test_a_stop_string_over_token_borders_ends_the_answer_and_is_never_seen(self, client: openai.OpenAI) -> None:
        ask: dict[str, Any] = {"model": "math", "prompt": "the owl", "max_tokens": 40, "temperature": 0}
        whole = client.completions.create(**ask).choices[0].text
        for start in range(4, 12):
            stop = whole[start : start + 3]
            cut = whole.index(stop)
            chunks = list(client.completions.create(stop=[stop, "\0"], stream=True, **ask))
            assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:cut]
            assert chunks[-1].choices[0].finish_reason == "stop"

    def test_an_answer_in_a_form_is_parsed(self, client: openai.OpenAI) -> None:
        class Owl(BaseModel):
            afraid: bool

        answer = client.chat.completions.parse(model="math", messages=MESSAGES, response_format=Owl, max_tokens=60)
        assert isinstance(answer.choices[0].message.parsed, Owl)

    def test_experts_are_mixed_and_routed(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": "story"}], max_tokens=4, extra_body={"k": 2}
        )
        assert answer.model == "story"

    def test_many_async_streams_are_each_their_own(self, service: Hosted, expected: Any) -> None:
        async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
            chunks = await client.completions.create(
                model="math", prompt=prompt, max_tokens=16, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

        async def streams() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
                return await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS * 5))

        assert asyncio.run(streams()) == [expected(prompt, 16) for prompt in PROMPTS] * 5

    def test_what_cannot_be_is_refused_before_a_byte(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="math", prompt="the owl", max_tokens=600, stream=True)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="logit_bias"):
            client.completions.create(model="math", prompt="the owl", logit_bias={"9999": 1}, stream=True)

    def test_a_client_that_leaves_a_stream_or_times_out_ends_the_work(self, endless: Path) -> None:
        def idle() -> bool:
            load = service.engine.load()["math"]
            return (load.running, load.waiting, load.kv) == (0, 0, 0)

        ask: dict[str, Any] = {"model": "math", "prompt": "the owl", "temperature": 0, "n": 16}
        ask["max_tokens"] = ENDLESS.max_tokens
        with (
            hosted({"math": endless}, kv_bytes=ENDLESS_KV_BYTES) as service,
            openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client,
        ):
            with client.completions.create(stream=True, **ask) as stream:
                next(stream)
                assert not idle()
            wait_until(idle)
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).completions.create(**ask)
            wait_until(idle)


class TestLangChain:
    @pytest.fixture
    def options(self, service: Hosted) -> dict[str, Any]:
        return {"base_url": f"{service.url}/v1", "api_key": "none", "model": "math", "temperature": 0, "max_retries": 0}

    def test_a_chat_whole_streamed_and_in_a_batch(self, options: dict[str, Any], expected: Any) -> None:
        model = ChatOpenAI(max_tokens=16, **options)
        answer = model.invoke(CHAT)
        assert isinstance(answer, AIMessage)
        assert answer.content == expected(MESSAGES, 16)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["output_tokens"] == 16
        assert answer.response_metadata["model_name"] == "math"
        assert "".join(str(part.content) for part in model.stream(CHAT)) == answer.content
        assert [each.content for each in model.batch([CHAT] * 3)] == [answer.content] * 3

    def test_a_conversation_goes_on_with_what_was_answered(self, options: dict[str, Any]) -> None:
        model = ChatOpenAI(max_tokens=8, **options)
        answer = model.invoke(CHAT)
        again = asyncio.run(model.ainvoke([*CHAT, answer, HumanMessage("and then")]))
        assert again.content

    def test_a_structured_answer(self, options: dict[str, Any]) -> None:
        class Owl(BaseModel):
            afraid: bool

        model = ChatOpenAI(max_tokens=60, **options).with_structured_output(Owl, method="json_schema")
        assert isinstance(model.invoke(CHAT), Owl)

    def test_a_text_with_a_stop_string(self, options: dict[str, Any], expected: Any) -> None:
        whole = expected("the owl", 16)
        stop = whole[6:8]
        assert OpenAI(max_tokens=16, **options).invoke("the owl", stop=[stop]) == whole[: whole.index(stop)]

    def test_a_failure_has_the_services_own_words(self, options: dict[str, Any]) -> None:
        with pytest.raises(openai.NotFoundError, match="there are: auto, auto:best, auto:cheap, math, code, story"):
            ChatOpenAI(**options | {"model": "gpt-9"}).invoke("hi")


class TestCurl:
    def test_a_streamed_chat(self, service: Hosted, expected: Any) -> None:
        body = {"model": "math", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "stream": True}
        head, _, text = curl(f"{service.url}/v1/chat/completions", body).partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 200 OK")
        assert "content-type: text/event-stream" in head
        assert "x-route-expert: math" in head
        *events, done, end = text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas) == expected(MESSAGES, 12)

    def test_an_error(self, service: Hosted) -> None:
        head, _, text = curl(f"{service.url}/v1/completions", {"prompt": "hi", "temperature": 9}).partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 400 Bad Request")
        assert "content-type: application/json" in head
        assert json.loads(text)["error"]["param"] == "temperature"


def curl(url: str, body: dict[str, Any]) -> str:
    """All that came, head and body."""
    command = [
        "curl",
        "--silent",
        "--no-buffer",
        "--include",
        "--max-time",
        "20",
        url,
        "--data-binary",
        json.dumps(body),
    ]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode()
