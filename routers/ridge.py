"""Ridge regression from vectors to scores, in closed form (DUME, arXiv 2603.29765, with scores for domains).

E experts, D features, N prompts, P = D + 1 with the constant, S sets of prompts.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Arrays, Estimate, Evidence, Vector
from routers.shapes import Shapes

Sums = NDArray[np.float64]

STRENGTHS = tuple(float(10.0**power) for power in np.arange(-2, 3.01, 0.25))
"""Penalties that are tried; vectors have length one."""


class RidgeRouter:
    """quality_e = w_e h + c_e; the penalty is that of the least generalised cross-validation error.

    What it was fitted on is kept as sums (X'X, X'Y, Y'Y, N), so an expert can be added later by its own prompts and
    scores, without those of the others. Experts that were scored on the same prompts share a set of sums.
    """

    kind: ClassVar[str] = "ridge"

    def __init__(
        self,
        experts: tuple[str, ...],
        grams_SPP: Sums,
        counts_S: Sums,
        sets_E: NDArray[np.int64],
        moments_EP: Sums,
        squares_E: Sums,
        solved: tuple[Vector, Vector, Vector] | None = None,
    ) -> None:
        self._experts = experts
        self._grams_SPP, self._counts_S, self._sets_E = grams_SPP, counts_S, sets_E
        self._moments_EP, self._squares_E = moments_EP, squares_E
        # Stored solutions give the same bits on a machine whose LAPACK would not.
        self._weights_EP, self._inverses_SPP, self._residual_E = solved or self._solve()

    @classmethod
    def fit(cls, experts: tuple[str, ...], vectors_ND: Vector, scores_NE: NDArray[np.float64], seed: int = 0) -> Self:
        """No randomness: the seed does not matter."""
        gram_PP, moments_EP, squares_E = _sums(vectors_ND, scores_NE)
        sets_E = np.zeros(len(experts), np.int64)
        return cls(experts, gram_PP[None], np.array([float(len(vectors_ND))]), sets_E, moments_EP, squares_E)

    def with_expert(self, expert: str, vectors_ND: Vector, scores_N: NDArray[np.float64]) -> Self:
        """This router and one expert more, known by its own prompts and scores alone."""
        gram_PP, moments_EP, squares_E = _sums(vectors_ND, scores_N[:, None])
        same = [s for s, known_PP in enumerate(self._grams_SPP) if np.array_equal(known_PP, gram_PP)]
        grams_SPP, counts_S = self._grams_SPP, self._counts_S
        if not same:
            grams_SPP = np.concatenate([grams_SPP, gram_PP[None]])
            counts_S = np.append(counts_S, float(len(vectors_ND)))
        return type(self)(
            (*self._experts, expert),
            grams_SPP,
            counts_S,
            np.append(self._sets_E, same[0] if same else len(grams_SPP) - 1),
            np.concatenate([self._moments_EP, moments_EP]),
            np.concatenate([self._squares_E, squares_E]),
        )

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    @property
    def dimension(self) -> int:
        return int(self._weights_EP.shape[1]) - 1

    def estimate(self, vector_D: Vector) -> Estimate:
        """The spread grows where the vector is unlike those of the fit (the leverage)."""
        vector_P = np.append(vector_D, np.float32(1))
        leverage_S = np.array([vector_P @ (inverse_PP @ vector_P) for inverse_PP in self._inverses_SPP], np.float32)
        std_E = self._residual_E * np.sqrt(1 + np.maximum(leverage_S, 0))[self._sets_E]
        return Estimate(self._weights_EP @ vector_P, std_E.astype(np.float32), Evidence("weights"))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "grams": self._grams_SPP,
            "counts": self._counts_S,
            "sets": self._sets_E,
            "moments": self._moments_EP,
            "squares": self._squares_E,
            "weights": self._weights_EP,
            "inverses": self._inverses_SPP,
            "residual": self._residual_E,
        }

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Arrays) -> Self:
        shapes = Shapes(cls.kind, arrays, E=len(experts))
        solved = (
            shapes.take("weights", "E", "P"),
            shapes.take("inverses", "S", "P", "P"),
            shapes.take("residual", "E"),
        )
        return cls(
            experts,
            shapes.take("grams", "S", "P", "P"),
            shapes.take("counts", "S"),
            shapes.take("sets", "E"),
            shapes.take("moments", "E", "P"),
            shapes.take("squares", "E"),
            solved,
        )

    def _solve(self) -> tuple[Vector, Vector, Vector]:
        weights_EP = np.empty_like(self._moments_EP)
        residual_E = np.empty_like(self._squares_E)
        inverses = []
        for number, gram_PP in enumerate(self._grams_SPP):
            own = self._sets_E == number
            inverse_PP, weights, residual = _ridge(
                gram_PP, self._counts_S[number], self._moments_EP[own], self._squares_E[own]
            )
            inverses.append(inverse_PP)
            weights_EP[own], residual_E[own] = weights, residual
        single = np.float32
        return weights_EP.astype(single), np.stack(inverses).astype(single), residual_E.astype(single)


def _sums(vectors_ND: Vector, scores_NE: NDArray[np.float64]) -> tuple[Sums, Sums, Sums]:
    rows_NP = np.concatenate([vectors_ND, np.ones((len(vectors_ND), 1), np.float32)], axis=1).astype(np.float64)
    return rows_NP.T @ rows_NP, scores_NE.T @ rows_NP, (scores_NE**2).sum(axis=0)


def _ridge(gram_PP: Sums, count: float, moments_EP: Sums, squares_E: Sums) -> tuple[Sums, Sums, Sums]:
    """Inverse [P, P], weights [E, P] and residual deviations [E]; the constant bears no penalty.

    With the means taken out, all penalties share one eigendecomposition.
    """
    mean_D, score_E = gram_PP[-1, :-1] / count, moments_EP[:, -1] / count
    values_D, axes_DD = np.linalg.eigh(gram_PP[:-1, :-1] - count * np.outer(mean_D, mean_D))
    values_D = np.maximum(values_D, 0)
    turned_ED = (moments_EP[:, :-1] - count * np.outer(score_E, mean_D)) @ axes_DD
    spread_E = np.maximum(squares_E - count * score_E**2, 0)

    def errors(penalty: float) -> tuple[float, Sums]:
        shrunk_ED = turned_ED / (values_D + penalty)
        left_E = spread_E - (shrunk_ED * (2 * turned_ED - shrunk_ED * values_D)).sum(axis=1)
        freedom = count - 1 - float((values_D / (values_D + penalty)).sum())
        left_E = np.maximum(left_E, 0)
        return float(left_E.sum()) / max(freedom, 1e-9) ** 2, np.sqrt(left_E / max(freedom, 1.0))

    penalty = min(STRENGTHS, key=lambda each: errors(each)[0])
    inverse_DD = (axes_DD / (values_D + penalty)) @ axes_DD.T
    weights_ED = (turned_ED / (values_D + penalty)) @ axes_DD.T
    # The inverse as a quadratic form of (h, 1): the distance from the mean.
    edge_D = -inverse_DD @ mean_D
    inverse_PP = np.block([[inverse_DD, edge_D[:, None]], [edge_D[None], mean_D @ inverse_DD @ mean_D + 1 / count]])
    weights_EP = np.concatenate([weights_ED, (score_E - weights_ED @ mean_D)[:, None]], axis=1)
    return inverse_PP, weights_EP, errors(penalty)[1]
