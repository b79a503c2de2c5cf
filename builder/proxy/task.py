"""What a task is: samples that ask a model something and say how good its answers are."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from builder.config import Split
from builder.proxy.requests import Answer, Request

T = TypeVar("T")
SPLITS: tuple[Split, ...] = ("proxy", "routing", "test")
Metrics = Mapping[str, float]
"""What one sample measured, by metric; higher is better."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Which samples of which task; enough to load them in another process.

    name: of one of our own sets, of a task or group of lm-evaluation-harness, or a YAML file of its kind.
    split: its part of the task's samples, one of `parts`, or all of them with None. limit: how many at most.
    fewshot: examples before every question; None is the task's own number.
    """

    name: str
    split: Split | None
    limit: int | None
    seed: int
    fewshot: int | None = None
    parts: int = 3

    def share(self, units: Sequence[T]) -> list[T]:
        """The split's part of a task's units, shuffled by task and seed; no unit is in two splits."""
        order = list(units)
        random.Random(f"{self.name} {self.seed}").shuffle(order)
        return order if self.split is None else order[SPLITS.index(self.split) :: self.parts]


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored question: `prompt` is what a router would see, `score` turns a model's answers into metrics."""

    prompt: str
    requests: tuple[Request, ...]
    score: Callable[[Sequence[Answer]], Metrics]


@dataclass(frozen=True)
class Task:
    """Samples, and which of their metrics is the task's score; a YAML file's task is called as the file says.

    digest: of all that decides a score beside the model. runs_code: whether scoring runs programs that the model wrote.
    """

    name: str
    samples: tuple[Sample, ...]
    metric: str
    digest: str
    runs_code: bool = False

    def score(self, answers: Sequence[Sequence[Answer]]) -> list[Metrics]:
        """The metrics of every sample from its answers; programs run side by side."""
        if not self.runs_code:
            return [sample.score(each) for sample, each in zip(self.samples, answers, strict=True)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            return list(pool.map(lambda pair: pair[0].score(pair[1]), zip(self.samples, answers, strict=True)))
