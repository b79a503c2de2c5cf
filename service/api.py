"""The endpoints: each reads a body, makes one call, shapes an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from routers.bundle import Bundle
from routers.errors import ModelGlueError
from routers.explain import Detail, explain
from routers.policy import pin
from routers.routelog import router_digest
from service import completions, decisions, errors
from service import record as records
from service.completions import Completion
from service.decisions import POLICIES, Decision, aside, estimated_tokens, read_tokens
from service.ending import Drain, cause
from service.engines.base import Engine, State, UnsupportedError
from service.errors import CLIENT_LEFT, RequestError
from service.events import HEARTBEAT, EventStream
from service.metrics import Metrics
from service.schemas import answers
from service.schemas.answers import Writer
from service.schemas.bodies import Body, ChatBody, CompletionBody
from service.schemas.fields import Json
from service.schemas.queries import DetailQuery, DetokenizeBody, EmbeddingsBody, ModelQuery, RouteQuery, TokenizeBody
from service.served import Served
from service.sessions import Sessions

MAX_BODY: Final = 1 << 20
"""Bytes of a request's body."""

BATCH: Final = 16
"""A batch's body may be so many times as large."""

MAX_BATCH: Final = BATCH * MAX_BODY

PATIENCE: Final = 2.0
"""Seconds that a stream waits for its first pieces: until then a failure has a status, and another expert is tried."""

PLAYGROUND = Path(__file__).parent / "playground"
SCRIPTS = ("playground.js", "answer.js", "client.js", "dom.js", "request.js", "route.js")
PAGES = {
    "/": ("index.html", "text/html"),
    "/docs.css": ("docs.css", "text/css"),
    "/playground/playground.css": ("playground.css", "text/css"),
    **{f"/playground/{name}": (name, "text/javascript") for name in SCRIPTS},
}
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

T = TypeVar("T")


class Api:
    """The endpoints over one bundle and one engine.

    Headers of a request: `x-expert` pins one, as `model` does; `x-session-id` names the conversation that it belongs to
    (service/sessions.py); `x-route-debug: 1` adds the decision to the answer's last part as `route`, a list where there
    are several prompts.
    """

    def __init__(
        self,
        served: Served,
        engine: Engine,
        metrics: Metrics,
        drain: Drain,
        *,
        patience: float = PATIENCE,
        heartbeat: float = HEARTBEAT,
        max_body: int = MAX_BODY,
    ) -> None:
        """patience, heartbeat: seconds. max_body: bytes."""
        self._served = served
        self._engine = engine
        self._metrics = metrics
        self._drain = drain
        self._sessions = Sessions()
        self._patience = patience
        self._heartbeat = heartbeat
        self._max_body = max_body
        self._since = int(time.time())

    def endpoints(self) -> APIRouter:
        """Every path there is."""
        api = APIRouter(redirect_slashes=False)
        api.add_api_route("/v1/completions", self.complete, methods=["POST"])
        api.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        api.add_api_route("/v1/embeddings", self.embed, methods=["POST"])
        api.add_api_route("/v1/models", self.models, methods=["GET"])
        api.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        for path in ("/route", "/v1/route"):
            api.add_api_route(path, self.route_of_query, methods=["GET"])
            api.add_api_route(path, self.route_of_body, methods=["POST"])
            api.add_api_route(f"{path}/batch", self.routes_of_lines, methods=["POST"])
        api.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        api.add_api_route("/tokenizer_info", self.tokenizer_info, methods=["GET"])
        api.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        api.add_api_route("/version", self.version, methods=["GET"])
        for path in ("/healthz", "/health"):  # vLLM's name, which benchmarks ask for
            api.add_api_route(path, self.healthz, methods=["GET"])
        api.add_api_route("/readyz", self.readyz, methods=["GET"])
        api.add_api_route("/metrics", self.metrics, methods=["GET"])
        for path, (file, media_type) in PAGES.items():
            api.add_api_route(path, _page(PLAYGROUND / file, media_type), methods=["GET"])
        return api

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer(request, CompletionBody.of(await read(request, self._max_body)))

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        return await self._answer(request, ChatBody.of(await read(request, self._max_body)))

    async def embed(self, request: Request) -> Json:
        """The vectors that prompts are routed by."""
        body = EmbeddingsBody.of(await read(request, self._max_body))
        features = self._served.router.features

        def embedded() -> Json:
            vectors = [features.vector(text) for text in body.input]
            tokens = sum(estimated_tokens(text, features) for text in body.input)
            return answers.embeddings(vectors, tokens, encoded=body.encoding_format == "base64")

        # Off the event loop: two thousand texts take seconds.
        return await asyncio.to_thread(embedded)

    async def route_of_query(self, request: Request, query: Annotated[RouteQuery, Query()]) -> Json:
        """The route of a prompt, and why; nothing is generated."""
        asked = query.request(*_named(request))
        return await self._route(self._served.bundle, replace(asked, client=_client(request)), query.detail)

    async def route_of_body(self, request: Request, query: Annotated[DetailQuery, Query()]) -> Json | list[Json]:
        """The route that serving would take with this very body; of several prompts, a list."""
        return await self._routes(await read(request, self._max_body), request, query.detail)

    async def routes_of_lines(self, request: Request, query: Annotated[DetailQuery, Query()]) -> Response:
        """JSONL to JSONL: the route of each line's body, or the error that it would get, in order."""
        lines = (await read_raw(request, BATCH * self._max_body)).splitlines()

        async def routes() -> AsyncGenerator[str, None]:
            for line in filter(bytes.strip, lines):
                try:
                    found = await self._routes(self._parsed(line), request, query.detail)
                except ModelGlueError as exc:
                    found = errors.body(exc)
                yield json.dumps(found, ensure_ascii=False) + "\n"

        return StreamingResponse(routes(), media_type="application/jsonl")

    async def tokenize(self, request: Request) -> Json:
        """A text as its expert's tokens, of `auto` the default expert's, which reads tokens that are to be routed."""
        body = TokenizeBody.of(await read(request, self._max_body))
        expert = self._expert(body.model)
        ids = await asyncio.to_thread(self._engine.encode, expert, body.text)
        # An empty text becomes the mark that texts begin with; a chat's template writes its own.
        if not body.add_special_tokens and body.messages is None and ids[:1] == self._engine.encode(expert, "")[:1]:
            ids = ids[1:]
        window = self._engine.about(expert).window
        return {"model": expert, "tokens": list(ids), "count": len(ids), "max_model_len": window}

    async def tokenizer_info(self, query: Annotated[ModelQuery, Query()]) -> Json:
        """What an expert's tokens begin and end texts with; of `auto` the default expert's."""
        expert = self._expert(query.model)
        if not (told := self._engine.about(expert).tokenizer):
            raise UnsupportedError(f"only {expert}'s server has its tokenizer: ask it there", "model")
        return {"model": expert, **told}

    async def detokenize(self, request: Request) -> Json:
        """Tokens as text."""
        body = DetokenizeBody.of(await read(request, self._max_body))
        return {"prompt": read_tokens(self._expert(body.model), body.tokens, self._engine, "tokens")}

    async def models(self) -> Json:
        """`auto`, its policies, and every expert."""
        return {"object": "list", "data": [self._model(name) for name in (*POLICIES, *self._served.router.experts)]}

    async def model(self, name: str) -> Json:
        """One of them."""
        return self._model(name)

    async def version(self) -> Json:
        """Which release serves which bundle."""
        bundle = self._served.bundle
        manifest = bundle.manifest
        return {
            "version": version("modelglue"),
            "bundle": manifest.zoo,
            "inputs_sha256": manifest.inputs_sha256,
            "router_sha256": router_digest(bundle),
        }

    async def healthz(self) -> Json:
        """The process answers."""
        return {"status": "ok"}

    async def readyz(self) -> Response:
        """Whether requests should be sent here, and how far each expert is."""
        experts = {
            name: {"state": status.state} | ({"detail": status.detail} if status.detail else {})
            for name, status in self._engine.status().items()
        }
        ready = self._state() == "ready" and not self._drain.begun
        told = {"ready": ready, "stopping": self._drain.begun, "experts": experts}
        return JSONResponse(told, 200 if ready else 503)

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(
            self._metrics.exposition(self._engine.status(), self._engine.load()), media_type=CONTENT_TYPE_LATEST
        )

    async def _answer(self, request: Request, body: Body) -> Response:
        bundle = self._served.bundle  # kept for the whole answer, whatever is served by then
        requests = _requests(body, request)
        debug = request.headers.get("x-route-debug") == "1"
        if not body.stream:
            return await unless_left(request, self._whole(request, bundle, body, requests, debug))
        completion = await unless_left(request, self._start(request, bundle, requests, self._patience))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(completion.aclose)
            writer = await self._writer(bundle, body, completion, debug)
            stream = EventStream(completion, writer, _headers(completion), body.include_usage, self._heartbeat)
            stack.pop_all()  # from here on the response closes it
            return stream

    async def _whole(
        self, request: Request, bundle: Bundle, body: Body, requests: tuple[decisions.Request, ...], debug: bool
    ) -> Response:
        async with aclosing(await self._start(request, bundle, requests)) as completion:
            writer = await self._writer(bundle, body, completion, debug)
            return JSONResponse(writer.whole(await completion.whole()), headers=_headers(completion))

    async def _start(
        self,
        request: Request,
        bundle: Bundle,
        requests: tuple[decisions.Request, ...],
        patience: float | None = None,
    ) -> Completion:
        started = await completions.start(
            requests, bundle.router, self._engine, self._metrics, self._sessions, patience=patience
        )
        record = records.of(request.scope)
        record.completion, record.bundle = started, bundle
        return started

    async def _writer(self, bundle: Bundle, body: Body, completion: Completion, debug: bool) -> Writer:
        routes = [await _explained(bundle, part.decision, "scores") for part in completion.parts] if debug else []
        fingerprint = f"fp_{bundle.manifest.inputs_sha256[:10]}"
        return Writer(body, completion, fingerprint, _one_or_all(routes) if routes else None)

    def _parsed(self, line: bytes) -> Json:
        """Of a batch. Raises RequestError."""
        if len(line) > self._max_body:
            raise RequestError(f"the line is larger than {self._max_body} bytes: send less", code="line_too_large")
        return parse(line)

    async def _routes(self, fields: Json, request: Request, detail: Detail) -> Json | list[Json]:
        body: Body = ChatBody.of(fields) if "messages" in fields else CompletionBody.of(fields)
        bundle = self._served.bundle
        return _one_or_all([await self._route(bundle, each, detail) for each in _requests(body, request)])

    async def _route(self, bundle: Bundle, request: decisions.Request, detail: Detail) -> Json:
        await asyncio.sleep(0)  # others' turn: there may be a thousand
        decide = partial(decisions.decide, request, bundle.router, self._engine, self._sessions)
        return await _explained(bundle, await aside(bundle.router, decide), detail)

    def _expert(self, model: str) -> str:
        router = self._served.router
        return router.policy.default if model in POLICIES else pin(router.experts, model, POLICIES).expert

    def _state(self) -> State:
        """The service's: loading as long as any expert is, then ready if any is; routes leave out the others."""
        states = {status.state for status in self._engine.status().values()}
        return next(state for state in ("loading", "ready", "failed") if state in states)

    def _model(self, name: str) -> Json:
        listed: Json = {"id": name, "object": "model", "created": self._since, "owned_by": "modelglue"}
        if name in POLICIES:
            return listed | {"state": self._state()}
        pin(self._served.router.experts, name, POLICIES)
        state = self._engine.status()[name].state
        if state != "ready":
            return listed | {"state": state, "window": None, "facts": {}}
        about = self._engine.about(name)
        return listed | {"state": state, "window": about.window, "facts": dict(about.facts)}


async def read(request: Request, most: int) -> Json:
    """The JSON object in a request's body, whatever its content type. Raises RequestError or HTTPException."""
    return parse(await read_raw(request, most))


async def read_raw(request: Request, most: int) -> bytes:
    """A request's body. Raises HTTPException for one of more than `most` bytes, and where the client leaves."""
    raw = bytearray()
    try:
        async for part in request.stream():
            raw += part
            if len(raw) > most:
                raise HTTPException(413, f"the body is larger than {most} bytes: send less")
    except ClientDisconnect as exc:
        raise HTTPException(CLIENT_LEFT, "the client left") from exc
    return bytes(raw)


def parse(raw: bytes) -> Json:
    """The JSON object in these bytes. Raises RequestError."""
    try:
        fields = from_json(raw, allow_inf_nan=False)
    except ValueError as exc:
        raise RequestError(f"the body is not JSON: {exc}", code="invalid_json") from exc
    if not isinstance(fields, dict):
        raise RequestError("the body is not a JSON object", code="invalid_json")
    return fields


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; a client that leaves ends it. The body must have been read."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HTTPException(CLIENT_LEFT, "the client left")
    except asyncio.CancelledError as exc:
        raise cause(request.scope) from exc
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _named(request: Request) -> tuple[str | None, str | None]:
    """The expert and the session that headers name."""
    return request.headers.get("x-expert") or None, request.headers.get("x-session-id") or None


def _client(request: Request) -> str | None:
    """The name of its key."""
    return records.of(request.scope).key


def _requests(body: Body, request: Request) -> tuple[decisions.Request, ...]:
    """One for every prompt."""
    return tuple(replace(each, client=_client(request)) for each in body.requests(*_named(request)))


def _headers(completion: Completion) -> dict[str, str]:
    """The route; of several prompts, every different one."""
    made = [part.decision for part in completion.parts]
    return {
        "x-route-expert": ", ".join(dict.fromkeys(decision.route.expert for decision in made)),
        "x-route-reason": ", ".join(dict.fromkeys(decision.route.reason for decision in made)),
        "x-route-ms": f"{1000 * sum(decision.seconds for decision in made):.3f}",
    }


async def _explained(bundle: Bundle, decision: Decision, detail: Detail) -> Json:
    told = partial(explain, bundle, decision.text, decision.route, decision.limits, detail)
    return answers.route(decision, await aside(bundle.router, told))


def _one_or_all(routes: list[Json]) -> Json | list[Json]:
    return routes[0] if len(routes) == 1 else routes


def _page(file: Path, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = file.read_bytes()

    async def page() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return page
