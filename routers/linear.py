"""The paper's router: one gate vector a subject, from what it is about minus what the others are about.

E experts, G gates, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np

from routers.base import Vector
from routers.errors import BundleError


class LinearRouter:
    """logits = G h, with g = normalise(mean h(positive prompts) - mean h(negative prompts)) (PAPER.md 5).

    An expert's score is that of its best gate. The paper has one gate an expert; a merged expert answers for several
    subjects, and the mean of their prompts would point at none of them.
    """

    kind: ClassVar[str] = "linear"

    def __init__(self, experts: tuple[str, ...], gates_GD: Vector, owners_GE: Vector) -> None:
        self._experts = experts
        self._gates_GD = gates_GD
        self._owners_GE = owners_GE

    @classmethod
    def from_vectors(cls, experts: Mapping[str, Sequence[str]], subjects: Mapping[str, Sequence[Vector]]) -> Self:
        """Gates from the prompt vectors of each subject, those of all others against it; `experts` own subjects.

        An expert has one subject at least, a subject one expert or several.
        """
        gates = []
        for subject, own in subjects.items():
            others = [vector for other, vectors in subjects.items() if other != subject for vector in vectors]
            direction_D = np.mean(own, axis=0) - (np.mean(others, axis=0) if others else 0.0)
            gates.append(direction_D / max(float(np.linalg.norm(direction_D)), 1e-12))
        owners = [[subject in owned for owned in experts.values()] for subject in subjects]
        return cls(tuple(experts), np.stack(gates).astype(np.float32), np.array(owners, np.float32))

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    def estimate(self, vector_D: Vector) -> Vector:
        """The prompt's cosine with each expert's best gate, [E]."""
        scores_G1 = (self._gates_GD @ vector_D)[:, None]
        scores_E: Vector = np.where(self._owners_GE > 0, scores_G1, np.float32(-np.inf)).max(axis=0)
        return scores_E

    def arrays(self) -> dict[str, Vector]:
        return {"gates": self._gates_GD, "owners": self._owners_GE}

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Mapping[str, Vector]) -> Self:
        gates_GD, owners_GE = arrays.get("gates"), arrays.get("owners")
        if gates_GD is None or owners_GE is None or gates_GD.ndim != 2:
            raise BundleError("the linear router needs gates and their owners: build again")
        if owners_GE.shape != (len(gates_GD), len(experts)) or not owners_GE.any(axis=0).all():
            raise BundleError(f"the linear router needs a gate for each of {len(experts)} experts: build again")
        return cls(experts, gates_GD, owners_GE)
