"""What a server answers: the events of a completion, or of a chat, as pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Final

from pydantic import BaseModel, Field, ValidationError

from service.engines.base import EngineError, Finish, Job, Piece, Scored, UnsupportedError, Usage
from service.engines.remote.events import DONE, Event

UNKNOWN: Final = -1
"""A token's id where the server tells only its text."""

FINISHES: Final[dict[str, Finish]] = {"stop": "stop", "length": "length", "content_filter": "content_filter"}

BROKEN: Final = ("abort", "error")
"""What vLLM says of an answer that failed there; all else that is no finish of ours is no fault of the server's."""


class Candidate(BaseModel):
    """A token in the shape of chats."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    id: int = UNKNOWN


class Position(Candidate):
    """A token that was taken, beside those that were not."""

    top_logprobs: list[Candidate] | None = None


class Logprobs(BaseModel):
    """`content` of chats, and of llama.cpp's completions too; the rest is of completions."""

    content: list[Position] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None

    def scored(self) -> list[Scored]:
        """Every token with its alternatives, the likeliest first."""
        if self.content is not None:
            return [_scored(position, position.top_logprobs or ()) for position in self.content]
        tokens = self.tokens or []
        logprobs = self.token_logprobs or [None] * len(tokens)
        tops = self.top_logprobs or [None] * len(tokens)
        return [
            Scored(UNKNOWN, token.encode(), logprob, _alternatives(top))
            for token, logprob, top in zip(tokens, logprobs, tops, strict=False)
        ]


class Delta(BaseModel):
    """What a chat's chunk adds."""

    content: str | None = None


class Choice(BaseModel):
    """A chunk's text, of a completion or of a chat."""

    text: str | None = None
    delta: Delta = Delta()
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Details(BaseModel):
    """Of a prompt's tokens."""

    cached_tokens: int | None = None


class Counts(BaseModel):
    """`usage`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None


class Timings(BaseModel):
    """llama.cpp's counts in mid-answer: what the prompt had in the cache, what it had not, and the answer so far."""

    cache_n: int = Field(ge=0)
    prompt_n: int = Field(ge=0)
    predicted_n: int = Field(ge=0)

    def counts(self) -> Counts:
        """As `usage` says it."""
        return Counts(
            prompt_tokens=self.cache_n + self.prompt_n,
            completion_tokens=self.predicted_n,
            prompt_tokens_details=Details(cached_tokens=self.cache_n),
        )


class Chunk(BaseModel):
    """An event's data; what else it holds is not ours, and neither are timings in another form than llama.cpp's."""

    choices: list[Choice] = []
    usage: Counts | None = None
    timings: Annotated[Timings | object, Field(union_mode="left_to_right")] = None
    error: object = None

    @property
    def counts(self) -> Counts | None:
        """What it tells of the tokens so far."""
        return self.timings.counts() if self.usage is None and isinstance(self.timings, Timings) else self.usage


class Reading:
    """One answer as it comes; what came and cannot be passed on yet is pending.

    That is the last piece until the server has said all, and with `prompt_logprobs` everything until it is known where
    the answer begins: the server echoes the prompt in front of it. heard: it has begun to answer.
    """

    def __init__(self, job: Job) -> None:
        self.heard = False
        self._done = False
        self._job = job
        self._echoed = job.sampling.prompt_logprobs is not None
        self._count = 0
        self._counts: Counts | None = None
        self._finish: Finish | None = None
        self._begun = False
        self._text = ""
        self._scored: list[Scored] = []
        self._offsets: list[int] = []
        self._prompt: tuple[Scored, ...] = ()

    def take(self, event: Event) -> Piece | None:
        """The piece that can be passed on with this event. Raises EngineError or UnsupportedError."""
        if event.data == DONE:
            self._done = True
            return None
        chunk = self._chunk(event)
        self.heard = True
        self._counts = chunk.counts or self._counts
        if chunk.choices:
            self._hear(chunk.choices[0])
        if self._finish or not self._apart_from_prompt():
            return None
        return self._next()

    def end(self) -> Piece:
        """The last piece, with as many tokens as make the sum that the server counted.

        Some servers end without [DONE]: a finish and a count are all there is to say. Raises EngineError for one that
        ended before, or UnsupportedError.
        """
        if self._finish is None or not (self._done or self._counts):
            raise EngineError(f"{self._server} broke off")
        if not self._apart_from_prompt():
            raise UnsupportedError(f"{self._server} scores no prompts: leave echo or logprobs out", "echo")
        piece = self._next() or Piece("", 0)
        if self._job.sampling.max_tokens == 0:
            return replace(piece, finish="length", usage=self.usage)
        tokens = piece.tokens
        if self._counts is not None:  # never fewer than none: a server may cut a token's text in two
            tokens = max(0, self._counts.completion_tokens - (self._count - piece.tokens))
        return replace(piece, tokens=tokens, finish=self._finish, usage=self.usage)

    @property
    def usage(self) -> Usage:
        """The prompt's counts, as far as they are known."""
        counts = self._counts or Counts()
        details = counts.prompt_tokens_details
        return Usage(counts.prompt_tokens or len(self._job.tokens), (details.cached_tokens or 0) if details else 0)

    @property
    def _server(self) -> str:
        return f"{self._job.expert}'s server"

    def _chunk(self, event: Event) -> Chunk:
        try:
            chunk = Chunk.model_validate_json(event.data)
        except ValidationError as exc:
            raise EngineError(f"{self._server} sent what is no chunk of an answer") from exc
        if event.name == "error" or chunk.error is not None:
            said = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
            raise EngineError(f"{self._server} failed in mid-answer: {said or event.data}")
        return chunk

    def _hear(self, choice: Choice) -> None:
        text = choice.text or choice.delta.content or ""
        scored = choice.logprobs.scored() if choice.logprobs else []
        if text and not scored and not self._begun and self._scores:
            raise UnsupportedError(f"{self._server} reports no log-probabilities: leave logprobs out", "logprobs")
        self._begun = self._begun or bool(text or scored)
        self._text += text
        self._scored += scored
        if self._echoed and choice.logprobs:
            self._offsets += choice.logprobs.text_offset or []
        if choice.finish_reason:
            self._finish = self._known(choice.finish_reason)

    def _known(self, reason: str) -> Finish:
        if reason in FINISHES:
            return FINISHES[reason]
        sentence = f"{self._server} ended the answer for {reason!r}"
        if reason in BROKEN:
            raise EngineError(sentence)
        raise UnsupportedError(f"{sentence}, which has no meaning here: ask another model", "model")

    @property
    def _scores(self) -> bool:
        return self._echoed or self._job.sampling.logprobs is not None

    def _apart_from_prompt(self) -> bool:
        """Whether what is pending is the answer's alone, cutting the prompt off once its length is known."""
        if not self._echoed:
            return True
        size = len(self._job.tokens) or (self._counts.prompt_tokens if self._counts else None)
        if size is None or len(self._scored) < size:
            return False
        ids = self._job.tokens or (UNKNOWN,) * size
        top = self._job.sampling.prompt_logprobs or 0
        self._prompt = tuple(
            replace(scored, id=token, top=scored.top[:top])
            for scored, token in zip(self._scored[:size], ids, strict=True)
        )
        echo = self._job.prompt
        if isinstance(echo, str) and self._text.startswith(echo):
            self._text = self._text[len(echo) :]
        else:  # special tokens may have no text
            begin = self._offsets[size] if size < len(self._offsets) else len(self._text)
            self._text = self._text[begin:]
        self._scored = self._scored[size:]
        self._echoed = False
        return True

    def _next(self) -> Piece | None:
        """What is pending, as a piece: a token for each that is scored, else one for a text."""
        sampling = self._job.sampling
        if sampling.max_tokens == 0:  # one was asked for all the same
            self._text, self._scored = "", []
        tokens = len(self._scored) or int(bool(self._text))
        if not (tokens or self._prompt):
            return None
        scored = () if sampling.logprobs is None else _cut(self._scored, sampling.logprobs)
        usage = self.usage if self._counts and not self._count else None
        piece = Piece(self._text, tokens, scored=scored, prompt=self._prompt, usage=usage)
        self._count += tokens
        self._text, self._scored, self._prompt = "", [], ()
        return piece


def _scored(position: Candidate, top: Iterable[Candidate]) -> Scored:
    raw = position.token.encode() if position.bytes is None else bytes(position.bytes)
    return Scored(position.id, raw, position.logprob, _sorted(_scored(each, ()) for each in top))


def _alternatives(top: dict[str, float] | None) -> tuple[Scored, ...]:
    return _sorted(Scored(UNKNOWN, text.encode(), logprob) for text, logprob in (top or {}).items())


def _sorted(scored: Iterable[Scored]) -> tuple[Scored, ...]:
    return tuple(sorted(scored, key=lambda each: -(each.logprob or 0.0)))


def _cut(scored: list[Scored], top: int) -> tuple[Scored, ...]:
    return tuple(replace(each, top=each.top[:top]) for each in scored)
