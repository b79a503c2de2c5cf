from __future__ import annotations

import numpy as np
import pytest

from routers.base import Estimate, Evidence
from routers.errors import RoutingError
from routers.policy import Calibration, Limits, Policy, pin

EXPERTS = ("a", "b", "c")


def expected(*quality: float, std: float = 0.1) -> Estimate:
    return Estimate(np.array(quality, np.float32), np.full(len(quality), std, np.float32), Evidence("weights"))


def test_the_best_quality_wins_and_the_margin_is_its_lead() -> None:
    route = Policy("a").decide(EXPERTS, expected(0.1, 0.7, 0.4))
    assert [ranked.expert for ranked in route.ranking] == ["b", "c", "a"]
    assert (route.expert, route.reason) == ("b", "top_score")
    assert route.margin == pytest.approx(0.3)


def test_weights_are_the_softmax_over_the_selected_alone() -> None:
    route = Policy("a", k=2).decide(EXPERTS, expected(1.0, 3.0, 2.0))
    wanted = np.exp([3.0, 2.0]) / np.exp([3.0, 2.0]).sum()
    assert [ranked.weight for ranked in route.ranking] == pytest.approx([*wanted, 0.0])
    assert [ranked.selected for ranked in route.ranking] == [True, True, False]


def test_a_tie_goes_to_the_default_then_to_the_order_of_the_bundle() -> None:
    assert Policy("c").decide(EXPERTS, expected(0.5, 0.5, 0.5)).expert == "c"
    assert Policy("a").decide(EXPERTS, expected(0.0, 0.5, 0.5)).expert == "b"


def test_equal_estimates_everywhere_are_no_evidence() -> None:
    assert Policy("b").decide(EXPERTS, expected(0.0, 0.0, 0.0)).reason == "no_evidence"


def test_what_did_not_look_at_the_prompt_is_fixed() -> None:
    fixed = Estimate(np.array([0.1, 0.2, 0.3], np.float32), np.zeros(3, np.float32), Evidence("none"))
    assert Policy("a").decide(EXPERTS, fixed).reason == "fixed"


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_k_that_cannot_be_is_refused(k: int) -> None:
    with pytest.raises(RoutingError, match=f"between 1 and 3, the number of experts; got {k}"):
        Policy("a").decide(EXPERTS, expected(1, 2, 3), Limits(k=k))


def test_a_cost_is_taken_off_the_quality() -> None:
    policy = Policy("a", cost_weight=0.5, costs={"a": 0.1, "b": 1.0, "c": 0.2})
    route = policy.decide(EXPERTS, expected(0.1, 0.7, 0.4))
    assert [(each.expert, each.score) for each in route.ranking] == [
        ("c", pytest.approx(0.3)),
        ("b", pytest.approx(0.2)),
        ("a", pytest.approx(0.05)),
    ]
    assert policy.decide(EXPERTS, expected(0.1, 0.7, 0.4), Limits(cost_weight=0.0)).expert == "b"


@pytest.mark.parametrize(
    ("limits", "chosen", "excluded"),
    [
        (Limits(deny=frozenset({"b"})), "c", {"b": "denied"}),
        (Limits(allow=frozenset({"a"})), "a", {"b": "not_allowed", "c": "not_allowed"}),
        (Limits(tokens=100), "c", {"b": "context_window"}),
        (Limits(ready=frozenset({"a", "c"})), "c", {"b": "not_ready"}),
    ],
)
def test_an_expert_that_does_not_fit_is_excluded_with_the_reason(
    limits: Limits, chosen: str, excluded: dict[str, str]
) -> None:
    route = Policy("a", windows={"b": 50, "a": 200}).decide(EXPERTS, expected(0.1, 0.7, 0.4), limits)
    assert route.expert == chosen
    assert {each.expert: each.excluded for each in route.ranking if each.excluded} == excluded
    assert all(each.weight == 0 for each in route.ranking if each.excluded)


def test_the_only_expert_left_is_no_evidence_of_quality() -> None:
    route = Policy("a").decide(EXPERTS, expected(0.1, 0.7, 0.4), Limits(allow=frozenset({"a"})))
    assert (route.reason, route.margin, route.confidence) == ("only_choice", 0.0, None)


def test_when_nobody_may_answer_every_reason_is_told() -> None:
    with pytest.raises(RoutingError, match=r"may answer this: a \(denied\), b \(not_ready\), c \(not_ready\)"):
        Policy("a").decide(EXPERTS, expected(1, 2, 3), Limits(deny=frozenset("a"), ready=frozenset("a")))


def test_an_unknown_name_to_deny_is_refused() -> None:
    with pytest.raises(RoutingError, match="no expert 'z' to allow or deny; there are: a, b, c"):
        Policy("a").decide(EXPERTS, expected(1, 2, 3), Limits(deny=frozenset("z")))


def test_more_are_never_selected_than_may_answer() -> None:
    route = Policy("a", k=3).decide(EXPERTS, expected(1, 2, 3), Limits(deny=frozenset("c")))
    assert [each.expert for each in route.ranking if each.selected] == ["b", "a"]


def test_below_the_threshold_the_default_answers() -> None:
    policy = Policy("a", calibration=Calibration(0.0, 1.0), threshold=0.9)
    unsure = policy.decide(EXPERTS, expected(0.1, 0.7, 0.4))
    assert (unsure.expert, unsure.reason) == ("a", "abstained")
    assert unsure.confidence == pytest.approx(1 / (1 + np.exp(-0.3 / np.hypot(0.1, 0.1))))
    sure = policy.decide(EXPERTS, expected(0.1, 0.7, 0.4, std=0.01))
    assert (sure.expert, sure.reason) == ("b", "top_score")


def test_a_default_that_may_not_answer_does_not() -> None:
    policy = Policy("a", calibration=Calibration(0.0, 1.0), threshold=0.9)
    assert policy.decide(EXPERTS, expected(0.1, 0.7, 0.4), Limits(deny=frozenset("a"))).expert == "b"


def test_a_pinned_expert_is_the_whole_route() -> None:
    route = pin(EXPERTS, "b")
    assert (route.expert, route.reason, route.ranking[0].weight) == ("b", "pinned", 1.0)


def test_an_unknown_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(RoutingError, match="no model 'z'; there are: auto, a, b, c"):
        pin(EXPERTS, "z")
