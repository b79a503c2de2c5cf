"""What a server says instead of an answer, as a failure of ours."""

from __future__ import annotations

import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import httpx
from pydantic_core import from_json

from routers.errors import ModelGlueError
from service.engines.base import BusyError, EngineError, NotReadyError, PromptError, UnsupportedError, WindowError

RETRIED: Final = (429, 502, 503, 504)
"""What a server may have got over by the next try."""

OF_THE_REQUEST: Final = (400, 413, 422)
TOO_LONG: Final = ("context_length_exceeded", "exceed_context_size_error")
OF_THE_PROMPT: Final = ("prompt", "messages", "input_tokens")
LONGEST: Final = 500
"""Characters of a sentence that are passed on."""


def refusal(expert: str, response: httpx.Response, body: bytes) -> ModelGlueError:
    """The failure that a response with this body stands for."""
    said, param, code = _said(body)
    status = response.status_code
    reason = said[:LONGEST] or f"{status} {response.reason_phrase}"
    if status == 429:
        return BusyError(f"{expert}'s server is busy: {reason}", retry_after(response.headers) or 1.0)
    if status == 503:
        return NotReadyError(f"{expert}'s server is not ready: {reason}")
    if status not in OF_THE_REQUEST:
        return EngineError(f"{expert}'s server answers {status}: {reason}")
    sentence = f"{expert}'s server refuses this: {reason}"
    if code in TOO_LONG:
        return WindowError(sentence)
    if param is None or param in OF_THE_PROMPT:
        return PromptError(sentence)
    return UnsupportedError(sentence, param)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that a server asks to be left alone for, from any of the headers that OpenAI's clients heed."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        said = headers.get("retry-after", "")
        if said.replace(".", "", 1).isdecimal():
            return float(said)
        when = parsedate_to_datetime(said)
        return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - time.time())
    except ValueError:
        return None


def _said(body: bytes) -> tuple[str, str | None, str | None]:
    """Sentence, field and kind of an error, in OpenAI's shape, or FastAPI's; a page for browsers says nothing."""
    try:
        error = from_json(body)
    except ValueError:
        return "", None, None
    if isinstance(error, dict):
        error = error.get("error", error.get("detail", error.get("message", "")))
    if isinstance(error, list) and error:  # FastAPI's list of what is wrong with a body
        error = error[0]
    if not isinstance(error, dict):
        return str(error), None, None
    where = error.get("loc")
    param = error.get("param") or (str(where[-1]) if isinstance(where, list) and where else None)
    kinds = (error.get("code"), error.get("type"))
    code = next((kind for kind in kinds if kind in TOO_LONG), None)
    return str(error.get("message", error.get("msg", ""))), param, code
