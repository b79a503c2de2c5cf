"""What the service asks of an engine: check a request, then stream its answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from routers.errors import ModelGlueError

Finish = Literal["stop", "length"]
State = Literal["loading", "ready", "failed"]


class EngineError(ModelGlueError):
    """The engine cannot answer: an expert failed to load, or died."""


class NotReadyError(EngineError):
    """The expert is still loading."""


class PromptError(ModelGlueError):
    """A prompt that the expert cannot take: longer than its window, or a chat for a model without a template."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""Text to continue, or a chat to answer in the expert's own template."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick tokens; temperature 0 is greedy; the same seed gives the same text."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: the prompt as the expert's tokens."""

    expert: str
    tokens: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of streamed text and how many tokens it stands for; the last one alone has a finish."""

    text: str
    tokens: int
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """How far an expert is; `detail` says why it failed."""

    state: State
    detail: str = ""


class Engine(Protocol):
    """Runs experts. Closing the generator of `generate` ends the work within one step and frees its place."""

    def status(self) -> dict[str, Status]:
        """Every expert's state, in the bundle's order."""
        ...

    def window(self, expert: str) -> int:
        """Tokens of prompt and answer together that the expert can hold."""
        ...

    def prepare(self, expert: str, prompt: Prompt, sampling: Sampling) -> Job:
        """Check and tokenise a request; cuts nothing. Raises PromptError, NotReadyError or EngineError."""
        ...

    def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The answer in pieces, the last with a finish. Raises EngineError when the expert fails in mid-answer."""
        ...

    async def start(self) -> None:
        """Begin to load the experts; returns at once."""
        ...

    async def aclose(self) -> None:
        """End all work and free the experts."""
        ...
