from __future__ import annotations

import numpy as np
import pytest

from routers.base import Policy, Router
from routers.errors import BundleError
from routers.fixed import FixedRouter
from routers.linear import LinearRouter
from routers.testing import DIMENSION, RouterContract


class TestLinearRouter(RouterContract):
    @pytest.fixture
    def router(self) -> Router:
        subjects = {name: np.random.default_rng(1).normal(size=(3, DIMENSION)) for name in ("x", "y", "z", "w")}
        vectors = {name: list(rows_ND.astype(np.float32)) for name, rows_ND in subjects.items()}
        return LinearRouter.from_vectors({"a": ["x"], "b": ["y", "w"], "c": ["z"]}, vectors)

    def test_a_silent_prompt_goes_to_the_default(self, router: Router) -> None:
        scores_E = router.estimate(np.zeros(DIMENSION, np.float32))
        route = Policy("c").decide(router.experts, scores_E, fixed=False)
        assert (route.expert, route.reason) == ("c", "no_evidence")


class TestFixedRouter(RouterContract):
    @pytest.fixture
    def router(self) -> Router:
        return FixedRouter.always(("a", "b", "c"), "b")


def gate(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The paper's formula in float64."""
    difference = own.astype(np.float64).mean(axis=0) - others.astype(np.float64).mean(axis=0)
    return difference / np.linalg.norm(difference)


def test_a_gate_is_the_unit_difference_of_positive_and_negative_means() -> None:
    rng = np.random.default_rng(2)
    own, others = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    router = LinearRouter.from_vectors({"a": ["x"], "b": ["y"]}, {"x": list(own), "y": list(others)})
    probe = rng.normal(size=5).astype(np.float32)
    assert router.estimate(probe) == pytest.approx([probe @ gate(own, others), probe @ gate(others, own)], rel=1e-5)


def test_an_expert_of_several_subjects_scores_by_the_best_of_their_gates() -> None:
    rng = np.random.default_rng(3)
    x, y, z = (rng.normal(size=(2, 5)).astype(np.float32) for _ in range(3))
    subjects = {"x": list(x), "y": list(y), "z": list(z)}
    router = LinearRouter.from_vectors({"merged": ["x", "z"], "b": ["y"]}, subjects)
    alone = LinearRouter.from_vectors({name: [name] for name in subjects}, subjects)
    for probe in rng.normal(size=(20, 5)).astype(np.float32):
        by_subject = alone.estimate(probe)
        assert router.estimate(probe).tolist() == [max(by_subject[0], by_subject[2]), by_subject[1]]


@pytest.mark.parametrize("kind", [LinearRouter, FixedRouter])
def test_arrays_for_other_experts_are_refused(kind: type[Router]) -> None:
    with pytest.raises(BundleError, match=r"2 experts|gates and their owners"):
        kind.from_arrays(
            ("a", "b"),
            {
                "gates": np.zeros((3, 4), np.float32),
                "owners": np.ones((3, 1), np.float32),
                "scores": np.zeros(3, np.float32),
            },
        )
