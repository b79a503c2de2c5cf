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
