"""The inner loops of merging on numpy arrays: kernels.c where it was compiled, else numpy; both give the same bits.

The extension is optional: without a compiler at install, or with MODELGLUE_KERNELS=numpy, a merge is slower and equal.
Arrays are flat and contiguous; K elements, float32 unless said otherwise.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from importlib import machinery
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Doubles = NDArray[np.float64]

LANES = 64
BLOCK = 4096
"""A dot product is summed by blocks of this many elements, each over LANES lanes in fp64."""
BINS = 1 << 16

_EXPONENT = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@cache
def _compiled() -> ctypes.CDLL | None:
    if os.environ.get("MODELGLUE_KERNELS") == "numpy":
        return None
    for suffix in machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            library.top.restype = ctypes.c_int64
            return library
    return None


def is_compiled() -> bool:
    """Whether the C kernels are in use."""
    return _compiled() is not None


def load(stored: NDArray[Any]) -> tuple[Array, bool]:
    """What a checkpoint stores, uint16 for bfloat16, as float32, and whether all of it is finite."""
    if not stored.flags.aligned:
        stored = stored.copy()
    if stored.dtype == np.uint16:
        return load_bf16(stored)
    values: Array = stored.astype(np.float32, copy=False)
    return values, all_finite(values)


def store(values: Array, dtype: str) -> tuple[NDArray[Any], bool]:
    """Values in a safetensors dtype, rounded once to nearest, ties to even, and whether they are finite there."""
    if dtype == "BF16":
        return store_bf16(values)
    if dtype == "F32":
        return values, all_finite(values)
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    return stored, bool(np.isfinite(stored).all())


def host(values: Array) -> Array:
    """The array on the processor: it is there."""
    return values


def doubles(values: Array) -> Doubles:
    """The array in fp64."""
    return values.astype(np.float64)


def singles(values: Doubles) -> Array:
    """The array in fp32, rounded once."""
    return values.astype(np.float32)


device = host
xp = np


def load_bf16(stored: NDArray[np.uint16]) -> tuple[Array, bool]:
    """bfloat16 bits as float32, and whether all are finite."""
    if library := _compiled():
        values = np.empty(stored.size, np.float32)
        return values, bool(library.load_bf16(_at(stored), _at(values), _count(stored)))
    values = (stored.astype(np.uint32) << 16).view(np.float32)
    return values, all_finite(values)


def all_finite(values: Array) -> bool:
    """Whether none is NaN or inf."""
    if library := _compiled():
        return bool(library.all_finite(_at(values), _count(values)))
    return bool(((values.view(np.uint32) & _EXPONENT) != _EXPONENT).all())


def store_bf16(values: Array) -> tuple[NDArray[np.uint16], bool]:
    """bfloat16 bits, rounded to nearest, ties to even, and whether all are finite before and after."""
    if library := _compiled():
        stored = np.empty(values.size, np.uint16)
        return stored, bool(library.store_bf16(_at(values), _at(stored), _count(values)))
    bits = values.view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    finite = ((bits & _EXPONENT) != _EXPONENT) & ((rounded & _EXPONENT) != _EXPONENT)
    return (rounded >> np.uint32(16)).astype(np.uint16), bool(finite.all())


def combine(arrays: Sequence[Array], factors: Sequence[float]) -> Array:
    """sum_i c_i x_i in the order of i, every product and sum rounded to fp32."""
    if library := _compiled():
        out = np.empty(arrays[0].size, np.float32)
        coefficients = np.array(factors, np.float32)
        library.combine(_many(arrays), _at(coefficients), ctypes.c_int64(len(arrays)), _at(out), _count(out))
        return out
    total = np.float32(factors[0]) * arrays[0]
    for array, factor in zip(arrays[1:], factors[1:], strict=True):
        total += np.float32(factor) * array
    return total


def combine_stored(stored: Sequence[NDArray[Any]], factors: Sequence[float]) -> tuple[Array, bool]:
    """`combine` of what checkpoints store, and whether all of that is finite."""
    library = _compiled()
    if library and all(each.dtype == np.uint16 and each.flags.aligned for each in stored):
        out = np.empty(stored[0].size, np.float32)
        coefficients = np.array(factors, np.float32)
        count = ctypes.c_int64(len(stored))
        return out, bool(library.combine_bf16(_many(stored), _at(coefficients), count, _at(out), _count(out)))
    loaded = [load(each) for each in stored]
    return combine([values for values, _ in loaded], factors), all(finite for _, finite in loaded)


def dots(a: Array, b: Array) -> Doubles:
    """Dot products of successive blocks, [ceil(K / BLOCK)]; the last block is as if filled up with zeros."""
    if library := _compiled():
        sums = np.empty(-(-a.size // BLOCK), np.float64)
        library.dots(_at(a), _at(b), _count(a), _at(sums))
        return sums
    return fold(a.astype(np.float64) * b)


def row_dots(a: Array, b: Array, rows: int) -> Doubles:
    """Dot products of the rows of two matrices, [rows]; each row is summed block by block."""
    if library := _compiled():
        sums = np.empty(rows, np.float64)
        library.row_dots(_at(a), _at(b), ctypes.c_int64(rows), ctypes.c_int64(a.size // rows), _at(sums))
        return sums
    return _row_sums((a.astype(np.float64) * b).reshape(rows, -1))


def column_dots(inputs: Sequence[Array], pairs: NDArray[np.int64], sums: Doubles) -> None:
    """Add to sums[P, C] the dot products of the columns of pairs[P, 2] of inputs, [R, C] each; row after row."""
    columns = sums.shape[1]
    rows = inputs[0].size // columns
    if library := _compiled():
        sizes = [ctypes.c_int64(size) for size in (len(inputs), len(pairs), rows, columns)]
        if not library.column_dots(_many(inputs), sizes[0], _at(pairs), *sizes[1:], _at(sums)):
            raise MemoryError
        return
    wide = [values.reshape(rows, columns).astype(np.float64) for values in inputs]
    for total, (i, j) in zip(sums, pairs, strict=True):
        for product in wide[i] * wide[j]:
            total += product


def magnitudes(a: Array, rows: int | None = None) -> Doubles:
    """Sums of magnitudes, [ceil(K / BLOCK)] of successive blocks, or [rows]."""
    if library := _compiled():
        sums = np.empty(rows or -(-a.size // BLOCK), np.float64)
        if rows is None:
            library.magnitudes(_at(a), _count(a), _at(sums))
        else:
            library.row_magnitudes(_at(a), ctypes.c_int64(rows), ctypes.c_int64(a.size // rows), _at(sums))
        return sums
    values = np.abs(a).astype(np.float64)
    return fold(values) if rows is None else _row_sums(values.reshape(rows, -1))


def fold(products: Doubles) -> Doubles:
    """Sums of successive blocks in the order that `dots` keeps."""
    whole = products.size // BLOCK * BLOCK
    sums = _folded(products[:whole].reshape(-1, BLOCK))
    return np.concatenate([sums, _folded(products[None, whole:])]) if whole < products.size else sums


def _row_sums(rows: Doubles) -> Doubles:
    """The sums of rows, each block by block."""
    sums = np.zeros(len(rows))
    for start in range(0, rows.shape[1], BLOCK):
        sums += _folded(rows[:, start : start + BLOCK])
    return sums


def _folded(rows: Doubles) -> Doubles:
    """The sums of rows of at most a block: over lanes first, then of the lanes by halves; zeros fill up."""
    count, width = rows.shape
    lanes = np.zeros((count, min(LANES, 1 << max(width - 1, 0).bit_length())))
    for start in range(0, width, LANES):
        part = rows[:, start : start + LANES]
        lanes[:, : part.shape[1]] += part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def keys(values: Array, magnitude: bool) -> NDArray[np.uint32]:
    """Unsigned numbers that are ordered as the values are, or as their magnitudes."""
    bits = values.view(np.uint32)
    if magnitude:
        return (bits & _MAGNITUDE) | _SIGN
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def count(values: Array, magnitude: bool, within: int | None, counts: NDArray[np.int64]) -> None:
    """Add to counts[2, BINS] how often each upper half of a key occurs, or each lower one below the upper `within`.

    What was counted is the sum of the two rows.
    """
    if library := _compiled():
        if within is None:
            library.count_upper(_at(values), _count(values), int(magnitude), _at(counts))
        else:
            upper = ctypes.c_uint32(within)
            library.count_lower(_at(values), _count(values), int(magnitude), upper, _at(counts))
        return
    found = keys(values, magnitude)
    halves = found >> np.uint32(16) if within is None else found[found >> np.uint32(16) == within] & np.uint32(0xFFFF)
    counts[0] += np.bincount(halves, minlength=BINS)


def top(values: Array, magnitude: bool, cut: int, room: int) -> tuple[Mask, int]:
    """Which keys are above the cut, or among the first `room` of those equal to it; and how many are equal."""
    if library := _compiled():
        mask = np.empty(values.size, np.bool_)
        cut_, room_ = ctypes.c_uint32(cut), ctypes.c_int64(room)
        return mask, library.top(_at(values), _count(values), int(magnitude), cut_, room_, _at(mask))
    found = keys(values, magnitude)
    equal = found == np.uint32(cut)
    taken = equal & (np.cumsum(equal) <= room)
    return (found > np.uint32(cut)) | taken, int(equal.sum())


def value_of(key: int) -> float:
    """The value whose key this is."""
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def packed(mask: Mask) -> NDArray[np.uint8]:
    """The mask, a bit an element."""
    return np.packbits(mask)


def unpacked(bits: NDArray[np.uint8], size: int) -> Mask:
    """The mask that was packed."""
    return np.unpackbits(bits, count=size).view(np.bool_)


def masked(values: Array, mask: Mask) -> Array:
    """Zero where the mask is false."""
    if library := _compiled():
        out = np.empty(values.size, np.float32)
        library.masked(_at(values), _at(mask), _at(out), _count(values))
        return out
    return np.where(mask, values, np.float32(0))


def random(key: int, start: int, size: int) -> NDArray[np.uint32]:
    """Part of a random sequence: halves of SplitMix64's numbers, the lower first (Steele, Lea, Flood 2014)."""
    first = start // 2
    with np.errstate(over="ignore"):
        steps = np.arange(first + 1, (start + size + 1) // 2 + 1, dtype=np.uint64)
        z = np.uint64(key) + steps * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
    z ^= z >> np.uint64(31)
    halves = np.stack([z.astype(np.uint32), (z >> np.uint64(32)).astype(np.uint32)], axis=1).reshape(-1)
    return halves[start - 2 * first :][:size]


def bernoulli(key: int, start: int, size: int, p: float) -> Mask:
    """True with probability p, for the elements `start` .. `start + size` of the sequence of `key`."""
    if library := _compiled():
        mask = np.empty(size, np.bool_)
        place, chance = ctypes.c_uint64(start), ctypes.c_double(p)
        library.bernoulli(ctypes.c_uint64(key), place, chance, _at(mask), ctypes.c_int64(size))
        return mask
    return random(key, start, size).astype(np.uint64) < np.uint64(p * 2.0**32)


def bernoulli_by_rank(key: int, start: int, ranks: NDArray[np.int32], low: float, step: float) -> Mask:
    """The same with p = low + rank * step for each element."""
    if library := _compiled():
        mask = np.empty(ranks.size, np.bool_)
        place, low_, step_ = ctypes.c_uint64(start), ctypes.c_double(low), ctypes.c_double(step)
        library.bernoulli_by_rank(ctypes.c_uint64(key), place, _at(ranks), low_, step_, _at(mask), _count(ranks))
        return mask
    return random(key, start, ranks.size) < (low + ranks * step) * 2.0**32


def ranks(values: Array, rows: int, columns: int) -> NDArray[np.int32]:
    """Each element's rank by magnitude in its row, from 0, [K]; of equal ones the first counts as the largest."""
    out = np.empty(values.size, np.int32)
    if library := _compiled():
        if not library.ranks(_at(values), ctypes.c_int64(rows), ctypes.c_int64(columns), _at(out)):
            raise MemoryError
        return out
    # Backwards, and the sort is stable: of equal ones the last comes first.
    found = keys(values, magnitude=True).reshape(rows, columns)[:, ::-1]
    order = columns - 1 - np.argsort(found, axis=1, kind="stable")
    np.put_along_axis(out.reshape(rows, columns), order, np.arange(columns, dtype=np.int32)[None], axis=1)
    return out


def consensus(deltas: Sequence[Array], weights: Sequence[float], votes: Sequence[float], normalize: bool) -> Array:
    """Elect a sign by sum_i votes_i d_i, 0 counting as +; sum w_i d_i over those that agree (TIES, arXiv 2306.01708).

    An input agrees where votes_i d_i has the elected sign. `normalize` divides by the agreeing weights' sum, unless
    they cancel.
    """
    if library := _compiled():
        out = np.empty(deltas[0].size, np.float32)
        shares, ballots = np.array(weights, np.float32), np.array(votes, np.float32)
        inputs = ctypes.c_int64(len(deltas))
        library.consensus(_many(deltas), _at(shares), _at(ballots), inputs, int(normalize), _at(out), _count(out))
        return out
    elected = np.where(combine(deltas, votes) >= 0, np.float32(1), np.float32(-1))
    total, divisor = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for delta, weight, vote in zip(deltas, weights, votes, strict=True):
        agrees = np.float32(vote) * delta * elected > 0
        total += np.where(agrees, np.float32(weight) * delta, np.float32(0))
        divisor += np.where(agrees, np.float32(weight), np.float32(0))
    if normalize:
        nothing = np.float32(0)
        for weight in weights:
            nothing += abs(np.float32(weight))
        nothing *= np.float32(1e-6)
        total /= np.where(np.abs(divisor) <= nothing, np.float32(1), divisor)
    return total


def _at(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _count(array: NDArray[Any]) -> ctypes.c_int64:
    return ctypes.c_int64(array.size)


def _many(arrays: Sequence[Array]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
