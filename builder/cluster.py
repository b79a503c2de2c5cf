"""From pairwise similarities to clusters: every model in exactly one, whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform


def clusters(
    names: Sequence[str], similarity: ArrayLike, threshold: float, how: Literal["components", "complete"]
) -> list[tuple[str, ...]]:
    """Clusters of names, in the order of their first members.

    components: linked by any chain of pairs at or above the threshold; complete: every pair in a cluster is, and where
    that leaves a choice the names decide, not their order.
    """
    if len(names) == 1:
        return [(names[0],)]
    similarity = np.asarray(similarity)
    if how == "components":
        labels = connected_components(similarity >= threshold, directed=False)[1]
    else:
        by_name = np.argsort(names)
        distances = squareform(np.clip(1.0 - similarity[np.ix_(by_name, by_name)], 0.0, None), checks=False)
        labels = np.empty(len(names), int)
        labels[by_name] = fcluster(linkage(distances, "complete"), 1.0 - threshold, "distance")
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        groups.setdefault(int(label), []).append(name)
    return [tuple(group) for group in groups.values()]
