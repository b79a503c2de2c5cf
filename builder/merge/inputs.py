"""What a merge method sees of one tensor: its values in every input, piece by piece, as often as the method looks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from keyword import iskeyword
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from builder import kernels
from builder.errors import MergeError
from builder.merge.method import Method

Values = Any
"""K elements, flat, float32, on the device: numpy's array or torch's tensor."""
PIECE = 1 << 17
"""Elements of a piece on a processor: a few of them fit its cache."""


class Source(Protocol):
    """One tensor of one input, wherever it comes from."""

    @property
    def label(self) -> str:
        """What to call it in a sentence: model and tensor."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        ...

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """Elements `start` to `stop` of the flat tensor: float32, float16, or uint16 for the bits of bfloat16."""
        ...


class Arrays(Protocol):
    """The inner loops on one kind of device; kernels.py says what each does, and every device gives the same bits."""

    xp: Any
    """The module of elementwise functions: numpy, or torch."""

    def load(self, stored: NDArray[Any]) -> tuple[Values, bool]: ...
    def store(self, values: Values, dtype: str) -> tuple[NDArray[Any], bool]: ...
    def host(self, values: Values) -> NDArray[Any]: ...
    def device(self, values: NDArray[Any]) -> Values: ...
    def doubles(self, values: Values) -> Values: ...
    def singles(self, values: Values) -> Values: ...
    def combine(self, arrays: Sequence[Values], factors: Sequence[float]) -> Values: ...
    def combine_stored(self, stored: Sequence[NDArray[Any]], factors: Sequence[float]) -> tuple[Values, bool]: ...
    def dots(self, a: Values, b: Values) -> NDArray[np.float64]: ...
    def row_dots(self, a: Values, b: Values, rows: int) -> NDArray[np.float64]: ...
    def magnitudes(self, a: Values, rows: int | None = None) -> NDArray[np.float64]: ...
    def count(self, values: Values, magnitude: bool, within: int | None, counts: NDArray[np.int64]) -> None: ...
    def top(self, values: Values, magnitude: bool, cut: int, room: int) -> tuple[Any, int]: ...
    def packed(self, mask: Any) -> Any: ...
    def unpacked(self, bits: Any, size: int) -> Any: ...
    def masked(self, values: Values, mask: Any) -> Values: ...
    def bernoulli(self, key: int, start: int, size: int, p: float) -> Any: ...
    def bernoulli_by_rank(self, key: int, start: int, ranks: Any, low: float, step: float) -> Any: ...
    def ranks(self, values: Values, rows: int, columns: int) -> Any: ...
    def consensus(
        self, deltas: Sequence[Values], weights: Sequence[float], votes: Sequence[float], normalize: bool
    ) -> Values: ...


@dataclass(frozen=True)
class Piece:
    """A stretch of the flat tensor in every input.

    start: where it begins. rows, columns: its shape when whole rows were asked for.
    """

    start: int
    rows: int
    columns: int
    values: list[Values]
    base: Values | None
    statistics: list[Values]

    @cached_property
    def deltas(self) -> list[Values]:
        """The task vectors d_i = x_i - b; the values themselves without a base."""
        return self.values if self.base is None else [value - self.base for value in self.values]

    def matrix(self, values: Values) -> Values:
        """The piece's values as [rows, columns]."""
        return values.reshape(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the k largest end: keys above `key`, and the first `room` of those equal to it."""

    key: int
    room: int


EVERYTHING, NOTHING = Cut(-1, 0), Cut(2**32 - 1, 0)


class Top:
    """Marks the k largest elements as pieces go by in order; equal ones at the border by index."""

    def __init__(self, arrays: Arrays, cut: Cut, *, magnitude: bool = True) -> None:
        self._arrays, self._key, self._room, self._magnitude = arrays, cut.key, cut.room, magnitude

    def mask(self, values: Values) -> Any:
        """Which of the piece's elements are among them."""
        if self._key < 0:
            return values == values
        mask, equal = self._arrays.top(values, self._magnitude, self._key, self._room)
        self._room -= min(equal, self._room)
        return mask


Vectors = Callable[[Piece], Sequence[Values]]


@dataclass(frozen=True)
class Inputs:
    """One tensor of every input of a merge.

    sources: the inputs beside the base, in the recipe's order; all of one shape.
    statistics: of each source where the method needs them, None where a model has none for this tensor.
    seed: of random methods; the same numbers for any piece size, thread or device.
    """

    name: str
    sources: Sequence[Source]
    base: Source | None = None
    statistics: Sequence[Source | None] = ()
    seed: int = 0
    arrays: Arrays = kernels
    piece: int = PIECE

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return (self.base or self.sources[0]).shape

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Length of a row: the last axis; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    def pieces(self, *, row: int | None = None) -> Iterator[Piece]:
        """The tensor from start to end, in whole blocks of the fp64 sums; with `row`, in whole rows of that length.

        Raises MergeError for NaN or inf.
        """
        if not self.size:
            return
        unit = row or kernels.BLOCK
        step = max(self.piece // unit, 1) * unit
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            yield Piece(
                start,
                rows=(stop - start) // row if row else 1,
                columns=row or stop - start,
                values=[self._load(source, start, stop) for source in self.sources],
                base=None if self.base is None else self._load(self.base, start, stop),
                statistics=[
                    self._load(s, start, stop) for s in self.statistics if s is not None and s.shape == self.shape
                ],
            )

    def combined(self, factors: Sequence[float]) -> Iterator[Values]:
        """sum_i c_i x_i by pieces, in one look at what is stored. Raises MergeError for NaN or inf."""
        step = max(self.piece // kernels.BLOCK, 1) * kernels.BLOCK
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            stored = [source.stored(start, stop) for source in self.sources]
            values, finite = self.arrays.combine_stored(stored, factors)
            if not finite:
                for source in self.sources:
                    self._load(source, start, stop)  # says whose
            yield values

    def _load(self, source: Source, start: int, stop: int) -> Values:
        values, finite = self.arrays.load(source.stored(start, stop))
        if not finite:
            raise MergeError(f"{source.label} holds NaN or inf: fetch the model again, or leave it out")
        return values

    def key(self, i: int) -> int:
        """What tells the random numbers of input i for this tensor from all others."""
        text = f"{self.seed} {i} {self.name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def gram(self, vectors: Vectors) -> NDArray[np.float64]:
        """All dot products of n vectors, [n, n]: exact products, summed in fp64 by blocks, the blocks exactly."""
        parts: dict[tuple[int, int], list[NDArray[np.float64]]] = {}
        n = 0
        for piece in self.pieces():
            found = vectors(piece)
            n = len(found)
            for i in range(n):
                for j in range(i, n):
                    parts.setdefault((i, j), []).append(self.arrays.dots(found[i], found[j]))
        gram = np.zeros((n, n))
        for (i, j), sums in parts.items():
            gram[i, j] = gram[j, i] = total(sums)
        return gram

    def cuts(self, vectors: Vectors, keep: Sequence[int]) -> list[Cut]:
        """For every vector where its `keep` largest magnitudes end."""
        return [clamped(each, k, self.size) for each, k in zip(self.borders(vectors, keep), keep, strict=True)]

    def borders(
        self, vectors: Vectors, keep: Sequence[int], *, magnitude: bool = True, row: int | None = None
    ) -> list[Cut]:
        """The key of every vector's k-th largest element, and how many of those equal to it are among the k.

        Two looks, each a histogram of half of the key's bits. k from 1 to the number of elements.
        """
        counts = np.zeros((len(keep), 2, kernels.BINS), np.int64)
        for piece in self.pieces(row=row):
            for table, values in zip(counts, vectors(piece), strict=True):
                self.arrays.count(values, magnitude, None, table)
        uppers = [bin_of(table, k) for table, k in zip(counts, keep, strict=True)]
        counts[:] = 0
        for piece in self.pieces(row=row):
            for table, values, (upper, _) in zip(counts, vectors(piece), uppers, strict=True):
                self.arrays.count(values, magnitude, upper, table)
        return [joined(upper, bin_of(table, room)) for table, (upper, room) in zip(counts, uppers, strict=True)]


def bin_of(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest of what was counted, and how many of that bin are among the k largest."""
    above = np.cumsum(counts.sum(axis=0)[::-1])
    place = int(np.searchsorted(above, max(k, 1)))
    place = min(place, kernels.BINS - 1)
    return kernels.BINS - 1 - place, k - (int(above[place - 1]) if place else 0)


def joined(upper: int, lower: tuple[int, int]) -> Cut:
    """The cut of an upper half of a key, and a lower half with its room."""
    return Cut(upper << 16 | lower[0], lower[1])


def clamped(cut: Cut, k: int, size: int) -> Cut:
    """The cut that keeps k of `size` elements, none and all included."""
    if k <= 0:
        return NOTHING
    return EVERYTHING if k >= size else cut


def total(sums: Sequence[NDArray[np.float64]]) -> float:
    """The exact sum of what the blocks hold, rounded once: no order of blocks changes it."""
    return math.fsum(np.concatenate(sums).tolist())


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory as a source."""

    values: NDArray[Any]
    label: str = "a tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return self.values.shape

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """A part of the flat array."""
        return self.values.reshape(-1)[start:stop]


def merge_arrays(
    method: str,
    tensors: Sequence[NDArray[np.float32]],
    base: NDArray[np.float32] | None = None,
    *,
    name: str = "x",
    seed: int = 0,
    piece: int = PIECE,
    statistics: Sequence[NDArray[np.float32] | None] = (),
    arrays: Arrays = kernels,
    **parameters: Any,
) -> NDArray[np.float32]:
    """One tensor merged in memory, float32. Parameters that are left out have their defaults."""
    from builder.merge import METHODS

    chosen = METHODS[method]
    given = {
        key: parameters.get(key, [each.default] * len(tensors) if each.per_model else each.default)
        for key, each in chosen.parameters.items()
        if each.kind != "path"
    }
    inputs = Inputs(
        name,
        [Held(tensor) for tensor in tensors],
        None if base is None else Held(base),
        [None if each is None else Held(each) for each in statistics] or [None] * len(tensors),
        seed,
        arrays,
        piece,
    )
    merged = [arrays.host(values) for values in run(chosen, inputs, given)]
    return np.concatenate(merged or [np.zeros(0, np.float32)]).reshape(inputs.shape)


def run(method: Method, inputs: Inputs, parameters: Mapping[str, Any]) -> Iterator[Values]:
    """The merged tensor's pieces; none of an empty tensor."""
    if not inputs.size:
        return iter(())
    return method.merge(inputs, **{f"{key}_" if iskeyword(key) else key: value for key, value in parameters.items()})
