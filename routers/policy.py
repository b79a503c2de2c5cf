"""From estimates to a decision: who may answer, what an expert costs, when to trust the router; one route a request.

E experts, K selected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from routers.base import Estimate, Evidence, Vector
from routers.errors import RoutingError

Reason = Literal[
    "top_score", "no_evidence", "abstained", "only_choice", "fixed", "pinned", "retained", "switched", "fallback"
]
Excluded = Literal["not_allowed", "denied", "context_window", "not_ready"]


@dataclass(frozen=True, slots=True)
class Ranked:
    """One expert's place in a route.

    score: what the ranking goes by, quality less its weighed cost. quality, std: as estimated. weight: over the
    selected experts, summing to one. excluded: why it could not be chosen.
    """

    expert: str
    score: float
    quality: float
    std: float
    cost: float
    selected: bool
    weight: float
    excluded: Excluded | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """The decision for one prompt, best expert first; made once and kept for the whole answer.

    confidence: the calibrated probability that no other expert would have scored better; None where nobody knows.
    """

    ranking: tuple[Ranked, ...]
    reason: Reason
    confidence: float | None = None
    evidence: Evidence = field(default=Evidence("none"))

    @property
    def expert(self) -> str:
        """The expert that answers."""
        return self.ranking[0].expert

    @property
    def margin(self) -> float:
        """How far the first is ahead of the best other that could be chosen, in score; 0.0 without one."""
        others = [ranked.score for ranked in self.ranking[1:] if ranked.excluded is None]
        return self.ranking[0].score - max(others) if others else 0.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """How the lead of the first expert, in standard deviations, becomes a probability: sigmoid(a + b z) (Platt)."""

    intercept: float
    slope: float

    def confidence(self, lead: float) -> float:
        """The probability that no other expert would have scored better."""
        return 1 / (1 + math.exp(-min(max(self.intercept + self.slope * lead, -60.0), 60.0)))


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request asks for, or the service knows: each expert that does not fit is excluded, and it is said why.

    allow: these alone. deny: none of these. tokens: that the prompt and its answer need; None is not checked.
    ready: those that can answer now; None is all.
    """

    k: int | None = None
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    tokens: int | None = None
    ready: frozenset[str] | None = None
    cost_weight: float | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Policy:
    """Top-k over utilities, with softmax weights among the k (paper: softmax in fp32, renormalised over the k).

    utility = quality - cost_weight * cost, cost the expert's, by default its share of the most active parameters.
    default: answers where the router knows nothing, or where its confidence is below `threshold`.
    windows: tokens that an expert can hold.
    """

    default: str
    k: int = 1
    cost_weight: float = 0.0
    costs: Mapping[str, float] = field(default_factory=dict)
    windows: Mapping[str, int] = field(default_factory=dict)
    calibration: Calibration | None = None
    threshold: float = 0.0

    def decide(self, experts: tuple[str, ...], estimate: Estimate, limits: Limits = NO_LIMITS) -> Route:
        """The route for an estimate. Ties go to the default expert, then to the order in the bundle.

        Raises RoutingError for a k out of 1..E, for an unknown name, and where no expert may answer.
        """
        k = self._k(experts, limits)
        excluded = self._excluded(experts, limits)
        weight = self.cost_weight if limits.cost_weight is None else limits.cost_weight
        cost_E = np.array([self.costs.get(expert, 0.0) for expert in experts], np.float32)
        utility_E = (estimate.quality_E - np.float32(weight) * cost_E).astype(np.float32)
        order = self._order(experts, utility_E, excluded)
        open_ = [e for e in order if excluded[e] is None]
        silent = len(open_) > 1 and len({float(utility_E[e]) for e in open_}) == 1
        confidence = self._confidence(open_, utility_E, estimate.std_E)
        reason: Reason = "top_score"
        if estimate.evidence.kind == "none":
            reason, confidence = "fixed", None
        elif len(open_) == 1 and len(experts) > 1:
            reason, confidence = "only_choice", None
        elif silent:
            reason, confidence = "no_evidence", None
        elif confidence is not None and confidence < self.threshold and experts[order[0]] != self.default:
            default = experts.index(self.default)
            if excluded[default] is None:
                order = [default, *(e for e in order if e != default)]
                reason = "abstained"
        chosen = [e for e in order if excluded[e] is None][:k]
        weights_K = _softmax(utility_E[chosen])
        shares = dict(zip(chosen, map(float, weights_K), strict=True))
        ranking = tuple(
            Ranked(
                experts[e],
                float(utility_E[e]),
                float(estimate.quality_E[e]),
                float(estimate.std_E[e]),
                float(cost_E[e]),
                e in shares,
                shares.get(e, 0.0),
                excluded[e],
            )
            for e in order
        )
        return Route(ranking, reason, confidence, estimate.evidence)

    def _k(self, experts: Sequence[str], limits: Limits) -> int:
        k = self.k if limits.k is None else limits.k
        if not 1 <= k <= len(experts):
            raise RoutingError(f"k must be between 1 and {len(experts)}, the number of experts; got {k}")
        return k

    def _excluded(self, experts: Sequence[str], limits: Limits) -> list[Excluded | None]:
        for name in sorted((limits.allow or frozenset()) | limits.deny):
            if name not in experts:
                raise RoutingError(f"no expert {name!r} to allow or deny; there are: {', '.join(experts)}")
        why = [self._why_not(expert, limits) for expert in experts]
        if None not in why:
            told = ", ".join(f"{expert} ({reason})" for expert, reason in zip(experts, why, strict=True))
            raise RoutingError(f"no expert may answer this: {told}")
        return why

    def _why_not(self, expert: str, limits: Limits) -> Excluded | None:
        if limits.allow is not None and expert not in limits.allow:
            return "not_allowed"
        if expert in limits.deny:
            return "denied"
        if limits.tokens is not None and limits.tokens > self.windows.get(expert, limits.tokens):
            return "context_window"
        if limits.ready is not None and expert not in limits.ready:
            return "not_ready"
        return None

    def _order(self, experts: Sequence[str], utility_E: Vector, excluded: Sequence[Excluded | None]) -> list[int]:
        shut = np.array([each is not None for each in excluded])
        favoured = np.array([expert != self.default for expert in experts])
        return [int(e) for e in np.lexsort((np.arange(len(experts)), favoured, -utility_E, shut))]

    def _confidence(self, open_: Sequence[int], utility_E: Vector, std_E: Vector) -> float | None:
        if self.calibration is None or len(open_) < 2:
            return None
        return self.calibration.confidence(lead(utility_E[open_], std_E[open_]))


def lead(ranked_E: Vector, std_E: Vector) -> float:
    """How far the first of at least two is ahead of the second, in standard deviations of their difference."""
    apart = math.sqrt(float(std_E[0]) ** 2 + float(std_E[1]) ** 2)
    return float(ranked_E[0] - ranked_E[1]) / max(apart, 1e-6)


def pin(experts: tuple[str, ...], expert: str, policies: Iterable[str] = ("auto",)) -> Route:
    """The route of a request that names its expert. Raises RoutingError for one that is not there.

    policies: the models that are no experts.
    """
    if expert not in experts:
        raise RoutingError(f"no model {expert!r}; there are: {', '.join((*policies, *experts))}")
    others = (Ranked(other, 0.0, 0.0, 0.0, 0.0, False, 0.0) for other in experts if other != expert)
    return Route((Ranked(expert, 0.0, 0.0, 0.0, 0.0, True, 1.0), *others), "pinned")


def _softmax(scores_K: Vector) -> Vector:
    exp_K = np.exp(scores_K.astype(np.float32) - scores_K.max())
    weights_K: Vector = exp_K / exp_K.sum()
    return weights_K
