"""OpenAI's own client against a real server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import openai
import pytest
from held import Held
from openai.types.chat import ChatCompletionContentPartTextParam, ChatCompletionMessageParam
from pydantic import BaseModel
from serving import serve
from waiting import wait_until

from routers.bundle import Bundle
from routers.prompt import AUTO, PromptRouter
from service.app import create_app
from service.engines.base import BusyError, EngineError, Job, NotReadyError, Prompt, Sampling
from service.engines.echo import EchoEngine
from service.schemas.bodies import ChatBody, CompletionBody, TextPart, Turn
from service.schemas.fields import Strict
from service.schemas.queries import EmbeddingsBody

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "write a python loop"}]


class Moody(EchoEngine):
    """`math` is loading for ever, and `story` has failed. Busy for the first `refusals` that it is asked.

    Takes any form for granted.
    """

    def __init__(self, experts: tuple[str, ...]) -> None:
        super().__init__(experts)
        self.asked: list[str] = []
        self.refusals = 0

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        expert = next(iter(experts))
        self.asked.append(expert)
        if expert == "math":
            raise NotReadyError("math is still loading")
        if expert == "story":
            raise EngineError("story has no weights")
        if self.refusals:
            self.refusals -= 1
            raise BusyError("code is full", after=0.01)
        return super().prepare(experts, prompt, replace(sampling, guide=None))


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Moody:
    return Moody(bundle.router.experts)


@pytest.fixture(scope="module")
def openai_client(bundle: Bundle, engine: Moody) -> Iterator[openai.OpenAI]:
    with (
        serve(create_app(bundle, engine)) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_completions(openai_client: openai.OpenAI) -> None:
    completion = openai_client.completions.create(model=AUTO, prompt="python loop class", max_tokens=2)
    assert (completion.model, completion.choices[0].text) == ("code", "python loop")
    assert completion.usage is not None
    assert completion.usage.total_tokens == 5
    assert completion._request_id


def test_completions_stream(openai_client: openai.OpenAI) -> None:
    stream = openai_client.completions.create(model=AUTO, prompt="python loop class", stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "python loop class"
    assert {chunk.model for chunk in chunks} == {"code"}


def test_chat(openai_client: openai.OpenAI) -> None:
    completion = openai_client.chat.completions.create(model=AUTO, messages=MESSAGES, max_completion_tokens=3)
    assert completion.choices[0].message.content == "write a python"
    assert (completion.model, completion.choices[0].finish_reason) == ("code", "length")


def test_chat_stream_with_usage(openai_client: openai.OpenAI) -> None:
    stream = openai_client.chat.completions.create(
        model="code", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "write a python loop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


def test_chat_stream_helper(openai_client: openai.OpenAI) -> None:
    with openai_client.chat.completions.stream(model="code", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == "write a python loop"


def test_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == [
        AUTO,
        "auto:best",
        "auto:cheap",
        "math",
        "code",
        "story",
    ]
    assert openai_client.models.retrieve("code").owned_by == "modelglue"


def test_the_route_is_in_the_headers(openai_client: openai.OpenAI) -> None:
    raw = openai_client.chat.completions.with_raw_response.create(model=AUTO, messages=MESSAGES)
    assert (raw.headers["x-route-expert"], raw.headers["x-route-reason"]) == ("code", "top_score")


def test_a_bad_value(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        openai_client.completions.create(model=AUTO, prompt="hi", temperature=9)
    assert caught.value.param == "temperature"


def test_an_unserved_field(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix is not served") as caught:
        openai_client.completions.create(model=AUTO, prompt="hi", suffix="end")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")


def test_an_unknown_model(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9") as caught:
        openai_client.completions.create(model="gpt-9", prompt="hi")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("meta/llama")


def test_a_body_over_the_limit(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        openai_client.completions.create(model=AUTO, prompt="x" * 3_000_000)
    assert caught.value.status_code == 413


def test_a_loading_expert(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="still loading") as caught:
        openai_client.completions.create(model="math", prompt="hi")
    assert caught.value.status_code == 503


def test_a_failed_expert_is_not_asked_again(openai_client: openai.OpenAI, engine: Moody) -> None:
    engine.asked.clear()
    with pytest.raises(openai.InternalServerError, match="no weights"):
        openai_client.with_options(max_retries=2).completions.create(model="story", prompt="hi")
    assert engine.asked == ["story"]


def test_prompts_choices_and_log_probabilities(openai_client: openai.OpenAI) -> None:
    completion = openai_client.completions.create(
        model="code", prompt=["a b c", "d e f"], n=2, seed=0, logprobs=1, echo=True, max_tokens=1
    )
    assert [choice.text for choice in completion.choices] == ["a b ca", "a b c b", "d e fd", "d e f e"]
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", " b", " c", "a"]
    assert logprobs.text_offset == [0, 1, 3, 5]
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[3] is not None
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 0


def test_best_of_and_stop(openai_client: openai.OpenAI) -> None:
    completion = openai_client.completions.create(
        model="code", prompt="a b c d", n=1, best_of=3, seed=0, stop=["c", "x"], max_tokens=2
    )
    assert len(completion.choices) == 1
    assert "c" not in completion.choices[0].text


def test_token_prompts(openai_client: openai.OpenAI) -> None:
    ids = [int.from_bytes(word.encode()) for word in ("python", " loop")]
    assert openai_client.completions.create(model=AUTO, prompt=ids).choices[0].text == "python loop"
    both = openai_client.completions.create(model=AUTO, prompt=[ids, ids[:1]])
    assert [choice.text for choice in both.choices] == ["python loop", "python"]


def test_chat_log_probabilities(openai_client: openai.OpenAI) -> None:
    completion = openai_client.chat.completions.create(
        model=AUTO, messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, max_completion_tokens=2
    )
    logprobs = completion.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["write", " a"]
    assert [len(token.top_logprobs) for token in logprobs.content] == [2, 2]
    assert logprobs.content[0].bytes == list(b"write")


def test_a_form_that_the_client_parses(openai_client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        a: int

    completion = openai_client.chat.completions.parse(
        model="code", messages=[{"role": "user", "content": '{"a": 1}'}], response_format=Answer
    )
    assert completion.choices[0].message.parsed == Answer(a=1)


def test_embeddings(openai_client: openai.OpenAI, router: PromptRouter) -> None:
    found = openai_client.embeddings.create(
        model="router", input=["python loop", "owl"]
    )  # in base64, behind the scenes
    for text, each in zip(["python loop", "owl"], found.data, strict=True):
        np.testing.assert_array_equal(np.float32(each.embedding), router.features.vector(text))


def test_extensions_go_in_extra_body_and_extra_headers(openai_client: openai.OpenAI) -> None:
    completion = openai_client.completions.create(
        model=AUTO,
        prompt="python loop",
        extra_body={"k": 2, "mixture": "best", "deny": ["math"], "top_k": 5},
        extra_headers={"x-route-debug": "1", "x-session-id": "mine"},
    )
    assert completion.model_extra is not None
    assert completion.model_extra["route"]["expert"] == completion.model == "code"


def test_many_streams_of_an_async_client(openai_client: openai.OpenAI) -> None:
    async def stream(client: openai.AsyncOpenAI, i: int) -> list[str]:
        texts = ["", ""]
        async for chunk in await client.chat.completions.create(
            model="code", messages=[{"role": "user", "content": f"{i} and {i}"}], n=2, stream=True
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    async def streams() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=openai_client.base_url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, i) for i in range(8)))

    assert asyncio.run(streams()) == [[f"{i} and {i}"] * 2 for i in range(8)]


def test_a_busy_expert_is_asked_again_as_soon_as_it_says(openai_client: openai.OpenAI, engine: Moody) -> None:
    engine.refusals = 2
    with pytest.raises(openai.RateLimitError, match="code is full") as caught:
        openai_client.completions.create(model="code", prompt="hi")
    assert caught.value.response.headers["retry-after-ms"] == "10"
    engine.refusals = 2
    patient = openai_client.with_options(max_retries=2)
    assert patient.completions.create(model="code", prompt="hi").choices[0].text == "hi"


def test_a_prompt_over_the_window_has_openais_code(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.completions.create(model="code", prompt="word " * 65)
    assert caught.value.code == "context_length_exceeded"


def test_a_client_that_times_out_ends_the_work(bundle: Bundle) -> None:
    engine = Held(bundle.router.experts)
    with (
        serve(create_app(bundle, engine)) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=1) as client,
    ):
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model=AUTO, prompt="a b", n=3)
        wait_until(lambda: engine.finished == 3)
        assert engine.running == 0


@pytest.mark.parametrize(
    ("create", "body"),
    [
        (openai.resources.Completions.create, CompletionBody),
        (openai.resources.chat.Completions.create, ChatBody),
        (openai.resources.Embeddings.create, EmbeddingsBody),
    ],
)
def test_every_field_that_the_client_can_send_is_served_or_refused_by_name(
    create: Callable[..., object], body: type[Strict]
) -> None:
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    fields = inspect.signature(inspect.unwrap(create)).parameters.keys() - own
    assert fields <= body.model_fields.keys() | body.neutral.keys()


@pytest.mark.parametrize(
    ("sent", "part"),
    [(each, Turn) for each in get_args(ChatCompletionMessageParam) if "Function" not in each.__name__]
    + [(ChatCompletionContentPartTextParam, TextPart)],
)
def test_every_field_of_a_message_is_served_or_refused_by_name(sent: type, part: type[Strict]) -> None:
    """The role `function` is gone from OpenAI's models too."""
    assert get_type_hints(sent).keys() <= part.model_fields.keys() | part.neutral.keys()
