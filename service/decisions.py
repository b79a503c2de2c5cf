"""Which expert answers: what of a request is routed, within which limits, and who is next where that one fails."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeVar

from routers.features import Features, TokenEmbeddings
from routers.policy import NO_LIMITS, Limits, Route, pin
from routers.prompt import AUTO, PromptRouter, Steps
from service import sessions as keys
from service.engines.base import Engine, EngineError, NotReadyError, Prompt, Sampling, Tokens, UnsupportedError
from service.errors import RequestError
from service.sessions import Sessions, alone, keep

Mixture = Literal["all", "best"]
T = TypeVar("T")

TURNS: Final = 3
"""User turns of a chat that are routed: the last and the two before it."""

SAMPLE: Final = 128
"""Characters from a prompt's end whose tokens, all of which the features count, tell how many the whole has."""

LAST_TOKENS: Final = 4096
"""Tokens of a prompt in tokens that are read, from its end."""

CHEAP: Final = 0.1
"""Quality, of 1, that `auto:cheap` gives up for an expert that costs nothing beside the dearest."""

POLICIES: Final[Mapping[str, Limits]] = {
    AUTO: NO_LIMITS,
    f"{AUTO}:best": Limits(k=1, cost_weight=0.0),
    f"{AUTO}:cheap": Limits(cost_weight=CHEAP),
}
"""The models that ask for routing: as the bundle has it; the best alone, whatever it costs; costs weighed. What a
body says itself (k, cost_weight) goes first."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and what a client asks for; the answer ends before a stop string, or with it where `keep_stop`.

    n: answers wanted, the likeliest of `best_of`. echo: the prompt goes before each. session: the client's name for
    the conversation that this belongs to. client: whose it is; nobody has a part in the sessions of others.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    model: str = AUTO
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    n: int = 1
    best_of: int = 1
    echo: bool = False
    limits: Limits = NO_LIMITS
    mixture: Mixture = "all"
    session: str | None = None
    client: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The route of a request within its limits, the text that it was made from, and how long it took.

    session: the key that the answering expert is to be remembered by. at: when it was begun, by time.perf_counter.
    steps: of the router, where it was asked.
    """

    text: str
    route: Route
    seconds: float
    limits: Limits = NO_LIMITS
    session: str | None = None
    at: float = 0.0
    steps: Steps | None = None

    @property
    def experts(self) -> dict[str, float]:
        """Who answers, with what weight."""
        return {ranked.expert: ranked.weight for ranked in self.route.ranking if ranked.selected}


def decide(request: Request, router: PromptRouter, engine: Engine, sessions: Sessions) -> Decision:
    """The one route of a request; remembers nothing.

    Raises RoutingError for an unknown model, RequestError for limits that cannot be, UnsupportedError for experts that
    cannot be mixed, NotReadyError or EngineError where no expert that may answer is ready.
    """
    began = time.perf_counter()
    session, past = _session(request)
    steps: Steps | None = None
    if request.model not in POLICIES:
        route = pin(router.experts, request.model, POLICIES)
        _check_alone(request.limits)
        text, limits = text_to_route(request.prompt, router, engine, pinned=True), request.limits
    else:
        limits = _within(request, router, engine)
        text = text_to_route(request.prompt, router, engine)
        route, steps = router.timed(text, limits)
        last = sessions.last(session) if session and past else None
        route = keep(route, last) if last else route
        route = _mixable(route, request, engine)
    return Decision(text, route, time.perf_counter() - began, limits, session, began, steps)


async def aside(router: PromptRouter, work: Callable[[], T]) -> T:
    """What `work` on its routes returns: in a thread where the features are a network's, and would hold up the loop."""
    if isinstance(router.features, TokenEmbeddings):
        return work()
    return await asyncio.to_thread(work)


def attempts(decision: Decision) -> Iterator[Decision]:
    """The decision, and what is left where its experts fail: every other that may answer, alone, the best first."""
    yield decision
    if decision.route.reason == "pinned":
        return
    mixed = len(decision.experts) > 1
    for ranked in decision.route.ranking[0 if mixed else 1 :]:
        if ranked.excluded is None:
            yield replace(decision, route=alone(decision.route, ranked.expert, "fallback"))


def text_to_route(prompt: Prompt, router: PromptRouter, engine: Engine, *, pinned: bool = False) -> str:
    """What of a prompt the router sees: of a chat the last user turns, for only they say what is wanted.

    Tokens are read by the default expert's tokenizer; those for a pinned expert are not read.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Tokens):
        return "" if pinned else read_tokens(router.policy.default, prompt.ids[-LAST_TOKENS:], engine, "prompt")
    turns = [message.content for message in prompt if message.role == "user"]
    return "\n".join(turns[-TURNS:])


def read_tokens(expert: str, ids: Sequence[int], engine: Engine, param: str) -> str:
    """The text of tokens that a client sent in the field `param`. Raises RequestError for ids that cannot be any."""
    try:
        return engine.decode(expert, ids)
    except OverflowError as exc:  # what tokenizers say to a number that is larger than theirs
        raise RequestError(f"{param} has a number that is no token of {expert}'s", param) from exc


def estimated_tokens(prompt: Prompt, features: Features) -> int:
    """About how many tokens a prompt has, from those of its end by the router's tokenizer."""
    if isinstance(prompt, Tokens):
        return len(prompt.ids)
    text = _whole(prompt)
    end = text[-SAMPLE:]
    # An encoder's tokenizer is its own; four characters a token is English.
    tokens = len(features.tokens(end)) if isinstance(features, TokenEmbeddings) else len(end) / 4
    return math.ceil(tokens * len(text) / max(len(end), 1))


def _session(request: Request) -> tuple[str | None, bool]:
    """The key of a request's session, and whether it can have a past: a chat's first turn is routed by itself."""
    if request.session:
        return keys.named(request.client, request.session), True
    if isinstance(request.prompt, str | Tokens):
        return None, False
    return keys.of_chat(request.client, request.prompt), any(message.role == "assistant" for message in request.prompt)


def _mixable(route: Route, request: Request, engine: Engine) -> Route:
    """The route; its first expert's alone where the selected ones cannot answer as one and nobody insists on it."""
    selected = [ranked.expert for ranked in route.ranking if ranked.selected]
    if len(selected) == 1:
        return route
    try:
        engine.check_mix(selected, request.sampling)
    except UnsupportedError:
        if request.limits.k is not None and request.mixture == "all":
            raise
        return alone(route, route.expert, route.reason)
    return route


def _check_alone(limits: Limits) -> None:
    asked = {
        "k": limits.k not in (None, 1),
        "allow": limits.allow is not None,
        "deny": bool(limits.deny),
        "cost_weight": limits.cost_weight is not None,
    }
    if param := next((param for param, given in asked.items() if given), None):
        raise RequestError(f"{param} is for model {AUTO!r}: a pinned expert stands alone", param)


def _within(request: Request, router: PromptRouter, engine: Engine) -> Limits:
    """The request's limits and the service's own. An estimate of the prompt's size leaves out experts, never all."""
    asked, policy = request.limits, POLICIES[request.model]
    k = policy.k if asked.k is None else asked.k
    cost_weight = policy.cost_weight if asked.cost_weight is None else asked.cost_weight
    for param, names in (("allow", asked.allow or ()), ("deny", asked.deny)):
        if unknown := sorted(set(names) - set(router.experts)):
            raise RequestError(f"{param} has no expert {unknown[0]!r}; there are: {', '.join(router.experts)}", param)
    if k is not None and k > len(router.experts):
        raise RequestError(f"k is {k}, and there are {len(router.experts)} experts: ask for as many at most", "k")
    open_ = [name for name in router.experts if name not in asked.deny and (asked.allow is None or name in asked.allow)]
    if not open_:
        raise RequestError("allow and deny leave no expert: allow another", "deny" if asked.deny else "allow")
    ready = _ready(open_, engine)
    windows = [router.policy.windows.get(name, math.inf) for name in open_ if name in ready]
    return Limits(k, asked.allow, asked.deny, _tokens(request, router.features, windows), ready, cost_weight)


def _ready(experts: list[str], engine: Engine) -> frozenset[str]:
    states = {name: status.state for name, status in engine.status().items()}
    ready = frozenset(name for name, state in states.items() if state == "ready")
    if ready.isdisjoint(experts):
        told = ", ".join(f"{name} ({states[name]})" for name in experts)
        kind = NotReadyError if "loading" in (states[name] for name in experts) else EngineError
        raise kind(f"no expert is ready to answer: {told}")
    return ready


def _tokens(request: Request, features: Features, windows: list[float]) -> int | None:
    answer = request.sampling.max_tokens or 1
    length = len(request.prompt.ids) if isinstance(request.prompt, Tokens) else len(_whole(request.prompt).encode())
    if length + answer <= min(windows):  # a token has a byte at least
        return None
    tokens = estimated_tokens(request.prompt, features) + answer
    return None if tokens > max(windows) else tokens


def _whole(prompt: Prompt) -> str:
    assert not isinstance(prompt, Tokens)
    return prompt if isinstance(prompt, str) else "\n".join(f"{each.role}\n{each.content}" for each in prompt)
