from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from landscape import Landscape, problem

from builder.search.coefficient import GRID, coefficient, cosine, similarity

SINGLES = {"a": -0.9, "b": -0.5, "c": -0.6}
TARGET = {"a": 0.12, "b": 0.48, "c": 0.4}


def nearness(weights: Mapping[str, float]) -> float:
    return -sum((weights.get(name, 0.0) - each) ** 2 for name, each in TARGET.items())


def test_the_best_coefficient_of_the_grid_is_what_is_kept_and_not_the_last() -> None:
    landscape = Landscape(nearness)
    search = problem(SINGLES, landscape)
    outcome = coefficient(search)
    assert [len(batch) for batch in landscape.asked] == [9, 9]
    kept = [trial for trial in search.trials if trial.accepted]
    assert len(kept) == 2
    for step, trial in enumerate(kept):
        rivals = search.trials[9 * step : 9 * step + 9]
        assert trial.score == max(rival.score for rival in rivals if rival.score is not None)
    # What is returned is the very candidate that was scored, and scores the same again.
    assert outcome.candidate == kept[-1].candidate
    assert next(iter(landscape([outcome.candidate]))) == pytest.approx(outcome.scores)


def test_effective_weights_are_those_of_the_merges_done_one_after_another() -> None:
    """w(init) = prod c_j; w(j-th accepted) = (1 - c_j) prod over l > j of c_l (PAPER.md 4), on real vectors too."""
    search = problem(SINGLES, Landscape(nearness))
    outcome = coefficient(search)
    vectors = {name: np.random.default_rng(i).normal(size=50) for i, name in enumerate(SINGLES)}
    kept, merged, cs = [trial for trial in search.trials if trial.accepted], vectors["b"], []
    for trial in kept:
        c = 1 - trial.candidate.weights[trial.tried]
        cs.append(c)
        merged = c * merged + (1 - c) * vectors[trial.tried]
    weights = outcome.candidate.weights
    assert sum(weights[name] * vectors[name] for name in weights) == pytest.approx(merged)
    expected = {"b": np.prod(cs)} | {trial.tried: (1 - cs[j]) * np.prod(cs[j + 1 :]) for j, trial in enumerate(kept)}
    assert weights == pytest.approx(expected)
    assert all(any(c == pytest.approx(each) for each in GRID) for c in cs)


def test_members_are_tried_by_their_scores_and_never_again() -> None:
    search = problem({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.25}, Landscape(lambda _: 0.0))
    coefficient(search)
    assert [search.trials[place].tried for place in range(0, 27, 9)] == ["d", "c", "a"]


@pytest.mark.parametrize(("similar", "order"), [("most", ["c", "d", "a"]), ("least", ["a", "d", "c"])])
def test_similarity_tries_the_model_nearest_to_the_merge_or_farthest_from_it(similar: str, order: list[str]) -> None:
    vectors = {"a": [0.0, 1.0, 0.0], "b": [1.0, 0.0, 0.0], "c": [0.9, 0.1, 0.0], "d": [0.5, 0.5, 0.1]}
    search = problem({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.25}, Landscape(lambda _: 0.0), similar=similar)
    matrix = np.array(list(vectors.values()))
    search.dots = matrix @ matrix.T
    similarity(search)
    assert [search.trials[place].tried for place in range(0, 27, 9)] == order


def test_the_next_model_is_the_nearest_to_what_was_merged_and_not_to_where_it_began() -> None:
    """c pulls the merge toward d, which is farther from b than a is."""
    vectors = {"a": [0.75, 0.66, 0.0], "b": [1.0, 0.0, 0.0], "c": [0.8, -0.6, 0.0], "d": [0.5, -0.86, 0.0]}
    search = problem(
        {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.25}, Landscape(lambda w: w.get("c", 0) if len(w) == 2 else 0.0)
    )
    matrix = np.array(list(vectors.values()))
    search.dots = matrix @ matrix.T
    similarity(search)
    assert [search.trials[place].tried for place in range(0, 27, 9)] == ["c", "d", "a"]


def test_a_merges_cosine_follows_from_dot_products_alone() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(3, 40))
    names = ("a", "b", "c")
    dots = {(p, q): float(vectors[i] @ vectors[j]) for i, p in enumerate(names) for j, q in enumerate(names)}
    merge = 0.3 * vectors[0] + 0.7 * vectors[1]
    expected = merge @ vectors[2] / np.linalg.norm(merge) / np.linalg.norm(vectors[2])
    assert cosine({"a": 0.3, "b": 0.7}, "c", dots) == pytest.approx(expected)


def test_where_a_whole_grid_fails_the_merge_stays_as_it_was() -> None:
    search = problem(
        SINGLES, Landscape(lambda weights: "broken" if "c" in weights else nearness(weights)), failures=100
    )
    outcome = coefficient(search)
    assert set(outcome.candidate.weights) == {"a", "b"}
    assert {trial.failure for trial in search.trials[:9]} == {"broken"}
