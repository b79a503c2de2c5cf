"""From a build's experts to their router: the score matrix of the routing split, the paper's gates, the proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builder.candidate import Candidate, Weights
from builder.config import Zoo
from builder.evaluate import Evaluator
from builder.members import Members
from builder.record import RoutedRecord
from builder.routing import gate, space
from builder.routing.gate import Published
from builder.routing.matrix import Matrix
from routers import bundle
from routers.bundle import FeaturesEntry, RouterEntry, RoutingRow
from routers.features import Features


@dataclass(frozen=True)
class Routing:
    """A published router, and what its build found."""

    published: Published
    features: Features
    matrix: Matrix
    subjects: dict[str, tuple[str, ...]]
    router: RouterEntry
    about_features: FeaturesEntry
    files: tuple[str, ...]

    @property
    def items(self) -> tuple[RoutedRecord, ...]:
        """Every prompt of the routing split, with who answered it by a router that had not seen it."""
        return routed(self.matrix, self.published.picks)


def subjects(zoo: Zoo, experts: Mapping[str, Weights], default: str) -> dict[str, tuple[str, ...]]:
    """Each subject's expert: where the subject's models weigh most, the default when they are in none.

    `experts` gives the weights of the models in each expert. An expert that wins no subject shares its models' own.
    """
    won: dict[str, list[str]] = {expert: [] for expert in experts}
    for subject in zoo.subjects:
        models = [model.id for model in zoo.models if model.subject == subject]
        shares = {expert: sum(weights.get(model, 0.0) for model in models) for expert, weights in experts.items()}
        best = max(shares, key=lambda expert: shares[expert])
        won[best if shares[best] > 0 else default].append(subject)
    own = {model.id: model.subject for model in zoo.models}
    return {
        expert: tuple(names or dict.fromkeys(own[model] for model in experts[expert])) for expert, names in won.items()
    }


def publish(zoo: Zoo, experts: Mapping[str, Candidate], members: Members, evaluator: Evaluator, out: Path) -> Routing:
    """Fit every router on the routing split, prove them, and write the published one's files into `out`."""
    best = max(experts, key=lambda name: evaluator.mean(experts[name]))
    owned = subjects(zoo, {name: each.weights for name, each in experts.items()}, best)
    matrix = score_matrix(experts, evaluator)
    texts = [*(prompt for prompts in zoo.subjects.values() for prompt in prompts), *matrix.prompts]
    encoder = None if zoo.router.encoder is None else Path(zoo.router.encoder)
    features = space.prepare(out, members[zoo.router.features].folder, texts, trunk=zoo.router.trunk, encoder=encoder)
    gates = gate.gates(owned, zoo.subjects, features)
    found = gate.publish(matrix, features, zoo.seed, kind=zoo.router.kind, prompts=gates)
    entry, about = write(out, found, features, matrix, k=zoo.router.k, cost_weight=zoo.router.cost_weight)
    model = zoo.router.features if encoder is None else encoder.name
    about = about.model_copy(update={"model": model, "layers": zoo.router.trunk})
    return Routing(found, features, matrix, owned, entry, about, written(out, features.kind))


def score_matrix(experts: Mapping[str, Candidate], evaluator: Evaluator) -> Matrix:
    """Every expert's score on every prompt of the routing split."""
    items = evaluator.items("routing")
    scores_NE = np.stack([evaluator.scores(each, "routing") for each in experts.values()], axis=1)
    return Matrix(tuple(item.prompt for _, item in items), tuple(task for task, _ in items), tuple(experts), scores_NE)


def routed(matrix: Matrix, picks: Sequence[str]) -> tuple[RoutedRecord, ...]:
    """A matrix with who answered each prompt, as a record keeps it."""
    return tuple(
        RoutedRecord(task=row.task, prompt=row.prompt, picked=picked, scores=row.scores)
        for row, picked in zip(rows(matrix), picks, strict=True)
    )


def rows(matrix: Matrix) -> list[RoutingRow]:
    """A matrix as a bundle keeps it."""
    return [
        RoutingRow(task=task, prompt=prompt, scores=dict(zip(matrix.experts, map(float, scores_E), strict=True)))
        for task, prompt, scores_E in zip(matrix.tasks, matrix.prompts, matrix.scores_NE, strict=True)
    ]


def write(
    out: Path, found: Published, features: Features, matrix: Matrix, *, k: int, cost_weight: float
) -> tuple[RouterEntry, FeaturesEntry]:
    """Write a router's files into `out`, where the features' are; what the manifest says of both."""
    bundle.save_router(out, found.router, features)
    bundle.save_routing(out, rows(matrix))
    calibration = found.proven.calibration if found.proven else None
    entry = RouterEntry(
        kind=found.router.kind,
        k=min(k, len(matrix.experts)),
        cost_weight=cost_weight,
        calibration=(calibration.intercept, calibration.slope) if calibration else None,
        threshold=found.proven.threshold if found.proven else 0.0,
    )
    kind = "encoder" if features.kind == "encoder" else "token-embeddings"
    return entry, FeaturesEntry(kind=kind, model="", dimension=features.dimension)


def written(out: Path, kind: str) -> tuple[str, ...]:
    """The files of a router and its features, as a manifest names them."""
    return (bundle.ROUTER, bundle.ROUTING, *bundle.feature_files(out, kind))
