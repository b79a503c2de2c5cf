from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from builder.candidate import Candidate, whole
from builder.config import load_zoo, with_choices
from builder.errors import SearchError, ZooError
from builder.evaluate import Evaluator, by_task, places
from builder.executors import Failed, Job
from builder.executors.local import InProcess
from builder.explore import kinship
from builder.journal import Journal
from builder.members import open_all
from builder.progress import Quiet
from builder.proxy.bench import Scored
from builder.sources import Store


class Counting:
    """An executor that counts what it is asked for, and fails or breaks as told."""

    workers = 1

    def __init__(self, inner: InProcess) -> None:
        self.inner, self.jobs = inner, list[Job]()
        self.reason: str | None = None
        self.worth: float | None = None

    def run(self, jobs: Sequence[Job], done: object) -> Iterator[tuple[int, Scored | Failed]]:
        self.jobs += jobs
        for place, found in self.inner.run(jobs, lambda _: None):
            if self.reason is not None:
                yield place, Failed(self.reason)
            elif self.worth is not None and isinstance(found, Scored):
                spoilt = {
                    task: [{**row, "log_likelihood": self.worth} for row in rows]
                    for task, rows in found.metrics.items()
                }
                yield place, dataclasses.replace(found, metrics=spoilt)
            else:
                yield place, found

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def evaluator(zoo_file: Path, tmp_path: Path) -> Iterator[Evaluator]:
    zoo = with_choices(load_zoo(str(zoo_file)), search={}, proxy={"limit": 4})
    fetched = Store(zoo, tmp_path / "cache").fetch(Quiet())
    with Journal(tmp_path / "journal.sqlite") as journal:
        members = open_all(zoo, fetched, journal)
        yield Evaluator(zoo, members, journal, Quiet(), Counting(InProcess(places(members), "cpu")))


def executor(evaluator: Evaluator) -> Counting:
    assert isinstance(evaluator.executor, Counting)
    return evaluator.executor


def merge(evaluator: Evaluator) -> Candidate:
    kin = kinship(evaluator.zoo, ("math", "code"), evaluator.members)
    return kin.linear({"math": 0.5, "code": 0.5})


def test_the_score_is_the_mean_over_tasks_of_the_samples_metric(evaluator: Evaluator) -> None:
    scores = evaluator.scores(whole("math"))
    tasks = evaluator.by_task(whole("math"))
    assert scores.shape == (16,)
    assert scores.mean() == pytest.approx(np.mean(list(tasks.values())))
    assert tasks["tiny/math"] > tasks["tiny/code"]
    assert by_task(scores, evaluator.tasks("proxy")) == tasks


def test_nothing_is_scored_twice_and_another_task_costs_itself_alone(evaluator: Evaluator) -> None:
    candidate = merge(evaluator)
    first = evaluator.scores(candidate)
    assert evaluator.scores(candidate) == pytest.approx(first)
    assert len(executor(evaluator).jobs) == 1
    fewer = with_choices(evaluator.zoo, search={}, proxy={"tasks": ["tiny/math", "tiny/code"]})
    dataclasses.replace(evaluator, zoo=fewer).scores(candidate)
    assert len(executor(evaluator).jobs) == 1
    fewer_samples = with_choices(evaluator.zoo, search={}, proxy={"limit": 3})
    dataclasses.replace(evaluator, zoo=fewer_samples).scores(candidate)
    assert [len(job.specs) for job in executor(evaluator).jobs] == [4, 4]


def test_results_are_kept_by_what_models_are_and_not_by_what_they_are_called(evaluator: Evaluator) -> None:
    first = evaluator.scores(merge(evaluator))
    renamed = {"x": evaluator.members["math"], "y": evaluator.members["code"]}
    kin = dataclasses.replace(kinship(evaluator.zoo, ("math", "code"), evaluator.members), names=("x", "y"))
    other = dataclasses.replace(evaluator, members=renamed)
    assert other.scores(kin.linear({"x": 0.5, "y": 0.5})) == pytest.approx(first)
    assert len(executor(evaluator).jobs) == 1
    assert other._known(kin.linear({"x": 0.4, "y": 0.6}), "proxy") is None


def test_a_failure_is_kept_with_its_reason_and_tried_again_only_when_asked(evaluator: Evaluator) -> None:
    candidate = merge(evaluator)
    executor(evaluator).reason = "out of memory"
    for _ in range(2):
        (found,) = evaluator.evaluate([candidate])
        assert found == Failed("out of memory")
    assert len(executor(evaluator).jobs) == 1
    with pytest.raises(SearchError, match="math-code cannot be scored: out of memory"):
        evaluator.scores(candidate)
    executor(evaluator).reason = None
    again = dataclasses.replace(evaluator, retry=True)
    assert again.scores(candidate).shape == (16,)


@pytest.mark.parametrize("worth", [float("nan"), float("-inf")])
def test_scores_that_are_no_numbers_are_failures(evaluator: Evaluator, worth: float) -> None:
    executor(evaluator).worth = worth
    (found,) = evaluator.evaluate([merge(evaluator)])
    assert found == Failed("a sample of tiny/math scored NaN or inf")


def test_a_metric_that_a_task_has_not_is_told(evaluator: Evaluator) -> None:
    graceful = [dataclasses.replace(task, metric="elegance") for task in evaluator.tasks("proxy")]
    other = dataclasses.replace(evaluator, zoo=with_choices(evaluator.zoo, search={}, proxy={"metric": "accuracy"}))
    other._loaded["proxy"] = graceful
    with pytest.raises(ZooError, match="tiny/math has no elegance, only accuracy, log_likelihood"):
        other.scores(whole("math"))


def write(evaluator: Evaluator, candidate: Candidate, folder: Path) -> Path:
    from builder.merge import stream

    stream.write(candidate.plan({name: member.folder for name, member in evaluator.members.items()}), folder)
    return folder


def test_a_written_merge_is_held_against_the_one_in_memory(evaluator: Evaluator, tmp_path: Path) -> None:
    candidate = merge(evaluator)
    evaluator.check_written(candidate, write(evaluator, candidate, tmp_path / "right"))
    other = kinship(evaluator.zoo, ("math", "story"), evaluator.members).linear({"math": 0.9, "story": 0.1})
    third = kinship(evaluator.zoo, ("math", "chat"), evaluator.members).linear({"math": 0.5, "chat": 0.5})
    with pytest.raises(SearchError, match=r"wrong scores .* and the same merge in memory .*: this must not be"):
        evaluator.check_written(third, write(evaluator, other, tmp_path / "wrong"))


def test_scores_that_another_worker_rounded_otherwise_are_no_contradiction(
    evaluator: Evaluator, tmp_path: Path
) -> None:
    candidate = merge(evaluator)
    executor(evaluator).worth = -1.25
    assert evaluator.scores(candidate).mean() == pytest.approx(-1.25)
    evaluator.check_written(candidate, write(evaluator, candidate, tmp_path / "right"))


def test_scores_of_other_versions_of_what_computes_them_are_not_taken(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = merge(evaluator)
    evaluator.scores(candidate)
    monkeypatch.setattr("builder.evaluate.version", lambda _: "0.0.1")
    evaluator.scores(candidate)
    monkeypatch.setattr("builder.evaluate.SCORER", 0)
    evaluator.scores(candidate)
    assert len(executor(evaluator).jobs) == 3


def test_splits_of_a_zoo_with_a_test_of_its_own_are_halves(evaluator: Evaluator) -> None:
    from builder.config import Test

    zoo = evaluator.zoo.model_copy(update={"test": Test(tasks=("demo/math",), limit=5)})
    other = dataclasses.replace(evaluator, zoo=zoo)
    assert [spec.parts for spec in other.specs("proxy")] == [2] * 4
    assert [(spec.name, spec.split, spec.limit) for spec in other.specs("test")] == [("demo/math", None, 5)]
    assert len(other.tasks("test")[0].samples) == 5
