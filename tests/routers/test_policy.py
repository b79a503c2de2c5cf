from __future__ import annotations

import numpy as np
import pytest

from routers.base import Policy, pin
from routers.errors import RoutingError

EXPERTS = ("a", "b", "c")


def scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_best_score_wins_and_the_margin_is_its_lead() -> None:
    route = Policy("a").decide(EXPERTS, scores(0.1, 0.7, 0.4), fixed=False)
    assert [ranked.expert for ranked in route.ranking] == ["b", "c", "a"]
    assert (route.expert, route.reason) == ("b", "top_score")
    assert route.margin == pytest.approx(0.3)


def test_weights_are_the_softmax_over_the_selected_alone() -> None:
    route = Policy("a", k=2).decide(EXPERTS, scores(1.0, 3.0, 2.0), fixed=False)
    expected = np.exp([3.0, 2.0]) / np.exp([3.0, 2.0]).sum()
    assert [ranked.weight for ranked in route.ranking] == pytest.approx([*expected, 0.0])
    assert [ranked.selected for ranked in route.ranking] == [True, True, False]


def test_a_tie_goes_to_the_default_then_to_the_order_of_the_bundle() -> None:
    assert Policy("c").decide(EXPERTS, scores(0.5, 0.5, 0.5), fixed=False).expert == "c"
    assert Policy("a").decide(EXPERTS, scores(0.0, 0.5, 0.5), fixed=False).expert == "b"


def test_equal_scores_everywhere_are_no_evidence() -> None:
    assert Policy("b").decide(EXPERTS, scores(0.0, 0.0, 0.0), fixed=False).reason == "no_evidence"


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_k_that_cannot_be_is_refused(k: int) -> None:
    with pytest.raises(RoutingError, match=f"between 1 and 3, the number of experts; got {k}"):
        Policy("a").decide(EXPERTS, scores(1, 2, 3), fixed=False, k=k)


def test_a_pinned_expert_is_the_whole_route() -> None:
    route = pin(EXPERTS, "b")
    assert (route.expert, route.reason, route.ranking[0].weight) == ("b", "pinned", 1.0)


def test_an_unknown_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(RoutingError, match="no model 'z'; there are: auto, a, b, c"):
        pin(EXPERTS, "z")
