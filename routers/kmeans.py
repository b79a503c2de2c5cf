"""Clusters of prompts, each with the experts' mean scores there (Avengers, arXiv 2505.19797).

C clusters, D features, E experts, N prompts, R representatives.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Arrays, Estimate, Evidence, Near, Vector
from routers.shapes import Shapes

SIZES = (4, 8, 16, 32, 64)
PER_CLUSTER = 8
"""So many prompts a cluster should have on average."""
GRAINS = 3
"""Clusterings, coarse to fine, whose answers are averaged: one alone depends on where its borders fell."""
PRIOR = 10.0
"""Prompts that the mean over all prompts counts for in a cluster's mean."""
REPRESENTATIVES = 3
RESTARTS, ITERATIONS = 3, 50


class KMeansRouter:
    """quality = the mean score of the cluster that the prompt falls in, shrunk to the mean over all prompts."""

    kind: ClassVar[str] = "kmeans"

    def __init__(
        self,
        experts: tuple[str, ...],
        centres_CD: Vector,
        grains_C: NDArray[np.int64],
        quality_CE: Vector,
        std_CE: Vector,
        counts_C: NDArray[np.int64],
        nearest_CR: NDArray[np.int64],
    ) -> None:
        self._experts = experts
        self._centres_CD, self._grains_C = centres_CD, grains_C
        self._quality_CE, self._std_CE, self._counts_C = quality_CE, std_CE, counts_C
        self._nearest_CR = nearest_CR
        # The nearest centre has the least |c|^2 - 2 c h.
        self._halves_C = (centres_CD**2).sum(axis=1) / 2
        borders = np.flatnonzero(np.diff(grains_C)) + 1
        self._parts = [slice(a, b) for a, b in zip([0, *borders], [*borders, len(grains_C)], strict=True)]

    @classmethod
    def fit(cls, experts: tuple[str, ...], vectors_ND: Vector, scores_NE: NDArray[np.float64], seed: int = 0) -> Self:
        """Clusterings of the three finest sizes that leave PER_CLUSTER prompts a cluster."""
        sizes = [size for size in SIZES if size * PER_CLUSTER <= len(vectors_ND)][-GRAINS:] or [1]
        centres, grains, quality, std, counts, nearest = [], [], [], [], [], []
        mean_E, variance_E = scores_NE.mean(axis=0), scores_NE.var(axis=0)
        for grain, size in enumerate(sizes):
            centres_CD, owner_N = cluster(vectors_ND, size, seed)
            for centre, centre_D in enumerate(centres_CD):
                own = np.flatnonzero(owner_N == centre)
                inside_E = (scores_NE[own].sum(axis=0) + PRIOR * mean_E) / (len(own) + PRIOR)
                spread_E = ((scores_NE[own] - inside_E) ** 2).sum(axis=0) + PRIOR * variance_E
                apart_N = ((vectors_ND[own] - centre_D) ** 2).sum(axis=1)
                centres.append(centre_D)
                grains.append(grain)
                quality.append(inside_E)
                std.append(np.sqrt(spread_E / (len(own) + PRIOR)))
                counts.append(len(own))
                nearest.append(own[np.argsort(apart_N, kind="stable")][np.arange(REPRESENTATIVES) % len(own)])
        return cls(
            experts,
            np.stack(centres),
            np.array(grains, np.int64),
            np.array(quality, np.float32),
            np.array(std, np.float32),
            np.array(counts, np.int64),
            np.array(nearest, np.int64),
        )

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    @property
    def dimension(self) -> int:
        return int(self._centres_CD.shape[1])

    def estimate(self, vector_D: Vector) -> Estimate:
        products_C = self._centres_CD @ vector_D
        apart_C = self._halves_C - products_C
        found = [part.start + int(np.argmin(apart_C[part])) for part in self._parts]
        near = tuple(Near(c, self._cosine(c, products_C[c], vector_D)) for c in reversed(found))
        evidence = Evidence("clusters", near, int(self._counts_C[found[-1]]))
        std_E: Vector = np.sqrt((self._std_CE[found] ** 2).mean(axis=0))
        return Estimate(self._quality_CE[found].mean(axis=0), std_E, evidence)

    def representatives(self, cluster: int) -> tuple[int, ...]:
        """The prompts of the fit nearest to a cluster's centre, by their rows."""
        return tuple(dict.fromkeys(map(int, self._nearest_CR[cluster])))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "centres": self._centres_CD,
            "grains": self._grains_C,
            "quality": self._quality_CE,
            "std": self._std_CE,
            "counts": self._counts_C,
            "nearest": self._nearest_CR,
        }

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Arrays) -> Self:
        shapes = Shapes(cls.kind, arrays, E=len(experts))
        return cls(
            experts,
            shapes.take("centres", "C", "D"),
            shapes.take("grains", "C"),
            shapes.take("quality", "C", "E"),
            shapes.take("std", "C", "E"),
            shapes.take("counts", "C"),
            shapes.take("nearest", "C", "R"),
        )

    def _cosine(self, centre: int, product: float, vector_D: Vector) -> float:
        length = float(np.sqrt(2 * self._halves_C[centre])) * float(np.sqrt(vector_D @ vector_D))
        return float(product) / length if length > 0 else 0.0


def cluster(vectors_ND: Vector, size: int, seed: int) -> tuple[Vector, NDArray[np.int64]]:
    """Lloyd's k-means from k-means++ starts, the best of RESTARTS: centres [C, D] and every row's centre [N].

    No centre is empty, so there may be fewer than `size`.
    """
    rng = np.random.default_rng(seed)
    found = [_lloyd(vectors_ND, _spread_starts(vectors_ND, size, rng)) for _ in range(RESTARTS if size > 1 else 1)]
    return min(found, key=lambda each: float(_apart(vectors_ND, each[0])[np.arange(len(vectors_ND)), each[1]].sum()))


def _lloyd(vectors_ND: Vector, centres_CD: Vector) -> tuple[Vector, NDArray[np.int64]]:
    owner_N = np.argmin(_apart(vectors_ND, centres_CD), axis=1)
    for _ in range(ITERATIONS):
        centres_CD = _means(vectors_ND, owner_N)
        moved_N = np.argmin(_apart(vectors_ND, centres_CD), axis=1)
        if np.array_equal(moved_N, owner_N):
            break
        owner_N = moved_N
    kept, owner_N = np.unique(owner_N, return_inverse=True)
    return centres_CD[kept], owner_N.astype(np.int64)


def _spread_starts(vectors_ND: Vector, size: int, rng: np.random.Generator) -> Vector:
    """Each start far from those before it, by chance (k-means++)."""
    chosen = [int(rng.integers(len(vectors_ND)))]
    apart_N = _apart(vectors_ND, vectors_ND[chosen])[:, 0]
    while len(chosen) < size and apart_N.sum() > 1e-6:
        chosen.append(int(rng.choice(len(vectors_ND), p=apart_N / apart_N.sum())))
        apart_N = np.minimum(apart_N, _apart(vectors_ND, vectors_ND[chosen[-1:]])[:, 0])
    return vectors_ND[chosen]


def _apart(vectors_ND: Vector, centres_CD: Vector) -> NDArray[np.float64]:
    """Squared distances [N, C]."""
    products_NC = vectors_ND @ centres_CD.T
    squares_NC = (vectors_ND**2).sum(axis=1)[:, None] + (centres_CD**2).sum(axis=1) - 2 * products_NC
    apart_NC: NDArray[np.float64] = np.maximum(squares_NC, 0).astype(np.float64)
    return apart_NC


def _means(vectors_ND: Vector, owner_N: NDArray[np.int64]) -> Vector:
    """The mean of every centre's rows; centres without any go."""
    _, owner_N = np.unique(owner_N, return_inverse=True)
    order_N = np.argsort(owner_N, kind="stable")
    counts_C = np.bincount(owner_N)
    starts_C = np.concatenate([[0], np.cumsum(counts_C)[:-1]])
    sums_CD = np.add.reduceat(vectors_ND[order_N], starts_C, axis=0)
    means_CD: Vector = (sums_CD / counts_C[:, None]).astype(np.float32)
    return means_CD
