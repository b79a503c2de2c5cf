"""A router estimates how well every expert would answer a prompt; what is done with it is the policy's business.

Array names carry their shape: E experts, D features, N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Near:
    """Something that an estimate leans on, by its number among the router's own, and its cosine with the prompt."""

    index: int
    similarity: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an estimate rests on, the nearest first.

    gates: subjects' prompt vectors. clusters, neighbours: of the prompts that the router was fitted on. weights: a
    formula of the vector alone. none: the prompt did not matter.
    count: prompts with known scores that the estimate is a mean of; 0 where it is none.
    """

    kind: Literal["gates", "clusters", "neighbours", "weights", "none"]
    near: tuple[Near, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """For one prompt: each expert's expected score [E], and the standard deviation of scores around it [E]."""

    quality_E: Vector
    std_E: Vector
    evidence: Evidence


class Router(Protocol):
    """Estimates every expert for one prompt. Pure: the same vector gives the same estimate in every process."""

    kind: ClassVar[str]

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in the order of the estimates."""
        ...

    @property
    def dimension(self) -> int | None:
        """D of the vectors that it takes; None for any."""
        ...

    def estimate(self, vector_D: Vector) -> Estimate:
        """Expected quality, its spread and the evidence; equal everywhere when the router knows nothing."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a bundle stores."""
        ...

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Arrays) -> Self:
        """The router that `arrays()` came from; raises BundleError where shapes do not fit the experts."""
        ...


class Fitted(Router, Protocol):
    """A router that learns from scores: never from which expert was best, for most prompts have several (ties)."""

    @classmethod
    def fit(cls, experts: tuple[str, ...], vectors_ND: Vector, scores_NE: NDArray[np.float64], seed: int) -> Self:
        """The router for prompts whose scores under every expert are known. Same inputs and seed, same router."""
        ...


def unit(vectors: Vector) -> Vector:
    """Rows, or one vector, divided by their length; zeros stay zeros."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    scaled: Vector = (vectors / lengths).astype(np.float32)
    return scaled
