"""The bodies that the endpoints take and the answers that they give, in OpenAI's shapes.

A field of OpenAI's (or of vLLM's) that is not served is taken at its neutral value and refused by name at any other.
"""

from __future__ import annotations

import difflib
import time
import uuid
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from routers.explain import Detail
from routers.prompt import AUTO
from service.completions import Decision, Request
from service.engines.base import Message, Piece, Prompt
from service.errors import RequestError

Json = dict[str, Any]

NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not served, each with the values (beside null) that ask for nothing."""


class Strict(BaseModel):
    """A body or a part of one: no unknown fields, no "0.5" for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream carries beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Turn(Strict):
    """One message of a chat; its content may come in text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _without_blanks(cls, fields: Any) -> Any:
        """Clients send an assistant's message back as they got it: `refusal: null`, `annotations: []`."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value not in (None, [])}

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        if not all(map(_is_text, content)):
            raise ValueError('takes text parts only: {"type": "text", "text": "..."}')
        return "\n".join(part["text"] for part in content)

    def message(self) -> Message:
        """The engine's form. `developer` is OpenAI's new word for `system`, which the experts' templates know."""
        return Message("system" if self.role == "developer" else self.role, self.content)


class Body(Strict):
    """What completions and chats have in common."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    prefix: ClassVar[str]

    model: str = AUTO
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default=[], max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""
    k: int | None = Field(default=None, ge=1)

    @classmethod
    def of(cls, fields: Json) -> Self:
        """The body with these fields. Raises RequestError naming the first that is unknown, wrong or not served."""
        served = {name: value for name, value in fields.items() if value is not None and not _neutral(name, value)}
        if unserved := next((name for name in served if name in NEUTRAL), None):
            raise RequestError(f"{unserved} is not served here: leave it out", unserved, "unsupported_parameter")
        try:
            return cls.model_validate(served)
        except ValidationError as exc:
            raise refusal(exc.errors()[0], [*cls.model_fields, *NEUTRAL]) from exc

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("an empty stop string would end every answer at once")
        return stop

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options need stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def request(self) -> Request:
        """The request as the service understands it."""
        return Request(
            self._prompt(),
            self.model,
            self._max_tokens(),
            self.temperature,
            self.top_p,
            self.seed,
            tuple(self.stop),
            self.k,
        )

    def choice(self, piece: Piece) -> Json:
        """The whole answer as a choice."""
        raise NotImplementedError

    def delta(self, piece: Piece, *, first: bool) -> Json:
        """A piece of the answer as a chunk's choice."""
        raise NotImplementedError

    def _prompt(self) -> Prompt:
        raise NotImplementedError

    def _max_tokens(self) -> int | None:
        raise NotImplementedError


class CompletionBody(Body):
    """`POST /v1/completions`."""

    whole_object = chunk_object = "text_completion"
    prefix = "cmpl"

    prompt: str
    max_tokens: int = Field(default=16, ge=1)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, prompt: Any) -> Any:
        if isinstance(prompt, list):
            raise ValueError("must be one string; lists of prompts and token ids are not served yet")
        return prompt

    def choice(self, piece: Piece) -> Json:
        return {"index": 0, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}

    def delta(self, piece: Piece, *, first: bool) -> Json:
        return self.choice(piece)

    def _prompt(self) -> Prompt:
        return self.prompt

    def _max_tokens(self) -> int | None:
        return self.max_tokens


class ChatBody(Body):
    """`POST /v1/chat/completions`; as with OpenAI, an answer without a limit may fill the window."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens is the old name of max_completion_tokens: send one of them")
        return self

    def choice(self, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish}

    def delta(self, piece: Piece, *, first: bool) -> Json:
        delta = ({"role": "assistant"} if first else {}) | ({"content": piece.text} if piece.text or first else {})
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": piece.finish}

    def _prompt(self) -> Prompt:
        return tuple(turn.message() for turn in self.messages)

    def _max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class DetailQuery(BaseModel):
    """`POST /route?detail=...`: not strict, for a query holds nothing but strings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    detail: Detail = "scores"


class RouteQuery(DetailQuery):
    """`GET /route?prompt=...`."""

    prompt: str
    model: str = AUTO
    k: int | None = Field(default=None, ge=1)

    def request(self) -> Request:
        """The request whose route is asked for."""
        return Request(self.prompt, self.model, k=self.k)


class Answer:
    """Writes one request's answer, whole or in chunks; every part of it names the expert that serves."""

    def __init__(self, body: Body, expert: str) -> None:
        self._body = body
        self._head = {"id": f"{body.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": expert}

    def whole(self, piece: Piece, prompt_tokens: int) -> Json:
        """The answer at once."""
        choices = [self._body.choice(piece)]
        return self._written(self._body.whole_object, choices) | {"usage": usage(prompt_tokens, piece.tokens)}

    def chunk(self, piece: Piece, *, first: bool) -> Json:
        """One piece; `usage` is there, and null, only where a count was asked for."""
        chunk = self._written(self._body.chunk_object, [self._body.delta(piece, first=first)])
        return chunk | {"usage": None} if self._body.include_usage else chunk

    def count(self, prompt_tokens: int, tokens: int) -> Json:
        """The chunk after the last piece, with the token counts."""
        return self._written(self._body.chunk_object, []) | {"usage": usage(prompt_tokens, tokens)}

    def _written(self, object: str, choices: list[Json]) -> Json:
        return self._head | {"object": object, "choices": choices}


def usage(prompt_tokens: int, tokens: int) -> Json:
    """OpenAI's token counts."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}


def route(decision: Decision, facts: Json) -> Json:
    """What /route shows of a decision; `margin` and the words' pulls are in score, `ms` is the decision's alone."""
    return {"object": "route", "text": decision.text, "ms": round(1000 * decision.seconds, 3)} | facts


def refusal(error: ErrorDetails, known: list[str]) -> RequestError:
    """The sentence for what pydantic found, with the field in OpenAI's notation: messages[0].role."""
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return RequestError(f"there is no field {param}{hint}", param, "unknown_parameter")
    if error["type"] == "missing":
        return RequestError(f"{param} is missing", param, "missing_required_parameter")
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return RequestError(f"{param} {said}" if param else said, param or None, "invalid_value")


def _is_text(part: object) -> bool:
    if not isinstance(part, dict) or part.keys() != {"type", "text"}:
        return False
    return part["type"] == "text" and isinstance(part["text"], str)


def _neutral(name: str, value: object) -> bool:
    # True == 1 in Python, and not in JSON.
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )
