"""One tensor of one input, wherever it comes from: stored, with an adapter on it, permuted, or by another vocabulary.

Each reads any part of itself on demand; nothing of it is held but what a piece needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from builder import kernels
from builder.adapters import LowRank
from builder.checkpoints import Array, Tensor
from builder.errors import MergeError
from builder.merge.inputs import Source

BLOCK_ROWS = 16
"""Rows of a low-rank product computed at a time, whatever part is asked for: its rounding may depend on the shape."""


class Store(Protocol):
    """A file or folder of tensors."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def stored(self, name: str) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Stored:
    """A tensor as a checkpoint has it."""

    store: Store
    name: str
    label: str

    @property
    def shape(self) -> tuple[int, ...]:
        """From the header."""
        return self.store.tensors[self.name].shape

    @cached_property
    def _flat(self) -> NDArray[Any]:
        return self.store.stored(self.name)

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """A view of the file."""
        return self._flat[start:stop]


@dataclass(frozen=True)
class Adapted:
    """W + scale left @ right."""

    source: Source
    update: LowRank

    @property
    def label(self) -> str:
        """The base's."""
        return self.source.label

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's."""
        return self.source.shape

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """In fp32."""
        rows, columns = self.shape
        step = BLOCK_ROWS * columns
        first, last = start // step * BLOCK_ROWS, min(-(-stop // step) * BLOCK_ROWS, rows)
        values = loaded(self.source, first * columns, last * columns).reshape(-1, columns)
        out = np.empty((last - first, columns), np.float32)
        for row in range(first, last, BLOCK_ROWS):
            here, there = slice(row - first, row - first + BLOCK_ROWS), slice(row, row + BLOCK_ROWS)
            product = self.update.left[there] @ self.update.right
            out[here] = values[here] + np.float32(self.update.scale) * product
        return out.reshape(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True)
class Permuted:
    """W with its axes in another order; None leaves an axis as it is."""

    source: Source
    axes: Sequence[NDArray[np.intp] | None]

    @property
    def label(self) -> str:
        """The tensor's."""
        return self.source.label

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return self.source.shape

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """In the dtype of the tensor."""
        columns = self.shape[-1] if len(self.shape) > 1 else 1
        values = self.source.stored(0, int(np.prod(self.shape))).reshape(-1, columns)
        first, last = start // columns, -(-stop // columns)
        rows = np.arange(first, last) if self.axes[0] is None else self.axes[0][first:last]
        found = values[rows]
        if len(self.shape) > 1 and self.axes[1] is not None:
            found = found[:, self.axes[1]]
        return found.reshape(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True)
class Rows:
    """An embedding table by the merged vocabulary.

    own: this model's row for each token, -1 where it has none; stand_ins: rows whose mean is taken there, of this or
    another model's `tables`, zeros for none. Rows beyond the tokens are the mean of all tokens' rows.
    """

    source: Source
    own: NDArray[np.int64]
    stand_ins: Mapping[int, Sequence[tuple[str, int]]]
    tables: Mapping[str, Source]
    rows: int

    @property
    def label(self) -> str:
        """The table's."""
        return self.source.label

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as the merged table has."""
        return (self.rows, *self.source.shape[1:])

    @cached_property
    def _columns(self) -> int:
        return int(np.prod(self.source.shape[1:]))

    @cached_property
    def _padding(self) -> Array:
        """The mean of all tokens' rows."""
        total, columns, tokens = np.zeros(self._columns), self._columns, len(self.own)
        for first in range(0, tokens, BLOCK_ROWS):
            values = self.stored(first * columns, min(first + BLOCK_ROWS, tokens) * columns)
            total += values.reshape(-1, columns).sum(axis=0, dtype=np.float64)
        return (total / max(tokens, 1)).astype(np.float32)

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """In fp32; rows that follow each other in the table are read at once."""
        columns = self._columns
        first, last = start // columns, -(-stop // columns)
        out = np.empty((last - first, columns), np.float32)
        known = self.own[first:last]
        breaks = np.flatnonzero((np.diff(known) != 1) | (known[1:] < 1)) + 1
        for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(known)], strict=True):
            if begin == end:
                continue
            if known[begin] >= 0:
                row = int(known[begin])
                values = loaded(self.source, row * columns, (row + end - begin) * columns)
                out[begin:end] = values.reshape(-1, columns)
            else:
                out[begin] = self._row(first + begin)
        if len(known) < last - first:
            out[len(known) :] = self._padding
        return out.reshape(-1)[start - first * columns : stop - first * columns]

    def _row(self, token: int) -> Array:
        row, columns = int(self.own[token]), self._columns
        if row >= 0:
            return loaded(self.source, row * columns, (row + 1) * columns)
        found = [(self.tables[model], place) for model, place in self.stand_ins[token] if model in self.tables]
        if not found:
            return np.zeros(columns, np.float32)
        total = sum(loaded(table, place * columns, (place + 1) * columns).astype(np.float64) for table, place in found)
        return np.asarray(total / len(found), np.float32)


def loaded(source: Source, start: int, stop: int) -> Array:
    """A part of a tensor as float32. Raises MergeError for NaN or inf."""
    values, finite = kernels.load(source.stored(start, stop))
    if not finite:
        raise MergeError(f"{source.label} holds NaN or inf: fetch the model again, or leave it out")
    return values
