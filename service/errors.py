"""Which failure becomes which HTTP status and OpenAI error body: one table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from routers.errors import ModelGlueError, RoutingError
from service.engines.base import BusyError, EngineError, NotReadyError, PromptError, UnsupportedError, WindowError


class RequestError(ModelGlueError):
    """A request that cannot be honoured as it is; `param` names the field, `code` the kind of fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


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
    Exception: Kind(500, "server_error", "internal_error"),
}


def kind(exc: Exception) -> Kind:
    """The most specific kind of `exc`."""
    return next(KINDS[base] for base in type(exc).__mro__ if base in KINDS)


def headers(exc: Exception) -> dict[str, str]:
    """What tells a client whether, and when, to ask again."""
    if isinstance(exc, BusyError):
        return {"retry-after": str(math.ceil(exc.after)), "retry-after-ms": str(math.ceil(1000 * exc.after))}
    return kind(exc).headers


def body(exc: Exception) -> dict[str, object]:
    """OpenAI's error object. What is not ours to explain stays in the log: it may hold paths or prompts."""
    sentence = str(exc) if isinstance(exc, ModelGlueError) else "the service failed; its log says why"
    code = getattr(exc, "code", None) or kind(exc).code
    return error(sentence, kind(exc).type, getattr(exc, "param", None), code)


def error(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """`{"error": {...}}` as OpenAI writes it."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}
