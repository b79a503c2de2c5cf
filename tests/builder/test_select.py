from __future__ import annotations

import itertools

import numpy as np
import pytest

from builder.select import choose

SCORES = {
    "merged": np.array([0.6, 0.6, 0.6, 0.6]),
    "left": np.array([0.9, 0.9, 0.1, 0.1]),
    "right": np.array([0.1, 0.1, 0.7, 0.7]),
    "weak": np.array([0.5, 0.5, 0.5, 0.5]),
}


def test_each_choice_adds_most_to_what_a_perfect_router_reaches() -> None:
    assert choose(SCORES, 3) == pytest.approx({"merged": 0.6, "left": 0.75, "right": 0.8})


def test_nothing_is_kept_that_adds_nothing() -> None:
    assert list(choose(SCORES, 4)) == ["merged", "left", "right"]


def test_all_are_kept_where_each_cluster_must_have_its_expert() -> None:
    assert list(choose(SCORES, 4, stop_early=False)) == ["merged", "left", "right", "weak"]


def test_the_first_choice_is_the_best_on_the_mean_and_later_ones_never_lower_the_reach() -> None:
    scores = {str(i): row for i, row in enumerate(np.random.default_rng(0).normal(size=(6, 9)))}
    reach = list(choose(scores, 6).values())
    assert reach[0] == pytest.approx(max(row.mean() for row in scores.values()))
    assert all(low < high for low, high in itertools.pairwise(reach))
