"""One device's work: a candidate becomes a model in memory and answers the tasks."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from builder.candidate import Candidate
from builder.checkpoints import Checkpoint
from builder.merge import stream
from builder.merge.plan import Plan
from builder.merge.vocabulary import Vocabulary
from builder.proxy import tasks
from builder.proxy.task import Metrics, Spec, Task

if TYPE_CHECKING:
    from builder.proxy.live import Live
    from builder.proxy.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is, and whether its own code may run."""

    folder: Path
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Scored:
    """What a candidate's samples measured, a list a task, and the seconds it took to make the model and to score it."""

    metrics: Mapping[str, list[Metrics]]
    making: float
    scoring: float


@dataclass
class Bench:
    """Scores candidates on one device. Lone models and mixtures are loaded; merges are written into one live model.

    device: cpu, cuda, cuda:1; None is cuda where there is one. Raises ModelGlueError for what cannot be scored.
    """

    places: Mapping[str, Place]
    device: str | None = None
    _live: Live | None = field(default=None, init=False, repr=False)
    _opened: dict[str, Checkpoint] = field(default_factory=dict, init=False, repr=False)
    _vocabularies: dict[str, Vocabulary] = field(default_factory=dict, init=False, repr=False)

    def score(
        self, candidate: Candidate, specs: Sequence[Spec], done: Callable[[int], None] = lambda _: None
    ) -> Scored:
        """Every sample's metrics, by task; `done` hears how many requests were answered."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="modelglue-") as scratch:
            scorer = self._model(candidate, Path(scratch))
            made = time.monotonic()
            found = answer(scorer, [tasks.load(spec) for spec in specs], done)
        return Scored(found, made - started, time.monotonic() - made)

    def forget(self) -> None:
        """Free the live model: what a failed trial left in it is not known."""
        self._live = None

    def _model(self, candidate: Candidate, scratch: Path) -> Scorer:
        # torch and transformers take seconds to import; whoever finds all results in the journal does without.
        from builder.proxy.live import Live
        from builder.proxy.scorer import Scorer

        first = self.places[candidate.members[0]]
        if not candidate.said:
            return Scorer(first.folder, device=self.device, trust_remote_code=first.trust_remote_code)
        if candidate.mixture:
            self._live = None  # a mixture is as large as all its members together
            candidate.write({name: self.places[name].folder for name in candidate.members}, scratch / "mixture")
            return Scorer(scratch / "mixture", device=self.device)
        plan = self._plan(candidate)
        if self._live is None or not self._live.fits(plan, first.folder):
            self._live = None  # the old one goes before the new one comes
            live = Live(plan, first.folder, device=self.device, trust_remote_code=first.trust_remote_code)
            if not live.fits(plan, first.folder):
                del live
                stream.write(plan, scratch / "merge")
                return Scorer(scratch / "merge", device=self.device, trust_remote_code=first.trust_remote_code)
            self._live = live
        self._live.become(plan)
        return self._live.scorer

    def _plan(self, candidate: Candidate) -> Plan:
        for name in candidate.references:
            if name not in self._opened:
                self._opened[name] = Checkpoint(self.places[name].folder)
        tokens = repr((candidate.references, candidate.said.get("tokenizer")))
        folders = {name: self.places[name].folder for name in candidate.references}
        with _no_collection():
            plan = candidate.plan(folders, self._vocabularies.get(tokens), self._opened)
        if plan.vocabulary is not None:
            self._vocabularies[tokens] = plan.vocabulary
        return plan


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A plan is thousands of objects that live on: to look among torch's and transformers' for garbage costs more."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def answer(
    scorer: Scorer, asked: Sequence[Task], done: Callable[[int], None] = lambda _: None
) -> dict[str, list[Metrics]]:
    """The metrics of every sample of tasks.

    A task's requests are batched by themselves: its scores are the same to the last bit whatever else is asked, as they
    must be where a search that was killed has some of them already.
    """
    found: dict[str, list[Metrics]] = {}
    for task in asked:
        answers = scorer.answer([request for sample in task.samples for request in sample.requests], done)
        by_sample, at = [], 0
        for sample in task.samples:
            by_sample.append(answers[at : at + len(sample.requests)])
            at += len(sample.requests)
        found[task.name] = task.score(by_sample)
    return found
