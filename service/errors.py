"""Which failure becomes which HTTP status and OpenAI error body: one table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.responses import JSONResponse
from starlette.types import Scope

from routers.errors import ModelGlueError, RoutingError
from service.engines.base import BusyError, EngineError, NotReadyError, PromptError, UnsupportedError, WindowError

CLIENT_LEFT: Final = 499
"""nginx's status for a client that did not wait: nobody reads it but the log."""


class RequestError(ModelGlueError):
    """A request that cannot be honoured as it is; `param` names the field, `code` the kind of fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class AccessError(ModelGlueError):
    """No key, or one that is not known."""


class ForbiddenError(ModelGlueError):
    """Something that only an administrator may do."""


class LimitError(ModelGlueError):
    """A key's limit is reached; `code` says which. after: seconds by which it may be tried again."""

    def __init__(self, message: str, after: float, code: str) -> None:
        super().__init__(message)
        self.after = after
        self.code = code


class StoppingError(ModelGlueError):
    """The service is about to end, and takes nothing new."""


class DeadlineError(ModelGlueError):
    """A request took longer than one may."""


class SlowBodyError(DeadlineError):
    """A client did not send its whole body in the time that a request may take."""


class UnknownRequestError(ModelGlueError):
    """A request that was not logged, or no longer is."""


class UnavailableError(ModelGlueError):
    """Something that cannot be done for now."""


class ReloadError(ModelGlueError):
    """A bundle that cannot take the place of the one that is served, which goes on."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a failure is answered."""

    status: int
    type: str = "invalid_request_error"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


KINDS: dict[type[Exception], Kind] = {
    RequestError: Kind(400),
    PromptError: Kind(400),
    WindowError: Kind(400, code="context_length_exceeded"),
    UnsupportedError: Kind(400, code="unsupported_value"),
    RoutingError: Kind(404, code="model_not_found"),
    BusyError: Kind(429, "requests", "rate_limit_exceeded"),
    NotReadyError: Kind(503, "server_error", "loading", {"retry-after": "2"}),
    # Asking again will not revive it: OpenAI's clients, which retry every 5xx, heed this header.
    EngineError: Kind(503, "server_error", "expert_failed", {"x-should-retry": "false"}),
    AccessError: Kind(401, code="invalid_api_key", headers={"www-authenticate": "Bearer"}),
    ForbiddenError: Kind(403, code="forbidden"),
    LimitError: Kind(429, "requests", "rate_limit_exceeded"),
    StoppingError: Kind(503, "server_error", "stopping", {"retry-after": "2"}),
    # The same request would take as long again.
    DeadlineError: Kind(504, "server_error", "deadline_exceeded", {"x-should-retry": "false"}),
    SlowBodyError: Kind(408, code="request_timeout", headers={"connection": "close", "x-should-retry": "false"}),
    UnknownRequestError: Kind(404, code="request_not_found"),
    UnavailableError: Kind(503, "server_error", "unavailable", {"retry-after": "10"}),
    ReloadError: Kind(409, code="reload_refused"),
    Exception: Kind(500, "server_error", "internal_error"),
}


def kind(exc: Exception) -> Kind:
    """The most specific kind of `exc`."""
    return next(KINDS[base] for base in type(exc).__mro__ if base in KINDS)


def headers(exc: Exception) -> dict[str, str]:
    """What tells a client whether, and when, to ask again."""
    if isinstance(exc, BusyError | LimitError):
        return {"retry-after": str(math.ceil(exc.after)), "retry-after-ms": str(math.ceil(1000 * exc.after))}
    return kind(exc).headers


def body(exc: Exception) -> dict[str, Any]:
    """OpenAI's error object. What is not ours to explain stays in the log: it may hold paths or prompts."""
    sentence = str(exc) if isinstance(exc, ModelGlueError) else "the service failed; its log says why"
    code = getattr(exc, "code", None) or kind(exc).code
    return error(sentence, kind(exc).type, getattr(exc, "param", None), code)


def told(exc: Exception, scope: Scope) -> dict[str, Any]:
    """The body of a request that failed so; its record has the code."""
    found = body(exc)
    scope["record"].code = found["error"]["code"]
    return found


def answer(exc: Exception, scope: Scope) -> JSONResponse:
    """The answer to it."""
    # What is not ours is answered outside of the middleware, which would have said the name.
    name = {"x-request-id": scope["record"].id}
    return JSONResponse(told(exc, scope), kind(exc).status, headers(exc) | name)


def error(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """`{"error": {...}}` as OpenAI writes it."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}
