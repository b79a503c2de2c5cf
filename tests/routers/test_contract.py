from __future__ import annotations

import numpy as np
import pytest

from routers.base import Router
from routers.fixed import FixedRouter
from routers.kmeans import KMeansRouter, cluster
from routers.knn import KnnRouter
from routers.linear import LinearRouter
from routers.mlp import MlpRouter, train
from routers.policy import Policy
from routers.ridge import RidgeRouter
from routers.testing import DIMENSION, EXPERTS, FittedContract, RouterContract, examples


class TestLinearRouterOfPrompts(RouterContract):
    @pytest.fixture
    def router(self) -> Router:
        subjects = {name: np.random.default_rng(1).normal(size=(3, DIMENSION)) for name in ("x", "y", "z", "w")}
        vectors = {name: list(rows_ND.astype(np.float32)) for name, rows_ND in subjects.items()}
        return LinearRouter.from_vectors({"a": ["x"], "b": ["y", "w"], "c": ["z"]}, vectors)

    def test_a_silent_prompt_goes_to_the_default(self, router: Router) -> None:
        route = Policy("c").decide(router.experts, router.estimate(np.zeros(DIMENSION, np.float32)))
        assert (route.expert, route.reason) == ("c", "no_evidence")


class TestLinearRouter(FittedContract):
    kind = LinearRouter

    def test_a_bias_makes_the_mean_estimate_the_mean_score(self) -> None:
        vectors_ND, scores_NE = examples(60)
        router = LinearRouter.fit(EXPERTS, vectors_ND, scores_NE + np.array([3.0, 0, 0]))
        mean_E = np.mean([router.estimate(vector_D).quality_E for vector_D in vectors_ND], axis=0)
        assert mean_E == pytest.approx([3 + 1 / 3, 1 / 3, 1 / 3], abs=0.1)

    def test_calibrating_gates_of_prompts_keeps_the_gates(self) -> None:
        vectors_ND, scores_NE = examples(60)
        subjects = {name: list(vectors_ND[place::3][:4]) for place, name in enumerate(EXPERTS)}
        bare = LinearRouter.from_vectors({name: [name] for name in EXPERTS}, subjects)
        calibrated = bare.calibrated(vectors_ND, scores_NE)
        assert np.array_equal(calibrated.arrays()["gates"], bare.arrays()["gates"])
        errors = [
            np.square([router.estimate(vector_D).quality_E for vector_D in vectors_ND] - scores_NE).mean()
            for router in (bare, calibrated)
        ]
        assert errors[1] < errors[0]


class TestFixedRouter(FittedContract):
    kind = FixedRouter


class TestRidgeRouter(FittedContract):
    kind = RidgeRouter

    def test_it_is_sklearns_ridge_at_the_penalty_it_chose(self) -> None:
        from sklearn.linear_model import Ridge

        vectors_ND, scores_NE = examples(90)
        router = RidgeRouter.fit(EXPERTS, vectors_ND, scores_NE)
        ours_NE = np.array([router.estimate(vector_D).quality_E for vector_D in vectors_ND])
        found = [
            Ridge(alpha=10.0**power).fit(vectors_ND, scores_NE).predict(vectors_ND)
            for power in np.arange(-2, 3.01, 0.25)
        ]
        assert min(float(np.abs(theirs_NE - ours_NE).max()) for theirs_NE in found) < 1e-4

    def test_its_penalty_is_that_of_generalised_cross_validation_computed_with_the_hat_matrix(self) -> None:
        rng = np.random.default_rng(0)
        vectors_ND = rng.normal(size=(40, 30)).astype(np.float32)
        scores_N1 = vectors_ND[:, :1] + rng.normal(0, 2, (40, 1))
        centred_ND = vectors_ND - vectors_ND.mean(axis=0)

        def error(penalty: float) -> float:
            hat_NN = centred_ND @ np.linalg.solve(centred_ND.T @ centred_ND + penalty * np.eye(30), centred_ND.T)
            left_N1 = (scores_N1 - scores_N1.mean()) - hat_NN @ (scores_N1 - scores_N1.mean())
            return float((left_N1**2).sum() / (39 - np.trace(hat_NN)) ** 2)

        best = min((10.0**power for power in np.arange(-2, 3.01, 0.25)), key=error)
        weights_D = np.linalg.solve(centred_ND.T @ centred_ND + best * np.eye(30), centred_ND.T @ scores_N1)[:, 0]
        assert RidgeRouter.fit(("a",), vectors_ND, scores_N1).arrays()["weights"][0, :-1] == pytest.approx(
            weights_D, abs=1e-4
        )

    @pytest.mark.parametrize("rows", [slice(None), slice(10, 70)])
    def test_an_expert_that_was_added_by_its_own_prompts_is_as_if_fitted_on_them(self, rows: slice) -> None:
        vectors_ND, scores_NE = examples(90)
        two = RidgeRouter.fit(("a", "b"), vectors_ND, scores_NE[:, :2])
        three = two.with_expert("c", vectors_ND[rows], scores_NE[rows, 2])
        alone = RidgeRouter.fit(("c",), vectors_ND[rows], scores_NE[rows, 2:])
        kept = two.estimate(vectors_ND[0]).quality_E
        if rows == slice(None):  # one set of sums, so one penalty for all three
            together = RidgeRouter.fit(EXPERTS, vectors_ND, scores_NE)
            assert three.estimate(vectors_ND[0]).quality_E == pytest.approx(together.estimate(vectors_ND[0]).quality_E)
        else:
            assert three.estimate(vectors_ND[0]).quality_E == pytest.approx(
                [*kept, *alone.estimate(vectors_ND[0]).quality_E], abs=1e-5
            )

    def test_the_spread_grows_away_from_what_was_seen(self) -> None:
        vectors_ND, scores_NE = examples(90)
        router = RidgeRouter.fit(EXPERTS, vectors_ND, scores_NE)
        assert router.estimate(-5 * vectors_ND[0]).std_E[0] > router.estimate(vectors_ND[0]).std_E[0]


class TestKMeansRouter(FittedContract):
    kind = KMeansRouter

    def test_its_clusters_are_about_as_tight_as_sklearns(self) -> None:
        from sklearn.cluster import KMeans

        vectors_ND = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
        centres_CD, owner_N = cluster(vectors_ND, 12, 0)
        ours = float(((vectors_ND - centres_CD[owner_N]) ** 2).sum())
        theirs = float(KMeans(12, n_init=10, random_state=0).fit(vectors_ND).inertia_)
        assert ours < 1.05 * theirs

    def test_a_clusters_score_is_its_prompts_mean_shrunk_to_all_prompts_by_ten(self) -> None:
        vectors_ND, scores_NE = examples(32)
        router = KMeansRouter.fit(EXPERTS, vectors_ND, scores_NE)
        estimate = router.estimate(vectors_ND[0])
        _, owner_N = cluster(vectors_ND, 4, 0)
        own = scores_NE[owner_N == owner_N[0]]
        assert estimate.quality_E == pytest.approx((own.sum(axis=0) + 10 * scores_NE.mean(axis=0)) / (len(own) + 10))
        assert estimate.evidence.count == len(own)

    def test_equal_prompts_are_one_cluster(self) -> None:
        centres_CD, owner_N = cluster(np.ones((20, 4), np.float32), 4, 0)
        assert (len(centres_CD), set(owner_N)) == (1, {0})

    def test_representatives_are_prompts_of_the_cluster(self) -> None:
        vectors_ND, scores_NE = examples(120)
        router = KMeansRouter.fit(EXPERTS, vectors_ND, scores_NE)
        near = router.estimate(vectors_ND[4]).evidence.near[0]
        assert {row % 3 for row in router.representatives(near.index)} == {1}


class TestKnnRouter(FittedContract):
    kind = KnnRouter

    def test_it_is_sklearns_mean_over_the_cosine_neighbours(self) -> None:
        from sklearn.neighbors import KNeighborsRegressor

        vectors_ND, scores_NE = examples(200)
        theirs = KNeighborsRegressor(50, metric="cosine", algorithm="brute").fit(vectors_ND, scores_NE)
        router = KnnRouter.fit(EXPERTS, vectors_ND, scores_NE)
        for vector_D in vectors_ND[:20]:
            assert router.estimate(vector_D).quality_E == pytest.approx(theirs.predict(vector_D[None])[0], abs=1e-6)

    def test_of_equal_neighbours_the_earlier_count(self) -> None:
        vectors_ND = np.tile(np.eye(4, dtype=np.float32)[0], (16, 1))
        scores_NE = np.arange(16.0)[:, None] * np.ones(3)
        router = KnnRouter.fit(EXPERTS, vectors_ND, scores_NE)
        assert [near.index for near in router.estimate(vectors_ND[0]).evidence.near] == [0, 1, 2, 3]
        assert router.estimate(vectors_ND[0]).quality_E[0] == 1.5


class TestMlpRouter(FittedContract):
    kind = MlpRouter

    def test_it_learns_what_no_linear_router_can(self) -> None:
        rng = np.random.default_rng(0)
        vectors_ND = rng.normal(size=(800, 8)).astype(np.float32)
        vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        apart_N = vectors_ND[:, 0] * vectors_ND[:, 1] > 0
        scores_NE = np.stack([apart_N, ~apart_N], axis=1).astype(float)
        seen, held = slice(600), slice(600, None)
        right = {}
        for kind in (MlpRouter, RidgeRouter):
            router = kind.fit(("a", "b"), vectors_ND[seen], scores_NE[seen], seed=0)
            picks = [np.argmax(router.estimate(vector_D).quality_E) == 0 for vector_D in vectors_ND[held]]
            right[kind.kind] = float(np.mean(np.array(picks) == apart_N[held]))
        assert right["mlp"] > 0.7 > 0.6 > right["ridge"]

    def test_likelihoods_teach_it_whose_answers_are_likelier(self) -> None:
        vectors_ND, scores_NE = examples(90)
        weights = train(vectors_ND, 10 * scores_NE - 20, 0, loss="likelihood")
        hidden = np.maximum(vectors_ND @ weights[0].T + weights[1], 0)
        assert np.array_equal(np.argmax(hidden @ weights[2].T + weights[3], axis=1), np.argmax(scores_NE, axis=1))

    @pytest.mark.parametrize("loss", ["scores", "likelihood"])
    def test_its_gradients_are_those_of_torch(self, loss: str) -> None:
        import torch

        from routers.mlp import _gradients

        rng = np.random.default_rng(0)
        weights = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((6, DIMENSION), (6,), (3, 6), (3,)))
        inputs_BD, targets_BE = rng.normal(size=(5, DIMENSION)).astype(np.float32), rng.normal(size=(5, 3))
        ours = _gradients(weights, inputs_BD, targets_BE.astype(np.float32), loss)
        leaves = [torch.tensor(weight, requires_grad=True) for weight in weights]
        hidden = torch.relu(torch.tensor(inputs_BD) @ leaves[0].T + leaves[1])
        outputs, targets = hidden @ leaves[2].T + leaves[3], torch.tensor(targets_BE, dtype=torch.float32)
        if loss == "scores":
            ((outputs - targets) ** 2).sum(dim=1).mean().backward()
        else:
            (-torch.logsumexp(torch.log_softmax(outputs, -1) + targets, -1)).mean().backward()
        for gradient, leaf in zip(ours, leaves, strict=True):
            assert gradient == pytest.approx(leaf.grad.numpy(), rel=1e-5, abs=1e-5)


def gate(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The paper's formula in float64."""
    difference = own.astype(np.float64).mean(axis=0) - others.astype(np.float64).mean(axis=0)
    return difference / np.linalg.norm(difference)


def test_a_gate_is_the_unit_difference_of_positive_and_negative_means() -> None:
    rng = np.random.default_rng(2)
    own, others = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    router = LinearRouter.from_vectors({"a": ["x"], "b": ["y"]}, {"x": list(own), "y": list(others)})
    probe = rng.normal(size=5).astype(np.float32)
    assert router.estimate(probe).quality_E == pytest.approx(
        [probe @ gate(own, others), probe @ gate(others, own)], rel=1e-5
    )


def test_an_expert_of_several_subjects_scores_by_the_best_of_their_gates() -> None:
    rng = np.random.default_rng(3)
    x, y, z = (rng.normal(size=(2, 5)).astype(np.float32) for _ in range(3))
    subjects = {"x": list(x), "y": list(y), "z": list(z)}
    router = LinearRouter.from_vectors({"merged": ["x", "z"], "b": ["y"]}, subjects)
    alone = LinearRouter.from_vectors({name: [name] for name in subjects}, subjects)
    for probe in rng.normal(size=(20, 5)).astype(np.float32):
        by_subject = alone.estimate(probe).quality_E
        assert router.estimate(probe).quality_E.tolist() == [max(by_subject[0], by_subject[2]), by_subject[1]]
