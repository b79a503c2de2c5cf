"""Which router is published: every one cross-validated, the best, if it beats the best single expert beyond chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from builder.routing.crossval import Fit, Proven, by_chance, consistency, prove
from builder.routing.matrix import Matrix
from routers.base import Router, Vector
from routers.estimators import FITTED
from routers.features import Features
from routers.fixed import FixedRouter
from routers.linear import LinearRouter
from routers.scorecard import Scorecard, Scores

FOLDS = 5
Subjects = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Published:
    """The router that a bundle gets.

    scorecards: of all routers. proven: of this one; None of a lone expert. picks: who answered each prompt of the
    matrix, by routers that had not seen it.
    """

    router: Router
    default: str
    proven: Proven | None
    scorecards: dict[str, Scorecard]
    picks: tuple[str, ...]
    note: str


def fits(experts: tuple[str, ...], seed: int, gates: LinearRouter | None = None) -> dict[str, Fit]:
    """How each kind of router is fitted; `gates` of subjects' prompts are what linear takes instead of the scores'."""

    def fitted(kind: str) -> Fit:
        return lambda vectors_ND, scores_NE: FITTED[kind].fit(experts, vectors_ND, scores_NE, seed)

    found = {kind: fitted(kind) for kind in FITTED}
    return found if gates is None else found | {"linear": gates.calibrated}


def gates(owned: Subjects, subjects: Subjects, features: Features) -> LinearRouter:
    """The paper's gates: a subject's prompts against those of all others; `owned` are each expert's subjects."""
    vectors = {name: [features.vector(prompt) for prompt in prompts] for name, prompts in subjects.items()}
    return LinearRouter.from_vectors(owned, vectors)


def publish(
    matrix: Matrix, features: Features, seed: int, *, kind: str = "auto", prompts: LinearRouter | None = None
) -> Published:
    """The router for a matrix: of `kind`, or the one that routes best in cross-validation.

    A router whose gain over the best single expert is not above zero with 95 % confidence gives way to that expert.
    """
    experts, scores_NE = matrix.experts, matrix.scores_NE
    vectors_ND = np.stack([features.vector(prompt) for prompt in matrix.prompts])
    best = experts[int(np.argmax(scores_NE.mean(axis=0)))]
    if len(experts) == 1:
        note = "one expert: nothing to route"
        return Published(FixedRouter.always(experts, best), best, None, {}, (best,) * len(vectors_ND), note)
    made = fits(experts, seed, prompts)
    proven = {
        name: _prove(experts, fit, features, matrix.prompts, vectors_ND, scores_NE, seed) for name, fit in made.items()
    }
    cards = {name: each.card for name, each in proven.items()}
    learned = [name for name in made if name != FixedRouter.kind]
    chosen = max(learned, key=lambda name: cards[name].routed) if kind == "auto" else kind
    card = cards[chosen]
    gain = f"{card.gain:+.4f} ({card.gain_low:+.4f} to {card.gain_high:+.4f}) over {card.best_single_expert} alone"
    if chosen == FixedRouter.kind or not card.proven:
        why = "was asked for" if kind == FixedRouter.kind else f"stands in: the {chosen} router is not proven, {gain}"
        note = f"the fixed router {why}; every prompt goes to {best}"
        router, behind = made["fixed"](vectors_ND, scores_NE), proven["fixed"]
        return Published(router, best, behind, cards, (best,) * len(vectors_ND), note)
    picks = tuple(experts[pick] for pick in proven[chosen].predicted.picks_N)
    note = f"the {chosen} router is proven: {gain}, on {card.prompts} prompts by {FOLDS}-fold cross-validation"
    return Published(made[chosen](vectors_ND, scores_NE), best, proven[chosen], cards, picks, note)


def _prove(
    experts: tuple[str, ...],
    fit: Fit,
    features: Features,
    prompts: Sequence[str],
    vectors_ND: Vector,
    scores_NE: Scores,
    seed: int,
) -> Proven:
    stays = consistency(fit(vectors_ND, scores_NE), features, prompts, seed)
    parts = by_chance(len(vectors_ND), FOLDS, seed)
    return prove(experts, fit, vectors_ND, scores_NE, parts=parts, seed=seed, consistency=stays)
