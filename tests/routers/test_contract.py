from __future__ import annotations

import numpy as np
import pytest

from routers.base import Router
from routers.errors import BundleError
from routers.fixed import FixedRouter
from routers.linear import LinearRouter
from routers.testing import DIMENSION, RouterContract


class TestLinearRouter(RouterContract):
    @pytest.fixture
    def router(self) -> Router:
        gates_ED = np.random.default_rng(1).normal(size=(3, DIMENSION)).astype(np.float32)
        return LinearRouter(("a", "b", "c"), gates_ED)


class TestFixedRouter(RouterContract):
    @pytest.fixture
    def router(self) -> Router:
        return FixedRouter.always(("a", "b", "c"), "b")


def test_a_gate_is_the_unit_difference_of_positive_and_negative_means() -> None:
    rng = np.random.default_rng(2)
    own, others = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    router = LinearRouter.from_vectors({"a": list(own), "b": list(others)}, {"a": list(others), "b": []})
    difference = own.astype(np.float64).mean(axis=0) - others.astype(np.float64).mean(axis=0)
    probe = rng.normal(size=5).astype(np.float32)
    expected = [
        probe @ difference / np.linalg.norm(difference),
        probe @ others.mean(axis=0) / np.linalg.norm(others.mean(axis=0)),
    ]
    assert router.estimate(probe) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [LinearRouter, FixedRouter])
def test_arrays_for_other_experts_are_refused(kind: type[Router]) -> None:
    with pytest.raises(BundleError, match="2 experts"):
        kind.from_arrays(("a", "b"), {"gates": np.zeros((3, 4), np.float32), "scores": np.zeros(3, np.float32)})
