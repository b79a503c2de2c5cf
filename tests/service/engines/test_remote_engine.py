"""A scripted server in a thread, and this service itself, as servers of experts."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.testclient import TestClient
from serving import serve, wait_until

from routers.bundle import Bundle
from service.app import create_app
from service.engines.base import (
    BusyError,
    EngineError,
    Guide,
    Load,
    Message,
    NotReadyError,
    Piece,
    Prompt,
    PromptError,
    Sampling,
    Scored,
    Tokens,
    UnsupportedError,
    Usage,
    WindowError,
)
from service.engines.echo import EchoEngine
from service.engines.remote import Patience, Remote, RemoteEngine, RemoteError
from service.engines.remote.breaker import Breaker
from service.engines.remote.events import Event, Events
from service.engines.remote.refusals import LONGEST_WAIT, retry_after
from service.engines.several import SeveralEngines

Json = dict[str, Any]
QUICK: Json = {"every": 0.02, "backoff": 0.01, "misses": 0}
OWL = {"owl": 1.0}
CHAT = (Message("system", "be kind"), Message("user", "hello"))
GREETING = Sampling(8, temperature=0)
WINDOW = 64


def frame(data: object) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def words(text: str, finish: str | None = None, **more: object) -> bytes:
    """A chunk of a completion."""
    return frame({"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}], "usage": None})


def said(text: str | None, finish: str | None = None, **more: object) -> bytes:
    """A chunk of a chat."""
    delta = {"role": "assistant"} if text is None else {"content": text}
    return frame({"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    details = {"prompt_tokens_details": {"cached_tokens": cached}} if cached is not None else {}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, **details}
    return frame({"choices": [], "usage": counts})


DONE = b"data: [DONE]\n\n"
HELLO = (words("hello"), words(" world", "stop"), usage(3, 2), DONE)


class Upstream:
    """Answers by script, the last answer again and again; remembers what it was asked, and who left."""

    def __init__(self) -> None:
        self.health: int | None = 200
        self.models: list[Json] = [{"id": "tiny", "owned_by": "vllm", "max_model_len": WINDOW}]
        self.props: Json | None = None
        self.key: str | None = None
        self.answers: list[Callable[[], Response]] = []
        self.asked: list[tuple[str, Json]] = []
        self.headers: list[dict[str, str]] = []
        self.open = 0
        self.left = 0
        self.release = asyncio.Event()

    def streams(self, *frames: bytes, stalls: bool = False, breaks: bool = False) -> None:
        """Answer with these bytes, each written by itself; then wait, or close the connection in mid-answer."""

        async def written() -> AsyncGenerator[bytes, None]:
            self.open += 1
            whole = False
            try:
                for each in frames:
                    yield each
                    await asyncio.sleep(0)
                if stalls:
                    await asyncio.sleep(30)
                if breaks:
                    raise ConnectionError("the plug was pulled")
                whole = True
            finally:
                self.open -= 1
                self.left += not (whole or breaks)

        self.answers.append(lambda: StreamingResponse(written(), media_type="text/event-stream"))

    def refuses(self, status: int, body: object = None, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append(lambda: JSONResponse(body, status, named))

    async def answer(self, request: Request) -> Response:
        self.asked.append((request.url.path, await request.json()))
        self.headers.append(dict(request.headers))
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()

    async def page(self, request: Request) -> Response:
        path = request.url.path
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return Response(status_code=401)
        if path == "/health":
            return Response(status_code=404 if self.health is None else self.health)
        if path == "/v1/models":
            return JSONResponse({"object": "list", "data": self.models})
        return JSONResponse(self.props) if self.props is not None else Response(status_code=501)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, list[Upstream]]]:
    """One server for all tests, each with an upstream of its own behind it."""
    now: list[Upstream] = []
    app = FastAPI(openapi_url=None)

    async def answer(request: Request) -> Response:
        return await now[-1].answer(request)

    async def page(request: Request) -> Response:
        return await now[-1].page(request)

    app.add_api_route("/v1/completions", answer, methods=["POST"])
    app.add_api_route("/v1/chat/completions", answer, methods=["POST"])
    for path in ("/health", "/v1/models", "/props"):
        app.add_api_route(path, page, methods=["GET"])
    with serve(app) as (url, _):
        yield url, now


@pytest.fixture
def upstream(address: tuple[str, list[Upstream]]) -> Upstream:
    address[1].append(Upstream())
    return address[1][-1]


@pytest.fixture
def url(address: tuple[str, list[Upstream]]) -> str:
    return address[0]


@pytest.fixture(scope="module")
def nowhere() -> Iterator[str]:
    """An address that refuses every connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(10):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


@asynccontextmanager
async def running(*remotes: Remote | str, **patience: float) -> AsyncIterator[RemoteEngine]:
    """An engine over owl, fox, ... at these servers, once it knows how they are."""
    experts = {
        name: Remote(each) if isinstance(each, str) else each
        for name, each in zip(("owl", "fox"), remotes, strict=False)
    }
    engine = RemoteEngine(experts, Patience(**QUICK | patience))
    await engine.start()
    try:
        await until(lambda: all(status.detail != "not asked yet" for status in engine.status().values()))
        yield engine
    finally:
        await engine.aclose()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for is another thread's
        await asyncio.sleep(0.002)


async def read(engine: RemoteEngine, prompt: Prompt = "hi", sampling: Sampling = GREETING) -> list[Piece]:
    async with aclosing(engine.generate(engine.prepare(OWL, prompt, sampling))) as pieces:
        return [piece async for piece in pieces]


async def failure(engine: RemoteEngine, prompt: Prompt = "hi", sampling: Sampling = GREETING) -> Exception:
    try:
        await read(engine, prompt, sampling)
    except Exception as exc:
        return exc
    raise AssertionError("it answered")


# What is asked


@in_loop
async def test_a_text_is_asked_as_a_streamed_completion_of_the_servers_model(upstream: Upstream, url: str) -> None:
    upstream.models[0]["owned_by"] = "openai"
    upstream.streams(*HELLO)
    async with running(url) as engine:
        await read(engine, "hi", Sampling(8))
    assert upstream.asked == [
        (
            "/v1/completions",
            {
                "model": "tiny",
                "prompt": "hi",
                "stream": True,
                "stream_options": {"include_usage": True},
                "temperature": 1.0,
                "top_p": 1.0,
                "max_tokens": 8,
            },
        )
    ]


@in_loop
async def test_every_sampling_field_goes_by_vllms_name(upstream: Upstream, url: str) -> None:
    upstream.streams(words("hello", "stop", logprobs={"tokens": ["hello"], "token_logprobs": [-0.5]}), DONE)
    sampling = Sampling(
        8, 0.5, 0.9, 7, 0.1, 1.2, 0.3, 0.4, ((5, -1.5), (6, 2.0)), 42, (9, 10), True, 2, 3, None, Guide("regex", "a+")
    )
    async with running(url) as engine:
        await read(engine, Tokens((1, 2)), sampling)
    _, body = upstream.asked[0]
    assert body == {
        "model": "tiny",
        "prompt": [1, 2],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "logit_bias": {"5": -1.5, "6": 2.0},
        "seed": 42,
        "stop_token_ids": [9, 10],
        "ignore_eos": True,
        "min_tokens": 2,
        "logprobs": 3,
        "structured_outputs": {"regex": "a+"},
    }


@in_loop
async def test_a_chat_is_asked_with_its_turns_and_chats_logprobs(upstream: Upstream, url: str) -> None:
    upstream.streams(said(None), said("hello", "stop", logprobs={"content": [position("hello", -0.5)]}), DONE)
    async with running(url) as engine:
        await read(engine, CHAT, Sampling(8, logprobs=2))
    path, body = upstream.asked[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (8, True, 2)
    assert "prompt" not in body


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("{}", {"type": "json_object"}),
        (
            '{"type": "array"}',
            {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": {"type": "array"}}},
        ),
    ],
)
@in_loop
async def test_a_json_schema_goes_as_openais_response_format(
    upstream: Upstream, url: str, text: str, asked: Json
) -> None:
    upstream.streams(*HELLO)
    async with running(url) as engine:
        await read(engine, "hi", Sampling(8, guide=Guide("json_schema", text)))
    assert upstream.asked[0][1]["response_format"] == asked


@pytest.mark.parametrize(("maker", "told"), [("vllm", True), ("somebody", False)])
@in_loop
async def test_only_servers_with_defaults_of_their_own_are_told_the_neutral_values(
    upstream: Upstream, url: str, maker: str, told: bool
) -> None:
    upstream.models[0]["owned_by"] = maker
    upstream.streams(*HELLO)
    async with running(url) as engine:
        await read(engine)
    body = upstream.asked[0][1]
    assert [body.get(name) for name in ("top_k", "min_p", "repetition_penalty")] == ([0, 0, 1] if told else [None] * 3)


@in_loop
async def test_llama_cpp_is_asked_in_its_own_words_and_for_nothing_that_it_would_ignore(
    upstream: Upstream, url: str
) -> None:
    upstream.models = [{"id": "tiny", "owned_by": "llamacpp", "meta": {"n_ctx": 32, "n_ctx_train": 8192}}]
    upstream.streams(*HELLO)
    async with running(url) as engine:
        await read(engine, "hi", Sampling(8, repetition_penalty=1.3))
        for param, sampling in {
            "min_tokens": Sampling(8, min_tokens=1),
            "stop_token_ids": Sampling(8, stop_tokens=(1,)),
            "echo": Sampling(8, prompt_logprobs=0),
            "response_format": Sampling(8, guide=Guide("regex", "a+")),
        }.items():
            with pytest.raises(UnsupportedError) as refused:
                engine.prepare(OWL, "hi", sampling)
            assert refused.value.param == param
    body = upstream.asked[0][1]
    assert (body["repeat_penalty"], body["repeat_last_n"], body["timings_per_token"]) == (1.3, 32, True)
    assert "repetition_penalty" not in body
    assert body["stream_options"] == {"include_usage": True}


@in_loop
async def test_a_chat_without_a_limit_may_fill_the_window(upstream: Upstream, url: str) -> None:
    upstream.streams(said("hello", "stop"), usage(9, 1), DONE)
    async with running(url) as engine:
        job = engine.prepare(OWL, CHAT, Sampling())
        assert job.sampling.max_tokens == WINDOW
        await read(engine, CHAT, Sampling())
    assert "max_tokens" not in upstream.asked[0][1]


@in_loop
async def test_tokens_without_a_limit_may_fill_what_the_window_has_left(upstream: Upstream, url: str) -> None:
    upstream.streams(*HELLO)
    async with running(url) as engine:
        job = engine.prepare(OWL, Tokens((1, 2, 3)), Sampling())
        assert (job.tokens, job.sampling.max_tokens) == ((1, 2, 3), WINDOW - 3)
        await read(engine, Tokens((1, 2, 3)), Sampling())
    assert upstream.asked[0][1]["max_tokens"] == WINDOW - 3


@in_loop
async def test_what_cannot_be_asked_is_refused_before_the_server_hears_of_it(upstream: Upstream, url: str) -> None:
    async with running(url, url) as engine:
        with pytest.raises(UnsupportedError, match="owl and fox cannot be mixed") as mixed:
            engine.prepare({"owl": 0.5, "fox": 0.5}, "hi", GREETING)
        with pytest.raises(UnsupportedError) as uncounted:
            engine.prepare(OWL, "hi", Sampling())
        with pytest.raises(UnsupportedError) as scored_chat:
            engine.prepare(OWL, CHAT, Sampling(8, prompt_logprobs=1))
        with pytest.raises(WindowError, match="64 tokens of answer leave no room in owl's window of 64"):
            engine.prepare(OWL, "hi", Sampling(WINDOW))
        with pytest.raises(PromptError, match="3 tokens of prompt and 62 of answer"):
            engine.prepare(OWL, Tokens((1, 2, 3)), Sampling(62))
        with pytest.raises(UnsupportedError) as undecoded:
            engine.decode("owl", (1, 2))
    assert (mixed.value.param, uncounted.value.param, scored_chat.value.param) == ("k", "max_tokens", "messages")
    assert undecoded.value.param == "prompt"
    assert not upstream.asked


# What comes back


@in_loop
async def test_pieces_come_as_the_server_writes_them_and_the_last_has_the_finish_and_the_usage(
    upstream: Upstream, url: str
) -> None:
    upstream.streams(words("hello"), words(" "), words("world"), words("", "length"), usage(3, 5, cached=2), DONE)
    async with running(url) as engine:
        pieces = await read(engine)
        assert engine.load()["owl"] == Load(queries=3, hits=2)
    assert pieces == [
        Piece("hello", 1),
        Piece(" ", 1),
        Piece("world", 1),
        Piece("", 2, "length", usage=Usage(3, 2)),
    ]


def counted(chunk: bytes, counts: Json) -> bytes:
    """A chunk that counts as well."""
    return frame(json.loads(chunk.removeprefix(b"data: ")) | counts)


COUNTS: Json = {
    "vllm": {"usage": {"prompt_tokens": 3, "completion_tokens": 1}},
    "llamacpp": {"timings": {"cache_n": 2, "prompt_n": 1, "predicted_n": 1, "predicted_ms": 0.001}},
}


@pytest.mark.parametrize(("kind", "known"), [("vllm", Usage(3)), ("llamacpp", Usage(3, 2))])
@in_loop
async def test_a_prompt_is_counted_with_the_first_piece_where_the_server_tells_it_then(
    upstream: Upstream, url: str, kind: str, known: Usage
) -> None:
    upstream.models[0] |= {"owned_by": kind, "meta": {"n_ctx": WINDOW}}
    more = counted(words(" world"), COUNTS[kind])
    upstream.streams(counted(words("hello"), COUNTS[kind]), more, words("", "stop"), usage(3, 2, cached=2), DONE)
    async with running(url) as engine:
        pieces = await read(engine)
        assert engine.load()["owl"] == Load(queries=3, hits=2)
    assert pieces == [Piece("hello", 1, usage=known), Piece(" world", 1), Piece("", 0, "stop", usage=Usage(3, 2))]


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
@in_loop
async def test_an_answer_that_is_left_is_counted_once(upstream: Upstream, url: str, kind: str) -> None:
    upstream.models[0] |= {"owned_by": kind, "meta": {"n_ctx": WINDOW}}
    upstream.streams(*[counted(words(text), COUNTS[kind]) for text in ("hello", " world")], stalls=True)
    async with running(url) as engine:
        async with aclosing(engine.generate(engine.prepare(OWL, "hi", GREETING))) as pieces:
            assert [(await anext(pieces)).text, (await anext(pieces)).text] == ["hello", " world"]
        assert engine.load()["owl"].queries == 3


@pytest.mark.parametrize("told", [{}, {"usage": {"prompt_tokens": 0, "completion_tokens": 1}}])
@in_loop
async def test_a_prompt_of_tokens_needs_no_servers_count(upstream: Upstream, url: str, told: Json) -> None:
    upstream.streams(counted(words("hello"), told), stalls=True)
    async with running(url) as engine:
        async with aclosing(engine.generate(engine.prepare(OWL, Tokens((1, 2)), GREETING))) as pieces:
            assert (await anext(pieces)).usage == (Usage(2) if told else None)
        assert engine.load()["owl"].queries == 2


@in_loop
async def test_what_is_refused_is_not_counted(upstream: Upstream, url: str) -> None:
    upstream.refuses(400, {"error": {"message": "no"}})
    async with running(url) as engine:
        await failure(engine, Tokens((1, 2)))
        assert engine.load()["owl"] == Load()


@pytest.mark.parametrize("timings", [{"prompt_n": 1, "predicted_n": 1}, [0.5], {"cache_n": -1, "prompt_n": 1}])
@in_loop
async def test_timings_in_another_form_are_not_read(upstream: Upstream, url: str, timings: object) -> None:
    upstream.streams(counted(words("hello"), {"timings": timings}), words("", "stop"), usage(3, 1), DONE)
    async with running(url) as engine:
        assert await read(engine) == [Piece("hello", 1), Piece("", 0, "stop", usage=Usage(3))]


@in_loop
async def test_a_chat_is_read_from_its_deltas(upstream: Upstream, url: str) -> None:
    upstream.streams(said(None), said(""), said("héllo"), said(" 👍"), said(None, "stop"), usage(9, 3), DONE)
    async with running(url) as engine:
        pieces = await read(engine, CHAT)
    assert pieces == [Piece("héllo", 1), Piece(" 👍", 1), Piece("", 1, "stop", usage=Usage(9))]


@in_loop
async def test_the_sum_of_tokens_is_the_servers_even_when_it_writes_several_at_once(
    upstream: Upstream, url: str
) -> None:
    upstream.streams(words("three tokens here"), words(" and", "stop"), usage(3, 7), DONE)
    async with running(url) as engine:
        assert sum(piece.tokens for piece in await read(engine)) == 7


def position(token: str, logprob: float, *top: tuple[str, float]) -> Json:
    tops = [{"token": text, "logprob": p, "bytes": list(text.encode())} for text, p in top]
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": tops}


@in_loop
async def test_log_probabilities_of_a_completion(upstream: Upstream, url: str) -> None:
    logprobs = {
        "tokens": ["he", "llo"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"he": -0.5, "she": -1.5}, {"llo": -2.0, "lp": -0.25, "n": -1.0}],
        "text_offset": [0, 2],
    }
    upstream.streams(words("hello", logprobs=logprobs), words("", "stop"), usage(3, 2), DONE)
    async with running(url) as engine:
        first, last = await read(engine, "hi", Sampling(8, logprobs=2))
    assert first.tokens == 2
    assert first.scored == (
        Scored(-1, b"he", -0.5, (Scored(-1, b"he", -0.5), Scored(-1, b"she", -1.5))),
        Scored(-1, b"llo", -2.0, (Scored(-1, b"lp", -0.25), Scored(-1, b"n", -1.0))),
    )
    assert (last.tokens, last.scored) == (0, ())


@in_loop
async def test_log_probabilities_of_a_chat_keep_the_bytes_of_half_a_character(upstream: Upstream, url: str) -> None:
    half = {"token": "�", "logprob": -0.1, "bytes": [0xF0, 0x9F], "top_logprobs": []}
    upstream.streams(said("", logprobs={"content": [half]}), said("👍", "stop", logprobs=None), usage(3, 2), DONE)
    async with running(url) as engine:
        pieces = await read(engine, CHAT, Sampling(8, logprobs=0))
    assert pieces[0].scored == (Scored(-1, b"\xf0\x9f", -0.1),)


@pytest.mark.parametrize("counts_at_once", [True, False])
@pytest.mark.parametrize("prompt", ["a bc", Tokens((7, 8))])
@in_loop
async def test_prompt_log_probabilities_are_cut_from_the_echo(
    upstream: Upstream, url: str, prompt: Prompt, counts_at_once: bool
) -> None:
    logprobs = {
        "tokens": ["a", " bc", "d"],
        "token_logprobs": [None, -3.0, -0.5],
        "top_logprobs": [None, {" x": -0.1, " bc": -3.0}, {"d": -0.5, "e": -1.0}],
        "text_offset": [0, 1, 4],
    }
    counts = {"prompt_tokens": 2, "completion_tokens": 1} if counts_at_once else None
    choice = {"index": 0, "text": "a bcd", "logprobs": logprobs, "finish_reason": None}
    e = {"tokens": ["e"], "token_logprobs": [-1.5], "top_logprobs": [{"e": -1.5}]}
    upstream.streams(frame({"choices": [choice], "usage": counts}), words("e", "length", logprobs=e), usage(2, 2), DONE)
    async with running(url) as engine:
        pieces = await read(engine, prompt, Sampling(2, logprobs=1, prompt_logprobs=2))
    ids = prompt.ids if isinstance(prompt, Tokens) else (-1, -1)
    assert pieces[0].prompt == (
        Scored(ids[0], b"a", None),
        Scored(ids[1], b" bc", -3.0, (Scored(-1, b" x", -0.1), Scored(-1, b" bc", -3.0))),
    )
    assert not any(piece.prompt for piece in pieces[1:])
    assert "".join(piece.text for piece in pieces) == "de"
    assert [scored.top for piece in pieces for scored in piece.scored] == [
        (Scored(-1, b"d", -0.5),),
        (Scored(-1, b"e", -1.5),),
    ]
    assert (sum(piece.tokens for piece in pieces), pieces[-1].finish, pieces[-1].usage) == (2, "length", Usage(2))
    body = upstream.asked[0][1]
    assert (body["echo"], body["logprobs"]) == (True, 2)
    assert body["stream_options"]["continuous_usage_stats"] is True


@in_loop
async def test_a_token_without_text_in_the_echo_shifts_nothing(upstream: Upstream, url: str) -> None:
    logprobs = {"tokens": ["<s>", "ab", "c"], "token_logprobs": [None, -3.0, -0.5], "text_offset": [0, 3, 5]}
    upstream.streams(words("abc", "length", logprobs=logprobs), usage(2, 1), DONE)
    async with running(url) as engine:
        pieces = await read(engine, "ab", Sampling(1, logprobs=0, prompt_logprobs=0))
    assert [scored.text for scored in pieces[0].prompt] == ["<s>", "ab"]
    assert "".join(piece.text for piece in pieces) == "c"


@in_loop
async def test_an_echo_may_come_in_parts(upstream: Upstream, url: str) -> None:
    parts = [
        words(text, finish, logprobs={"tokens": [text], "token_logprobs": [-1.0], "text_offset": [offset]})
        for offset, (text, finish) in enumerate([("a", None), ("b", None), ("c", "length")])
    ]
    upstream.streams(*parts, usage(2, 1), DONE)
    async with running(url) as engine:
        pieces = await read(engine, Tokens((7, 8)), Sampling(1, prompt_logprobs=0))
    assert [[scored.id for scored in piece.prompt] for piece in pieces] == [[7, 8], []]
    assert "".join(piece.text for piece in pieces) == "c"


@in_loop
async def test_no_answer_at_all_is_one_token_asked_for_and_dropped(upstream: Upstream, url: str) -> None:
    upstream.streams(words("hello", "length"), usage(3, 1), DONE)
    async with running(url) as engine:
        assert await read(engine, "hi", Sampling(0)) == [Piece("", 0, "length", usage=Usage(3))]
    assert upstream.asked[0][1]["max_tokens"] == 1


@in_loop
async def test_log_probabilities_that_a_server_leaves_out_are_not_left_out_silently(
    upstream: Upstream, url: str
) -> None:
    upstream.streams(*HELLO)
    async with running(url) as engine:
        failed = await failure(engine, "hi", Sampling(8, logprobs=0))
    assert isinstance(failed, UnsupportedError)
    assert failed.param == "logprobs"


@in_loop
async def test_a_server_without_done_or_usage_chunk_is_read_when_it_has_said_all(upstream: Upstream, url: str) -> None:
    counts = {"prompt_tokens": 3, "completion_tokens": 2}
    choice = {"index": 0, "text": " world", "finish_reason": "stop"}
    upstream.streams(words("hello"), frame({"choices": [choice], "usage": counts}))
    async with running(url) as engine:
        assert await read(engine) == [Piece("hello", 1), Piece(" world", 1, "stop", usage=Usage(3))]


@in_loop
async def test_an_answer_that_the_servers_filter_ends_is_an_answer(upstream: Upstream, url: str) -> None:
    upstream.streams(words("hello", "content_filter"), usage(3, 1), DONE)
    async with running(url, failures=1) as engine:
        assert await read(engine) == [Piece("hello", 1, "content_filter", usage=Usage(3))]
        assert engine.status()["owl"].state == "ready"


@pytest.mark.parametrize("finish", ["tool_calls", "function_call", "no_more_ideas"])
@in_loop
async def test_a_finish_that_has_no_meaning_here_is_refused_by_its_name(
    upstream: Upstream, url: str, finish: str
) -> None:
    upstream.streams(said(None, finish), usage(3, 0), DONE)
    async with running(url, failures=1) as engine:
        failed = await failure(engine, CHAT)
        assert isinstance(failed, UnsupportedError)
        assert (finish in str(failed), failed.param) == (True, "model")
        assert engine.status()["owl"].state == "ready"


# How it is written


def test_events_are_the_same_wherever_the_bytes_are_cut() -> None:
    stream = (
        ': ping\n\ndata: {"a": "é\u2028\x85"}\r\n\r\ndata:one\rdata: two\r\ndata\r\rdata: 1\r\n\ndata: 2\n\n'
        "event: error\nid: 7\nretry: 3\ndata: x\n\n\n\ndata\n\ndata: cut"
    ).encode()
    expected = [
        Event("", '{"a": "é\u2028\x85"}'),
        Event("", "one\ntwo\n"),
        Event("", "1"),
        Event("", "2"),
        Event("error", "x"),
        Event("", ""),
    ]
    for size in (1, 2, 3, 7, len(stream)):
        events = Events()
        found = [event for i in range(0, len(stream), size) for event in events.feed(stream[i : i + size])]
        assert found == expected, size


@in_loop
async def test_comments_and_cut_events_are_no_answer(upstream: Upstream, url: str) -> None:
    whole = b": ping\n\n" + b"".join(HELLO).replace(b"\n", b"\r\n")
    upstream.streams(*(whole[i : i + 5] for i in range(0, len(whole), 5)))
    async with running(url) as engine:
        assert "".join(piece.text for piece in await read(engine)) == "hello world"


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        ((frame({"error": {"message": "out of memory", "code": 500}}), DONE), "out of memory"),
        ((frame({"error": "out of memory"}),), "out of memory"),
        ((b'event: error\ndata: {"message": "oh"}\n\n',), "oh"),
        ((b"data: {nonsense\n\n",), "what is no chunk"),
        ((words("", "abort"), DONE), "abort"),
        ((words("", "error"), DONE), "error"),
        ((counted(words(""), COUNTS["vllm"]),), "broke off"),
        ((DONE,), "broke off"),
        ((), "broke off"),
        ((words("", "stop"),), "broke off"),
    ],
)
@in_loop
async def test_an_answer_that_ends_badly_is_an_engine_error_and_not_tried_again(
    upstream: Upstream, url: str, frames: tuple[bytes, ...], sentence: str
) -> None:
    upstream.streams(words("hello"), *frames)
    async with running(url) as engine:
        pieces = engine.generate(engine.prepare(OWL, "hi", GREETING))
        assert (await anext(pieces)).text == "hello"
        with pytest.raises(EngineError, match=sentence):
            await anext(pieces)
    assert len(upstream.asked) == 1


@in_loop
async def test_a_connection_that_breaks_in_mid_answer_is_not_tried_again(upstream: Upstream, url: str) -> None:
    upstream.streams(words("hello"), breaks=True)
    async with running(url) as engine:
        failed = await failure(engine)
    assert isinstance(failed, EngineError)
    assert "owl's server broke off" in str(failed)
    assert len(upstream.asked) == 1


# Who leaves


@in_loop
async def test_a_reader_who_leaves_ends_the_servers_stream_at_once(upstream: Upstream, url: str) -> None:
    upstream.streams(words("hello"), stalls=True)
    async with running(url) as engine:
        pieces = engine.generate(engine.prepare(OWL, "hi", GREETING))
        await anext(pieces)
        assert engine.load()["owl"].running == 1
        await pieces.aclose()
        assert engine.load()["owl"].running == 0
        await until(lambda: upstream.left == 1)
    assert upstream.open == 0


@pytest.mark.parametrize("frames", [(), (words("hello"),)])
@in_loop
async def test_a_reader_who_is_cancelled_ends_the_servers_stream(
    upstream: Upstream, url: str, frames: tuple[bytes, ...]
) -> None:
    upstream.streams(*frames, stalls=True)
    async with running(url) as engine:
        reading = asyncio.create_task(read(engine))
        await until(lambda: upstream.open == 1)
        reading.cancel()
        await until(lambda: upstream.left == 1)
        assert reading.cancelled()
        assert engine.load()["owl"] == Load()
        assert engine.status()["owl"].state == "ready"


@in_loop
async def test_an_engine_that_closes_ends_its_readers_and_their_streams(upstream: Upstream, url: str) -> None:
    upstream.streams(words("hello"), stalls=True)
    async with running(url) as engine:
        pieces = engine.generate(engine.prepare(OWL, "hi", GREETING))
        await anext(pieces)
        waiting = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        await engine.aclose()
        with pytest.raises(EngineError, match="the service is stopping"):
            await waiting
        await until(lambda: upstream.left == 1)


@in_loop
async def test_an_engine_that_is_closed_answers_nobody(upstream: Upstream, url: str) -> None:
    async with running(url) as engine:
        job = engine.prepare(OWL, "hi", GREETING)
        await engine.aclose()
        with pytest.raises(EngineError, match="the service is stopping"):
            await anext(engine.generate(job))
    assert not upstream.asked


async def read_to_the_finish(engine: RemoteEngine) -> None:
    """And no further, as streams over HTTP are read."""
    async with aclosing(engine.generate(engine.prepare(OWL, "hi", GREETING))) as pieces:
        async for piece in pieces:
            if piece.finish:
                return


@pytest.mark.parametrize("reader", [read, read_to_the_finish])
@in_loop
async def test_connections_are_used_again(
    upstream: Upstream, url: str, reader: Callable[[RemoteEngine], Awaitable[object]]
) -> None:
    upstream.streams(*HELLO)
    ports = []
    count = upstream.answer

    async def answer(request: Request) -> Response:
        assert request.client is not None
        ports.append(request.client.port)
        return await count(request)

    upstream.answer = answer  # type: ignore[method-assign]
    async with running(url, every=60) as engine:
        for _ in range(3):
            await reader(engine)
    assert len(set(ports)) == 1


# Refusals and tries


@pytest.mark.parametrize(
    ("status", "body", "kind", "param", "sentence"),
    [
        (400, {"error": {"message": "bad top_k", "param": "top_k"}}, UnsupportedError, "top_k", "bad top_k"),
        (400, {"error": {"message": "too long", "param": None, "code": 400}}, PromptError, None, "too long"),
        (
            400,
            {"error": {"message": "over", "param": "n", "type": "exceed_context_size_error"}},
            WindowError,
            None,
            "over",
        ),
        (
            422,
            {"detail": [{"loc": ["body", "min_p"], "msg": "too big"}]},
            UnsupportedError,
            "min_p",
            "too big",
        ),
        (413, "<html>", PromptError, None, "<html>"),
        (404, {"error": {"message": "no such model"}}, EngineError, None, "no such model"),
        (401, {"error": {"message": "bad key"}}, EngineError, None, "bad key"),
        (500, {"detail": "boom"}, EngineError, None, "boom"),
    ],
)
@in_loop
async def test_a_refusal_is_ours_with_the_servers_sentence_and_field(
    upstream: Upstream, url: str, status: int, body: object, kind: type[Exception], param: str | None, sentence: str
) -> None:
    upstream.refuses(status, body)
    async with running(url) as engine:
        failed = await failure(engine)
    assert type(failed) is kind
    assert sentence in str(failed)
    assert "owl" in str(failed)
    assert getattr(failed, "param", None) == param
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@in_loop
async def test_what_may_pass_is_tried_again(upstream: Upstream, url: str, status: int) -> None:
    upstream.refuses(status)
    upstream.refuses(status)
    upstream.streams(*HELLO)
    async with running(url) as engine:
        assert len(await read(engine)) == 2
    assert len(upstream.asked) == 3


@pytest.mark.parametrize(("status", "kind"), [(429, BusyError), (502, EngineError), (503, NotReadyError)])
@in_loop
async def test_what_stays_is_raised_after_the_last_try(
    upstream: Upstream, url: str, status: int, kind: type[Exception]
) -> None:
    upstream.refuses(status, {"error": {"message": "full"}})
    async with running(url, attempts=2) as engine:
        failed = await failure(engine)
    assert type(failed) is kind
    assert "full" in str(failed)
    assert len(upstream.asked) == 2


@in_loop
async def test_a_server_that_asks_for_a_long_wait_is_not_tried_again(upstream: Upstream, url: str) -> None:
    upstream.refuses(429, retry_after="30")
    async with running(url) as engine:
        failed = await failure(engine)
    assert isinstance(failed, BusyError)
    assert failed.after == 30
    assert len(upstream.asked) == 1


@in_loop
async def test_the_wait_that_a_server_asks_for_is_kept(upstream: Upstream, url: str) -> None:
    upstream.refuses(429, retry_after_ms="80")
    upstream.streams(*HELLO)
    loop = asyncio.get_running_loop()
    async with running(url, backoff=0) as engine:
        began = loop.time()
        await read(engine)
        assert loop.time() - began >= 0.08


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, LONGEST_WAIT),
        ({"retry-after": "99999999"}, LONGEST_WAIT),
        ({"retry-after-ms": "1e300"}, LONGEST_WAIT),
        ({"retry-after-ms": "inf", "retry-after": "7"}, 7),
        ({"retry-after-ms": "nan"}, None),
        ({"retry-after-ms": "-5"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "-inf"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 +99999999999999999999"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_a_wait_is_a_number_of_seconds_up_to_an_hour(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(httpx.Headers(headers)) == seconds


@in_loop
async def test_a_server_that_forbids_another_try_is_not_tried_again(upstream: Upstream, url: str) -> None:
    upstream.refuses(503, x_should_retry="false")
    async with running(url) as engine:
        await failure(engine)
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(("frames", "limit"), [((), "first"), ((words("hello"),), "between")])
@in_loop
async def test_a_server_that_says_nothing_is_given_up(
    upstream: Upstream, url: str, frames: tuple[bytes, ...], limit: str
) -> None:
    upstream.streams(*frames, stalls=True)
    async with running(url, **{limit: 0.05}) as engine:
        failed = await failure(engine)
        await until(lambda: upstream.left == 1)
    assert isinstance(failed, EngineError)
    assert "owl's server said nothing for 0.05 s" in str(failed)


@in_loop
async def test_more_requests_than_connections_are_refused_not_queued(upstream: Upstream, url: str) -> None:
    upstream.streams(words("hello"), stalls=True)
    async with running(url, connections=1) as engine:
        job = engine.prepare(OWL, "hi", GREETING)
        async with aclosing(engine.generate(job)) as pieces:
            await anext(pieces)
            for other in (job, engine.prepare(OWL, "hi", GREETING)):
                with pytest.raises(BusyError):
                    await anext(engine.generate(other))
            assert engine.load()["owl"].running == 1
        async with aclosing(engine.generate(job)) as pieces:
            await anext(pieces)
    assert len(upstream.asked) == 2


# The breaker


@in_loop
async def test_a_server_that_fails_again_and_again_is_left_alone_then_tried_once(upstream: Upstream, url: str) -> None:
    upstream.refuses(500, {"error": {"message": "boom"}})
    async with running(url, failures=2, pause=0.1) as engine:
        job = engine.prepare(OWL, "hi", GREETING)
        for _ in range(2):
            await failure(engine)
        status = engine.status()["owl"]
        assert status.state == "failed"
        assert "failed 2 times in a row" in status.detail
        assert "boom" in status.detail
        with pytest.raises(EngineError, match="owl cannot answer: failed 2 times"):
            engine.prepare(OWL, "hi", GREETING)
        with pytest.raises(EngineError, match="owl cannot answer"):
            await anext(engine.generate(job))
        assert len(upstream.asked) == 2
        await until(lambda: engine.status()["owl"].state == "ready")
        upstream.answers.clear()
        upstream.streams(*HELLO)
        await read(engine)
        assert engine.status()["owl"].state == "ready"


@in_loop
async def test_others_may_ask_as_soon_as_the_try_gets_a_first_byte(upstream: Upstream, url: str) -> None:
    upstream.refuses(500)
    upstream.streams(words("hello"), stalls=True)
    async with running(url, failures=1, pause=0) as engine:
        await failure(engine)
        async with aclosing(engine.generate(engine.prepare(OWL, "hi", GREETING))) as pieces:
            await anext(pieces)
            assert engine.status()["owl"].state == "ready"


@pytest.mark.parametrize("status", [400, 429])
@in_loop
async def test_refusals_do_not_count_as_failures(upstream: Upstream, url: str, status: int) -> None:
    upstream.refuses(status, {"error": {"message": "no"}})
    async with running(url, failures=1) as engine:
        await failure(engine)
        assert engine.status()["owl"].state == "ready"


@in_loop
async def test_an_answer_read_to_its_finish_is_a_success(upstream: Upstream, url: str) -> None:
    upstream.refuses(500)
    upstream.streams(*HELLO)
    upstream.refuses(500)
    async with running(url, failures=2) as engine:
        await failure(engine)
        await read_to_the_finish(engine)
        await failure(engine)
        assert engine.status()["owl"].state == "ready"


class TestBreaker:
    @pytest.fixture
    def now(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def breaker(self, now: list[float]) -> Breaker:
        return Breaker(2, 10, clock=lambda: now[0])

    def fail(self, breaker: Breaker, *, answering: bool = False) -> None:
        try:
            with breaker.attempt():
                if answering:
                    breaker.answered()
                raise EngineError("boom")
        except EngineError:
            pass

    def test_a_success_between_failures_keeps_it_closed(self, breaker: Breaker) -> None:
        self.fail(breaker)
        with breaker.attempt():
            pass
        self.fail(breaker)
        assert not breaker.refusal

    def test_one_request_tries_while_others_are_refused(self, breaker: Breaker, now: list[float]) -> None:
        self.fail(breaker)
        self.fail(breaker)
        assert "tried again in 10.0 s" in breaker.refusal
        now[0] = 11
        assert not breaker.refusal
        with breaker.attempt():
            assert "being tried now" in breaker.refusal
            breaker.answered()
            assert not breaker.refusal
        assert not breaker.refusal

    def test_a_try_that_fails_opens_it_again(self, breaker: Breaker, now: list[float]) -> None:
        self.fail(breaker)
        self.fail(breaker)
        now[0] = 11
        self.fail(breaker, answering=True)
        assert "boom" in breaker.refusal

    def test_a_try_that_answers_for_long_does_not_keep_the_next_one_from_trying(
        self, breaker: Breaker, now: list[float]
    ) -> None:
        self.fail(breaker)
        self.fail(breaker)
        now[0] = 11
        with breaker.attempt():
            breaker.answered()
            self.fail(breaker)
            assert breaker.refusal
            now[0] = 22
            assert not breaker.refusal

    def test_a_try_that_ends_late_does_not_let_a_second_one_try(self, breaker: Breaker, now: list[float]) -> None:
        self.fail(breaker)
        self.fail(breaker)
        now[0] = 11
        late = breaker.attempt()
        late.__enter__()
        breaker.answered()
        self.fail(breaker)
        now[0] = 22
        with breaker.attempt():
            late.__exit__(GeneratorExit, GeneratorExit(), None)
            assert "being tried now" in breaker.refusal

    def test_a_try_that_is_left_lets_the_next_one_try(self, breaker: Breaker, now: list[float]) -> None:
        self.fail(breaker)
        self.fail(breaker)
        now[0] = 11
        with pytest.raises(GeneratorExit), breaker.attempt():
            raise GeneratorExit
        assert not breaker.refusal
        with breaker.attempt():
            assert breaker.refusal


# Health


@in_loop
async def test_a_dead_server_fails_its_expert_and_no_other(upstream: Upstream, url: str, nowhere: str) -> None:
    upstream.streams(*HELLO)
    async with running(url, nowhere) as engine:
        assert {name: status.state for name, status in engine.status().items()} == {"owl": "ready", "fox": "failed"}
        assert "cannot be reached" in engine.status()["fox"].detail
        assert [load.resident for load in engine.load().values()] == [True, False]
        with pytest.raises(EngineError, match="fox cannot answer"):
            engine.prepare({"fox": 1.0}, "hi", GREETING)
        with pytest.raises(EngineError):
            engine.about("fox")
        assert len(await read(engine)) == 2


@in_loop
async def test_health_is_loading_then_ready_then_failed_then_ready(upstream: Upstream, url: str) -> None:
    upstream.health = 503
    async with running(url) as engine:
        assert engine.status()["owl"].state == "loading"
        with pytest.raises(NotReadyError):
            engine.prepare(OWL, "hi", GREETING)
        for health, state in [(200, "ready"), (500, "failed"), (200, "ready")]:
            upstream.health = health
            await until(lambda state=state: engine.status()["owl"].state == state)  # type: ignore[misc]


@in_loop
async def test_a_ready_server_may_be_late_once(upstream: Upstream, url: str) -> None:
    async with running(url, misses=10**6) as engine:
        upstream.health = 500
        await asyncio.sleep(0.1)
        assert engine.status()["owl"].state == "ready"


@in_loop
async def test_a_server_without_health_is_asked_for_its_models(upstream: Upstream, url: str) -> None:
    upstream.health = None
    async with running(url) as engine:
        assert engine.status()["owl"].state == "ready"
        upstream.models[0]["max_model_len"] = 32
        await until(lambda: engine.about("owl").window == 32)


@pytest.mark.parametrize(
    "error",
    [
        {"message": "gone", "code": "model_not_found"},
        {"message": "gone", "param": "model", "code": None},
        {"message": "The model `tiny` does not exist.", "type": "NotFoundError", "param": None, "code": 404},
        {"message": "model is not found", "type": "not_found_error", "code": 404},
    ],
)
@in_loop
async def test_a_server_that_says_that_its_model_is_not_there_is_not_ready(
    upstream: Upstream, url: str, error: Json
) -> None:
    upstream.refuses(404, {"error": error})
    async with running(url, every=60) as engine:
        failed = await failure(engine)
        assert isinstance(failed, EngineError)
        assert engine.status()["owl"].state == "loading"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"detail": "Not Found"}),
        (404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}),
        (404, "<html>"),
        (
            404,
            {
                "error": {
                    "message": "This is not a chat model and thus not supported in the v1/chat/completions endpoint.",
                    "param": "model",
                    "code": None,
                }
            },
        ),
        (405, {"detail": "Method Not Allowed"}),
        (501, {"error": {"message": "This server does not support chats", "type": "not_supported_error"}}),
    ],
)
@in_loop
async def test_a_server_without_an_endpoint_refuses_those_who_need_it_and_serves_the_others(
    upstream: Upstream, url: str, status: int, body: object
) -> None:
    upstream.refuses(status, body)
    upstream.streams(*HELLO)
    async with running(url, every=60, failures=1) as engine:
        failed = await failure(engine, CHAT)
        assert isinstance(failed, UnsupportedError)
        assert "owl's server has no /v1/chat/completions" in str(failed)
        assert failed.param == "messages"
        assert engine.status()["owl"].state == "ready"
        assert len(await read(engine)) == 2


@in_loop
async def test_a_server_that_lost_its_model_is_asked_anew(upstream: Upstream, url: str) -> None:
    upstream.refuses(404, {"error": {"message": "no such model"}})
    async with running(url) as engine:
        upstream.models[0]["id"] = "other"
        await failure(engine)
        assert engine.status()["owl"].state == "loading"
        await until(lambda: engine.status()["owl"].state == "ready")
        assert engine.about("owl").facts["served_model"] == "other"


@pytest.mark.parametrize(
    ("card", "props", "stated", "window"),
    [
        ({"owned_by": "vllm", "max_model_len": 100}, None, 50, 100),
        ({"owned_by": "modelglue", "window": 100}, None, None, 100),
        ({"owned_by": "llamacpp", "meta": {"n_ctx": 90, "n_ctx_train": 8192}}, None, None, 90),
        (
            {"owned_by": "llamacpp", "meta": {"n_ctx_train": 8192}},
            {"default_generation_settings": {"n_ctx": 80}},
            None,
            80,
        ),
        ({"owned_by": "llamacpp", "meta": {"n_ctx_train": 8192}}, None, None, 8192),
        ({}, None, 70, 70),
    ],
)
@in_loop
async def test_the_window_is_the_servers_or_what_is_stated(
    upstream: Upstream, url: str, card: Json, props: Json | None, stated: int | None, window: int
) -> None:
    upstream.models = [{"id": "tiny"} | card]
    upstream.props = props
    async with running(Remote(url, window=stated)) as engine:
        about = engine.about("owl")
    assert about.window == window
    assert about.facts == {"engine": card.get("owned_by", "remote"), "served_model": "tiny"}


@pytest.mark.parametrize(
    ("models", "wanted", "detail"),
    [
        ([{"id": "a"}], None, "tells no window for a"),
        ([{"id": "a"}, {"id": "b"}], "c", "has no model c; there are: a, b"),
        ([], None, "lists no model"),
        ([{"name": "a"}], None, "another form than OpenAI's"),
    ],
)
@in_loop
async def test_a_server_that_does_not_serve_the_expert_says_why(
    upstream: Upstream, url: str, models: list[Json], wanted: str | None, detail: str
) -> None:
    upstream.models = models
    async with running(Remote(url, wanted)) as engine:
        status = engine.status()["owl"]
    assert status.state == "failed"
    assert detail in status.detail


@in_loop
async def test_the_named_model_is_asked_for(upstream: Upstream, url: str) -> None:
    upstream.models.append({"id": "second", "max_model_len": 8})
    upstream.streams(*HELLO)
    async with running(Remote(f"{url}/v1/", "second")) as engine:
        assert engine.about("owl").window == 8
        await read(engine, "hi", Sampling(4))
    assert upstream.asked[0][1]["model"] == "second"


@in_loop
async def test_the_key_of_the_environment_is_sent(
    upstream: Upstream, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.key = "secret"
    upstream.streams(*HELLO)
    monkeypatch.setenv("OWL_KEY", "secret")
    async with running(Remote(url, api_key="OWL_KEY")) as engine:
        await read(engine)
    assert upstream.headers[0]["authorization"] == "Bearer secret"
    async with running(url) as engine:
        assert engine.status()["owl"].detail == "its server refuses requests without a key"


# Addresses


@pytest.mark.parametrize(
    ("text", "name", "remote"),
    [
        ("owl=http://host:8000", "owl", Remote("http://host:8000")),
        ("owl=https://host/v1#org/model#1", "owl", Remote("https://host/v1", "org/model#1")),
    ],
)
def test_an_expert_and_its_server_are_read_from_one_word(text: str, name: str, remote: Remote) -> None:
    assert Remote.parse(text) == (name, remote)


@pytest.mark.parametrize(
    "text",
    [
        "owl",
        "=http://host",
        "owl=",
        "owl=http://host#",
        "owl=host:8000",
        "owl=ftp://host",
        "owl=http://",
        "owl=http://host:port",
        "owl=http://[host",
        "owl=http://host\x01",
        "owl=http://me:secret@host",
        "owl=http://host?key=secret",
    ],
)
def test_what_is_no_address_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(RemoteError, match=r"write |environment variable"):
        Remote.parse(text)


def test_a_key_that_is_missing_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OWL_KEY", raising=False)
    with pytest.raises(RemoteError, match="set OWL_KEY"):
        RemoteEngine({"owl": Remote("http://host", api_key="OWL_KEY")})


# This service as the server


@pytest.fixture
def echo(bundle: Bundle) -> EchoEngine:
    return EchoEngine(bundle.router.experts)


@pytest.fixture
def service(bundle: Bundle, echo: EchoEngine) -> Iterator[str]:
    with serve(create_app(bundle, echo)) as (url, _):
        yield url


@pytest.mark.parametrize("prompt", ["one two three", (Message("user", "one two three"),)])
@in_loop
async def test_an_expert_of_another_service_answers_as_it_does_there(
    service: str, echo: EchoEngine, prompt: Prompt
) -> None:
    async with running(Remote(service, "math")) as engine:
        assert engine.about("owl").window == 64
        pieces = await read(engine, prompt, Sampling(8))
        there = [piece async for piece in echo.generate(echo.prepare({"math": 1.0}, prompt, Sampling(8)))]
        uncounted = [[replace(piece, usage=None) for piece in answer] for answer in (pieces, there)]
        assert uncounted[0] == uncounted[1]
        assert pieces[0].usage == pieces[-1].usage == there[-1].usage
        assert (await read(engine, prompt, Sampling(2)))[-1].finish == "length"


@in_loop
async def test_a_reader_who_leaves_ends_the_other_services_work(service: str, echo: EchoEngine) -> None:
    echo._delay = 0.05
    async with running(Remote(service, "math")) as engine:
        async with aclosing(engine.generate(engine.prepare(OWL, "word " * 30, Sampling(30)))) as pieces:
            await anext(pieces)
            assert echo.running == 1
        await until(lambda: echo.running == 0)


@in_loop
async def test_a_prompt_over_the_other_services_window_is_refused_in_its_words(service: str) -> None:
    async with running(Remote(service, "math")) as engine:
        failed = await failure(engine, "word " * 80, Sampling(8))
    assert isinstance(failed, WindowError)
    assert "80 tokens of prompt and 8 of answer" in str(failed)


def test_a_bundle_is_served_by_local_and_remote_experts_alike(bundle: Bundle, service: str, echo: EchoEngine) -> None:
    here = EchoEngine(("code", "story"))
    there = RemoteEngine({"math": Remote(service, "math")}, Patience(**QUICK))
    with TestClient(create_app(bundle, SeveralEngines({"math": there, "code": here, "story": here}))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        for expert in bundle.router.experts:
            body = {"model": expert, "prompt": "one two"}
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "one two"
    assert (here.finished, echo.finished) == (2, 1)


# Under this service


@pytest.fixture
def client(bundle: Bundle, upstream: Upstream, url: str) -> Iterator[TestClient]:
    """The bundle's math is at the upstream."""
    here = EchoEngine(("code", "story"))
    there = RemoteEngine({"math": Remote(url)}, Patience(**QUICK | {"failures": 1}))
    with TestClient(create_app(bundle, SeveralEngines({"math": there, "code": here, "story": here}))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def test_an_answer_cut_at_a_stop_string_is_counted(upstream: Upstream, client: TestClient) -> None:
    upstream.streams(*[counted(words(text), COUNTS["vllm"]) for text in ("hello", " world")], stalls=True)
    body = {"model": "math", "prompt": "hi", "stop": "wor"}
    answer = client.post("/v1/completions", json=body).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("hello ", "stop")
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 2)
    metrics = client.get("/metrics").text
    for name in ("vllm:prompt_tokens", "vllm:prefix_cache_queries"):
        assert f'{name}_total{{model_name="math"}} 3.0' in metrics


def test_a_filtered_answer_is_told_as_openai_tells_it(upstream: Upstream, client: TestClient) -> None:
    upstream.streams(words("hello", "content_filter"), usage(3, 1), DONE)
    upstream.streams(said("hello"), said(None, "content_filter"), usage(3, 1), DONE)
    whole = client.post("/v1/completions", json={"model": "math", "prompt": "hi", "stop": "wor"}).json()
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == ("hello", "content_filter")
    chat = {"model": "math", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    *_, last, done = client.post("/v1/chat/completions", json=chat).text.split("\n\n")[:-1]
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "content_filter"
    assert done == "data: [DONE]"
    ended = 'vllm:request_success_total{finished_reason="content_filter",model_name="math"} 2.0'
    assert ended in client.get("/metrics").text
