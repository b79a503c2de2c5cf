from __future__ import annotations

from collections.abc import Mapping

import pytest
from landscape import Landscape, problem

from builder.search.average import average

SINGLES = {"a": 0.5, "b": 0.7, "c": 0.6, "d": 0.4}


def by_set(scores: Mapping[str, float]) -> Landscape:
    return Landscape(lambda weights: scores["".join(sorted(weights))])


def test_members_join_by_rank_while_the_score_does_not_fall() -> None:
    search = problem(SINGLES, by_set({"bc": 0.8, "abc": 0.75, "bcd": 0.9}))
    outcome = average(search)
    assert [trial.tried for trial in search.trials] == ["c", "a", "d"]
    assert [trial.accepted for trial in search.trials] == [True, False, True]
    assert outcome.candidate.weights == pytest.approx({"b": 1 / 3, "c": 1 / 3, "d": 1 / 3})
    assert outcome.score == pytest.approx(0.9)


def test_an_equal_score_is_accepted_as_in_the_paper() -> None:
    search = problem({"a": 0.5, "b": 0.4}, by_set({"ab": 0.5}))
    average(search)
    assert search.trials[0].accepted


def test_every_candidate_is_the_uniform_mean_that_the_papers_recurrence_gives() -> None:
    landscape = by_set({"bc": 0.8, "abc": 0.8, "abcd": 0.8})
    average(problem(SINGLES, landscape))
    merged = {"b": 1.0}
    for accepted, (name, candidate) in enumerate(zip("cad", landscape.candidates, strict=True)):
        c = (accepted + 1) / (accepted + 2)
        merged = {member: c * weight for member, weight in merged.items()} | {name: 1 - c}
        assert candidate.weights == pytest.approx(merged)


def test_where_nothing_helps_the_best_single_is_left() -> None:
    outcome = average(problem(SINGLES, by_set({"bc": 0.6, "ab": 0.6, "bd": 0.6})))
    assert (outcome.candidate.weights, outcome.score) == ({"b": 1.0}, pytest.approx(0.7))
    assert not outcome.candidate.said


def test_a_failed_candidate_is_recorded_and_not_taken_for_a_bad_one() -> None:
    search = problem(SINGLES, Landscape(lambda weights: "no memory" if len(weights) == 2 else 0.9))
    outcome = average(search)
    assert outcome.candidate.weights == {"b": 1.0}
    assert [(trial.score, trial.failure, trial.accepted) for trial in search.trials] == [(None, "no memory", False)] * 3
