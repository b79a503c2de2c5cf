"""How alike models are, weight by weight, every checkpoint read once and no more of it in memory than a few rows.

N models, P pairs of them, R rows, C columns of one matrix.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder import kernels
from builder.architecture import matrices
from builder.checkpoints import Array, Checkpoint
from builder.errors import CheckpointError

Matrix = NDArray[np.float64]
Pair = tuple[int, int]

PIECE = 1 << 17
"""Elements of a matrix in memory, of every model and thread, about."""
ROWS = 32
"""And at least so many rows, however long: sums are read and written once a piece."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """What two models have in common; a model's likeness to itself holds its squared norm.

    cosines: by part, the sum over matrices of the mean cosine of columns, and how many matrices there were to compare.
    dot: the dot product of the models' vectors of all these weights.
    """

    cosines: Mapping[str, tuple[float, int]]
    dot: float

    def mean(self, *parts: str) -> float:
        """The mean over the matrices of these parts; 1 where there is nothing that differs."""
        count = sum(self.cosines[part][1] for part in parts)
        return math.fsum(self.cosines[part][0] for part in parts) / count if count else 1.0


@dataclass(frozen=True, slots=True)
class Similarity:
    """Pairwise similarity of N models.

    parts: [N, N] of `all`, and of `attention` and `mlp` where the models' tensors have such names.
    dots: [N, N] dot products, from which follows the likeness of any weighted sum of the models to any other.
    """

    parts: dict[str, Matrix]
    dots: Matrix


def similarity(
    models: Sequence[Checkpoint],
    base: Checkpoint | None = None,
    done: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> Similarity:
    """The similarity of models of one family, or of their deltas from `base`."""
    pairs = all_pairs(len(models))
    return table(len(models), dict(zip(pairs, compare(models, pairs, base, done, threads), strict=True)))


def all_pairs(count: int) -> list[Pair]:
    """Every pair of `count` models, those with themselves included."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def table(count: int, likenesses: Mapping[Pair, Likeness]) -> Similarity:
    """Every pair's likeness as matrices."""
    every = tuple(likenesses[0, 0].cosines)
    parts = {"all": every} | {kind: (kind,) for kind in every if kind != "other"}
    found = Similarity({name: np.empty((count, count)) for name in parts}, np.empty((count, count)))
    for (i, j), likeness in likenesses.items():
        for name, kinds in parts.items():
            found.parts[name][i, j] = found.parts[name][j, i] = likeness.mean(*kinds)
        found.dots[i, j] = found.dots[j, i] = likeness.dot
    return found


def compare(
    models: Sequence[Checkpoint],
    pairs: Sequence[Pair],
    base: Checkpoint | None = None,
    done: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> list[Likeness]:
    """The likeness of each pair of models of one family, or of their deltas from `base`.

    sim(a, b) = the mean over matrices of the mean over columns j of cos(a[:, j], b[:, j]) (PAPER.md 3). A column that
    is zero in both is left out, as is a matrix of such columns: deltas of low rank leave most of a model alone. Sums
    are float64, as float32 gave a cosine of 1.028 on 134 M weights; neither the models' order nor `threads` changes a
    bit. `done` hears the bytes of each matrix read. Raises CheckpointError for a matrix with NaN or inf.
    """
    used = sorted({i for pair in pairs for i in pair})
    own = [(i, i) for i in used if (i, i) not in pairs]  # the norms
    places = [[used.index(i), used.index(j)] for i, j in (*pairs, *own)]
    comparison = _Comparison([models[i] for i in used], base, np.array(places, np.int64).reshape(-1, 2))
    kinds = matrices(models[used[0]])
    found = comparison.run(done, threads or len(os.sched_getaffinity(0)))
    return [
        _likeness([(kinds[name], found[name], p) for name in found], set(kinds.values())) for p in range(len(pairs))
    ]


def _likeness(rows: Sequence[tuple[str, _Compared, int]], kinds: set[str]) -> Likeness:
    """One pair's likeness; fsum rounds once, so no order of matrices matters."""
    cosines = {}
    for kind in sorted(kinds):
        means = [compared.means[p] for each, compared, p in rows if each == kind]
        known = [mean for mean in means if not math.isnan(mean)]
        cosines[kind] = (math.fsum(known), len(known))
    return Likeness(cosines, math.fsum(compared.dots[p] for _, compared, p in rows))


@dataclass(frozen=True, slots=True)
class _Compared:
    """One matrix of every pair: the mean cosine of columns, NaN where none is left; the dot product."""

    means: list[float]
    dots: list[float]


class _Stopped(Exception):
    """Another matrix failed."""


class _Comparison:
    """All pairs of the models, matrix by matrix; places[P, 2] are indices of models, each one's own among them."""

    def __init__(self, models: Sequence[Checkpoint], base: Checkpoint | None, places: NDArray[np.int64]) -> None:
        self._models, self._base, self._places = models, base, places
        self._own = {int(i): p for p, (i, j) in enumerate(places) if i == j}
        self._read = [*models, *([base] if base else [])]
        self._stop = threading.Event()

    def run(self, done: Callable[[int], None], threads: int) -> dict[str, _Compared]:
        """Every matrix, the largest first, so that no thread is left alone with one at the end."""
        tensors = {name: self._models[0].tensors[name] for name in matrices(self._models[0])}
        order = sorted((n for n, tensor in tensors.items() if tensor.elements), key=lambda n: (-tensors[n].elements, n))

        def job(place: int) -> _Compared:
            for ahead in order[place + 1 : place + 1 + threads]:
                for model in self._read:
                    model.fetch(ahead)
            return self._compare(order[place])

        found = {}
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(job, place) for place in range(len(order))]
            try:
                for name, future in zip(order, futures, strict=True):
                    found[name] = future.result()
                    done(sum(model.tensors[name].bytes for model in self._read))
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return found

    def _compare(self, name: str) -> _Compared:
        rows, columns = self._models[0].tensors[name].shape
        stored = [model.stored(name) for model in self._read]
        sums = np.zeros((len(self._places), columns))
        step = max(ROWS, PIECE // columns) * columns
        for start in range(0, rows * columns, step):
            if self._stop.is_set():
                raise _Stopped
            values = [
                _load(model, name, flat[start : start + step]) for model, flat in zip(self._read, stored, strict=True)
            ]
            if self._base:
                values = [
                    _delta(model, name, each, values[-1]) for model, each in zip(self._models, values, strict=False)
                ]
            kernels.column_dots(values, self._places, sums)
        norms = {i: sums[p] for i, p in self._own.items()}
        means = [_mean(sums[p], norms[int(i)], norms[int(j)]) for p, (i, j) in enumerate(self._places)]
        return _Compared(means, sums.sum(axis=1).tolist())


def _load(model: Checkpoint, name: str, stored: NDArray[Any]) -> Array:
    values, finite = kernels.load(stored)
    if not finite:
        raise CheckpointError(f"{model.folder}: {name} holds NaN or inf: fetch the model again, or leave it out")
    return values


def _delta(model: Checkpoint, name: str, values: Array, base: Array) -> Array:
    with np.errstate(over="ignore"):
        delta = values - base
    if not kernels.all_finite(delta):
        raise CheckpointError(f"{model.folder}: {name} is too far from its base for float32: is it damaged?")
    return delta


def _mean(dots: Matrix, norms_a: Matrix, norms_b: Matrix) -> float:
    """The mean cosine of columns; NaN where all are zero in both."""
    there = (norms_a > 0) | (norms_b > 0)
    # sqrt(x * x) is x: a column is exactly like itself. Squares of float32 numbers neither overflow here nor vanish.
    products = np.sqrt(norms_a * norms_b)
    cosines = np.divide(dots, products, out=np.zeros_like(dots), where=products > 0)
    return float(np.clip(cosines, -1, 1)[there].mean()) if there.any() else math.nan
