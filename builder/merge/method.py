"""What a merge method is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from builder.checkpoints import Array


class Method(Protocol):
    """A pure function of one tensor's values in each member, all of one shape, and the members' weights."""

    def __call__(self, tensors: Sequence[Array], weights: Sequence[float]) -> Array:
        """The merged tensor, float32, of the same shape."""
        ...
