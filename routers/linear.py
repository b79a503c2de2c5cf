"""The paper's router: one gate vector a subject, from what it is about minus what the others are about.

E experts, G gates, D features, N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Arrays, Estimate, Evidence, Near, Vector, unit
from routers.errors import BundleError
from routers.folds import folds
from routers.shapes import Shapes

INNER_FOLDS = 5


class LinearRouter:
    """quality = bias + scale * (G h), with g = normalise(mean h(positive) - mean h(negative)) (PAPER.md 5).

    Without scores the bias is zero and the scale one, as in the paper. With scores the bias is what makes an expert's
    mean estimate its mean score: prompt vectors without it lose to the best single expert. An expert's gate is its
    best one; the paper has one gate an expert, but a merged expert answers for several subjects, and the mean of their
    prompts would point at none of them.
    """

    kind: ClassVar[str] = "linear"

    def __init__(
        self,
        experts: tuple[str, ...],
        gates_GD: Vector,
        owners_GE: Vector,
        bias_E: Vector | None = None,
        scale: float = 1.0,
        std_E: Vector | None = None,
    ) -> None:
        self._experts = experts
        self._gates_GD = gates_GD
        self._owners_GE = owners_GE
        self._bias_E = np.zeros(len(experts), np.float32) if bias_E is None else bias_E
        self._scale = np.float32(scale)
        self._std_E = np.ones(len(experts), np.float32) if std_E is None else std_E

    @classmethod
    def from_vectors(cls, experts: Mapping[str, Sequence[str]], subjects: Mapping[str, Sequence[Vector]]) -> Self:
        """Gates from the prompt vectors of each subject, those of all others against it; `experts` own subjects.

        An expert has one subject at least, a subject one expert or several.
        """
        gates = []
        for subject, own in subjects.items():
            others = [vector for other, vectors in subjects.items() if other != subject for vector in vectors]
            gates.append(np.mean(own, axis=0) - (np.mean(others, axis=0) if others else 0.0))
        owners = [[subject in owned for owned in experts.values()] for subject in subjects]
        return cls(tuple(experts), unit(np.stack(gates)), np.array(owners, np.float32))

    @classmethod
    def fit(cls, experts: tuple[str, ...], vectors_ND: Vector, scores_NE: NDArray[np.float64], seed: int = 0) -> Self:
        """Every prompt is a positive of the experts that do better on it than the mean expert, by how much.

        Bias and scale are fitted on gates that did not see the prompt.
        """
        cosines_NE = np.empty(scores_NE.shape, np.float32)
        for held_N in folds(len(vectors_ND), INNER_FOLDS, seed):
            gates_ED = _advantage_gates(vectors_ND[~held_N], scores_NE[~held_N])
            cosines_NE[held_N] = vectors_ND[held_N] @ gates_ED.T
        gates_ED = _advantage_gates(vectors_ND, scores_NE)
        return cls(experts, gates_ED, np.eye(len(experts), dtype=np.float32))._fitted_to(cosines_NE, scores_NE)

    def calibrated(self, vectors_ND: Vector, scores_NE: NDArray[np.float64]) -> Self:
        """The same gates with bias, scale and spread from prompts that they were not made of."""
        return self._fitted_to(np.stack([self._cosines(vector_D) for vector_D in vectors_ND]), scores_NE)

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    @property
    def dimension(self) -> int:
        return int(self._gates_GD.shape[1])

    def owners(self, gate: int) -> tuple[str, ...]:
        """The experts that a gate speaks for."""
        return tuple(name for name, owns in zip(self._experts, self._owners_GE[gate], strict=True) if owns)

    def estimate(self, vector_D: Vector) -> Estimate:
        cosines_G = self._gates_GD @ vector_D
        quality_E = self._bias_E + self._scale * self._best(cosines_G)
        near = tuple(Near(int(gate), float(cosines_G[gate])) for gate in np.argsort(-cosines_G, kind="stable"))
        return Estimate(quality_E, self._std_E, Evidence("gates", near))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "gates": self._gates_GD,
            "owners": self._owners_GE,
            "bias": self._bias_E,
            "scale": np.array([self._scale], np.float32),
            "std": self._std_E,
        }

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Arrays) -> Self:
        shapes = Shapes(cls.kind, arrays, E=len(experts))
        gates_GD, owners_GE = shapes.take("gates", "G", "D"), shapes.take("owners", "G", "E")
        if not owners_GE.any(axis=0).all():
            raise BundleError(f"the linear router needs a gate for each of {len(experts)} experts: build it again")
        scale = float(shapes.take("scale", 1)[0])
        return cls(experts, gates_GD, owners_GE, shapes.take("bias", "E"), scale, shapes.take("std", "E"))

    def _cosines(self, vector_D: Vector) -> Vector:
        return self._best(self._gates_GD @ vector_D)

    def _best(self, cosines_G: Vector) -> Vector:
        best_E: Vector = np.where(self._owners_GE > 0, cosines_G[:, None], np.float32(-np.inf)).max(axis=0)
        return best_E

    def _fitted_to(self, cosines_NE: Vector, scores_NE: NDArray[np.float64]) -> Self:
        """Least squares with one slope for all experts: what a cosine is worth, in score, to any of them."""
        mean_E, centre_E = scores_NE.mean(axis=0), cosines_NE.mean(axis=0)
        # What all experts share, an easy prompt, says nothing about whom to pick.
        advantages_NE = (scores_NE - mean_E) - (scores_NE - mean_E).mean(axis=1, keepdims=True)
        moved_NE = (cosines_NE - centre_E) - (cosines_NE - centre_E).mean(axis=1, keepdims=True)
        scale = max(float((moved_NE * advantages_NE).sum() / max(float((moved_NE**2).sum()), 1e-12)), 0.0)
        bias_E = mean_E - scale * centre_E
        std_E = (scores_NE - bias_E - scale * cosines_NE).std(axis=0)
        return type(self)(
            self._experts,
            self._gates_GD,
            self._owners_GE,
            bias_E.astype(np.float32),
            scale,
            std_E.astype(np.float32),
        )


def _advantage_gates(vectors_ND: Vector, scores_NE: NDArray[np.float64]) -> Vector:
    advantages_NE = scores_NE - scores_NE.mean(axis=1, keepdims=True)

    def mean(weights_NE: NDArray[np.float64]) -> NDArray[np.float64]:
        weighted_ED: NDArray[np.float64] = weights_NE.T @ vectors_ND
        mean_ED: NDArray[np.float64] = weighted_ED / np.maximum(weights_NE.sum(axis=0), 1e-12)[:, None]
        return mean_ED

    gates_ED = mean(np.maximum(advantages_NE, 0)) - mean(np.maximum(-advantages_NE, 0))
    return unit(gates_ED.astype(np.float32))
