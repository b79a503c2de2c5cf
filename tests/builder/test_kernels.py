"""The inner loops: C, numpy and torch give the same bits, and those are the right ones."""

from __future__ import annotations

import inspect
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from builder import kernels
from builder.merge.inputs import Arrays
from builder.merge.torch_arrays import TorchArrays

Array = NDArray[np.float32]

SIZES = [0, 1, 2, 3, 31, 32, 33, 48, 49, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097, 8192, 8193, 12345]
"""Around the borders of lanes, blocks, and the steps of the loops."""
WIDE = [1, 2, 47, 48, 49, 64, 257, 4096, 4097]
"""Lengths of rows."""


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the environment says, the C kernels where there are any."""
    monkeypatch.delenv("MODELGLUE_KERNELS", raising=False)
    kernels._compiled.cache_clear()
    yield
    kernels._compiled.cache_clear()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], list[Any]]:
    """Runs a call with the arrays of every engine: its results as numpy's, in the order C, numpy, torch."""

    def run(call: Callable[[Any], Any]) -> list[Any]:
        results = [plain(call(kernels))]
        monkeypatch.setenv("MODELGLUE_KERNELS", "numpy")
        kernels._compiled.cache_clear()
        assert not kernels.is_compiled()
        results.append(plain(call(kernels)))
        monkeypatch.delenv("MODELGLUE_KERNELS")
        kernels._compiled.cache_clear()
        return [*results, plain(call(TorchArrays("cpu")))]

    return run


def plain(result: Any) -> list[Any]:
    """A result, or several, as numpy arrays and numbers."""
    parts = result if isinstance(result, tuple) else (result,)
    return [part.numpy() if isinstance(part, torch.Tensor) else part for part in parts]


def assert_same(results: list[list[Any]]) -> None:
    """Equal in dtype, shape and every bit."""
    first, *others = results
    for other in others:
        for a, b in zip(first, other, strict=True):
            if isinstance(a, np.ndarray):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert a.tobytes() == b.tobytes(), np.flatnonzero(a != b)[:5]
            else:
                assert a == b


def awkward(size: int, seed: int = 0) -> Array:
    """Values of all magnitudes, subnormal ones, both zeros, and many that are equal or differ in sign alone."""
    rng = np.random.default_rng(seed)
    usual = rng.standard_normal(size) * 10.0 ** rng.integers(-30, 10, size)
    few = rng.choice([0.5, -0.5, 1.25, -3.0, 0.0, -0.0], size)
    tiny = rng.integers(-2000, 2000, size) * 2.0**-149
    kind = rng.integers(0, 4, size)
    return np.select([kind == 0, kind == 1, kind == 2], [usual, few, tiny], rng.standard_normal(size)).astype(
        np.float32
    )


def bits16(size: int, seed: int = 0) -> NDArray[np.uint16]:
    """Bits of finite bfloat16 numbers."""
    bits = np.random.default_rng(seed).integers(0, 1 << 16, size).astype(np.uint16)
    bits[(bits & 0x7F80) == 0x7F80] &= 0x807F
    return bits


def table(arrays: Any, values: Array, magnitude: bool, within: int | None) -> NDArray[np.int64]:
    counts = np.zeros((2, kernels.BINS), np.int64)
    arrays.count(arrays.device(values), magnitude, within, counts)
    return counts.sum(axis=0)


def middle(values: Array, magnitude: bool) -> int:
    """The key of an element in the middle of the order; of many equal ones if there are any."""
    keys = np.sort(kernels.keys(values, magnitude))
    counts = Counter(keys.tolist())
    return max(counts, key=lambda key: counts[key]) if counts else 7


def on(arrays: Any, *values: Array) -> list[Any]:
    return [arrays.device(each) for each in values]


CASES: dict[str, Callable[[Any, int], Any]] = {
    "load": lambda arrays, n: (
        arrays.load(awkward(n)) + arrays.load(bits16(n)) + arrays.load(np.float16(bits16(n) % 999))
    ),
    "store": lambda arrays, n: tuple(
        part for dtype in ("BF16", "F16", "F32") for part in arrays.store(arrays.device(awkward(n) / 1e6), dtype)
    ),
    "host": lambda arrays, n: arrays.host(arrays.device(awkward(n))),
    "device": lambda arrays, n: arrays.host(arrays.device(awkward(2 * n)[::2])),
    "doubles": lambda arrays, n: arrays.doubles(arrays.device(awkward(n))),
    "singles": lambda arrays, n: arrays.singles(arrays.doubles(arrays.device(awkward(n))) / 3),
    "combine": lambda arrays, n: arrays.combine(on(arrays, *(awkward(n, i) for i in range(3))), [0.3, -1.7, 1e-9]),
    "combine_stored": lambda arrays, n: (
        arrays.combine_stored([bits16(n) & 0xBFFF, bits16(n, 1) & 0xBFFF], [0.3, -1.7])
        + arrays.combine_stored([bits16(n) & 0xBFFF, awkward(n)], [0.3, -1.7])
    ),
    "dots": lambda arrays, n: arrays.dots(*on(arrays, awkward(n), awkward(n, 1))),
    "row_dots": lambda arrays, n: tuple(
        arrays.row_dots(*on(arrays, awkward(rows * n), awkward(rows * n, 1)), rows) for rows in (1, 2, 3)
    ),
    "magnitudes": lambda arrays, n: (
        arrays.magnitudes(arrays.device(awkward(n))),
        *(arrays.magnitudes(arrays.device(awkward(rows * n)), rows) for rows in (1, 3)),
    ),
    "count": lambda arrays, n: tuple(
        table(arrays, awkward(n), magnitude, within)
        for magnitude in (True, False)
        for within in (None, middle(awkward(n), magnitude) >> 16)
    ),
    "top": lambda arrays, n: tuple(
        part
        for magnitude in (True, False)
        for room in (0, 1, n // 9, n)
        for part in arrays.top(arrays.device(awkward(n)), magnitude, middle(awkward(n), magnitude), room)
    ),
    "packed": lambda arrays, n: arrays.unpacked(arrays.packed(arrays.device(awkward(n) > 0)), n),
    "unpacked": lambda arrays, n: arrays.unpacked(arrays.packed(arrays.device(awkward(n) > 0)), n),
    "masked": lambda arrays, n: arrays.masked(*on(arrays, awkward(n), awkward(n, 1) > 0)),
    "bernoulli": lambda arrays, n: tuple(
        arrays.bernoulli(key, start, n, p)
        for key, start in ((3, 0), (2**63 + 11, 2**33 + 1))
        for p in (0.0, 0.3, 1 - 2**-31, 1.0, *(border(3, 0) + part / 2**32 for part in (0.0, 0.5, 1.0)))
    ),
    "bernoulli_by_rank": lambda arrays, n: tuple(
        arrays.bernoulli_by_rank(key, start, arrays.device(np.arange(n, dtype=np.int32)[::-1].copy()), low, step)
        for key, start in ((2**64 - 1, n), (3, 0))
        # The last are on both sides of the first random number.
        for low, step in ((0.2, 0.5 / max(n, 1)), *((border(3, 0) + part / 2**32, 0.0) for part in (0.0, 0.5, 1.0)))
    ),
    "ranks": lambda arrays, n: tuple(
        arrays.ranks(arrays.device(values), rows, n)
        for rows in (1, 3)
        for values in (awkward(rows * n), flat(rows * n))
    ),
    "consensus": lambda arrays, n: tuple(
        arrays.consensus(on(arrays, *(awkward(n, i) for i in range(3))), weights, votes, normalize)
        for weights, votes in (([0.5, 0.25, 2.0], [0.5, 0.25, 2.0]), ([0.7, -0.4, -0.3], [1.0, 1.0, 1.0]))
        for normalize in (True, False)
    ),
}
"""Every function of the arrays protocol; n elements, of a row where there are rows."""


def border(key: int, index: int) -> float:
    """The probability below which the element is not kept, and above which it is."""
    return float(kernels.random(key, index, 1)[0]) / 2**32


def flat(size: int) -> Array:
    """Equal magnitudes alone."""
    return np.where(np.arange(size) % 3, np.float32(0.5), np.float32(-0.5))


def test_every_function_has_a_case() -> None:
    theirs = {name for name, _ in inspect.getmembers(Arrays, inspect.isfunction) if not name.startswith("_")}
    assert set(CASES) == theirs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", CASES)
def test_every_engine_gives_the_same_bits(everywhere: Any, function: str, size: int) -> None:
    if function == "ranks" and size == 0:
        size = 1  # a row has an element
    assert_same(everywhere(lambda arrays: CASES[function](arrays, size)))


def test_the_c_kernels_are_in_use_where_there_is_a_compiler() -> None:
    assert kernels.is_compiled() or shutil.which("cc") is None


def test_the_environment_turns_the_c_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_KERNELS", "numpy")
    kernels._compiled.cache_clear()
    assert not kernels.is_compiled()


@pytest.mark.parametrize("columns", [1, 2, 31, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 50])
def test_column_dots_are_added_row_after_row_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    inputs = [awkward(rows * columns, seed) for seed in range(3)]
    pairs = np.array([[0, 0], [2, 1], [1, 2], [1, 1], [0, 2]])
    start = np.random.default_rng(1).standard_normal((len(pairs), columns))
    expected = start.copy()
    for total, (i, j) in zip(expected, pairs, strict=True):
        for row in range(rows):
            at = slice(row * columns, (row + 1) * columns)
            total += inputs[i][at].astype(np.float64) * inputs[j][at].astype(np.float64)

    for engine in ("c", "numpy"):
        monkeypatch.setenv("MODELGLUE_KERNELS", engine)
        kernels._compiled.cache_clear()
        sums = start.copy()
        kernels.column_dots(inputs, pairs, sums)
        assert sums.tobytes() == expected.tobytes()


# Reading and writing


def test_every_bfloat16_is_read_as_torch_reads_it(everywhere: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = (bits & 0x7F80) != 0x7F80
    for values, all_finite in everywhere(lambda arrays: arrays.load(bits[finite])):
        assert all_finite
        expected = torch.from_numpy(bits[finite]).view(torch.bfloat16).float().numpy()
        assert values.tobytes() == expected.tobytes()


def test_bfloat16_is_rounded_as_torch_rounds_it(everywhere: Any) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32)
    # Halfway between two neighbours, and a bit beside it.
    halfway = (rng.integers(0, 1 << 16, 30_000).astype(np.uint32) << 16)[:, None] + np.uint32([0x7FFF, 0x8000, 0x8001])
    bits = np.concatenate([bits, halfway.ravel()])
    values = bits.view(np.float32)
    values = values[np.abs(values) < 3e38]  # NaN compares false; above, bfloat16 has no number
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()

    for stored, finite in everywhere(lambda arrays: arrays.store(arrays.device(values), "BF16")):
        assert finite
        assert np.array_equal(stored, expected)


@pytest.mark.parametrize("place", [0, 1, 63, 64, 4095, 4096, 9999])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_value_that_is_not_finite_is_noticed(everywhere: Any, dtype: str, bad: float, place: int) -> None:
    values = np.ones(10_000, np.float32)
    values[place] = bad
    stored = values.view(np.uint32) >> 16 if dtype == "bfloat16" else values
    stored = stored.astype({"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[dtype])
    code = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]

    assert [finite for _, finite in everywhere(lambda arrays: arrays.load(stored))] == [False] * 3
    assert [finite for _, finite in everywhere(lambda arrays: arrays.store(arrays.device(values), code))] == [False] * 3


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (65504.0, "F16", True),
        (65520.0, "F16", False),
        (np.finfo(np.float32).max, "F32", True),
        (np.finfo(np.float32).max, "BF16", False),
        (3.3895314e38, "BF16", True),
    ],
)
def test_what_a_dtype_has_no_number_for_is_noticed(everywhere: Any, value: float, dtype: str, fits: bool) -> None:
    values = np.array([1.0, value, -1.0], np.float32)

    assert [finite for _, finite in everywhere(lambda arrays: arrays.store(arrays.device(values), dtype))] == [fits] * 3


def test_values_at_odd_addresses_are_read(everywhere: Any) -> None:
    data = np.zeros(4 * 100 + 1, np.uint8)
    values = data[1:].view(np.float32)
    values[:] = awkward(100)
    assert not values.flags.aligned
    for loaded, finite in everywhere(lambda arrays: arrays.load(values)):
        assert finite
        assert loaded.tobytes() == awkward(100).tobytes()


# Sums


def test_a_combination_rounds_every_product_and_every_sum(everywhere: Any) -> None:
    arrays_, factors = [awkward(5000, i) for i in range(3)], [0.3, -1.7, 0.9]
    expected = np.float32(0.3) * arrays_[0]
    for values, factor in zip(arrays_[1:], factors[1:], strict=True):
        expected = expected + np.float32(factor) * values

    for (got,) in everywhere(lambda arrays: arrays.combine(on(arrays, *arrays_), factors)):
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [*SIZES, 1023, 1024, 1025])
def test_stored_inputs_combine_as_loaded_ones_do_and_what_is_not_finite_is_seen(everywhere: Any, size: int) -> None:
    stored = [
        (np.random.default_rng(i).normal(size=size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for i in range(3)
    ]
    factors = [0.3, -1.7, 0.9]
    expected = kernels.combine([kernels.load_bf16(each)[0] for each in stored], factors)
    for values, finite in everywhere(lambda arrays: arrays.combine_stored(stored, factors)):
        assert finite
        assert values.tobytes() == expected.tobytes()
    for bits in (0x7F80, 0xFFC0):
        if size:
            broken = [stored[0], stored[1].copy(), stored[2]]
            broken[1][-1] = bits
            for _, finite in everywhere(lambda arrays, broken=broken: arrays.combine_stored(broken, factors)):
                assert not finite


@pytest.mark.parametrize("size", SIZES)
def test_dot_products_are_exact_to_fp64(size: int) -> None:
    a, b = (np.random.default_rng(i).standard_normal(size).astype(np.float32) for i in range(2))
    blocks = [slice(start, start + kernels.BLOCK) for start in range(0, size, kernels.BLOCK)]

    expected = [math.fsum((a[block].astype(np.float64) * b[block]).tolist()) for block in blocks]
    np.testing.assert_allclose(kernels.dots(a, b), expected, rtol=1e-12, atol=1e-12)
    expected = [math.fsum(np.abs(a[block]).astype(np.float64).tolist()) for block in blocks]
    np.testing.assert_allclose(kernels.magnitudes(a), expected, rtol=1e-12)
    np.testing.assert_allclose(kernels.fold(a.astype(np.float64) * b), kernels.dots(a, b), rtol=0)


@pytest.mark.parametrize("columns", WIDE)
def test_the_dot_product_of_a_row_does_not_depend_on_the_rows_beside_it(columns: int) -> None:
    a, b = awkward(5 * columns), awkward(5 * columns, 1)

    together = kernels.row_dots(a, b, 5)

    rows = [slice(row * columns, (row + 1) * columns) for row in range(5)]
    assert together.tolist() == [float(kernels.row_dots(a[row], b[row], 1)[0]) for row in rows]
    expected = [math.fsum((a[row].astype(np.float64) * b[row]).tolist()) for row in rows]
    scale = [math.fsum(np.abs(a[row].astype(np.float64) * b[row]).tolist()) for row in rows]
    assert (np.abs(together - expected) <= 1e-13 * np.array(scale)).all()


# Order


def test_keys_are_ordered_as_the_values_are(monkeypatch: pytest.MonkeyPatch) -> None:
    values = awkward(3000)
    for magnitude in (False, True):
        keys = kernels.keys(values, magnitude)
        ordered = (np.abs(values) if magnitude else values)[np.argsort(keys, kind="stable")]
        assert (np.diff(ordered) >= 0).all()
        assert len(np.unique(keys)) >= len(np.unique(np.abs(values) if magnitude else values))
    assert (kernels.keys(np.float32([-0.0]), False) < kernels.keys(np.float32([0.0]), False)).all()


def test_a_key_tells_its_value() -> None:
    for value in awkward(500):
        key = int(kernels.keys(np.array([value]), magnitude=False)[0])
        assert np.float32(kernels.value_of(key)).tobytes() == value.tobytes()


@pytest.mark.parametrize("magnitude", [True, False])
def test_counts_find_every_element_by_its_two_halves(magnitude: bool) -> None:
    values = awkward(5001)
    keys = kernels.keys(values, magnitude)
    uppers = table(kernels, values, magnitude, None)
    assert {i: n for i, n in enumerate(uppers.tolist()) if n} == Counter((keys >> 16).tolist())
    for upper in np.flatnonzero(uppers)[::37]:
        lowers = table(kernels, values, magnitude, int(upper))
        expected = Counter((keys[keys >> 16 == upper] & 0xFFFF).tolist())
        assert {i: n for i, n in enumerate(lowers.tolist()) if n} == expected


def test_counts_are_added_to_those_before() -> None:
    counts = np.ones((2, kernels.BINS), np.int64)
    kernels.count(awkward(100), True, None, counts)
    assert counts.sum() == 2 * kernels.BINS + 100


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("room", [0, 1, 5, 10**6])
def test_the_top_is_all_above_the_cut_and_the_first_at_it(size: int, room: int) -> None:
    values = awkward(size)
    cut = middle(values, True)

    mask, equal = kernels.top(values, True, cut, room)

    keys = kernels.keys(values, True)
    first = np.flatnonzero(keys == cut)[:room]
    assert np.array_equal(np.flatnonzero(mask), np.union1d(np.flatnonzero(keys > cut), first))
    assert equal == (keys == cut).sum()


@pytest.mark.parametrize("columns", WIDE)
def test_ranks_count_what_is_smaller_and_of_equal_ones_what_comes_later(everywhere: Any, columns: int) -> None:
    rng = np.random.default_rng(columns)
    values = rng.choice(np.float32([0, -0.0, 1, -1, 2, 3e-40, -5, 7]), 3 * columns)
    expected = np.empty((3, columns), np.int32)
    for row, places in zip(values.reshape(3, columns), expected, strict=True):
        order = sorted(range(columns), key=lambda i: (abs(float(row[i])), -i))
        places[order] = np.arange(columns)

    for (ranks,) in everywhere(lambda arrays: arrays.ranks(arrays.device(values), 3, columns)):
        assert np.array_equal(ranks, expected.ravel())


def test_a_packed_mask_takes_a_bit_an_element(everywhere: Any) -> None:
    mask = awkward(1001) > 0
    assert kernels.packed(mask).size == 126
    for (back,) in everywhere(lambda arrays: arrays.unpacked(arrays.packed(arrays.device(mask)), 1001)):
        assert np.array_equal(back, mask)


def test_masked_elements_are_plus_zero() -> None:
    kept = kernels.masked(np.float32([-1, 2, -0.0]), np.array([False, True, True]))
    assert kept.tobytes() == np.float32([0.0, 2, -0.0]).tobytes()


# Chance


def split_mix(key: int, index: int) -> int:
    """A half of a number of SplitMix64 in Python's integers, the lower one first."""
    z = (key + (index // 2 + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z >> 32 if index % 2 else z % 2**32


def test_chance_begins_with_the_published_numbers() -> None:
    # The first outputs of SplitMix64 with the seed 1234567, as its author's program prints them.
    numbers = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    halves = [half for number in numbers for half in (number % 2**32, number >> 32)]
    assert kernels.random(1234567, 0, 6).tolist() == halves


@pytest.mark.parametrize(("key", "start"), [(0, 0), (2**64 - 1, 5), (2**63, 2**40), (9, 1)])
def test_chance_is_split_mix(everywhere: Any, key: int, start: int) -> None:
    numbers = [split_mix(key, start + i) for i in range(300)]
    assert kernels.random(key, start, 300).tolist() == numbers
    for p in (0.0, 0.25, 0.9, 1.0):
        for (mask,) in everywhere(lambda arrays, p=p: arrays.bernoulli(key, start, 300, p)):
            assert mask.tolist() == [number < p * 2**32 for number in numbers]


@pytest.mark.parametrize("begin", [0, 1, 256, 257])
@pytest.mark.parametrize("size", [1, 2, 499, 500])
def test_chance_does_not_depend_on_where_a_piece_begins(everywhere: Any, begin: int, size: int) -> None:
    whole = kernels.bernoulli(3, 0, 1000, 0.5)
    for (part,) in everywhere(lambda arrays: arrays.bernoulli(3, begin, size, 0.5)):
        assert np.array_equal(part, whole[begin : begin + size])


def test_a_rank_decides_the_chance(everywhere: Any) -> None:
    ranks = np.arange(300, dtype=np.int32)
    expected = [split_mix(5, i) < (0.1 + i * 0.002) * 2.0**32 for i in range(300)]
    for (mask,) in everywhere(lambda arrays: arrays.bernoulli_by_rank(5, 0, arrays.device(ranks), 0.1, 0.002)):
        assert mask.tolist() == expected


# Election


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_consensus_merges_those_that_agree_with_the_elected_sign(size: int, normalize: bool) -> None:
    rng = np.random.default_rng(size)
    deltas = [rng.integers(-3, 4, size).astype(np.float32) for _ in range(3)]
    weights = [0.5, 0.25, 1.0]  # all sums are exact

    got = kernels.consensus(deltas, weights, weights, normalize)

    for i in range(size):
        votes = [w * float(d[i]) for w, d in zip(weights, deltas, strict=True)]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [(w, v) for w, v in zip(weights, votes, strict=True) if v * sign > 0]
        expected = sum(v for _, v in agree)
        if normalize and agree:
            expected /= sum(w for w, _ in agree)
        assert got[i] == np.float32(expected)
