"""How a bundle came about: what the build measured and decided, kept as build.json for the report."""

from __future__ import annotations

from typing import Any

from routers.bundle import Strict


class Estimate(Strict):
    """A mean over samples, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class ModelRecord(Strict):
    """A model of the zoo; `scores` is the proxy metric by task, `score` its mean over them."""

    id: str
    subject: str
    family: str
    bytes: int
    scores: dict[str, float]
    score: Estimate


class FamilyRecord(Strict):
    """Models that could be merged, and how alike they are, as matrices in their order.

    similarity: `all`, and `attention` and `mlp` where the tensors' names tell.
    dots: of the models as vectors of all these weights.
    """

    key: str
    models: tuple[str, ...]
    similarity: dict[str, tuple[tuple[float, ...], ...]]
    dots: tuple[tuple[float, ...], ...]


class TrialRecord(Strict):
    """A candidate merge that was tried; `gain` is over the best single model, paired by samples; None where it failed.

    said: its recipe in mergekit's schema.
    """

    strategy: str
    tried: str
    weights: dict[str, float]
    said: dict[str, Any]
    score: Estimate | None
    gain: Estimate | None
    tasks: dict[str, float]
    failure: str | None
    accepted: bool


class ScoredRecord(Strict):
    """A model that others are held against: its score, by task too."""

    name: str
    score: Estimate
    tasks: dict[str, Estimate]


class ClusterRecord(Strict):
    """Models that were merged, or one alone; weights and recipe are those of the merge that was kept.

    standings: the best single model, the uniform soup and the merge, on the proxy.
    """

    models: tuple[str, ...]
    method: str
    weights: dict[str, float]
    said: dict[str, Any]
    score: float
    trials: tuple[TrialRecord, ...]
    standings: tuple[ScoredRecord, ...]


class CandidateRecord(Strict):
    """What could become an expert; `reach` is the perfect router's score once it was chosen, None when it was not."""

    name: str
    scores: dict[str, float]
    score: Estimate
    reach: float | None


class MixtureRecord(Strict):
    """A cluster's mixture; `note` says how it stands beside the merge that was found, or why there is none.

    name: of the candidate. said: its spec.
    """

    models: tuple[str, ...]
    name: str | None
    said: dict[str, Any]
    score: Estimate | None
    note: str


class RoutedRecord(Strict):
    """A prompt of the routing set: who was picked, and what every expert scored on it."""

    task: str
    prompt: str
    picked: str
    scores: dict[str, float]


class SearchRecord(Strict):
    """What a search measured and decided; `samples` is how many every score is a mean of."""

    zoo: str
    seed: int
    metric: str
    threshold: float
    linkage: str
    search: dict[str, Any]
    tasks: tuple[str, ...]
    samples: int
    models: tuple[ModelRecord, ...]
    families: tuple[FamilyRecord, ...]
    clusters: tuple[ClusterRecord, ...]


class Record(SearchRecord):
    """Everything of a build but the weights; `choices` are the zoo's on scoring and routing."""

    candidates: tuple[CandidateRecord, ...]
    mixtures: tuple[MixtureRecord, ...] = ()
    routing: tuple[RoutedRecord, ...]
    router_note: str
    choices: dict[str, Any]
