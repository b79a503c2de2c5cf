"""What another router would have done with the requests of a log, and what it is worth where there was feedback.

Only rows whose expert the scores chose tell about a router: pins, sessions that stayed and failures are left out, and
counted. N rows, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from builder.errors import BuildError
from builder.routing.gate import fits
from routers import routelog
from routers.bundle import Bundle
from routers.policy import Limits, Policy, Ranked, Reason, Route
from routers.prompt import PromptRouter
from routers.routelog import Logged
from routers.scorecard import Scores

BY_SCORES: Final[frozenset[Reason]] = frozenset(
    ("top_score", "no_evidence", "abstained", "only_choice", "fixed", "switched")
)
FEW: Final = 30
"""Rows that agree and have feedback, or as much as they weigh: with fewer, an estimate is no ground for a change."""
RESAMPLES: Final = 2000


@dataclass(frozen=True, slots=True)
class Value:
    """Mean feedback on a router's choices, and how far it is from the logged one's, with its 95 % interval."""

    mean: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Replay:
    """A log under another router.

    rows: whose expert the scores chose; left_out: the others, by why. moved: would go elsewhere, by (from, to).
    rated: rows with feedback; agreeing: those that go where they went. effective: what the agreeing weigh, in rows of
    equal weight. logged: mean feedback. replay: over agreeing rows alone. weighted: by one over their propensity,
    self-normalised. certain: no choice was left to chance, so that feedback tells nothing of moved prompts.
    """

    rows: int
    left_out: dict[str, int]
    moved: dict[str, int]
    rated: int
    agreeing: int
    effective: float
    logged: float | None
    replay: Value | None
    weighted: Value | None
    certain: bool

    @property
    def enough(self) -> bool:
        """Whether the estimates rest on enough."""
        return self.effective >= FEW

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"enough": self.enough}

    def sentences(self) -> list[str]:
        """What it came to, plainly."""
        moved = sum(self.moved.values())
        told = [f"{moved} of {self.rows} requests would go elsewhere ({100 * moved / max(self.rows, 1):.1f} %)"]
        told += [f"  {count} {way}" for way, count in self.moved.items()]
        if self.left_out:
            counts = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
            told.append(f"left out, for no router chose there: {counts}")
        if self.logged is None:
            return [*told, "no feedback: nothing is known of how good either router is"]
        told.append(f"feedback on {self.rated}: mean {self.logged:.4f}; on {self.agreeing} both routers agree")
        for name, value in (("agreeing rows alone", self.replay), ("weighted by propensity", self.weighted)):
            if value is not None:
                told.append(
                    f"the new router, {name}: {value.mean:.4f}, {value.gain:+.4f} "
                    f"({value.low:+.4f} to {value.high:+.4f}) against the logged one"
                )
        if not self.enough:
            told.append(f"too few rows agree for an estimate: they weigh {self.effective:.0f}, and {FEW} is the least")
        if self.certain and self.rated > self.agreeing:
            told.append(
                f"every choice was certain (propensity 1): of the {self.rated - self.agreeing} rated requests that "
                "would move, nothing is known of the answer of the other expert, and the estimates are of the rest"
            )
        return told


def replay(log: Path, bundle: Bundle, *, kind: str | None = None, seed: int = 0) -> Replay:
    """The log at `log` under the router of `bundle`; with `kind`, under one of that kind fitted on its routing set.

    Raises RouteLogError, or BuildError for a log of other features that does not have the prompts' text.
    """
    router = bundle.router if kind is None else _fitted(bundle, kind)
    space = bundle.features_digest
    left_out, moved, rows = Counter[str](), Counter[str](), 0
    rated: list[tuple[float, bool, float]] = []
    for row in routelog.read(log):
        if row.reason not in BY_SCORES:
            left_out[row.reason] += 1
            continue
        rows += 1
        was, is_ = _selected(row.experts), _selected(_route(row, router, space, log).ranking)
        if was != is_:
            moved[f"{' + '.join(sorted(was))} -> {' + '.join(sorted(is_))}"] += 1
        if row.feedback is not None:
            rated.append((row.feedback, was == is_, row.propensity))
    if not rows + left_out.total():
        raise BuildError(f"{log} has no requests yet")
    score_N, equal_N, propensity_N = np.array(rated, float).reshape(-1, 3).T
    weight_N = equal_N / propensity_N
    return Replay(
        rows=rows,
        left_out=dict(left_out.most_common()),
        moved=dict(moved.most_common()),
        rated=len(rated),
        agreeing=int(equal_N.sum()),
        effective=float(weight_N.sum() ** 2 / (weight_N**2).sum()) if weight_N.any() else 0.0,
        logged=float(score_N.mean()) if rated else None,
        replay=_value(score_N, equal_N, seed),
        weighted=_value(score_N, weight_N, seed),
        certain=bool((propensity_N == 1).all()),
    )


def _value(score_N: Scores, weight_N: Scores, seed: int) -> Value | None:
    """The weighted mean, and its gain over the plain one: both of the same resampled rows, which they share."""
    if not weight_N.any():
        return None
    rng = np.random.default_rng(seed)
    gains = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, len(score_N), len(score_N))
        total = weight_N[drawn].sum()
        if total:  # a resample in which nothing agrees says nothing
            gains.append(float((weight_N[drawn] * score_N[drawn]).sum() / total - score_N[drawn].mean()))
    low, high = np.quantile(gains, [0.025, 0.975])
    mean = float((weight_N * score_N).sum() / weight_N.sum())
    return Value(mean, mean - float(score_N.mean()), float(low), float(high))


def _route(row: Logged, router: PromptRouter, space: str, log: Path) -> Route:
    """The route of a logged request within what it asked for, and without whom it could not have had."""
    if row.space == space:
        vector_D = row.vector_D
    elif row.text is not None:
        vector_D = router.features.vector(row.text)
    else:
        raise BuildError(
            f"{log} was written with other features than the new bundle's, and without the prompts' text: replay it on "
            "a bundle with the same features, or log with --log-prompts"
        )
    shut = {each.expert for each in row.experts if each.excluded is not None}
    # Experts that are new since may answer; where nobody is left, all may.
    allow = frozenset(expert for expert in router.experts if expert not in shut) or None
    # As many as answered: who asked for a mixture may have got the best alone.
    k = None if row.k is None else min(len(_selected(row.experts)), len(allow or router.experts))
    limits = Limits(k, allow, cost_weight=row.cost_weight)
    return router.policy.decide(router.experts, router.router.estimate(vector_D), limits)


def _selected(ranking: Iterable[Ranked]) -> frozenset[str]:
    return frozenset(each.expert for each in ranking if each.selected)


def _fitted(bundle: Bundle, kind: str) -> PromptRouter:
    """A router of this kind for the bundle's experts and features. Raises BuildError."""
    manifest, rows = bundle.manifest, bundle.routing
    known = fits(manifest.names, manifest.seed)
    if kind not in known:
        raise BuildError(f"no router {kind!r}; there are: {', '.join(known)}")
    features, old = bundle.router.features, bundle.router.policy
    vectors_ND = np.stack([features.vector(row.prompt) for row in rows])
    scores_NE = np.array([[row.scores[name] for name in manifest.names] for row in rows])
    # Another router's confidence is another: what the bundle's was calibrated to does not hold for it.
    policy = Policy(old.default, old.k, old.cost_weight, old.costs, old.windows)
    return PromptRouter(features, known[kind](vectors_ND, scores_NE), policy)
