"""Sources of tensors: whichever part of one is asked for, it is that part of the whole, in every bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from builder.adapters import LowRank
from builder.errors import MergeError
from builder.merge.inputs import Held, Source
from builder.merge.sources import Adapted, Permuted, Rows

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((9, 5)).astype(np.float32)
OTHER = RNG.standard_normal((4, 5)).astype(np.float32)
# Rows that follow each other, that jump, that are missing; after one that is missing, the first row.
OWN = np.array([3, 4, 5, -1, 0, 1, 8, 8, -1, -1, 7, -1])
STAND_INS = {3: [("other", 2)], 8: [("own", 1), ("other", 0)], 9: [], 11: [("unknown", 0)]}


def rows() -> Rows:
    return Rows(Held(TABLE), OWN, STAND_INS, {"own": Held(TABLE), "other": Held(OTHER)}, 16)


def adapted() -> Adapted:
    left, right = (RNG.standard_normal(shape).astype(np.float32) for shape in ((77, 64), (64, 300)))
    base = RNG.standard_normal((77, 300)).astype(np.float32)
    return Adapted(Held(base), LowRank(left, right, 0.37))


def permuted() -> Permuted:
    return Permuted(Held(TABLE.astype(np.float16)), (RNG.permutation(9), RNG.permutation(5)))


def parts(size: int) -> Iterator[tuple[int, int]]:
    """From single elements to the whole, on both sides of the borders of rows."""
    cuts = sorted({0, 1, 4, 5, 6, 29, 30, 31, size // 2, size // 2 + 1, size - 6, size - 1, size})
    yield from ((start, stop) for start in cuts for stop in cuts if start < stop)


@pytest.mark.parametrize("source", [rows(), adapted(), permuted()], ids=["rows", "adapted", "permuted"])
def test_a_part_is_that_part_of_the_whole(source: Source) -> None:
    size = int(np.prod(source.shape))
    whole = source.stored(0, size)
    assert whole.shape == (size,)
    for start, stop in parts(size):
        assert source.stored(start, stop).tobytes() == whole[start:stop].tobytes(), (start, stop)


def test_every_token_has_its_row_or_the_mean_of_those_that_stand_in() -> None:
    table = rows().stored(0, 80).reshape(16, 5)

    for token, row in enumerate(OWN):
        if row >= 0:
            assert np.array_equal(table[token], TABLE[row]), token
    assert np.array_equal(table[3], OTHER[2])
    np.testing.assert_allclose(table[8], (TABLE[1].astype(np.float64) + OTHER[0]) / 2, rtol=1e-7)
    assert not table[9].any()
    assert not table[11].any()  # of a model without such a tensor
    np.testing.assert_allclose(table[12:], np.tile(table[:12].mean(axis=0), (4, 1)), rtol=1e-6, atol=1e-7)


def test_an_adapter_adds_its_scaled_product() -> None:
    source = adapted()
    base, update = source.source.stored(0, 77 * 300).reshape(77, 300), source.update

    want = base + 0.37 * update.left.astype(np.float64) @ update.right
    np.testing.assert_allclose(source.stored(0, 77 * 300).reshape(77, 300), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), ()], ids=str)
def test_only_the_named_axes_are_permuted(axes: tuple[int, ...]) -> None:
    orders = [RNG.permutation(size) if axis in axes else None for axis, size in enumerate(TABLE.shape)]

    want = TABLE[
        np.ix_(*(np.arange(n) if order is None else order for n, order in zip(TABLE.shape, orders, strict=True)))
    ]
    assert np.array_equal(Permuted(Held(TABLE), orders).stored(0, TABLE.size).reshape(TABLE.shape), want)


def test_a_vector_is_permuted() -> None:
    order = RNG.permutation(9)

    assert np.array_equal(Permuted(Held(TABLE[:, 0].copy()), [order]).stored(2, 7), TABLE[order, 0][2:7])


@pytest.mark.parametrize("bad", ["base", "row"])
def test_a_value_that_is_not_finite_is_named(bad: str) -> None:
    broken = TABLE.copy()
    broken[8, 4] = np.inf
    held = Held(broken, "MODEL: TENSOR")
    update = LowRank(np.zeros((9, 1), np.float32), np.zeros((1, 5), np.float32), 1.0)
    source = Adapted(held, update) if bad == "base" else Rows(held, np.arange(9), {}, {}, 9)

    with pytest.raises(MergeError, match="MODEL: TENSOR holds NaN or inf"):
        source.stored(0, 45)
