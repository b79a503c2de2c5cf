"""What a server says instead of an answer, as a failure of ours."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import httpx
from pydantic_core import from_json

from routers.errors import ModelGlueError
from service.engines.base import BusyError, EngineError, NotReadyError, PromptError, UnsupportedError, WindowError
from service.engines.remote.call import CHAT

RETRIED: Final = (429, 502, 503, 504)
"""What a server may have got over by the next try."""

OF_THE_REQUEST: Final = (400, 413, 422)
TOO_LONG: Final = ("context_length_exceeded", "exceed_context_size_error")
NO_ENDPOINT: Final = (404, 405, 501)
NO_MODEL: Final = "model_not_found"
NO_SUCH_MODEL: Final = re.compile(r"\bmodel\b.*\bnot (exist|found)\b|\bno (such )?model\b", re.IGNORECASE)
"""What vLLM, llama.cpp and others say without a code."""

OF_THE_PROMPT: Final = ("prompt", "messages", "input_tokens")
LONGEST: Final = 500
"""Characters of a sentence that are passed on."""

LONGEST_WAIT: Final = 3600.0
"""Seconds; a server that asks for more is asked after these."""


def refusal(expert: str, response: httpx.Response, body: bytes) -> ModelGlueError:
    """The failure that a response with this body stands for; of a 404, an EngineError is a model that is not there."""
    said, param, code = _said(body)
    status = response.status_code
    reason = said[:LONGEST] or f"{status} {response.reason_phrase}"
    if status == 429:
        return BusyError(f"{expert}'s server is busy: {reason}", retry_after(response.headers) or 1.0)
    if status == 503:
        return NotReadyError(f"{expert}'s server is not ready: {reason}")
    if status in NO_ENDPOINT and not _lacks_model(reason, param, code):
        path = response.request.url.path
        sent, other = ("messages", "a prompt") if path.endswith(CHAT) else ("prompt", "messages")
        return UnsupportedError(f"{expert}'s server has no {path} (it says: {reason}): send {other} instead", sent)
    if status not in OF_THE_REQUEST:
        return EngineError(f"{expert}'s server answers {status}: {reason}")
    sentence = f"{expert}'s server refuses this: {reason}"
    if code in TOO_LONG:
        return WindowError(sentence)
    if param is None or param in OF_THE_PROMPT:
        return PromptError(sentence)
    return UnsupportedError(sentence, param)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that a server asks to be left alone for, from any of the headers that OpenAI's clients heed.

    What is no such number is not heeded.
    """
    said = headers.get("retry-after", "")
    tries: list[tuple[Callable[[str], float], str]] = [
        (_milliseconds, headers.get("retry-after-ms", "")),
        (float, said),
        (_until, said),
    ]
    for read, text in tries:
        with suppress(ValueError, OverflowError):
            seconds = read(text)
            if math.isfinite(seconds) and seconds >= 0:
                return min(seconds, LONGEST_WAIT)
    return None


def _milliseconds(text: str) -> float:
    return float(text) / 1000


def _until(date: str) -> float:
    when = parsedate_to_datetime(date)
    return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - time.time())


def _lacks_model(reason: str, param: str | None, code: str | None) -> bool:
    """Whether it is the model that is not there; OpenAI names it too when it is there, but not for this endpoint."""
    named = param == "model" and "endpoint" not in reason
    return code == NO_MODEL or named or NO_SUCH_MODEL.search(reason) is not None


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
    code = next((kind for kind in kinds if kind in (*TOO_LONG, NO_MODEL)), None)
    return str(error.get("message", error.get("msg", ""))), param, code
