"""What the service logs: a line for each request, without what was asked, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, Literal

from service.access import OPEN
from service.engines.base import Message, Prompt, Tokens
from service.record import Record

Format = Literal["text", "json"]
TEXT: Final = "%(asctime)s %(levelname)s: %(message)s"

logger = logging.getLogger("service.requests")


def configure(level: str, form: Format) -> None:
    """Send every log line of the process to stderr, in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.getLogger().level, logging.WARNING))


class JsonLines(logging.Formatter):
    """One JSON object a line; a line with `fields` has them beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def requests(*, prompts: bool = False) -> Callable[[Record], None]:
    """What logs the line of a request; with `prompts`, what was asked too."""

    def tell(record: Record) -> None:
        # Probes come every few seconds, and are told no while experts load: worth a line to whoever wants it all.
        quiet = record.path in OPEN and record.status != 500
        level = logging.DEBUG if quiet else logging.INFO
        if logger.isEnabledFor(level):
            told = fields(record, prompts=prompts)
            logger.log(level, "%s", _sentence(told), extra={"fields": told})

    return tell


def fields(record: Record, *, prompts: bool) -> dict[str, Any]:
    """The facts of a request; those that are not there are left out. Milliseconds are whole ones from the start."""
    made = [part.decision.route for part in record.parts]
    first = record.first_seconds
    told = {
        "request_id": record.id,
        "key": record.key,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "code": record.code,
        "expert": ", ".join(dict.fromkeys(route.expert for route in made)) or None,
        "reason": ", ".join(dict.fromkeys(route.reason for route in made)) or None,
        "finish": ", ".join(dict.fromkeys(answer.finish for answer in record.answers)) or None,
        "prompt_tokens": record.completion.usage.prompt if record.completion else None,
        "tokens": record.completion.tokens if record.completion else None,
        "first_ms": None if first is None else round(1000 * first),
        "ms": round(1000 * record.seconds),
        "prompts": [_plain(part.request.prompt) for part in record.parts] if prompts else None,
    }
    return {name: value for name, value in told.items() if value is not None and value != []}


def _sentence(told: dict[str, Any]) -> str:
    method, path, status = (told[name] for name in ("method", "path", "status"))
    rest = " ".join(f"{name}={value}" for name, value in told.items() if name not in ("method", "path", "status"))
    # A path may hold anything, line breaks too.
    return f"{method} {path!r} {status} {rest}"


def _plain(prompt: Prompt) -> Any:
    if isinstance(prompt, Tokens):
        return list(prompt.ids)
    if isinstance(prompt, str):
        return prompt
    return [_turn(message) for message in prompt]


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
