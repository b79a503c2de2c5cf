"""The baseline that every other router must beat: always the same expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np

from routers.base import Vector
from routers.errors import BundleError


class FixedRouter:
    """Scores one for its expert and zero for the others, whatever the prompt."""

    kind: ClassVar[str] = "fixed"

    def __init__(self, experts: tuple[str, ...], scores_E: Vector) -> None:
        self._experts = experts
        self._scores_E = scores_E

    @classmethod
    def always(cls, experts: tuple[str, ...], expert: str) -> Self:
        """The router that always picks `expert`."""
        return cls(experts, np.array([name == expert for name in experts], np.float32))

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    def estimate(self, vector_D: Vector) -> Vector:
        """The same scores [E] for every prompt."""
        return self._scores_E

    def arrays(self) -> dict[str, Vector]:
        return {"scores": self._scores_E}

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Mapping[str, Vector]) -> Self:
        scores_E = arrays.get("scores")
        if scores_E is None or scores_E.shape != (len(experts),):
            raise BundleError(f"the fixed router needs scores for {len(experts)} experts: build again")
        return cls(experts, scores_E)
