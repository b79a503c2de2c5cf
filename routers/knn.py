"""The mean score of the nearest prompts: the router whose reasons are real examples.

D features, E experts, N prompts, K neighbours.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Arrays, Estimate, Evidence, Near, Vector
from routers.shapes import Shapes

NEIGHBOURS = 50
MOST_ROWS = 100_000
"""An exact search over more takes tens of milliseconds."""
SHOWN = 5


class KnnRouter:
    """quality = the mean score of the K prompts with the highest cosine, found exactly; ties go to the earlier row."""

    kind: ClassVar[str] = "knn"

    def __init__(self, experts: tuple[str, ...], vectors_ND: Vector, scores_NE: Vector, k: int) -> None:
        self._experts = experts
        self._vectors_ND, self._scores_NE = vectors_ND, scores_NE
        self._k = k
        self._variance_E = scores_NE.var(axis=0)

    @classmethod
    def fit(cls, experts: tuple[str, ...], vectors_ND: Vector, scores_NE: NDArray[np.float64], seed: int = 0) -> Self:
        """K is NEIGHBOURS, and a quarter of the prompts where they are few; of many, MOST_ROWS by chance are kept."""
        kept_N = np.arange(len(vectors_ND))
        if len(kept_N) > MOST_ROWS:
            kept_N = np.sort(np.random.default_rng(seed).choice(kept_N, MOST_ROWS, replace=False))
        k = max(1, min(NEIGHBOURS, len(kept_N) // 4))
        return cls(experts, np.ascontiguousarray(vectors_ND[kept_N]), scores_NE[kept_N].astype(np.float32), k)

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    @property
    def dimension(self) -> int:
        return int(self._vectors_ND.shape[1])

    def estimate(self, vector_D: Vector) -> Estimate:
        cosines_N = self._vectors_ND @ vector_D
        nearest_K = self._nearest(cosines_N)
        scores_KE = self._scores_NE[nearest_K]
        near = tuple(Near(int(row), float(cosines_N[row])) for row in nearest_K[:SHOWN])
        # Neighbours that agree are no proof that all do: one more counts, as spread as all prompts are.
        std_E: Vector = np.sqrt((scores_KE.var(axis=0) * self._k + self._variance_E) / (self._k + 1))
        return Estimate(scores_KE.mean(axis=0), std_E, Evidence("neighbours", near, self._k))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"vectors": self._vectors_ND, "scores": self._scores_NE, "k": np.array([self._k], np.int64)}

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Arrays) -> Self:
        shapes = Shapes(cls.kind, arrays, E=len(experts))
        vectors_ND, scores_NE = shapes.take("vectors", "N", "D"), shapes.take("scores", "N", "E")
        return cls(experts, vectors_ND, scores_NE, int(shapes.take("k", 1)[0]))

    def _nearest(self, cosines_N: Vector) -> NDArray[np.intp]:
        """Rows of the K highest, the highest first."""
        if self._k < len(cosines_N):
            # All rows that tie with the last one: which of them a partition leaves in is not defined.
            least = np.partition(cosines_N, len(cosines_N) - self._k)[len(cosines_N) - self._k]
            found = np.flatnonzero(cosines_N >= least)
        else:
            found = np.arange(len(cosines_N))
        return found[np.argsort(-cosines_N[found], kind="stable")][: self._k]
