from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from builder.routing.crossval import by_chance, by_task, predict, prove
from builder.routing.perturb import PERTURBATIONS, typos
from builder.routing.portfolio import portfolio
from routers.estimators import FITTED
from routers.scorecard import apgr, calibrate, calibration_error, risk_coverage, scorecard
from routers.testing import EXPERTS, examples


def test_nothing_is_estimated_by_a_router_that_saw_it() -> None:
    vectors_ND, scores_NE = examples(40)
    seen: list[np.ndarray] = []

    def fit(some_ND: np.ndarray, some_NE: np.ndarray) -> object:
        seen.append(some_ND)
        return FITTED["knn"].fit(EXPERTS, some_ND, some_NE, 0)

    parts = by_chance(40, 5, 1)
    assert np.array_equal(np.sum(parts, axis=0), np.ones(40))
    predict(fit, vectors_ND, scores_NE, parts)
    for held_N, others_ND in zip(parts, seen, strict=True):
        assert len(others_ND) == 40 - held_N.sum()
        assert not {row.tobytes() for row in vectors_ND[held_N]} & {row.tobytes() for row in others_ND}


def test_a_task_is_left_out_as_a_whole() -> None:
    assert [part.tolist() for part in by_task(["a", "b", "a"])] == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize("kind", [kind for kind in FITTED if kind != "fixed"])
def test_every_router_is_proven_where_there_is_something_to_learn(kind: str) -> None:
    vectors_ND, scores_NE = examples(120)
    proven = prove(
        EXPERTS,
        lambda v, s: FITTED[kind].fit(EXPERTS, v, s, 0),
        vectors_ND,
        scores_NE,
        parts=by_chance(120, 5, 0),
        seed=0,
    )
    assert proven.card.proven
    assert proven.card.oracle_share > 0.9


def test_noise_proves_nobody() -> None:
    vectors_ND, _ = examples(120)
    scores_NE = np.random.default_rng(0).integers(0, 2, (120, 3)).astype(float)
    for kind in FITTED:
        proven = prove(
            EXPERTS,
            lambda v, s, kind=kind: FITTED[kind].fit(EXPERTS, v, s, 0),
            vectors_ND,
            scores_NE,
            parts=by_chance(120, 5, 0),
            seed=0,
        )
        assert not proven.card.proven


def test_the_calibration_is_sklearns_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    leads_N = rng.normal(1, 1, 400)
    right_N = rng.random(400) < 1 / (1 + np.exp(-(0.3 + 0.9 * leads_N)))
    theirs = LogisticRegression(C=1e6).fit(leads_N[:, None], right_N)
    ours = calibrate(leads_N, right_N)
    assert (ours.intercept, ours.slope) == pytest.approx((theirs.intercept_[0], theirs.coef_[0, 0]), abs=0.01)


def test_a_confidence_that_is_the_frequency_has_no_error() -> None:
    confidence_N = np.repeat([0.25, 0.75], 40)
    right_N = np.tile([True, False, False, False], 10).tolist() + np.tile([True, True, True, False], 10).tolist()
    assert calibration_error(confidence_N, np.array(right_N)) == pytest.approx(0)
    assert calibration_error(1 - confidence_N, np.array(right_N)) == pytest.approx(0.5)


def test_the_surest_prompts_come_first() -> None:
    points = risk_coverage(np.arange(10.0), np.arange(10) > 4, np.arange(10.0))
    assert (points[0].coverage, points[0].gain) == (1.0, 4.5)
    assert (points[-1].coverage, points[-1].gain, points[-1].right) == (0.1, 9.0, 1.0)


def test_apgr_is_one_half_for_a_random_order_and_more_for_the_right_one() -> None:
    rng = np.random.default_rng(0)
    scores_N2 = rng.integers(0, 2, (4000, 2)).astype(float)
    scores_N2[:, 1] = np.maximum(scores_N2[:, 1], rng.random(4000) < 0.4)
    assert apgr(scores_N2, rng.random((4000, 2))) == pytest.approx(0.5, abs=0.08)
    assert apgr(scores_N2, scores_N2) > 1.0


def test_the_scorecard_counts_who_is_dead_and_how_mixed_the_picks_are() -> None:
    card = scorecard(EXPERTS, examples(8)[1], np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0)
    assert (card.entropy_bits, card.dead) == (1.0, ("c",))


def test_perturbations_change_the_text_and_are_the_same_every_time() -> None:
    text = "Don't write a function that returns 'the largest number' of a list"
    for change in PERTURBATIONS.values():
        assert change(text) != text
        assert change(text) == change(text)
    assert sorted(typos(text)) == sorted(text)


def test_an_expert_that_adds_nothing_is_not_in_the_smallest_set() -> None:
    scores_NE = examples(60)[1]
    doubled_NE = np.column_stack([scores_NE, scores_NE[:, 0] * 0.9])
    found = portfolio(("a", "b", "c", "copy"), doubled_NE, doubled_NE, {"copy": 7, "a": 1})
    assert found.smallest == ("a", "b", "c")
    assert (found.freed, found.smallest_gain) == (7, pytest.approx(found.gain))
    assert {each.expert: round(each.loss, 3) for each in found.worth} == {
        "a": pytest.approx(0.033, abs=1e-3),
        "b": pytest.approx(0.333, abs=1e-3),
        "c": pytest.approx(0.333, abs=1e-3),
        "copy": 0.0,
    }
