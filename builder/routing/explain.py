"""A route as facts: what was expected of every expert, why, and what would have changed it."""

from __future__ import annotations

from typing import Any, Literal

from routers.bundle import Bundle, RoutingRow
from routers.kmeans import KMeansRouter
from routers.policy import Limits, Route

Detail = Literal["basic", "scores", "full"]
PREVIEW = 200


def explain(read: Bundle, prompt: str, limits: Limits, detail: Detail) -> dict[str, Any]:
    """basic: who and why. scores: every expert's estimate. full: the evidence with its texts, and counterfactuals."""
    router = read.router
    route = router.route(prompt, limits=limits)
    facts: dict[str, Any] = {
        "expert": route.expert,
        "reason": route.reason,
        "router": read.manifest.router.kind,
        "margin": route.margin,
        "confidence": route.confidence,
    }
    if detail != "basic":
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
        facts["words"] = [{"word": pull.word, "score": pull.score} for pull in router.explain(prompt)]
        facts["evidence"] = _evidence(read, route)
        facts["counterfactuals"] = _counterfactuals(read, prompt, limits, route)
        facts["scorecard"] = read.manifest.scorecard.model_dump(mode="json") if read.manifest.scorecard else None
        facts["router_sha256"] = read.manifest.files["router.safetensors"].sha256
    return facts


def _evidence(read: Bundle, route: Route) -> dict[str, Any]:
    evidence = route.evidence
    rows = read.routing() if evidence.kind in ("clusters", "neighbours") else []
    return {
        "kind": evidence.kind,
        "prompts": evidence.count,
        "near": [
            {"similarity": near.similarity, **_near(read, evidence.kind, near.index, rows)} for near in evidence.near
        ],
    }


def _near(read: Bundle, kind: str, index: int, rows: list[RoutingRow]) -> dict[str, Any]:
    if kind == "neighbours":
        return _told(rows[index])
    if kind == "clusters":
        assert isinstance(read.router.router, KMeansRouter)
        members = read.router.router.representatives(index)
        return {"cluster": index, "representatives": [_told(rows[row]) for row in members]}
    return {"gate": index}


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
