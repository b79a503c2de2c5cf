"""How a bundle came about: what the build measured and decided, kept as build.json for the report."""

from __future__ import annotations

from routers.bundle import Strict


class ModelRecord(Strict):
    """A model of the zoo; `scores` is the proxy metric by task."""

    id: str
    subject: str
    family: str
    bytes: int
    scores: dict[str, float]


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
    """A candidate merge that was scored."""

    tried: str
    weights: dict[str, float]
    score: float
    accepted: bool


class ClusterRecord(Strict):
    """Models that were merged, or one alone; weights are those of the merge that was kept."""

    models: tuple[str, ...]
    weights: dict[str, float]
    score: float
    trials: tuple[TrialRecord, ...]


class CandidateRecord(Strict):
    """What could become an expert; `reach` is the perfect router's score once it was chosen, None when it was not."""

    name: str
    scores: dict[str, float]
    score: float
    reach: float | None


class RoutedRecord(Strict):
    """A prompt of the routing set: who was picked, and what every expert scored on it."""

    task: str
    prompt: str
    picked: str
    scores: dict[str, float]


class Record(Strict):
    """Everything but the weights."""

    zoo: str
    metric: str
    threshold: float
    models: tuple[ModelRecord, ...]
    families: tuple[FamilyRecord, ...]
    clusters: tuple[ClusterRecord, ...]
    candidates: tuple[CandidateRecord, ...]
    routing: tuple[RoutedRecord, ...]
    router_note: str
