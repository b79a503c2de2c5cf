"""The contract that every router passes; a test class inherits it and gives its router as the fixture `router`."""

from __future__ import annotations

import numpy as np
import pytest

from routers.base import Router

DIMENSION = 16


class RouterContract:
    """Promises of routers/base.py; the fixture's router must take vectors of DIMENSION features."""

    @pytest.fixture
    def router(self) -> Router:
        raise NotImplementedError

    def test_one_finite_score_an_expert(self, router: Router) -> None:
        scores_E = router.estimate(_vectors(1)[0])
        assert scores_E.shape == (len(router.experts),)
        assert np.isfinite(scores_E).all()

    def test_the_same_vector_gives_the_same_scores(self, router: Router) -> None:
        for vector_D in _vectors(8):
            assert np.array_equal(router.estimate(vector_D), router.estimate(vector_D.copy()))

    def test_estimating_leaves_the_vector_alone(self, router: Router) -> None:
        vector_D = _vectors(1)[0]
        before = vector_D.copy()
        router.estimate(vector_D)
        assert np.array_equal(vector_D, before)

    def test_arrays_make_the_same_router_again(self, router: Router) -> None:
        again = type(router).from_arrays(router.experts, router.arrays())
        for vector_D in _vectors(8):
            assert np.array_equal(again.estimate(vector_D), router.estimate(vector_D))


def _vectors(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((count, DIMENSION)).astype(np.float32)
    return list(vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True))
