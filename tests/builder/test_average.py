from __future__ import annotations

from collections.abc import Mapping

import pytest

from builder.search.average import average

SINGLES = {"a": 0.5, "b": 0.7, "c": 0.6, "d": 0.4}


class Landscape:
    """Scores by the set of members, and the record of what was asked."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = scores
        self.asked: list[dict[str, float]] = []

    def __call__(self, weights: Mapping[str, float]) -> float:
        self.asked.append(dict(weights))
        return self.scores["".join(sorted(weights))]


def test_members_join_by_rank_while_the_score_does_not_fall() -> None:
    landscape = Landscape({"bc": 0.8, "abc": 0.75, "bcd": 0.9})
    outcome = average(SINGLES, landscape)
    assert [trial.tried for trial in outcome.trials] == ["c", "a", "d"]
    assert [trial.accepted for trial in outcome.trials] == [True, False, True]
    assert outcome.weights == pytest.approx({"b": 1 / 3, "c": 1 / 3, "d": 1 / 3})
    assert outcome.score == 0.9


def test_an_equal_score_is_accepted_as_in_the_paper() -> None:
    assert average({"a": 0.5, "b": 0.4}, Landscape({"ab": 0.5})).trials[0].accepted


def test_every_candidate_is_the_uniform_mean_that_the_papers_recurrence_gives() -> None:
    landscape = Landscape({"bc": 0.8, "abc": 0.8, "abcd": 0.8})
    average(SINGLES, landscape)
    merged = {"b": 1.0}
    for accepted, (candidate, asked) in enumerate(zip("cad", landscape.asked, strict=True)):
        c = (accepted + 1) / (accepted + 2)
        merged = {name: c * weight for name, weight in merged.items()} | {candidate: 1 - c}
        assert asked == pytest.approx(merged)


def test_a_lone_model_needs_no_trial() -> None:
    outcome = average({"a": 0.1}, Landscape({}))
    assert (outcome.weights, outcome.score, outcome.trials) == ({"a": 1.0}, 0.1, ())


def test_where_nothing_helps_the_best_single_is_left() -> None:
    outcome = average(SINGLES, Landscape({"bc": 0.6, "ab": 0.6, "bd": 0.6}))
    assert (outcome.weights, outcome.score) == ({"b": 1.0}, 0.7)
