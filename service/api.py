"""The endpoints: each reads a body, makes one call, shapes an answer."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from routers.bundle import Bundle
from routers.explain import Detail, explain
from routers.policy import pin
from routers.prompt import AUTO
from service import completions, errors, schemas
from service.completions import Completion, Decision
from service.engines.base import Engine, EngineError, State
from service.errors import RequestError
from service.metrics import Metrics
from service.schemas import Answer, Body, ChatBody, CompletionBody, DetailQuery, Json, RouteQuery

MAX_BODY: Final = 1 << 20
"""Bytes of a request's body."""

CLIENT_LEFT: Final = 499
"""nginx's status for a client that did not wait: nobody reads it but the log."""

PLAYGROUND = Path(__file__).parent / "playground"
PAGES = {
    "/": ("index.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

DONE: Final = "data: [DONE]\n\n"

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Api:
    """The endpoints over one bundle and one engine."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._bundle = bundle
        self._router = bundle.router
        self._engine = engine
        self._metrics = Metrics(bundle.router.experts)
        self._since = int(time.time())

    def endpoints(self) -> APIRouter:
        """Every path there is."""
        api = APIRouter(redirect_slashes=False)
        api.add_api_route("/v1/completions", self.complete, methods=["POST"])
        api.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        api.add_api_route("/v1/models", self.models, methods=["GET"])
        api.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        api.add_api_route("/route", self.route_of_query, methods=["GET"])
        api.add_api_route("/route", self.route_of_body, methods=["POST"])
        api.add_api_route("/healthz", self.healthz, methods=["GET"])
        api.add_api_route("/readyz", self.readyz, methods=["GET"])
        api.add_api_route("/metrics", self.metrics, methods=["GET"])
        for path, (file, media_type) in PAGES.items():
            api.add_api_route(path, _page(PLAYGROUND / file, media_type), methods=["GET"])
        return api

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer(request, CompletionBody.of(await read(request)))

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        return await self._answer(request, ChatBody.of(await read(request)))

    async def route_of_query(self, query: Annotated[RouteQuery, Query()]) -> Json:
        """The route of a prompt, and why; nothing is generated."""
        return self._route(query.request(), query.detail)

    async def route_of_body(self, request: Request, query: Annotated[DetailQuery, Query()]) -> Json:
        """The route that serving would take with this very body."""
        fields = await read(request)
        body = ChatBody.of(fields) if "messages" in fields else CompletionBody.of(fields)
        return self._route(body.request(), query.detail)

    async def models(self) -> Json:
        """`auto` and every expert."""
        return {"object": "list", "data": [self._model(name) for name in (AUTO, *self._router.experts)]}

    async def model(self, name: str) -> Json:
        """One of them."""
        return self._model(name)

    async def healthz(self) -> Json:
        """The process answers."""
        return {"status": "ok"}

    async def readyz(self) -> Response:
        """Whether requests should be sent here, and how far each expert is."""
        experts = {
            name: {"state": status.state} | ({"detail": status.detail} if status.detail else {})
            for name, status in self._engine.status().items()
        }
        ready = self._state() == "ready"
        return JSONResponse({"ready": ready, "experts": experts}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._metrics.exposition(self._engine.status()), media_type=CONTENT_TYPE_LATEST)

    async def _answer(self, request: Request, body: Body) -> Response:
        if not body.stream:
            return await unless_left(request, self._whole(body))
        completion = await unless_left(request, self._start(body))
        return EventStream(completion, body)

    async def _whole(self, body: Body) -> Response:
        async with aclosing(await self._start(body)) as completion:
            answer = Answer(body, completion.decision.route.expert)
            written = answer.whole(await completion.whole(), completion.prompt_tokens)
            return JSONResponse(written, headers=_headers(completion.decision))

    async def _start(self, body: Body) -> Completion:
        return await completions.start(body.request(), self._router, self._engine, self._metrics)

    def _route(self, request: completions.Request, detail: Detail) -> Json:
        decision = completions.decide(request, self._router)
        return schemas.route(decision, explain(self._bundle, decision.text, decision.route, request.limits, detail))

    def _state(self) -> State:
        """The service's: loading as long as any expert is, and then its default expert's."""
        states = {name: status.state for name, status in self._engine.status().items()}
        return "loading" if "loading" in states.values() else states[self._router.policy.default]

    def _model(self, name: str) -> Json:
        about: Json = {"id": name, "object": "model", "created": self._since, "owned_by": "modelglue"}
        if name == AUTO:
            return about | {"state": self._state()}
        pin(self._router.experts, name)
        state = self._engine.status()[name].state
        return about | {"state": state, "window": self._engine.about(name).window if state == "ready" else None}


class EventStream(StreamingResponse):
    """A completion as server-sent events. However the response ends, the engine's work ends with it."""

    def __init__(self, completion: Completion, body: Body) -> None:
        headers = _headers(completion.decision) | {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_events(completion, body), headers=headers, media_type="text/event-stream")
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._completion):
            try:
                await super().__call__(scope, receive, send)
            except asyncio.CancelledError:  # only a server that stops cancels this; one that leaves is noticed above
                last = _event(errors.body(EngineError("the service is stopping"))) + DONE
                await send({"type": "http.response.body", "body": last.encode()})


async def _events(completion: Completion, body: Body) -> AsyncGenerator[str, None]:
    answer = Answer(body, completion.decision.route.expert)
    first, tokens = True, 0
    try:
        async for piece in completion.pieces():
            tokens += piece.tokens
            if first or piece.text or piece.finish:
                yield _event(answer.chunk(piece, first=first))
                first = False
        if body.include_usage:
            yield _event(answer.count(completion.prompt_tokens, tokens))
    except Exception as exc:  # the status is sent: an event is all that can still tell
        logger.exception("a stream of expert %s broke", completion.decision.route.expert)
        yield _event(errors.body(exc))
    yield DONE


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def read(request: Request) -> Json:
    """The JSON object in a request's body, whatever its content type. Raises RequestError or HTTPException."""
    raw = bytearray()
    try:
        async for part in request.stream():
            raw += part
            if len(raw) > MAX_BODY:
                raise HTTPException(413, f"the body is larger than {MAX_BODY} bytes: send less")
    except ClientDisconnect as exc:
        raise HTTPException(CLIENT_LEFT, "the client left") from exc
    try:
        fields = from_json(bytes(raw), allow_inf_nan=False)
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
        raise HTTPException(503, "the service is stopping", {"retry-after": "2"}) from exc
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(decision: Decision) -> dict[str, str]:
    return {
        "x-route-expert": decision.route.expert,
        "x-route-reason": decision.route.reason,
        "x-route-ms": f"{1000 * decision.seconds:.3f}",
    }


def _page(file: Path, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = file.read_bytes()

    async def page() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return page
