from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from builder.candidate import Candidate, Kin, whole
from builder.checkpoints import Checkpoint
from builder.errors import SearchError
from builder.executors import Executor, Failed, Job
from builder.executors.local import TRIES, InProcess, Processes
from builder.executors.ray import Ray
from builder.proxy.bench import Place, Scored
from builder.proxy.task import Spec

SPEC = Spec("tiny/math", "proxy", 4, 42)
TASK = """
task: dies
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function dying.score
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
DYING = """
import os, signal
from pathlib import Path

def score(doc, results):
    folder = Path(__file__).parent
    for life in range(int((folder / "lives").read_text())):
        try:
            mark = os.open(folder / "deaths" / str(life), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:  # another died of this one
            continue
        os.write(mark, str(os.getpid()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    return {"acc": 1.0}
"""


@pytest.fixture
def places(micro_zoo: Mapping[str, Path]) -> dict[str, Place]:
    return {name: Place(folder) for name, folder in micro_zoo.items()}


@pytest.fixture
def candidates(micro_zoo: Mapping[str, Path]) -> list[Candidate]:
    kin = Kin.of({name: Checkpoint(micro_zoo[name]) for name in ("math", "code")}, None, None)
    return [whole("math"), *(kin.linear({"math": c, "code": 1 - c}) for c in (0.25, 0.5, 0.75))]


@pytest.fixture
def deadly(tmp_path: Path) -> Spec:
    """A task that kills whoever scores it, as often as its file `lives` says."""
    (tmp_path / "task.yaml").write_text(TASK, "utf-8")
    (tmp_path / "dying.py").write_text(DYING, "utf-8")
    (tmp_path / "docs.jsonl").write_text('{"question": "1 + 1 =", "answer": " 2"}\n', "utf-8")
    (tmp_path / "deaths").mkdir()
    return Spec(str(tmp_path / "task.yaml"), None, None, 42)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A real Ray of two workers, on this machine."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(params=["processes", "ray"])
def executor(request: pytest.FixtureRequest, places: dict[str, Place]) -> Iterator[Executor]:
    made: Executor
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
        made = Ray(places)
    else:
        made = Processes(places, ["cpu", "cpu"])
    yield made
    made.close()


def results(executor: Executor, jobs: list[Job]) -> list[Scored | Failed]:
    found = dict(executor.run(jobs, lambda _: None))
    return [found[place] for place in range(len(jobs))]


def test_workers_find_what_this_process_finds_and_give_it_back_in_place(
    executor: Executor, places: dict[str, Place], candidates: list[Candidate]
) -> None:
    jobs = [Job(candidate, (SPEC,)) for candidate in candidates]
    assert executor.workers == 2
    expected, found = results(InProcess(places, "cpu"), jobs), results(executor, jobs)
    for ours, theirs in zip(expected, found, strict=True):
        assert isinstance(ours, Scored)
        assert isinstance(theirs, Scored)
        assert ours.metrics.keys() == theirs.metrics.keys()
        for mine, its in zip(ours.metrics[SPEC.name], theirs.metrics[SPEC.name], strict=True):
            assert mine == pytest.approx(its, abs=1e-2)  # other numbers of threads round otherwise


def test_the_trial_of_a_worker_that_is_killed_is_done_by_another(
    executor: Executor, candidates: list[Candidate], deadly: Spec
) -> None:
    folder = Path(deadly.name).parent
    (folder / "lives").write_text("1")
    found = results(executor, [Job(candidate, (deadly,)) for candidate in candidates[:2]])
    assert [type(each) for each in found] == [Scored, Scored]
    assert [each.metrics["dies"] for each in found if isinstance(each, Scored)] == [[{"acc": 1.0}]] * 2
    (dead,) = (folder / "deaths").iterdir()
    assert int(dead.read_text()) != os.getpid()


def test_a_candidate_that_kills_every_worker_is_a_failure_and_the_next_is_served(
    executor: Executor, candidates: list[Candidate], deadly: Spec
) -> None:
    (Path(deadly.name).parent / "lives").write_text("1000")
    (found,) = results(executor, [Job(candidates[0], (deadly,))])
    assert isinstance(found, Failed)
    assert f"{TRIES} times" in found.reason
    assert len(list((Path(deadly.name).parent / "deaths").iterdir())) == TRIES
    (after,) = results(executor, [Job(candidates[0], (SPEC,))])
    assert isinstance(after, Scored)


def test_what_is_wrong_with_a_candidate_is_its_failure_with_the_error(
    executor: Executor, micro_zoo: Mapping[str, Path], candidates: list[Candidate]
) -> None:
    nothing = Kin.of({name: Checkpoint(micro_zoo[name]) for name in ("math", "code")}, None, None).merge(
        "linear", {"math": 1.0, "code": -1.0}, {"weight": {"math": 1.0, "code": -1.0}}, {"normalize": True}
    )
    found = results(executor, [Job(nothing, (SPEC,)), Job(candidates[1], (SPEC,))])
    assert isinstance(found[0], Failed)
    assert found[0].reason.startswith("MergeError: ")
    assert isinstance(found[1], Scored)


def test_a_bug_in_a_worker_is_no_candidates_failure(executor: Executor, candidates: list[Candidate]) -> None:
    stranger = Candidate({"nobody": 1.0}, {})  # no place is known for it: nothing of ours asks for that
    with pytest.raises(KeyError, match="nobody"):
        results(executor, [Job(stranger, (SPEC,))])


def test_a_cluster_that_is_not_there_is_one_sentence(places: dict[str, Place]) -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(SearchError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        Ray(places, "127.0.0.1:1")
