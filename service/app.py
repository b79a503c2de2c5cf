"""The app: endpoints, failures as OpenAI's error bodies, a request id on every answer. Wired here, once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from routers.bundle import Bundle
from routers.errors import ModelGlueError
from service import errors
from service.api import CLIENT_LEFT, Api
from service.engines.base import Engine
from service.schemas.fields import refusal
from service.schemas.queries import RouteQuery

LAST_WORDS = 1.0
"""Seconds that a service which stops gives its open requests to say so."""


def create_app(bundle: Bundle, engine: Engine) -> FastAPI:
    """The service over a bundle and an engine, which starts and ends with the app."""

    requests: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.aclose()
            if requests:  # cut short by now, and still to tell their clients so
                await asyncio.wait(requests, timeout=LAST_WORDS)

    # No generated docs: their page loads scripts from elsewhere, and the bodies are read by hand.
    app = FastAPI(title="modelglue", lifespan=lifespan, openapi_url=None)
    app.include_router(Api(bundle, engine).endpoints())
    app.add_middleware(Requests, open_requests=requests)
    app.add_exception_handler(ModelGlueError, _failed)
    app.add_exception_handler(RequestValidationError, _bad_query)
    app.add_exception_handler(HTTPException, _http_failed)
    app.add_exception_handler(Exception, _failed)
    return app


class Requests:
    """Keeps the open requests, and names each as its client does, or anew; the answer says the name."""

    def __init__(self, app: ASGIApp, open_requests: set[asyncio.Task[None]]) -> None:
        self._app = app
        self._open = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope["request_id"] = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = scope["request_id"]
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            return await self._app(scope, receive, named)
        finally:
            self._open.discard(task)


async def _failed(request: Request, exc: Exception) -> JSONResponse:
    kind = errors.kind(exc)
    # What is not ours is answered outside of the middleware, which would have said the name.
    headers = errors.headers(exc) | {"x-request-id": request.scope["request_id"]}
    return JSONResponse(errors.body(exc), kind.status, headers)


async def _bad_query(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    return await _failed(request, refusal(first | {"loc": first["loc"][1:]}, [*RouteQuery.model_fields]))


async def _http_failed(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if exc.status_code == CLIENT_LEFT:
        return Response(status_code=CLIENT_LEFT)
    where = f"{request.method} {request.url.path}"
    said = {404: f"there is no {where}", 405: f"{where} is not possible"}.get(exc.status_code, exc.detail)
    kind = "server_error" if exc.status_code >= 500 else "invalid_request_error"
    body = errors.error(said, kind, code=HTTPStatus(exc.status_code).name.lower())
    return JSONResponse(body, exc.status_code, exc.headers)
