"""The baseline that every other router must beat: the same estimate for every prompt."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Arrays, Estimate, Evidence, Vector
from routers.shapes import Shapes


class FixedRouter:
    """Expects of every expert what it scored on the whole; so the best single expert answers everything."""

    kind: ClassVar[str] = "fixed"
    dimension: ClassVar[None] = None

    def __init__(self, experts: tuple[str, ...], quality_E: Vector, std_E: Vector) -> None:
        self._experts = experts
        self._estimate = Estimate(quality_E, std_E, Evidence("none"))

    @classmethod
    def fit(cls, experts: tuple[str, ...], vectors_ND: Vector, scores_NE: NDArray[np.float64], seed: int = 0) -> Self:
        """Means and deviations of the scores; the vectors do not matter."""
        return cls(experts, scores_NE.mean(axis=0).astype(np.float32), scores_NE.std(axis=0).astype(np.float32))

    @classmethod
    def always(cls, experts: tuple[str, ...], expert: str) -> Self:
        """The router that always picks `expert`."""
        quality_E = np.array([name == expert for name in experts], np.float32)
        return cls(experts, quality_E, np.zeros(len(experts), np.float32))

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    def estimate(self, vector_D: Vector) -> Estimate:
        return self._estimate

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"quality": self._estimate.quality_E, "std": self._estimate.std_E}

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Arrays) -> Self:
        shapes = Shapes(cls.kind, arrays, E=len(experts))
        return cls(experts, shapes.take("quality", "E"), shapes.take("std", "E"))
