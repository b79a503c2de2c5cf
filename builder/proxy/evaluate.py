"""Scores of merges on a zoo's tasks, each computed once: the journal knows those of every earlier build."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from builder.config import Split, Zoo
from builder.journal import Journal
from builder.members import Members
from builder.merge import simple, stream
from builder.progress import Progress
from builder.proxy import tasks
from builder.proxy.items import Item
from builder.search.average import Weights

Scores = NDArray[np.float64]
"""The zoo's metric on every item, [N], tasks one after another; scaled so that its mean is the mean over tasks."""


class Evaluator:
    """Scores any weighted merge of the zoo's models, a lone model included, in memory."""

    def __init__(self, zoo: Zoo, members: Members, journal: Journal, progress: Progress) -> None:
        self._zoo, self._members, self._journal, self._progress = zoo, members, journal, progress

    def items(self, split: Split) -> list[tuple[str, Item]]:
        """Every item of a split with its task's name."""
        proxy = self._zoo.proxy
        return [(name, item) for name in proxy.tasks for item in tasks.load(name, split, proxy.limit, self._zoo.seed)]

    def scores(self, weights: Weights, split: Split) -> Scores:
        """The metric on every item of the split."""
        items = self.items(split)
        inputs = {
            "members": [[self._members[name].sha256, weight] for name, weight in weights.items()],
            "method": self._zoo.search.method,
            "machine": _arithmetic(),
            "items": hashlib.sha256(repr(items).encode()).hexdigest(),
        }
        rows = self._journal.once("score", inputs, lambda: self._compute(weights, split))
        values = np.array([row[self._zoo.proxy.metric] for row in rows])
        names = [task for task, _ in items]
        shares = np.array([len(names) / (len(self._zoo.proxy.tasks) * names.count(name)) for name in names])
        scores: Scores = values * shares
        return scores

    def mean(self, weights: Weights, split: Split = "proxy") -> float:
        """F: the mean over tasks of the mean metric (PAPER.md 4)."""
        return float(self.scores(weights, split).mean())

    def by_task(self, weights: Weights, split: Split = "proxy") -> dict[str, float]:
        """The mean metric of each task."""
        scores, names = self.scores(weights, split), np.array([task for task, _ in self.items(split)])
        share = len(self._zoo.proxy.tasks)
        return {task: float(scores[names == task].sum() * share / len(names)) for task in self._zoo.proxy.tasks}

    def _compute(self, weights: Weights, split: Split) -> list[dict[str, float]]:
        # torch and transformers take seconds to import; a build that finds all its results does without.
        from builder.proxy.scorer import Scorer

        first = self._members[next(iter(weights))]
        items = [item for _, item in self.items(split)]
        with self._progress.step(f"score {name_of(weights)} ({split})", sum(len(i.choices) for i in items)) as advance:
            scorer = Scorer(first.folder, trust_remote_code=first.entry.trust_remote_code)
            if len(weights) > 1:
                folders = {name: self._members[name].folder for name in weights}
                scorer.rewrite(stream.tensors(simple.of_members(self._zoo.search.method, weights, folders)))
            return [dataclasses.asdict(score) for score in scorer.score(items, advance)]


def _arithmetic() -> str:
    """What a score depends on beside its inputs: the kind of processor, and whether it multiplies bfloat16."""
    try:
        facts = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        facts = ""
    bf16 = "avx512_bf16" in facts or "amx_bf16" in facts
    return f"{platform.machine()}, bf16 {bf16}, cuda {Path('/dev/nvidia0').exists()}"


def name_of(weights: Mapping[str, float]) -> str:
    """The name of a merge: its members', or the first one's and how many more there are."""
    names: Sequence[str] = list(weights)
    return "-".join(names) if len(names) <= 4 else f"{names[0]}-and-{len(names) - 1}-more"
