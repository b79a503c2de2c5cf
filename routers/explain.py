"""A route as facts: what was expected of every expert, why, and what would have changed it."""

from __future__ import annotations

import math
from typing import Any, Literal

from routers.bundle import Bundle, RoutingRow
from routers.kmeans import KMeansRouter
from routers.linear import LinearRouter
from routers.policy import Limits, Route

Detail = Literal["basic", "scores", "full"]
PREVIEW = 200


def explain(read: Bundle, prompt: str, route: Route, limits: Limits, detail: Detail) -> dict[str, Any]:
    """The facts of the route that `prompt` took within `limits`.

    basic: who and why. scores: every expert's estimate, and the words that pulled. full: the evidence with its texts,
    counterfactuals, and the router's own standing.
    """
    facts: dict[str, Any] = {
        "expert": route.expert,
        "reason": route.reason,
        "router": read.manifest.router.kind,
        "margin": route.margin,
        "entropy": _entropy(route),
        "confidence": route.confidence,
        "k": sum(ranked.selected for ranked in route.ranking),
    }
    if detail != "basic":
        facts["words"] = [{"word": pull.word, "score": pull.score} for pull in read.router.pulls(prompt, route)]
        facts["experts"] = [
            {
                "expert": each.expert,
                "rank": rank,
                "score": each.score,
                "expected_quality": each.quality,
                "std": each.std,
                "cost": each.cost,
                "selected": each.selected,
                "weight": each.weight,
                "excluded": each.excluded,
            }
            for rank, each in enumerate(route.ranking, 1)
        ]
    if detail == "full":
        facts["evidence"] = _evidence(read, route)
        facts["counterfactuals"] = [] if route.reason == "pinned" else _counterfactuals(read, prompt, limits, route)
        facts["scorecard"] = read.manifest.scorecard.model_dump(mode="json") if read.manifest.scorecard else None
        facts["router_sha256"], facts["features_digest"] = read.router_sha256, read.features_digest
    return facts


def _entropy(route: Route) -> float:
    """Of the selected experts' weights, in nats: 0 where one answers alone."""
    return 0.0 - sum(each.weight * math.log(each.weight) for each in route.ranking if each.weight > 0)


def _evidence(read: Bundle, route: Route) -> dict[str, Any]:
    evidence = route.evidence
    return {
        "kind": evidence.kind,
        "prompts": evidence.count,
        "near": [{"similarity": near.similarity, **_near(read, evidence.kind, near.index)} for near in evidence.near],
    }


def _near(read: Bundle, kind: str, index: int) -> dict[str, Any]:
    if kind == "neighbours":
        return _told(read.routing[index])
    if kind == "clusters":
        assert isinstance(read.router.router, KMeansRouter)
        members = read.router.router.representatives(index)
        return {"cluster": index, "representatives": [_told(read.routing[row]) for row in members]}
    assert isinstance(read.router.router, LinearRouter)
    return {"gate": index, "experts": list(read.router.router.owners(index))}


def _told(row: RoutingRow) -> dict[str, Any]:
    return {"task": row.task, "prompt": row.prompt[:PREVIEW], "scores": row.scores}


def _counterfactuals(read: Bundle, prompt: str, limits: Limits, route: Route) -> list[dict[str, Any]]:
    """Who would answer without the first expert, and without costs."""
    found = []
    left = [each.expert for each in route.ranking if each.excluded is None and each.expert != route.expert]
    if left:
        without = Limits(limits.k if limits.k == 1 else None, frozenset(left), cost_weight=limits.cost_weight)
        found.append({"if": f"without {route.expert}", "expert": read.router.route(prompt, limits=without).expert})
    if read.manifest.router.cost_weight or limits.cost_weight:
        free = Limits(limits.k, limits.allow, limits.deny, limits.tokens, limits.ready, 0.0)
        found.append({"if": "cost_weight = 0", "expert": read.router.route(prompt, limits=free).expert})
    return found
