from __future__ import annotations

import itertools

import pytest

from builder.config import PRESETS, Split
from builder.errors import ZooError
from builder.proxy import tasks
from builder.proxy.items import Item, sample
from builder.proxy.requests import Choices, Likelihood
from builder.proxy.task import SPLITS, Spec, Task


def load(name: str, split: Split | None, limit: int | None, seed: int = 42) -> Task:
    return tasks.load(Spec(name, split, limit, seed))


@pytest.mark.parametrize("name", tasks.OWN)
def test_no_question_is_in_two_splits(name: str) -> None:
    questions = {split: {one.requests for one in load(name, split, None).samples} for split in SPLITS}
    assert all(len(questions[split]) >= 15 for split in SPLITS)
    assert not any(questions[a] & questions[b] for a, b in itertools.combinations(SPLITS, 2))
    if name.startswith("demo/"):
        prompts = {split: {one.prompt for one in load(name, split, None).samples} for split in SPLITS}
        assert not any(prompts[a] & prompts[b] for a, b in itertools.combinations(SPLITS, 2))


@pytest.mark.parametrize("name", tasks.OWN)
def test_the_seed_alone_decides_the_items(name: str) -> None:
    tasks.load.cache_clear()
    first = load(name, "test", 8, 1)
    tasks.load.cache_clear()
    assert first.digest == load(name, "test", 8, 1).digest
    assert first.digest != load(name, "test", 8, 2).digest


def test_the_limit_is_kept_and_every_item_has_four_choices() -> None:
    for name in tasks.OWN:
        samples = load(name, "proxy", 7).samples
        assert len(samples) == 7
        choices = [one.requests[0] for one in samples]
        assert all(isinstance(each, Choices) and len(set(each.continuations)) == 4 for each in choices)


def test_an_item_is_right_where_the_right_choice_is_likeliest() -> None:
    one = sample(Item("1 + 1 =", (" 3", " 2"), 1))
    answers = [(Likelihood(-4.0, 1, False), Likelihood(-3.0, 2, True))]
    assert one.score(answers) == {"accuracy": 1.0, "log_likelihood": -1.5}
    assert one.score([answers[0][::-1]])["accuracy"] == 0.0


def test_a_task_that_nobody_knows_is_refused_with_those_that_are() -> None:
    with pytest.raises(ZooError, match=r"nobody knows tinyMMLUX: name a preset \(paper, demo\).*demo/math"):
        tasks.check(["demo/math", "tinyMMLU", "tinyMMLUX"])


def test_the_papers_six_tasks_are_known() -> None:
    tasks.check(PRESETS["paper"])


def test_a_question_in_two_splits_is_a_leak_and_named() -> None:
    one, other = load("demo/math", "proxy", 5), load("demo/math", "test", 5)
    tasks.check_apart([[one], [other]])
    leaked = Task("copy", (one.samples[2],), "accuracy", "")
    with pytest.raises(ZooError, match="demo/math and copy share a question across splits that must be apart"):
        tasks.check_apart([[one], [leaked]])
