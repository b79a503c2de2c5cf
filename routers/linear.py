"""The paper's router: one gate vector an expert, from what it is for minus what the others are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np

from routers.base import Vector
from routers.errors import BundleError


class LinearRouter:
    """scores = G h, with g_e = normalise(mean h(positive prompts) - mean h(negative prompts)) (PAPER.md 5)."""

    kind: ClassVar[str] = "linear"

    def __init__(self, experts: tuple[str, ...], gates_ED: Vector) -> None:
        self._experts = experts
        self._gates_ED = gates_ED

    @classmethod
    def from_vectors(cls, positives: Mapping[str, Sequence[Vector]], negatives: Mapping[str, Sequence[Vector]]) -> Self:
        """Gates from the vectors of each expert's prompts; only the negatives may be none."""
        gates = []
        for expert, own in positives.items():
            against = negatives[expert]
            direction_D = np.mean(own, axis=0) - (np.mean(against, axis=0) if len(against) else 0.0)
            gates.append(direction_D / max(float(np.linalg.norm(direction_D)), 1e-12))
        return cls(tuple(positives), np.stack(gates).astype(np.float32))

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    def estimate(self, vector_D: Vector) -> Vector:
        """Cosines of the prompt with each gate, [E]."""
        scores_E: Vector = self._gates_ED @ vector_D
        return scores_E

    def arrays(self) -> dict[str, Vector]:
        return {"gates": self._gates_ED}

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Mapping[str, Vector]) -> Self:
        gates_ED = arrays.get("gates")
        if gates_ED is None or gates_ED.ndim != 2 or len(gates_ED) != len(experts):
            found = "none" if gates_ED is None else str(gates_ED.shape)
            raise BundleError(f"the linear router needs gates for {len(experts)} experts, found {found}: build again")
        return cls(experts, gates_ED)
