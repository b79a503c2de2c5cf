"""The app: endpoints, what every request passes through, failures as OpenAI's error bodies. Wired here, once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from routers.bundle import Bundle
from routers.errors import ModelGlueError
from service import errors, logs
from service import record as records
from service.access import Access, Gate
from service.api import MAX_BODY, PAGES, PATIENCE, Api
from service.docs import Docs
from service.ending import BODY_SECONDS, LAST_WORDS, Deadline, Drain, Upload
from service.engines.base import Engine, Status
from service.errors import CLIENT_LEFT
from service.events import HEARTBEAT
from service.metrics import Metrics
from service.operations import Operations, Reloading
from service.record import Requests, Tell
from service.routelog import RouteLog
from service.schemas.fields import refusal
from service.schemas.queries import RouteQuery
from service.served import Served

LOOK_SECONDS: Final = 0.1
"""Between two looks at whether experts still load."""

SHOWN: Final = ("x-request-id", "x-route-expert", "x-route-reason", "x-route-ms", "retry-after", "retry-after-ms")
"""Headers that a page of another origin may read."""


def create_app(
    bundle: Bundle,
    engine: Engine,
    *,
    access: Access | None = None,
    drain: Drain | None = None,
    routelog: RouteLog | None = None,
    tell: Sequence[Tell] = (),
    cors: Sequence[str] = (),
    deadline: float | None = None,
    upload: float = BODY_SECONDS,
    max_body: int = MAX_BODY,
    patience: float = PATIENCE,
    heartbeat: float = HEARTBEAT,
    log_prompts: bool = False,
) -> FastAPI:
    """The service over a bundle and an engine, which starts and ends with the app; so does the route log.

    access: None takes everybody. tell: who else hears of every request. cors: origins; `*` is any. deadline,
    upload: seconds, of a whole request and of a body's next bytes. `app.state.reload` reads the router again.
    """
    drain, served = drain or Drain(), Served(bundle)
    requests: set[asyncio.Task[None]] = set()
    metrics = Metrics(bundle.router.experts)
    listeners: list[Tell] = [logs.requests(prompts=log_prompts), metrics.ended, *tell]
    if routelog is not None:
        routelog.lost = metrics.unlogged
        listeners.append(routelog.decided)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await engine.start()
        watching = asyncio.create_task(_watch(engine, metrics))
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await engine.aclose()
            if requests:  # cut short by now, and still to tell their clients so
                await asyncio.wait(requests, timeout=LAST_WORDS)
            if routelog is not None:
                await asyncio.to_thread(routelog.close)

    # service/openapi.py describes it: FastAPI does not know the bodies, and its page loads scripts from elsewhere.
    app = FastAPI(title="modelglue", lifespan=lifespan, openapi_url=None)
    api = Api(served, engine, metrics, drain, patience=patience, heartbeat=heartbeat, max_body=max_body)
    reloading = Reloading(served, access, metrics)
    app.state.reload = reloading.reload
    endpoints = [api.endpoints(), Operations(reloading, routelog, max_body).endpoints()]
    for each in (*endpoints, Docs(endpoints).endpoints()):
        app.include_router(each)
    # What is added last comes first.
    app.add_middleware(Upload, seconds=upload)
    if deadline is not None:
        app.add_middleware(Deadline, seconds=deadline)
    app.add_middleware(Gate, access=access, drain=drain, public=frozenset({*PAGES, "/docs", "/openapi.json"}))
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=SHOWN,
        )
    app.add_middleware(Requests, open_requests=requests, tell=listeners)
    app.add_exception_handler(ModelGlueError, _failed)
    app.add_exception_handler(RequestValidationError, _bad_query)
    app.add_exception_handler(HTTPException, _http_failed)
    app.add_exception_handler(Exception, _failed)
    return app


async def settled(engine: Engine) -> AsyncGenerator[tuple[str, Status], None]:
    """Every expert as soon as it loads no more: ready or failed. An engine has no event for it."""
    known = set[str]()
    while len(known) < len(states := engine.status()):
        for name, status in states.items():
            if name not in known and status.state != "loading":
                known.add(name)
                yield name, status
        await asyncio.sleep(LOOK_SECONDS)


async def _watch(engine: Engine, metrics: Metrics) -> None:
    began = time.monotonic()
    async for name, status in settled(engine):
        if status.state == "ready":
            metrics.loaded(name, time.monotonic() - began)


async def _failed(request: Request, exc: Exception) -> JSONResponse:
    return errors.answer(exc, request.scope)


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
    code = records.of(request.scope).code = HTTPStatus(exc.status_code).name.lower()
    return JSONResponse(errors.error(said, kind, code=code), exc.status_code, exc.headers)
