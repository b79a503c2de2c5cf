"""From a prompt to a route: features, then router, then policy; the one path that build, CLI and service share."""

from __future__ import annotations

from dataclasses import dataclass

from routers.base import Policy, Route, Router, pin
from routers.features import TokenEmbeddings
from routers.fixed import FixedRouter

AUTO = "auto"
"""The model name that asks for routing."""


@dataclass(frozen=True, slots=True)
class Pull:
    """How much one word moved the margin between the chosen expert and the next, in score."""

    word: str
    score: float


@dataclass(frozen=True, slots=True)
class PromptRouter:
    """What a bundle's routing is made of."""

    features: TokenEmbeddings
    router: Router
    policy: Policy

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in the bundle's order."""
        return self.router.experts

    def route(self, prompt: str, *, model: str = AUTO, k: int | None = None) -> Route:
        """The route of a prompt, or of the pinned `model`. Raises RoutingError for an unknown model or k."""
        if model != AUTO:
            return pin(self.experts, model)
        return self._of_tokens(self.features.tokens(prompt), k)

    def explain(self, prompt: str, most: int = 5) -> list[Pull]:
        """The words that spoke most for the chosen expert: what the margin loses when a word is left out."""
        ids = self.features.tokens(prompt)
        route = self._of_tokens(ids)
        if len(self.experts) == 1 or not ids:
            return []
        first, second = (self.experts.index(ranked.expert) for ranked in route.ranking[:2])
        pulls: dict[str, float] = {}
        for word, vector_D in self.features.leaving_out_each(ids):
            scores_E = self.router.estimate(vector_D)
            loss = route.margin - float(scores_E[first] - scores_E[second])
            pulls[word] = pulls.get(word, 0.0) + loss
        ranked = sorted(pulls.items(), key=lambda item: -item[1])
        return [Pull(word, score) for word, score in ranked[:most] if score > 0 and word]

    def _of_tokens(self, ids: list[int], k: int | None = None) -> Route:
        scores_E = self.router.estimate(self.features.of_tokens(ids))
        return self.policy.decide(self.experts, scores_E, fixed=self.router.kind == FixedRouter.kind, k=k)
