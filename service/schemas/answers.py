"""Writes what is answered, in OpenAI's shapes."""

from __future__ import annotations

import base64
import codecs
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final, Protocol

from routers.base import Vector
from routers.prompt import AUTO
from service.completions import Completion
from service.decisions import Decision
from service.engines.base import Piece, Scored, Usage
from service.schemas.bodies import Body, ChatBody, CompletionBody
from service.schemas.fields import Json

NEVER: Final = -9999.0
"""OpenAI's number for a token that cannot be."""


class Choice(Protocol):
    """Writes one choice of an answer, whole or bit by bit."""

    def whole(self, piece: Piece) -> Json:
        """All of it."""
        ...

    def delta(self, piece: Piece) -> Json:
        """The next bit of it."""
        ...


class TextChoice:
    """A completion's: the prompt goes before the first bit where it is echoed."""

    def __init__(self, index: int, body: CompletionBody, echoed: str) -> None:
        self._index = index
        self._scored = body.logprobs is not None
        self._echoed = echoed
        self._offsets = Offsets()

    def whole(self, piece: Piece) -> Json:
        logprobs = self._logprobs(piece.prompt + piece.scored) if self._scored else None
        text, self._echoed = self._echoed + piece.text, ""
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}

    def delta(self, piece: Piece) -> Json:
        return self.whole(piece)

    def _logprobs(self, scored: Sequence[Scored]) -> Json:
        return {
            "tokens": [legacy(each) for each in scored],
            "token_logprobs": [None if each.logprob is None else finite(each.logprob) for each in scored],
            "top_logprobs": [_alternatives(each) for each in scored],
            "text_offset": [self._offsets.next(each.raw) for each in scored],
        }


class ChatChoice:
    """A chat's: its role comes with the first bit."""

    def __init__(self, index: int, body: ChatBody) -> None:
        self._index = index
        self._scored = body.logprobs
        self._begun = False

    def whole(self, piece: Piece) -> Json:
        return self._written(piece, "message", {"role": "assistant", "content": piece.text, "refusal": None})

    def delta(self, piece: Piece) -> Json:
        role = {} if self._begun else {"role": "assistant"}
        content = {"content": piece.text} if piece.text or not self._begun else {}
        self._begun = True
        return self._written(piece, "delta", role | content)

    def _written(self, piece: Piece, name: str, message: Json) -> Json:
        logprobs = (
            {"content": [_chat_logprob(each) for each in piece.scored], "refusal": None} if self._scored else None
        )
        return {"index": self._index, name: message, "logprobs": logprobs, "finish_reason": piece.finish}


class Offsets:
    """Where tokens begin in their common text, in characters: one in the middle of a character, where that does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, raw: bytes) -> int:
        """Where this one does."""
        began = self._length
        self._length += len(self._decoder.decode(raw))
        return began


class Writer:
    """Writes one request's answer, whole or in chunks; every part of it names the expert that serves."""

    def __init__(self, body: Body, completion: Completion, fingerprint: str, route: Json | list[Json] | None) -> None:
        """route: goes with the answer's last part, where there is one."""
        self._body = body
        self._completion = completion
        self._route = {} if route is None else {"route": route}
        self._head: Json = {
            "id": f"{body.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "system_fingerprint": fingerprint,
        }
        self._head |= {"service_tier": "default"} if body.service_tier else {}
        parts = [part for part in completion.parts for _ in range(part.request.n)]
        self._experts = [part.decision.route.expert for part in parts]
        self._choices = [_choice(body, index, part.echoed) for index, part in enumerate(parts)]
        self._open = len(parts)

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The answer at once."""
        choices = [self._named(choice.whole(piece), i) for i, (choice, piece) in enumerate(self._pairs(pieces))]
        counts = {"usage": usage(self._completion.usage, self._completion.tokens)}
        return self._written(self._body.whole_object, self._model(), choices) | counts | self._route

    def chunk(self, index: int, piece: Piece) -> Json:
        """The next bit of one choice; `usage` is there, and null, only where a count was asked for."""
        choices = [self._named(self._choices[index].delta(piece), index)]
        written = self._written(self._body.chunk_object, self._experts[index], choices)
        self._open -= bool(piece.finish)
        if self._body.continuous_usage:
            written["usage"] = usage(self._completion.usage, self._completion.tokens)
        elif self._body.include_usage:
            written["usage"] = None
        last = not self._open and not self._body.include_usage
        return written | (self._route if last else {})

    def count(self) -> Json:
        """The chunk after the last bit, with the token counts."""
        counts = {"usage": usage(self._completion.usage, self._completion.tokens)}
        return self._written(self._body.chunk_object, self._model(), []) | counts | self._route

    def _pairs(self, pieces: Sequence[Piece]) -> list[tuple[Choice, Piece]]:
        return list(zip(self._choices, pieces, strict=True))

    def _model(self) -> str:
        return self._experts[0] if len(set(self._experts)) == 1 else AUTO

    def _named(self, choice: Json, index: int) -> Json:
        return choice | ({"expert": self._experts[index]} if len(self._completion.parts) > 1 else {})

    def _written(self, object: str, model: str, choices: list[Json]) -> Json:
        return self._head | {"object": object, "model": model, "choices": choices}


def usage(prompt: Usage, tokens: int) -> Json:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": prompt.prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt.prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": prompt.cached},
    }


def route(decision: Decision, facts: Json) -> Json:
    """What /route shows of a decision; `margin` and the words' pulls are in score, `ms` is the decision's alone."""
    steps = {name: _ms(seconds) for name, seconds in asdict(decision.steps).items()} if decision.steps else {}
    return {"object": "route", "text": decision.text, "ms": _ms(decision.seconds), "steps_ms": steps} | facts


def embeddings(vectors: Sequence[Vector], tokens: int, *, encoded: bool) -> Json:
    """OpenAI's list of vectors; encoded: their little-endian float32 in base64."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector_D.astype("<f4").tobytes()).decode() if encoded else vector_D.tolist(),
        }
        for index, vector_D in enumerate(vectors)
    ]
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": "router", "usage": counts}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, NEVER)


def legacy(scored: Scored) -> str:
    """A token as OpenAI's completions write it: bytes that are no text by their numbers, so that no two look alike."""
    try:
        return scored.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in scored.raw)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _choice(body: Body, index: int, echoed: str) -> Choice:
    if isinstance(body, CompletionBody):
        return TextChoice(index, body, echoed)
    assert isinstance(body, ChatBody)
    return ChatChoice(index, body)


def _alternatives(scored: Scored) -> dict[str, float] | None:
    """The likeliest in a token's place and the token itself; of two that look alike, the likelier."""
    if scored.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in (*scored.top, scored):
        if each.logprob is not None:
            found[legacy(each)] = max(finite(each.logprob), found.get(legacy(each), NEVER))
    return found


def _chat_logprob(scored: Scored) -> Json:
    alternatives = [_token(each) for each in scored.top]
    return _token(scored) | {"top_logprobs": alternatives}


def _token(scored: Scored) -> Json:
    assert scored.logprob is not None  # only a prompt's first token has none, and a chat's prompt is not shown
    return {"token": scored.text, "logprob": finite(scored.logprob), "bytes": list(scored.raw)}
