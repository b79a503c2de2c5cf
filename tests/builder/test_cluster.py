"""Clusters: every model in exactly one, whatever the order of the zoo."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest

from builder.cluster import clusters
from builder.similarity import Matrix

Linkage = Literal["components", "complete"]
NAMES = ("a", "b", "c", "d", "e")


def matrix(pairs: dict[str, float]) -> Matrix:
    """Similarities of NAMES: 1 with itself, as given for a pair, else 0.1."""
    likeness = np.full((len(NAMES), len(NAMES)), 0.1)
    np.fill_diagonal(likeness, 1.0)
    for pair, value in pairs.items():
        i, j = (NAMES.index(name) for name in pair)
        likeness[i, j] = likeness[j, i] = value
    return likeness


CHAIN = matrix({"ab": 0.99, "bc": 0.96, "ac": 0.5, "cd": 0.9})
TIES = matrix({"ab": 0.97, "bc": 0.97, "cd": 0.97, "de": 0.97})


def grouped(likeness: Matrix, how: Linkage, threshold: float = 0.95) -> list[str]:
    return ["".join(cluster) for cluster in clusters(NAMES, likeness, threshold, how)]


def test_components_follow_a_chain_of_likenesses() -> None:
    assert grouped(CHAIN, "components") == ["abc", "d", "e"]


def test_complete_asks_that_every_pair_is_alike() -> None:
    assert grouped(CHAIN, "complete") == ["ab", "c", "d", "e"]


@pytest.mark.parametrize("how", ["components", "complete"])
def test_the_threshold_itself_is_alike_enough(how: Linkage) -> None:
    assert grouped(matrix({"de": 0.95}), how) == ["a", "b", "c", "de"]
    assert grouped(matrix({"de": 0.9499}), how) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("how", ["components", "complete"])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7, 0.95, 0.99999, 1.0])
def test_the_next_number_below_the_threshold_is_not_alike_enough(how: Linkage, threshold: float) -> None:
    below, far = np.nextafter(threshold, 0), {a + b: -0.5 for a, b in itertools.combinations(NAMES, 2)}

    assert grouped(matrix({**far, "de": threshold}), how, threshold) == ["a", "b", "c", "de"]
    assert grouped(matrix({**far, "de": below}), how, threshold) == ["a", "b", "c", "d", "e"]


def test_both_linkages_are_what_their_definitions_say() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        likeness = matrix({a + b: rng.integers(0, 5) / 4 for a, b in itertools.combinations(NAMES, 2)})
        alike = likeness >= 0.75
        reached = np.linalg.matrix_power(alike.astype(int), len(NAMES)) > 0
        component = {"".join(n for n, there in zip(NAMES, row, strict=True) if there) for row in reached}
        assert set(grouped(likeness, "components", 0.75)) == component
        complete = [[NAMES.index(name) for name in group] for group in grouped(likeness, "complete", 0.75)]
        assert all(alike[np.ix_(group, group)].all() for group in complete)
        # And no two clusters could be one.
        assert not any(alike[np.ix_(a + b, a + b)].all() for a, b in itertools.combinations(complete, 2))


@pytest.mark.parametrize("how", ["components", "complete"])
@pytest.mark.parametrize("likeness", [CHAIN, TIES, matrix({})])
def test_the_order_of_the_models_changes_nothing_but_the_order(how: Linkage, likeness: Matrix) -> None:
    expected = {frozenset(cluster) for cluster in clusters(NAMES, likeness, 0.95, how)}
    for order in itertools.permutations(range(len(NAMES))):
        names = [NAMES[i] for i in order]
        found = clusters(names, likeness[np.ix_(order, order)], 0.95, how)
        assert {frozenset(cluster) for cluster in found} == expected
        assert [cluster[0] for cluster in found] == sorted((cluster[0] for cluster in found), key=names.index)
        assert all(list(cluster) == sorted(cluster, key=names.index) for cluster in found)


@pytest.mark.parametrize("how", ["components", "complete"])
def test_a_model_that_is_like_no_other_is_kept(how: Linkage) -> None:
    assert grouped(matrix({}), how) == list("abcde")


@pytest.mark.parametrize("how", ["components", "complete"])
def test_one_model_is_one_cluster(how: Linkage) -> None:
    assert clusters(["only"], np.ones((1, 1)), 0.95, how) == [("only",)]
