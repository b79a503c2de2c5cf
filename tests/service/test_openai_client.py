"""OpenAI's own client against a real server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from serving import serve

from routers.bundle import Bundle
from routers.prompt import AUTO
from service.app import create_app
from service.engines.base import EngineError, Job, NotReadyError, Prompt, Sampling
from service.engines.echo import EchoEngine

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "write a python loop"}]


class Moody(EchoEngine):
    """`math` is loading for ever, and `story` has failed."""

    def __init__(self, experts: tuple[str, ...]) -> None:
        super().__init__(experts)
        self.asked: list[str] = []

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        (expert,) = experts
        self.asked.append(expert)
        if expert == "math":
            raise NotReadyError("math is still loading")
        if expert == "story":
            raise EngineError("story has no weights")
        return super().prepare(experts, prompt, sampling)


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
