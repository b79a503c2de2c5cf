"""From pairwise similarities to clusters: every model in exactly one, whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from builder.similarity import Matrix


def clusters(
    names: Sequence[str], similarity: Matrix, threshold: float, how: Literal["components", "complete"]
) -> list[tuple[str, ...]]:
    """Clusters of names, in the order of their first members.

    components: linked by any chain of pairs at or above the threshold; complete: every pair in a cluster is.
    """
    if len(names) == 1:
        return [(names[0],)]
    if how == "components":
        labels = connected_components(similarity >= threshold, directed=False)[1]
    else:
        distances = squareform(np.clip(1.0 - similarity, 0.0, None), checks=False)
        labels = fcluster(linkage(distances, "complete"), 1.0 - threshold, "distance")
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        groups.setdefault(int(label), []).append(name)
    return [tuple(group) for group in groups.values()]
