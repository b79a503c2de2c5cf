from __future__ import annotations

import numpy as np
import pytest
from landscape import Landscape, problem
from scipy import stats

from builder.config import Search
from builder.search.accept import acceptance, gain_at
from builder.search.average import average


def test_the_paper_takes_equals_and_a_paired_test_does_not() -> None:
    same = np.array([0.0, 1.0, 1.0, 0.0])
    assert acceptance(Search(), 1)(same, same)
    assert not acceptance(Search(accept="paired"), 1)(same, same)


def test_luck_on_a_hundred_items_is_refused_and_a_real_gain_is_not() -> None:
    old = np.zeros(100)
    lucky, real = old.copy(), old.copy()
    lucky[:3], real[:20] = 1, 1
    lucky[3:5] = -1  # three won, two lost
    paired = acceptance(Search(accept="paired"), 1)
    assert acceptance(Search(), 1)(lucky, old)
    assert not paired(lucky, old)
    assert paired(real, old)


def test_the_bound_is_scipys_bootstrap_bound() -> None:
    rng = np.random.default_rng(3)
    new, old = rng.normal(0.3, 1, 120), rng.normal(0, 1, 120)
    expected = stats.bootstrap(
        (new - old,),
        np.mean,
        confidence_level=0.95,
        alternative="greater",
        method="percentile",
        n_resamples=20000,
        rng=1,
    ).confidence_interval.low
    assert gain_at(new, old, 0.05, 7) == pytest.approx(expected, abs=0.02)


def test_pairing_matters_for_noise_that_both_share_is_none() -> None:
    noise = np.random.default_rng(5).normal(0, 10, 200)
    assert gain_at(noise + 0.1, noise, 0.05, 1) == pytest.approx(0.1)


def test_a_level_is_kept_under_no_difference() -> None:
    """At level 0.05 about one in twenty merges that are no better is taken."""
    rng = np.random.default_rng(11)
    taken = [gain_at(rng.normal(size=80), rng.normal(size=80), 0.05, i) > 0 for i in range(300)]
    assert 0.02 < np.mean(taken) < 0.09


def test_the_choice_reaches_the_strategies() -> None:
    search = problem({"a": 0.5, "b": 0.4}, Landscape(lambda _: 0.5), accept="paired")
    assert average(search).candidate.weights == {"a": 1.0}
    assert not search.trials[0].accepted
