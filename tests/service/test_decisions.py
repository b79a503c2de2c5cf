"""Who answers: what is routed, within which limits, and what a session changes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from routers.errors import RoutingError
from routers.features import MAX_TOKENS, TokenEmbeddings
from routers.policy import Limits
from routers.prompt import AUTO, PromptRouter
from service.decisions import CHEAP, Decision, Mixture, Request, attempts, decide, estimated_tokens, text_to_route
from service.engines.base import EngineError, Message, NotReadyError, Sampling, State, Status, Tokens, UnsupportedError
from service.engines.echo import EchoEngine
from service.errors import RequestError
from service.sessions import MARGIN, Sessions, keep, named, of_chat

PROMPTS = ["python loop", "sum divide", "the owl", "add a fraction"]


class Partly(EchoEngine):
    """Experts in these states."""

    def __init__(self, **states: State) -> None:
        super().__init__(tuple(states))
        self._states = states

    def status(self) -> dict[str, Status]:
        return {name: Status(state) for name, state in self._states.items()}


def decided(
    router: PromptRouter, request: Request, engine: EchoEngine | None = None, sessions: Sessions | None = None
) -> Decision:
    return decide(request, router, engine or EchoEngine(router.experts), sessions or Sessions())


def test_of_a_chat_the_last_three_user_turns_are_routed(router: PromptRouter) -> None:
    turns = ("system", "Be brief."), ("user", "1"), ("user", "2"), ("assistant", "Hm."), ("user", "3"), ("user", "4")
    chat = (*(Message(*turn) for turn in turns), Message("tool", "owl"))
    assert text_to_route(chat, router, EchoEngine(router.experts)) == "2\n3\n4"


def test_a_chat_without_a_user_goes_to_the_default(router: PromptRouter) -> None:
    route = decided(router, Request((Message("system", "python"),))).route
    assert (route.expert, route.reason) == ("story", "no_evidence")


def test_tokens_are_routed_as_the_text_that_the_default_expert_reads(router: PromptRouter) -> None:
    engine = EchoEngine(router.experts)
    tokens = Tokens(engine.prepare({"story": 1.0}, "python loop", Sampling(0)).tokens)
    decision = decided(router, Request(tokens), engine)
    assert (decision.text, decision.route.expert) == ("python loop", "code")


def test_experts_that_are_not_ready_are_excluded_and_it_is_said(router: PromptRouter) -> None:
    route = decided(router, Request("python loop"), Partly(math="ready", code="loading", story="ready")).route
    assert route.expert != "code"
    assert {ranked.expert: ranked.excluded for ranked in route.ranking}["code"] == "not_ready"


@pytest.mark.parametrize(("state", "error"), [("loading", NotReadyError), ("failed", EngineError)])
def test_nobody_ready_is_a_failure_of_the_service(router: PromptRouter, state: State, error: type[Exception]) -> None:
    engine = Partly(math="failed", code=state, story="failed")
    with pytest.raises(error, match=rf"code \({state}\)") as caught:
        decided(router, Request("python loop"), engine)
    assert type(caught.value) is error
    with pytest.raises(error):
        decided(router, Request("python loop", limits=Limits(allow=frozenset(["code"]))), engine)


def test_a_prompt_over_an_experts_window_goes_to_another_and_it_is_said(router: PromptRouter) -> None:
    small = replace(router, policy=replace(router.policy, windows={"code": 30, "math": 200, "story": 200}))
    long = Request("python loop " * 20, Sampling(16))
    route = decided(small, long).route
    assert route.expert != "code"
    assert {ranked.expert: ranked.excluded for ranked in route.ranking}["code"] == "context_window"
    assert decided(small, replace(long, prompt="python loop")).route.expert == "code"


def test_an_estimate_never_excludes_every_expert(router: PromptRouter) -> None:
    small = replace(router, policy=replace(router.policy, windows=dict.fromkeys(router.experts, 30)))
    assert decided(small, Request("python loop " * 200, Sampling(16))).route.expert == "code"


@pytest.mark.parametrize("words", [1, 5, 300])
def test_the_estimate_is_near_the_routers_tokens(router: PromptRouter, words: int) -> None:
    assert estimated_tokens("python loop of " * words, router.features) == pytest.approx(3 * words, rel=0.03)
    assert estimated_tokens("", router.features) == 0
    assert estimated_tokens(Tokens((1, 2, 3)), router.features) == 3


def test_characters_of_several_tokens_each_count_as_such(router: PromptRouter) -> None:
    class Bytes(TokenEmbeddings):
        """A token for every byte, of which no more count than do elsewhere."""

        def tokens(self, text: str) -> list[int]:
            return [0 for _ in text.encode()][-MAX_TOKENS:]

    features = Bytes(Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), np.zeros((1, 16), np.float16), np.zeros(16))
    small = replace(router.policy, windows={"code": 1000, "math": 9000, "story": 9000})
    request = Request("的" * 600, Sampling(16))
    ranking = decided(PromptRouter(features, router.router, small), request).route.ranking
    assert {ranked.expert: ranked.excluded for ranked in ranking}["code"] == "context_window"


def test_allowed_and_denied_experts_decide_among_the_others(router: PromptRouter) -> None:
    denied = decided(router, Request("python loop", limits=Limits(deny=frozenset(["code"])))).route
    assert denied.expert == router.route("python loop").ranking[1].expert
    allowed = decided(router, Request("python loop", limits=Limits(allow=frozenset(["math"])))).route
    assert (allowed.expert, allowed.reason) == ("math", "only_choice")


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        (Limits(k=4), "k"),
        (Limits(allow=frozenset(["gpt"])), "allow"),
        (Limits(deny=frozenset(["gpt"])), "deny"),
        (Limits(allow=frozenset()), "allow"),
        (Limits(deny=frozenset(["math", "code", "story"])), "deny"),
    ],
)
def test_limits_that_cannot_be_are_named(router: PromptRouter, limits: Limits, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        decided(router, Request("python", limits=limits))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        (Limits(k=2), "k"),
        (Limits(allow=frozenset(["code"])), "allow"),
        (Limits(deny=frozenset(["math"])), "deny"),
        (Limits(cost_weight=0.5), "cost_weight"),
    ],
)
def test_a_pinned_expert_takes_no_limits(router: PromptRouter, limits: Limits, param: str) -> None:
    with pytest.raises(RequestError, match="pinned") as caught:
        decided(router, Request("python", model="code", limits=limits))
    assert caught.value.param == param


def test_a_policy_that_is_not_there_is_no_model(router: PromptRouter) -> None:
    with pytest.raises(RoutingError, match="auto:fast"):
        decided(router, Request("python", model="auto:fast"))


def test_the_policies_of_auto_are_limits_that_a_body_may_override(router: PromptRouter) -> None:
    policy = replace(router.policy, k=2, cost_weight=0.5, costs={"code": 1.0})
    costly = replace(router, policy=policy)
    request = Request("python loop")
    assert decided(costly, request).route == costly.route("python loop")
    best = decided(costly, replace(request, model="auto:best")).route
    assert (best.expert, sum(ranked.selected for ranked in best.ranking)) == ("code", 1)
    cheap = decided(costly, replace(request, model="auto:cheap"))
    assert cheap.limits.cost_weight == CHEAP
    own = decided(costly, replace(request, model="auto:best", limits=Limits(k=3, cost_weight=0.25)))
    assert (own.limits.k, own.limits.cost_weight) == (3, 0.25)


def test_after_the_first_attempt_the_others_follow_by_rank(router: PromptRouter) -> None:
    decision = decided(router, Request("python loop", limits=Limits(deny=frozenset(["story"]))))
    assert [(each.experts, each.route.reason) for each in attempts(decision)] == [
        ({"code": 1.0}, "top_score"),
        ({"math": 1.0}, "fallback"),
    ]
    assert len(list(attempts(decided(router, Request("python", model="code"))))) == 1


@pytest.mark.parametrize(("before", "prompt"), list(itertools.product(["math", "code", "story"], PROMPTS)))
def test_a_session_stays_unless_another_is_ahead_by_the_margin(router: PromptRouter, before: str, prompt: str) -> None:
    sessions = Sessions()
    sessions.answered(named(None, "mine"), before)
    leader = router.route(prompt).expert
    scores = {ranked.expert: ranked.score for ranked in router.route(prompt).ranking}
    route = decided(router, Request(prompt, session="mine"), sessions=sessions).route
    stays = scores[leader] - scores[before] <= MARGIN
    assert (route.expert, route.reason) == ((before, "retained") if stays else (leader, "switched"))
    assert [ranked.expert for ranked in route.ranking if ranked.selected] == [route.expert]


def test_a_prompt_that_says_nothing_does_not_end_a_session(router: PromptRouter) -> None:
    sessions = Sessions()
    sessions.answered(named(None, "mine"), "code")
    route = decided(router, Request("", session="mine"), sessions=sessions).route
    assert (route.expert, route.reason) == ("code", "retained")


def test_a_session_whose_expert_may_not_answer_is_switched(router: PromptRouter) -> None:
    sessions = Sessions()
    sessions.answered(named(None, "mine"), "code")
    request = Request("python loop", session="mine", limits=Limits(deny=frozenset(["code"])))
    route = decided(router, request, sessions=sessions).route
    assert (route.expert != "code", route.reason) == (True, "switched")


def test_a_lead_below_the_margin_is_not_enough(router: PromptRouter) -> None:
    route = router.route("python loop")
    first, second, third = route.ranking
    close = replace(route, ranking=(first, replace(second, score=first.score - MARGIN / 2), third))
    assert keep(close, second.expert).expert == second.expert
    far = replace(route, ranking=(first, replace(second, score=first.score - 2 * MARGIN), third))
    assert (keep(far, second.expert).expert, keep(far, second.expert).reason) == (first.expert, "switched")


def test_a_mixture_and_a_pinned_expert_are_as_asked_for(router: PromptRouter) -> None:
    sessions = Sessions()
    sessions.answered(named(None, "mine"), "story")
    for request in (
        Request("python loop", session="mine", limits=Limits(k=2)),
        Request("x", model="code", session="mine"),
    ):
        assert decided(router, request, sessions=sessions).route.reason in ("top_score", "pinned")


def test_a_chat_is_known_by_how_it_begins_once_it_has_been_answered(router: PromptRouter) -> None:
    opening = (Message("system", "Be brief."), Message("user", "the owl"))
    turn = (*opening, Message("assistant", "Hoo."), Message("user", "and?"))
    sessions = Sessions()
    sessions.answered(of_chat(None, opening), "math")
    assert decided(router, Request(turn), sessions=sessions).route.expert == "math"
    # The same words may begin another's chat.
    assert decided(router, Request(opening), sessions=sessions).route.expert == "story"
    other = (Message("system", "Be long."), *turn[1:])
    assert decided(router, Request(other), sessions=sessions).route.reason not in ("retained", "switched")


def test_nobody_has_a_part_in_the_sessions_of_others(router: PromptRouter) -> None:
    sessions = Sessions()
    chat = (Message("user", "the owl"), Message("assistant", "Hoo."), Message("user", "and?"))
    sessions.answered(named("ann", "mine"), "math")
    sessions.answered(of_chat("ann", chat), "math")
    for request in (Request(chat), Request("the owl", session="mine")):
        own = decided(router, replace(request, client="ann"), sessions=sessions).route
        assert own.reason in ("retained", "switched")
        alone = decided(router, request).route
        for other in ("bob", None):
            assert decided(router, replace(request, client=other), sessions=sessions).route == alone


@pytest.mark.parametrize("mixture", ["all", "best"])
def test_experts_that_cannot_be_mixed_are_no_route(router: PromptRouter, mixture: Mixture) -> None:
    engine = EchoEngine(router.experts, mixes=False)
    request = Request("python loop", limits=Limits(k=2), mixture=mixture)
    if mixture == "all":
        with pytest.raises(UnsupportedError):
            decided(router, request, engine)
    else:
        assert decided(router, request, engine).experts == {"code": 1.0}


def test_a_bundle_that_mixes_lets_the_best_alone_do_what_a_mixture_cannot(router: PromptRouter) -> None:
    class Scoreless(EchoEngine):
        def check_mix(self, experts: Sequence[str], sampling: Sampling) -> None:
            if sampling.prompt_logprobs is not None:
                raise UnsupportedError("together they score no prompts", "echo")

    mixing = replace(router, policy=replace(router.policy, k=2))
    for sampling, count in ((Sampling(1), 2), (Sampling(1, prompt_logprobs=0), 1)):
        assert len(decided(mixing, Request("python loop", sampling), Scoreless(router.experts)).experts) == count


def test_tokens_are_counted_and_not_estimated(router: PromptRouter) -> None:
    small = replace(router, policy=replace(router.policy, windows={"code": 100, "math": 9000, "story": 9000}))
    tokens = [Tokens(tuple(range(count))) for count in (80, 200)]
    found = [decided(small, Request(each, Sampling(16)), EchoEngine(router.experts)).route for each in tokens]
    assert [{r.expert: r.excluded for r in route.ranking}["code"] for route in found] == [None, "context_window"]


def test_the_sessions_that_were_silent_longest_are_forgotten() -> None:
    sessions = Sessions(most=2)
    for name in ("a", "b", "a", "c"):
        sessions.answered(name, "code")
    assert [sessions.last(name) for name in ("a", "b", "c")] == ["code", None, "code"]


def test_auto_is_a_policy() -> None:
    assert Request("x").model == AUTO
