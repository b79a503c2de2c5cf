"""The endpoints of whoever runs the service, and of whoever says how good an answer was."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request

from routers.errors import ModelGlueError
from service import record as records
from service.access import Access, check_admin
from service.api import read
from service.errors import ReloadError, UnknownRequestError
from service.metrics import Metrics
from service.routelog import RouteLog
from service.schemas.feedback import FeedbackBody
from service.schemas.fields import Json
from service.served import Served

logger = logging.getLogger(__name__)


class Reloading:
    """What is read again while the service runs: the file of keys, and the bundle's router."""

    def __init__(self, served: Served, access: Access | None, metrics: Metrics) -> None:
        self._served = served
        self._access = access
        self._metrics = metrics

    async def reload(self) -> str:
        """What was taken, in a sentence. Raises ReloadError; what was refused then goes on as it was."""
        try:
            if self._access is not None:
                self._access.reload()
            told = await self._served.reload()
        except ModelGlueError as exc:
            self._metrics.reloaded(taken=False)
            logger.error("reload: %s", exc)
            raise exc if isinstance(exc, ReloadError) else ReloadError(str(exc)) from exc
        self._metrics.reloaded(taken=True)
        return told


class Operations:
    """`POST /v1/feedback` and `POST /admin/reload`."""

    def __init__(self, reloading: Reloading, routelog: RouteLog | None, max_body: int) -> None:
        self._reloading = reloading
        self._routelog = routelog
        self._max_body = max_body

    def endpoints(self) -> APIRouter:
        """Every path there is."""
        api = APIRouter(redirect_slashes=False)
        api.add_api_route("/v1/feedback", self.feedback, methods=["POST"])
        api.add_api_route("/admin/reload", self.reload, methods=["POST"])
        return api

    async def feedback(self, request: Request) -> Json:
        """Keep how good an answer was, beside the decision that led to it."""
        body = FeedbackBody.of(await read(request, self._max_body))
        if self._routelog is None:
            raise UnknownRequestError("no requests are kept here, nor feedback on them: start with --route-log")
        key = records.of(request.scope).key
        await self._routelog.rated(body.request_id, body.index, key, body.value, body.comment or None)
        return {"object": "feedback", "request_id": body.request_id, "index": body.index, "score": body.value}

    async def reload(self, request: Request) -> Json:
        """Read the router again."""
        check_admin(request.scope)
        return {"object": "reload", "detail": await self._reloading.reload()}
