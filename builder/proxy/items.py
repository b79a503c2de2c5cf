"""A scored question of our own sets: what is asked, the continuations to choose from, and which is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from builder.proxy.requests import Answer, Choices, Likelihood
from builder.proxy.task import Sample


@dataclass(frozen=True, slots=True)
class Item:
    """One multiple-choice question; the model's pick is the choice of highest log-likelihood after the prompt."""

    prompt: str
    choices: tuple[str, ...]
    label: int


def sample(item: Item) -> Sample:
    """The item as a sample of a task.

    accuracy: 1.0 where the right choice has the highest log-likelihood, else 0.0.
    log_likelihood: nats a token of the right choice, minus the log of its perplexity.
    """

    def score(answers: Sequence[Answer]) -> dict[str, float]:
        likelihoods = answers[0]
        assert isinstance(likelihoods, tuple)
        right = likelihoods[item.label]
        best = max(likelihoods, key=_nats)
        return {"accuracy": float(best is right), "log_likelihood": right.nats / right.tokens}

    return Sample(item.prompt, (Choices(item.prompt, item.choices),), score)


def _nats(likelihood: Likelihood) -> float:
    return likelihood.nats
