"""A scored question: what is asked, the continuations to choose from, and which is right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """One multiple-choice question; the model's pick is the choice of highest log-likelihood after the prompt."""

    prompt: str
    choices: tuple[str, ...]
    label: int
