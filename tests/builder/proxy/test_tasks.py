from __future__ import annotations

import itertools

import pytest

from builder.errors import ZooError
from builder.proxy import tasks


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_prompt_is_in_two_splits(name: str) -> None:
    prompts = {split: {item.prompt for item in tasks.load(name, split, 1000, 42)} for split in tasks.SPLITS}
    if name.startswith("demo/"):
        assert all(len(prompts[split]) >= 20 for split in tasks.SPLITS)
        assert not any(prompts[a] & prompts[b] for a, b in itertools.combinations(tasks.SPLITS, 2))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_seed_alone_decides_the_items(name: str) -> None:
    assert tasks.load(name, "test", 8, 1) == tasks.load(name, "test", 8, 1)
    assert tasks.load(name, "test", 8, 1) != tasks.load(name, "test", 8, 2)


def test_the_limit_is_kept_and_every_item_has_four_choices() -> None:
    for name in tasks.TASKS:
        items = tasks.load(name, "proxy", 7, 42)
        assert len(items) == 7
        assert all(len(set(item.choices)) == 4 and 0 <= item.label < 4 for item in items)


def test_a_task_that_cannot_be_scored_is_refused_with_those_that_can() -> None:
    with pytest.raises(ZooError, match=r"tinyMMLU cannot be scored by this release; known: demo/math"):
        tasks.check(["demo/math", "tinyMMLU"])
