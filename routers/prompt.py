"""From a prompt to a route: features, then router, then policy; the one path that build, CLI and service share."""

from __future__ import annotations

import time
from dataclasses import dataclass

from routers.base import Estimate, Router
from routers.features import Features
from routers.policy import NO_LIMITS, Limits, Policy, Route, pin

AUTO = "auto"
"""The model name that asks for routing."""


@dataclass(frozen=True, slots=True)
class Pull:
    """How much one word moved the margin between the chosen expert and the next, in score."""

    word: str
    score: float


@dataclass(frozen=True, slots=True)
class Steps:
    """Seconds that the steps of a route took."""

    features: float = 0.0
    estimate: float = 0.0
    policy: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptRouter:
    """What a bundle's routing is made of."""

    features: Features
    router: Router
    policy: Policy

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in the bundle's order."""
        return self.router.experts

    def estimate(self, prompt: str) -> Estimate:
        """What the router expects of every expert."""
        return self.router.estimate(self.features.vector(prompt))

    def route(self, prompt: str, *, model: str = AUTO, limits: Limits = NO_LIMITS) -> Route:
        """The route of a prompt, or of the pinned `model`. Raises RoutingError for what cannot be."""
        if model != AUTO:
            return pin(self.experts, model)
        return self.timed(prompt, limits)[0]

    def timed(self, prompt: str, limits: Limits = NO_LIMITS) -> tuple[Route, Steps]:
        """The route of a prompt, and what each step took."""
        began = time.perf_counter()
        vector_D = self.features.vector(prompt)
        embedded = time.perf_counter()
        estimate = self.router.estimate(vector_D)
        estimated = time.perf_counter()
        route = self.policy.decide(self.experts, estimate, limits)
        return route, Steps(embedded - began, estimated - embedded, time.perf_counter() - estimated)

    def explain(self, prompt: str, most: int = 5) -> list[Pull]:
        """The words that spoke most for the chosen expert: what the margin loses when a word is left out."""
        route = self.route(prompt)
        if len(self.experts) == 1:
            return []
        first, second = (self.experts.index(ranked.expert) for ranked in route.ranking[:2])
        margin = route.ranking[0].quality - route.ranking[1].quality
        pulls: dict[str, float] = {}
        for word, vector_D in self.features.without_each(prompt):
            quality_E = self.router.estimate(vector_D).quality_E
            pulls[word] = pulls.get(word, 0.0) + margin - float(quality_E[first] - quality_E[second])
        ranked = sorted(pulls.items(), key=lambda item: -item[1])
        return [Pull(word, score) for word, score in ranked[:most] if score > 0 and word]
