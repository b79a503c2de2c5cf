from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.config import load_zoo
from builder.errors import ZooError
from builder.proxy import harness, programs, tasks
from builder.proxy.requests import Choices, Generation, Likelihood, Rolling
from builder.proxy.task import SPLITS, Spec

Write = Callable[..., str]
QUESTIONS = [
    {"question": f"What is {a} + {a}?", "choices": [str(2 * a), str(2 * a + 1), "none"], "label": 0} for a in range(30)
]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a YAML task beside its documents, and says where."""

    def call(name: str, docs: list[dict[str, Any]] = QUESTIONS, **said: Any) -> str:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), "utf-8")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        } | said
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(task), "utf-8")
        return str(path)

    return call


def likelihoods(*nats: float) -> tuple[Likelihood, ...]:
    return tuple(Likelihood(each, 2, greedy=False) for each in nats)


def test_a_yaml_task_with_local_files_is_found_from_anywhere(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("sums")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    task = tasks.load(Spec(path, None, 5, 42))
    assert (task.metric, len(task.samples), task.runs_code) == ("acc", 5, False)
    (request,) = task.samples[0].requests
    assert isinstance(request, Choices)
    assert request.prompt.startswith("What is")
    assert request.continuations[2] == " none"
    assert task.score([[likelihoods(-1, -2, -3)]] * 5)[0] == {"acc": 1.0, "log_likelihood": -0.5}
    assert task.score([[likelihoods(-2, -1, -3)]] * 5)[0]["acc"] == 0.0


def test_splits_divide_the_documents_and_equal_ones_are_one(write: Write) -> None:
    path = write("twice", QUESTIONS + QUESTIONS)
    prompts = [{one.prompt for one in tasks.load(Spec(path, split, None, 42)).samples} for split in SPLITS]
    assert [len(each) for each in prompts] == [10, 10, 10]
    assert len(set.union(*prompts)) == 30
    halves = [
        {one.prompt for one in tasks.load(Spec(path, split, None, 42, parts=2)).samples}
        for split in ("proxy", "routing")
    ]
    assert [len(each) for each in halves] == [15, 15]
    assert not halves[0] & halves[1]


def test_few_shot_examples_come_before_every_question_and_are_fixed_by_the_seed(write: Write) -> None:
    path = write("shots", fewshot_split="test", num_fewshot=2)
    first = tasks.load(Spec(path, None, 3, 42))
    assert all(one.requests[0].prompt.count("What is") == 3 for one in first.samples)  # type: ignore[union-attr]
    assert first.samples[0].prompt.count("What is") == 1  # what a router sees
    tasks.load.cache_clear()
    assert tasks.load(Spec(path, None, 3, 42)).digest == first.digest
    assert tasks.load(Spec(path, None, 3, 43)).digest != first.digest
    none = tasks.load(Spec(path, None, 3, 42, fewshot=0))
    assert none.samples[0].requests[0].prompt.count("What is") == 1  # type: ignore[union-attr]


def test_generations_go_through_the_tasks_filters(write: Write) -> None:
    path = write(
        "reckon",
        [{"question": "2 + 2 =", "answer": "so it is #### 4"}],
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{answer.split('#### ')[-1]}}",
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        generation_kwargs={"until": ["Question:"], "do_sample": False, "max_gen_toks": 9},
        filter_list=[
            {
                "name": "strict",
                "filter": [{"function": "regex", "regex_pattern": r"#### (\d+)"}, {"function": "take_first"}],
            },
            {"name": "loose", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]},
        ],
    )
    task = tasks.load(Spec(path, None, None, 42))
    assert task.samples[0].requests == (Generation("2 + 2 =", ("Question:",), 9),)
    assert task.metric == "exact_match,strict"
    assert task.score([["4, I think"]]) == [{"exact_match,strict": 0.0, "exact_match,loose": 1.0}]
    assert task.score([["#### 4"]]) == [{"exact_match,strict": 1.0, "exact_match,loose": 1.0}]


def test_rolling_likelihoods_are_asked_for_but_cannot_rank(write: Write) -> None:
    path = write(
        "text",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_choice=None,
        doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    with pytest.raises(ZooError, match="text has no metric of which more is better"):
        tasks.load(Spec(path, None, 2, 42))
    part = harness._tasks(path)[0]
    sample, _ = harness._sample(part, 0, part.eval_docs[0])
    assert sample.requests == (Rolling("What is 0 + 0?"),)


def test_a_task_that_samples_its_answers_is_refused(write: Write) -> None:
    path = write(
        "lucky",
        output_type="generate_until",
        doc_to_choice=None,
        metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"do_sample": True, "temperature": 0.7, "until": ["\n"]},
    )
    with pytest.raises(ZooError, match="lucky: a task wants sampled answers, and ours are greedy"):
        tasks.load(Spec(path, None, 2, 42))


def test_data_that_cannot_be_had_is_one_sentence(write: Write) -> None:
    path = write("lost", dataset_kwargs={"data_files": {"test": "nowhere.jsonl"}})
    with pytest.raises(
        ZooError, match=r"the task .*lost\.yaml cannot be loaded .*a YAML file of your own may name local"
    ):
        tasks.load(Spec(path, None, 2, 42))


def zoo(zoo_file: Path, proxy: str, test: str) -> Any:
    text = zoo_file.read_text("utf-8")
    text = text.replace('tasks = ["tiny/math", "tiny/code", "tiny/story", "tiny/chat"]', f'tasks = ["{proxy}"]')
    text = text.replace('metric = "log_likelihood"\n', "")
    path = zoo_file.with_name(f"overlap-{Path(proxy).stem}-{Path(test).stem}.toml")
    path.write_text(f'{text}\n[test]\ntasks = ["{test}"]\n', "utf-8")
    return load_zoo(str(path))


def test_a_zoo_whose_proxy_and_test_share_a_file_and_split_is_refused(write: Write, zoo_file: Path) -> None:
    proxy, other = write("seen"), write("unseen", [{**doc, "question": f"Now {doc['question']}"} for doc in QUESTIONS])
    again = write("renamed", dataset_kwargs={"data_files": {"test": "seen.jsonl"}})
    apart, shared = zoo(zoo_file, proxy, other), zoo(zoo_file, proxy, again)
    tasks.check_sources(apart.proxy.tasks, apart.test.tasks)
    with pytest.raises(ZooError, match=r"seen\.yaml \(proxy\) and .*renamed\.yaml \(test\) read the same split 'test'"):
        tasks.check_sources(shared.proxy.tasks, shared.test.tasks)


def test_a_copied_question_is_found_though_it_is_in_another_file(write: Write) -> None:
    first = tasks.load(Spec(write("one"), "proxy", None, 42))
    copied = tasks.load(Spec(write("two", [*QUESTIONS[:5], {**QUESTIONS[0], "question": "New?"}]), None, None, 42))
    with pytest.raises(ZooError, match="share a question across splits"):
        tasks.check_apart([[first], [copied]])


# What models write is run by the sandbox alone.

PROBLEM = {
    "prompt": "def add(a, b):\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}


def humaneval(write: Write) -> str:
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"
    path = Path(write("heval", [PROBLEM]))
    said = {
        "include": str(theirs),
        "task": "heval",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "heval.jsonl"}},
    }
    path.write_text(yaml.safe_dump(said), "utf-8")
    return str(path)


def test_the_harnesses_own_code_tasks_meet_the_sandbox(write: Write, tmp_path: Path) -> None:
    task = tasks.load(Spec(humaneval(write), None, None, 42))
    assert (task.metric, task.runs_code) == ("pass@1", True)
    mark = tmp_path / "harmed"
    harmful = f"    open({str(mark)!r}, 'w').write('x')\n    return a + b"
    answers = ["    return a + b", "    return a * b", harmful]
    scores = [task.score([[answer]])[0]["pass@1"] for answer in answers]
    assert scores[:2] == [1.0, 0.0]
    assert scores[2] == 0.0 or programs.sandbox(False).mechanism == "rlimits"
    assert not mark.exists()


def test_javascript_is_run_by_node_and_its_asserts_count() -> None:
    if not programs.sandbox(False).has("javascript"):
        pytest.skip("no node here")
    doc = {"prompt": "const add = (a, b) => {\n", "test": "console.assert(add(2, 3) === 5)\n"}
    assert programs.humanevalpack_js(doc, ["  return a + b\n}\n"]) == {"pass_at_1": 1.0}
    assert programs.humanevalpack_js(doc, ["  return a * b\n}\n"]) == {"pass_at_1": 0.0}


def test_mbpp_answers_are_run_with_the_problems_tests() -> None:
    doc = {"test_setup_code": "import math", "test_list": ["assert root(9) == 3", "assert root(16) == 4"]}
    assert programs.mbpp(doc, ["def root(x):\n    return math.isqrt(x)"]) == {"pass_at_1": 1.0}
    assert programs.mbpp(doc, ["def root(x):\n    return 3"]) == {"pass_at_1": 0.0}


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    good, bad = "def f(): return 1", "def f(): return 2"
    scores, details = programs.CodeEval().compute(
        references=["assert f() == 1"], predictions=[[good, bad, bad, good]], k=[1, 2, 10]
    )
    assert scores == pytest.approx({"pass@1": 0.5, "pass@2": 1 - 1 / 6})  # 1 - C(2, 2) / C(4, 2)
    assert [facts["passed"] for _, facts in details[0]] == [True, False, False, True]


def test_the_shipped_yaml_tasks_are_sound() -> None:
    for name in ("mbpp_validation", "humanevalpack_js"):
        path = harness._file(name)
        assert path is not None
        said: Mapping[str, Any] = harness._said(path)
        assert callable(said["process_results"])
        assert said["generation_kwargs"]["do_sample"] is False
