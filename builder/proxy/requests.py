"""What a scored model is asked, and what it answers; tasks make the requests, the scorer answers them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choices:
    """How likely is each continuation after the prompt? The prompt may be empty."""

    prompt: str
    continuations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rolling:
    """How likely is the whole text, each token once, after the model's first token?"""

    text: str


@dataclass(frozen=True, slots=True)
class Generation:
    """What does the model write after the prompt, greedily, up to a stop string (left out) or so many tokens?"""

    prompt: str
    until: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-likelihood of a text in nats, of how many tokens, and whether greedy decoding would have written it."""

    nats: float
    tokens: int
    greedy: bool


Request = Choices | Rolling | Generation
Answer = tuple[Likelihood, ...] | Likelihood | str
"""Of Choices one Likelihood a continuation, of Rolling one, of Generation the text."""
