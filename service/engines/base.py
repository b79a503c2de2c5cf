"""What the service asks of an engine: check a request, then stream its answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from routers.errors import ModelGlueError

Finish = Literal["stop", "length", "content_filter"]
State = Literal["loading", "ready", "failed"]


class EngineError(ModelGlueError):
    """The engine cannot answer: an expert failed to load, or died."""


class NotReadyError(EngineError):
    """The expert is still loading."""


class BusyError(EngineError):
    """The expert's queue is full. after: seconds by which there may be room."""

    def __init__(self, message: str, after: float = 1.0) -> None:
        super().__init__(message)
        self.after = after


class PromptError(ModelGlueError):
    """A prompt that the expert cannot take: longer than its window, or a chat for a model without a template."""


class WindowError(PromptError):
    """A prompt, or the answer asked for with it, that is over the expert's window."""


class UnsupportedError(ModelGlueError):
    """Something asked for that this engine, or these experts, cannot do. param: the request's field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


Failure = EngineError | UnsupportedError
"""Why an answer ends before it is whole: the expert's fault, or the request's own."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt in the expert's own tokens."""

    ids: tuple[int, ...]


Prompt = str | tuple[Message, ...] | Tokens
"""Text to continue, a chat to answer in the expert's own template, or tokens to continue."""


@dataclass(frozen=True, slots=True)
class Guide:
    """What an answer has to look like: text that is valid JSON by a schema, or matches a regular expression.

    text: the schema as JSON, `{}` for any object; or the expression.
    """

    kind: Literal["json_schema", "regex"]
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick tokens. The same seed gives the same text, whoever else is in the batch.

    max_tokens: None is what the window has left. temperature: 0 is greedy. top_k: 0 is all. min_p: of the likeliest
    token's probability. repetition_penalty: over prompt and answer; presence and frequency: over the answer.
    logit_bias: pairs of token and what is added. stop_tokens: end an answer as the model's own do, which `ignore_eos`
    takes for tokens like any other; neither ends it before `min_tokens`. logprobs: report so many alternatives of every
    token, and the token; prompt_logprobs: likewise of the prompt.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request.

    experts: who answers and with what weight, in order; the weights sum to one, and several are mixed token by token.
    tokens: the prompt as theirs; empty where only a remote server knows. sampling: max_tokens is a number.
    """

    experts: Mapping[str, float]
    tokens: tuple[int, ...]
    sampling: Sampling
    prompt: Prompt = ""

    @property
    def expert(self) -> str:
        """The first."""
        return next(iter(self.experts))


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, its bytes, and its log-probability before temperature and cuts; None for a prompt's first.

    top: the likeliest in its place, the likeliest first.
    """

    id: int
    raw: bytes
    logprob: float | None
    top: tuple[Scored, ...] = ()

    @property
    def text(self) -> str:
        """Its own text; of bytes that are no whole character, replacement characters."""
        return self.raw.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a prompt had, and how many of them were not computed anew.

    queued: seconds until its first token was computed, where the engine knows.
    """

    prompt: int
    cached: int = 0
    queued: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of streamed text and how many tokens it stands for; the last one alone has a finish.

    scored: those tokens, where logprobs were asked for; prompt: the prompt's, with the first piece. usage: with the
    first piece too, where the engine knows it by then: who stops reading early has it all the same.
    """

    text: str
    tokens: int
    finish: Finish | None = None
    scored: tuple[Scored, ...] = ()
    prompt: tuple[Scored, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """How far an expert is; `detail` says why it failed, or how far it has come."""

    state: State
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What an expert is doing, and has done. kv: the share of the engine's key-value memory that it holds, 0 to 1.

    queries, hits: prompt tokens looked up among the cached ones, and found. preemptions: requests that gave way for
    memory and were computed again. evictions: times that its weights made room for others'. resident: whether they are
    where they compute.
    """

    running: int = 0
    waiting: int = 0
    kv: float = 0.0
    queries: int = 0
    hits: int = 0
    preemptions: int = 0
    evictions: int = 0
    resident: bool = True


@dataclass(frozen=True, slots=True)
class About:
    """What /v1/models tells of an expert: `facts` beside window, such as its dtype or what quantisation cost.

    tokenizer: its special tokens and its chat template; empty where only a remote server has it.
    """

    window: int
    facts: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Mapping[str, str | None] = field(default_factory=dict)


def fit(expert: str, prompt: int, window: int, sampling: Sampling) -> Sampling:
    """Sampling with max_tokens said: what is asked for, or what the window has left. Raises WindowError."""
    room = window - prompt
    wanted = room if sampling.max_tokens is None else sampling.max_tokens
    if wanted > room or (sampling.max_tokens is None and room < 1):
        answer = "" if sampling.max_tokens is None else f" and {wanted} of answer"
        raise WindowError(f"{prompt} tokens of prompt{answer} are over {expert}'s window of {window}")
    return replace(sampling, max_tokens=wanted)


class Engine(Protocol):
    """Runs experts. Closing the generator of `generate` ends the work within one step and frees its place."""

    def status(self) -> dict[str, Status]:
        """Every expert's state, in the bundle's order."""
        ...

    def load(self) -> dict[str, Load]:
        """Every expert's load."""
        ...

    def about(self, expert: str) -> About:
        """What is known of a ready expert. Raises NotReadyError or EngineError."""
        ...

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        """Check and tokenise a request; cuts nothing. For any thread.

        Raises PromptError, UnsupportedError, NotReadyError or EngineError.
        """
        ...

    def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The answer in pieces, the last with a finish. Raises BusyError before the first, or a Failure."""
        ...

    def check_mix(self, experts: Sequence[str], sampling: Sampling) -> None:
        """Whether these can answer so as one. Raises UnsupportedError, NotReadyError or EngineError."""
        ...

    def encode(self, expert: str, prompt: Prompt) -> tuple[int, ...]:
        """A prompt of any length as the expert's tokens. For any thread.

        Raises PromptError, UnsupportedError where only a remote server can, NotReadyError or EngineError.
        """
        ...

    def decode(self, expert: str, ids: Sequence[int]) -> str:
        """The text of tokens, special ones too."""
        ...

    async def start(self) -> None:
        """Begin to load the experts; returns at once."""
        ...

    async def aclose(self) -> None:
        """End all work and free everything."""
        ...
