"""The contract that every router passes; a test class inherits it and gives its router as the fixture `router`."""

from __future__ import annotations

import numpy as np
import pytest

from routers.base import Estimate, Fitted, Router
from routers.errors import BundleError

DIMENSION = 16
EXPERTS = ("a", "b", "c")


class RouterContract:
    """Promises of routers/base.py; the fixture's router must take vectors of DIMENSION features."""

    @pytest.fixture
    def router(self) -> Router:
        raise NotImplementedError

    def test_one_finite_score_an_expert(self, router: Router) -> None:
        for vector_D in [*_vectors(2), np.zeros(DIMENSION, np.float32)]:
            estimate = router.estimate(vector_D)
            for values_E in (estimate.quality_E, estimate.std_E):
                assert values_E.shape == (len(router.experts),)
                assert np.isfinite(values_E).all()
            assert (estimate.std_E >= 0).all()

    def test_the_same_vector_gives_the_same_estimate(self, router: Router) -> None:
        for vector_D in _vectors(8):
            assert same(router.estimate(vector_D), router.estimate(vector_D.copy()))

    def test_estimating_leaves_the_vector_alone(self, router: Router) -> None:
        vector_D = _vectors(1)[0]
        before = vector_D.copy()
        router.estimate(vector_D)
        assert np.array_equal(vector_D, before)

    def test_arrays_make_the_same_router_again(self, router: Router) -> None:
        again = type(router).from_arrays(router.experts, router.arrays())
        for vector_D in _vectors(8):
            assert same(again.estimate(vector_D), router.estimate(vector_D))

    def test_the_evidence_is_named_nearest_first(self, router: Router) -> None:
        evidence = router.estimate(_vectors(1)[0]).evidence
        if evidence.kind in ("gates", "neighbours"):
            similarities = [near.similarity for near in evidence.near]
            assert similarities == sorted(similarities, reverse=True)

    def test_vectors_of_another_dimension_are_known_beforehand(self, router: Router) -> None:
        assert router.dimension in (None, DIMENSION)

    def test_arrays_of_another_size_are_refused_by_name(self, router: Router) -> None:
        with pytest.raises(BundleError, match=router.kind):
            type(router).from_arrays((*router.experts, "one-more"), router.arrays())

    def test_a_missing_or_broken_array_is_refused_by_name(self, router: Router) -> None:
        for name, array in router.arrays().items():
            without = {key: value for key, value in router.arrays().items() if key != name}
            with pytest.raises(BundleError, match=f"no {name}"):
                type(router).from_arrays(router.experts, without)
            if np.issubdtype(array.dtype, np.floating):
                broken = array.copy()
                broken.flat[0] = np.nan
                with pytest.raises(BundleError, match=name):
                    type(router).from_arrays(router.experts, {**router.arrays(), name: broken})


class FittedContract(RouterContract):
    """Promises of what is fitted on scores; a test class gives its router's class as `kind`."""

    kind: type[Fitted]

    @pytest.fixture
    def router(self) -> Router:
        return self.kind.fit(EXPERTS, *examples(120), seed=0)

    def test_the_same_data_and_seed_make_the_same_bits(self) -> None:
        first, second = (self.kind.fit(EXPERTS, *examples(60), seed=3).arrays() for _ in range(2))
        assert all(np.array_equal(first[name], second[name]) for name in first)

    def test_an_expert_that_is_better_everywhere_is_picked_everywhere(self) -> None:
        vectors_ND, scores_NE = examples(60)
        router = self.kind.fit(EXPERTS, vectors_ND, scores_NE * 0.1 + np.array([0, 5.0, 0]), seed=0)
        assert {int(np.argmax(router.estimate(vector_D).quality_E)) for vector_D in vectors_ND} == {1}

    def test_two_experts_with_equal_scores_have_equal_estimates(self) -> None:
        """What argmax labels get wrong: a tie is no reason for either."""
        vectors_ND, scores_NE = examples(60)
        router = self.kind.fit(EXPERTS, vectors_ND, scores_NE[:, [0, 0, 2]], seed=0)
        if self.kind.kind != "mlp":  # whose start is by chance
            for vector_D in _vectors(4):
                quality_E = router.estimate(vector_D).quality_E
                assert quality_E[0] == pytest.approx(quality_E[1], abs=1e-5)

    def test_one_prompt_is_enough_to_fit(self) -> None:
        router = self.kind.fit(EXPERTS, *examples(1), seed=0)
        assert np.isfinite(router.estimate(_vectors(1)[0]).quality_E).all()


def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of three kinds, each with the expert that solves it; rows [N, D], scores [N, E]."""
    rng = np.random.default_rng(1)
    kind_N = np.arange(count) % 3
    vectors_ND = rng.normal(0, 0.2, (count, DIMENSION)).astype(np.float32)
    vectors_ND[np.arange(count), kind_N] += 1
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND, np.eye(3)[kind_N]


def same(first: Estimate, second: Estimate) -> bool:
    """Whether two estimates are equal to the bit."""
    return (
        np.array_equal(first.quality_E, second.quality_E)
        and np.array_equal(first.std_E, second.std_E)
        and first.evidence == second.evidence
    )


def _vectors(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((count, DIMENSION)).astype(np.float32)
    return list(vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True))
