"""A router scores the experts for a prompt's vector; the policy turns the scores into a route.

Array names carry their shape: E experts, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from routers.errors import RoutingError

Vector = NDArray[np.float32]
Reason = Literal["top_score", "no_evidence", "fixed", "pinned"]


class Router(Protocol):
    """Scores every expert for one prompt. Pure: the same vector gives the same scores in every process."""

    kind: ClassVar[str]

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in the order of the scores."""
        ...

    def estimate(self, vector_D: Vector) -> Vector:
        """Scores [E], higher is better; equal everywhere when the vector says nothing."""
        ...

    def arrays(self) -> dict[str, Vector]:
        """What a bundle stores."""
        ...

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Mapping[str, Vector]) -> Self:
        """The router that `arrays()` came from; raises BundleError where shapes do not fit the experts."""
        ...


@dataclass(frozen=True, slots=True)
class Ranked:
    """One expert's place in a route; weights are over the selected experts and sum to one."""

    expert: str
    score: float
    selected: bool
    weight: float


@dataclass(frozen=True, slots=True)
class Route:
    """The decision for one prompt, best expert first; made once and kept for the whole answer."""

    ranking: tuple[Ranked, ...]
    reason: Reason

    @property
    def expert(self) -> str:
        """The expert that answers."""
        return self.ranking[0].expert

    @property
    def margin(self) -> float:
        """How far the first is ahead of the second, in score; 0.0 for a lone expert."""
        return self.ranking[0].score - self.ranking[1].score if len(self.ranking) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Policy:
    """Top-k over the scores, softmax weights among the k (paper: softmax in fp32, renormalised over the k)."""

    default: str
    k: int = 1

    def decide(self, experts: tuple[str, ...], scores_E: Vector, *, fixed: bool, k: int | None = None) -> Route:
        """The route for `scores_E`; `k` overrides the bundle's. Raises RoutingError for a k out of 1..E.

        Ties go to the default expert, then to the order in the bundle, on every machine.
        """
        k = self.k if k is None else k
        if not 1 <= k <= len(experts):
            raise RoutingError(f"k must be between 1 and {len(experts)}, the number of experts; got {k}")
        favoured = np.array([expert != self.default for expert in experts])
        order = np.lexsort((np.arange(len(experts)), favoured, -scores_E))
        weights_K = _softmax(scores_E[order[:k]])
        ranking = tuple(
            Ranked(experts[e], float(scores_E[e]), rank < k, float(weights_K[rank]) if rank < k else 0.0)
            for rank, e in enumerate(order)
        )
        silent = len(experts) > 1 and bool(np.all(scores_E == scores_E[0]))
        return Route(ranking, "fixed" if fixed else "no_evidence" if silent else "top_score")


def pin(experts: tuple[str, ...], expert: str) -> Route:
    """The route of a request that names its expert. Raises RoutingError for one that is not there."""
    if expert not in experts:
        raise RoutingError(f"no model {expert!r}; there are: auto, {', '.join(experts)}")
    others = (Ranked(other, 0.0, False, 0.0) for other in experts if other != expert)
    return Route((Ranked(expert, 0.0, True, 1.0), *others), "pinned")


def _softmax(scores_K: Vector) -> Vector:
    exp_K = np.exp(scores_K.astype(np.float32) - scores_K.max())
    weights_K: Vector = exp_K / exp_K.sum()
    return weights_K
