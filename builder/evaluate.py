"""Scores of candidates on a zoo's tasks, each computed once: the journal knows those of every earlier run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.candidate import Candidate, whole
from builder.config import Split, Zoo
from builder.errors import SearchError, ZooError
from builder.executors import Executor, Failed, Job
from builder.journal import Journal
from builder.members import Members
from builder.progress import Progress
from builder.proxy import tasks
from builder.proxy.bench import Bench, Place, Scored
from builder.proxy.task import SPLITS, Metrics, Sample, Spec, Task

Scores = NDArray[np.float64]
"""The zoo's metric on every sample, [N], tasks one after another; scaled so that its mean is the mean over tasks."""
Result = Scores | Failed
SCORER = 1
"""Raised by a change of the scorer that moves the last bits: scores of two kinds are never compared."""
_TOLERANCE = 0.02
"""Of a sample's score on a GPU, whose sums are not the same every time."""


def places(members: Members) -> dict[str, Place]:
    """Where the executors find the models."""
    return {name: Place(each.folder, each.entry.trust_remote_code) for name, each in members.items()}


@dataclass
class Evaluator:
    """Scores any candidate made of the zoo's models.

    retry: whether candidates that failed before are tried again. Raises ZooError for splits that overlap, and for tasks
    whose data cannot be had.
    """

    zoo: Zoo
    members: Members
    journal: Journal
    progress: Progress
    executor: Executor
    retry: bool = False
    _loaded: dict[Split, list[Task]] = field(default_factory=dict, init=False, repr=False)

    def specs(self, split: Split) -> list[Spec]:
        """Which samples of which tasks a split has."""
        proxy, test, seed = self.zoo.proxy, self.zoo.test, self.zoo.seed
        if split == "test" and test is not None:
            return [Spec(name, None, test.limit, seed, _fewshot(test.fewshot, name)) for name in test.tasks]
        parts = len(SPLITS) if test is None else 2
        return [Spec(name, split, proxy.limit, seed, _fewshot(proxy.fewshot, name), parts) for name in proxy.tasks]

    def tasks(self, split: Split) -> list[Task]:
        """The tasks of a split, loaded, and held apart from those of the others that were."""
        if split not in self._loaded:
            if not self._loaded and self.zoo.test is not None:
                tasks.check_sources(self.zoo.proxy.tasks, self.zoo.test.tasks)
            self._loaded[split] = [tasks.load(spec) for spec in self.specs(split)]
            _check_names(self._loaded[split])
            tasks.check_apart(list(self._loaded.values()))
            for task in self._loaded[split]:
                self._check(task)
        return self._loaded[split]

    def _check(self, task: Task) -> None:
        if not task.samples:
            raise ZooError(f"{task.name} has no samples in its split: name another task")
        if task.runs_code:
            from builder.proxy import programs

            programs.ready()  # before hours are spent on models that nobody may then run the answers of

    def items(self, split: Split) -> list[tuple[str, Sample]]:
        """Every sample of a split with its task's name."""
        return [(task.name, sample) for task in self.tasks(split) for sample in task.samples]

    def evaluate(
        self, candidates: Sequence[Candidate], split: Split = "proxy", done: Callable[[int], None] = lambda _: None
    ) -> Iterator[Result]:
        """Of each candidate, in order, the metric on every sample of the split, or why it has none.

        Whatever ends is kept at once, and given when those before it were.
        """
        found = [self._known(candidate, split) for candidate in candidates]
        missing = [place for place, result in enumerate(found) if result is None]
        jobs = [self._job(candidates[place], split) for place in missing]
        running = self.executor.run(jobs, done)
        for place in range(len(candidates)):
            while (result := found[place]) is None:
                number, scored = next(running)
                self._keep(jobs[number], split, scored)
                found[missing[number]] = self._known(candidates[missing[number]], split, just_made=True)
            yield result

    def scores(self, candidate: Candidate, split: Split = "proxy") -> Scores:
        """The metric on every sample of the split. Raises SearchError for a candidate that cannot be scored."""
        result = self._known(candidate, split)
        if result is None:
            total = sum(len(sample.requests) for _, sample in self.items(split))
            with self.progress.step(f"score {candidate.name} ({split})", total) as advance:
                (result,) = self.evaluate([candidate], split, advance)
        if isinstance(result, Failed):
            raise SearchError(f"{candidate.name} cannot be scored: {result.reason}")
        return result

    def mean(self, candidate: Candidate, split: Split = "proxy") -> float:
        """F: the mean over tasks of the mean metric (PAPER.md 4)."""
        return float(self.scores(candidate, split).mean())

    def by_task(self, candidate: Candidate, split: Split = "proxy") -> dict[str, float]:
        """The mean metric of each task."""
        return by_task(self.scores(candidate, split), self.tasks(split))

    def check_written(self, candidate: Candidate, folder: Path) -> None:
        """Score a merge that was written, read from its folder: what was chosen is what is there.

        Raises SearchError where a sample's score is not the one of the merge in memory. Where that one was found by
        other threads or another worker, whose sums round otherwise, it is made and scored here once more.
        """
        inputs = {**self._identity(candidate), "tasks": self._digests("proxy"), "machine": _arithmetic()}
        place = Place(folder, self.members[candidate.members[0]].entry.trust_remote_code)

        def measure() -> dict[str, Any]:
            return self._measured(f"check {candidate.name} as written", {folder.name: place}, whole(folder.name))

        again = self._values(self.journal.once("written", inputs, measure), "proxy")
        if _same(again, self.scores(candidate)):
            return
        name = f"check {candidate.name} in memory"
        found = self._values(self._measured(name, places(self.members), candidate), "proxy")
        again = self._values(measure(), "proxy")
        if not _same(again, found):
            raise SearchError(
                f"{folder} scores {again.mean():.6f} and the same merge in memory {found.mean():.6f}: this must not "
                "be. Is the disk sound? Remove the folder and run it again"
            )

    def _measured(self, step: str, places: Mapping[str, Place], candidate: Candidate) -> dict[str, Any]:
        """The metrics of every proxy sample, in this process."""
        total = sum(len(sample.requests) for _, sample in self.items("proxy"))
        with self.progress.step(step, total) as advance:
            return dict(Bench(places).score(candidate, self.specs("proxy"), advance).metrics)

    def _known(self, candidate: Candidate, split: Split, *, just_made: bool = False) -> Result | None:
        loaded = self.tasks(split)
        own = {task.name: self.journal.known("score", self._inputs(candidate, task)) for task in loaded}
        found = {name: rows for name, rows in own.items() if rows is not None}
        if len(found) == len(loaded):
            return self._values(found, split)
        failure = self.journal.known("failure", self._failure(candidate, split))
        return None if failure is None or (self.retry and not just_made) else Failed(failure["reason"])

    def _values(self, metrics: Mapping[str, Sequence[Metrics]], split: Split) -> Scores:
        loaded = self.tasks(split)
        return np.array([self._metric(task, each) for task in loaded for each in metrics[task.name]]) * shares(loaded)

    def _metric(self, task: Task, metrics: Metrics) -> float:
        metric = task.metric if self.zoo.proxy.metric == "accuracy" else "log_likelihood"
        if metric not in metrics:
            raise ZooError(f"{task.name} has no {metric}, only {', '.join(metrics)}: set proxy.metric to accuracy")
        return metrics[metric]

    def _job(self, candidate: Candidate, split: Split) -> Job:
        """What is not in the journal yet."""
        pairs = zip(self.specs(split), self.tasks(split), strict=True)
        lacking = [spec for spec, task in pairs if self.journal.known("score", self._inputs(candidate, task)) is None]
        return Job(candidate, tuple(lacking))

    def _keep(self, job: Job, split: Split, scored: Scored | Failed) -> None:
        if isinstance(scored, Scored) and (wrong := _not_finite(scored.metrics)):
            scored = Failed(f"a sample of {wrong} scored NaN or inf")
        if isinstance(scored, Failed):
            self.journal.keep("failure", self._failure(job.candidate, split), {"reason": scored.reason}, 0)
            return
        loaded = {task.name: task for task in self.tasks(split)}
        for name, metrics in scored.metrics.items():
            self.journal.keep(
                "score", self._inputs(job.candidate, loaded[name]), metrics, scored.making + scored.scoring
            )

    def _inputs(self, candidate: Candidate, task: Task) -> dict[str, Any]:
        """All that decides a score; names of models do not."""
        return {**self._identity(candidate), "task": task.digest, "machine": _arithmetic()}

    def _failure(self, candidate: Candidate, split: Split) -> dict[str, Any]:
        return {**self._identity(candidate), "tasks": self._digests(split), "machine": _arithmetic()}

    def _digests(self, split: Split) -> list[str]:
        return [task.digest for task in self.tasks(split)]

    def _identity(self, candidate: Candidate) -> dict[str, Any]:
        digests = {name: self.members[name].sha256 for name in candidate.references}
        return {
            "members": [digests[name] for name in candidate.members],
            "recipe": json.loads(json.dumps(_anonymous(candidate.said, digests))),
        }


def _check_names(loaded: Sequence[Task]) -> None:
    names = [task.name for task in loaded]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ZooError(f"two tasks are called {twice}: change `task:` in one of their files")


def _fewshot(said: int | Mapping[str, int] | None, task: str) -> int | None:
    return said.get(task) if isinstance(said, Mapping) else said


def shares(loaded: Sequence[Task]) -> Scores:
    """What each sample counts for, [N], so that the mean over samples is the mean over tasks."""
    total = sum(len(task.samples) for task in loaded)
    return np.concatenate([np.full(len(task.samples), total / (len(loaded) * len(task.samples))) for task in loaded])


def by_task(scores: Scores, loaded: Sequence[Task]) -> dict[str, float]:
    """The mean metric of each task."""
    plain, found, at = scores / shares(loaded), {}, 0
    for task in loaded:
        found[task.name] = float(plain[at : at + len(task.samples)].mean())
        at += len(task.samples)
    return found


def _anonymous(said: Any, digests: Mapping[str, str]) -> Any:
    """A recipe with the models' digests for their names."""
    if isinstance(said, Mapping):
        return {
            key: digests.get(value, value) if key in ("model", "base_model", "source") else _anonymous(value, digests)
            for key, value in said.items()
        }
    return [_anonymous(each, digests) for each in said] if isinstance(said, list) else said


def _not_finite(metrics: Mapping[str, Sequence[Metrics]]) -> str | None:
    """A task with a value that is no number."""
    rows = ((task, value) for task, samples in metrics.items() for each in samples for value in each.values())
    return next((task for task, value in rows if not math.isfinite(value)), None)


def _same(again: Scores, found: Scores) -> bool:
    return bool(np.allclose(again, found, rtol=0, atol=_TOLERANCE if _has_cuda() else 0))


def _arithmetic() -> str:
    """What a score depends on beside its inputs: the processor's kind, and the code that computes."""
    try:
        facts = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        facts = ""
    bf16 = "avx512_bf16" in facts or "amx_bf16" in facts
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return ", ".join([platform.machine(), f"bf16 {bf16}", f"cuda {_has_cuda()}", *versions, f"scorer {SCORER}"])


def _has_cuda() -> bool:
    return Path("/dev/nvidia0").exists()
