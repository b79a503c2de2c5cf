"""From pairwise similarities to clusters: every model in exactly one, whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

Linkage = Literal["components", "complete"]
SCIPY = {"components": "single", "complete": "complete"}
"""Cut at a threshold, single linkage gives the connected components."""


@dataclass(frozen=True)
class Tree:
    """Who joins whom as the similarity that is asked for falls.

    leaves: indices of the models, by name. links: scipy's, with ranks of similarities for heights, the highest is 0.
    levels: the similarity of each rank.
    """

    leaves: NDArray[np.intp]
    links: NDArray[np.float64]
    levels: NDArray[np.float64]

    def rank(self, threshold: float) -> int:
        """The lowest rank at or above the threshold; -1 if there is none."""
        return int(np.count_nonzero(self.levels >= threshold)) - 1


def tree(names: Sequence[str], similarity: ArrayLike, how: Linkage) -> Tree:
    """The tree of two models or more.

    Ranks, not distances: 1 - x rounds, and a pair just below the threshold would join. Where equal similarities leave a
    choice, the names decide, not their order.
    """
    leaves = np.argsort(names)
    pairs: NDArray[Any] = squareform(np.asarray(similarity)[np.ix_(leaves, leaves)], checks=False)
    levels, ranks = np.unique(-pairs, return_inverse=True)
    return Tree(leaves, linkage(ranks.reshape(-1).astype(float), SCIPY[how]), -levels)


def clusters(names: Sequence[str], similarity: ArrayLike, threshold: float, how: Linkage) -> list[tuple[str, ...]]:
    """Clusters of names, in the order of their first members.

    components: linked by any chain of pairs at or above the threshold; complete: every pair in a cluster is.
    """
    if len(names) == 1:
        return [(names[0],)]
    grown = tree(names, similarity, how)
    labels = np.empty(len(names), int)
    labels[grown.leaves] = fcluster(grown.links, grown.rank(threshold), "distance")
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        groups.setdefault(int(label), []).append(name)
    return [tuple(group) for group in groups.values()]
