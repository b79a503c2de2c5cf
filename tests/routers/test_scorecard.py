from __future__ import annotations

import numpy as np
import pytest

from routers.scorecard import interval, scorecard

SCORES_NE = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.5]])


def test_the_figures_are_means_over_prompts() -> None:
    card = scorecard(("a", "b"), SCORES_NE, np.array([0, 0, 1, 0]), seed=0)
    assert (card.routed, card.best_single, card.best_single_expert) == (0.75, 0.5, "a")
    assert (card.oracle, card.random) == (0.875, 0.4375)
    assert card.gain == pytest.approx(0.25)
    assert card.picks == {"a": 3, "b": 1}


def test_a_router_no_better_than_the_best_single_is_not_proven() -> None:
    assert not scorecard(("a", "b"), SCORES_NE, np.zeros(4, int), seed=0).proven


def test_a_router_far_better_on_many_prompts_is_proven() -> None:
    scores_NE = np.eye(2)[np.arange(100) % 2]
    assert scorecard(("a", "b"), scores_NE, np.arange(100) % 2, seed=0).proven


def test_the_interval_is_that_of_scipy() -> None:
    from scipy.stats import bootstrap

    values_N = np.random.default_rng(5).normal(0.3, 1.0, 80)
    reference = bootstrap((values_N,), np.mean, method="percentile", n_resamples=9999, rng=1).confidence_interval
    assert interval(values_N, 0) == pytest.approx((reference.low, reference.high), abs=0.03)
