"""Takes a router's arrays out of a bundle, or says which one does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.base import Arrays
from routers.errors import BundleError

Size = int | str


class Shapes:
    """Reads arrays by name and checks their shapes; a letter stands for the same size wherever it is used.

    Raises BundleError that names the router, the array and both shapes.
    """

    def __init__(self, kind: str, arrays: Arrays, **sizes: int) -> None:
        self._kind = kind
        self._arrays = arrays
        self._sizes = dict(sizes)

    def take(self, name: str, *shape: Size) -> NDArray[Any]:
        """The array, of that shape, all of it finite."""
        array = self._arrays.get(name)
        if array is None:
            raise BundleError(f"the {self._kind} router has no {name}: build it again")
        if array.ndim != len(shape) or not all(map(self._fits, shape, array.shape)):
            wanted = ", ".join(str(self._sizes.get(size, size) if isinstance(size, str) else size) for size in shape)
            raise BundleError(
                f"the {self._kind} router's {name} has the shape {array.shape}, not ({wanted}): build it again"
            )
        if not np.isfinite(array).all():
            raise BundleError(f"the {self._kind} router's {name} holds NaN or inf: build it again")
        return array

    def _fits(self, size: Size, found: int) -> bool:
        return found == (self._sizes.setdefault(size, found) if isinstance(size, str) else size)
