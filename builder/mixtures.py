"""A cluster's models as one checkpoint: a candidate beside the merge that was found of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.candidate import Candidate, short
from builder.config import Mixture, Zoo
from builder.evaluate import Evaluator, Scores
from builder.explore import Explored, Found, estimate, kinship
from builder.members import Members
from builder.record import MixtureRecord
from routers.errors import ModelGlueError


@dataclass(frozen=True)
class Mixed:
    """A cluster's mixture with its scores, or neither where it cannot be had.

    wins: whether it scores no less than the merge that was found. note: how they stand, or why there is none.
    """

    models: tuple[str, ...]
    candidate: Candidate | None
    scores: Scores | None
    wins: bool
    note: str


def mix(zoo: Zoo, members: Members, evaluator: Evaluator, explored: Explored) -> dict[int, Mixed]:
    """The mixture of every cluster of several models, by the cluster's place; none where the zoo asks for none."""
    if zoo.mixture is None:
        return {}
    found = {
        place: _mixed(zoo, zoo.mixture, each, members, evaluator)
        for place, each in enumerate(explored.found)
        if len(each.models) > 1
    }
    for each in found.values():
        evaluator.progress.say(each.note)
    return found


def candidate_of(zoo: Zoo, said: Mixture, models: Sequence[str], *, mixed: bool) -> Candidate:
    """Models as one checkpoint, each chosen by its subject's prompts. mixed: whether their vocabularies differ."""
    chosen: dict[str, Any] = {"mixture": said.mixture, "hybrid_layers": said.hybrid_layers}
    chosen["experts_per_token"] = min(said.experts_per_token, len(models))
    if said.gate:
        chosen["gate"] = said.gate
    if not _prompted(said):
        chosen["seed"] = zoo.seed
    if mixed:
        chosen["tokenizer"] = {"source": "union"}
    subjects = {model.id: model.subject for model in zoo.models}
    chosen["experts"] = [
        {"model": name, "positive_prompts": [] if said.gate == "random" else list(zoo.subjects[subjects[name]])}
        for name in models
    ]
    return Candidate(dict.fromkeys(models, 1 / len(models)), {"mixture": chosen})


def named(mixed: Mapping[int, Mixed], taken: Sequence[str]) -> dict[str, Candidate]:
    """The mixtures, each by a name that nothing else has."""
    found: dict[str, Candidate] = {}
    for each in mixed.values():
        if each.candidate is not None:
            name = f"{each.candidate.name}-{each.candidate.method}"
            while name in taken or name in found:
                name += "-mixed"
            found[name] = each.candidate
    return found


def record(zoo: Zoo, mixed: Mapping[int, Mixed], candidates: Mapping[str, Candidate]) -> tuple[MixtureRecord, ...]:
    """All of that as it is kept."""
    return tuple(
        MixtureRecord(
            models=each.models,
            name=next((name for name, candidate in candidates.items() if candidate is each.candidate), None),
            said=dict(each.candidate.mixture or {}) if each.candidate else {},
            score=None if each.scores is None else estimate(each.scores, zoo.seed),
            note=each.note,
        )
        for each in mixed.values()
    )


def _mixed(zoo: Zoo, said: Mixture, found: Found, members: Members, evaluator: Evaluator) -> Mixed:
    what = f"the {said.mixture} mixture of {short(found.models)}"
    candidate = candidate_of(zoo, said, found.models, mixed=kinship(zoo, found.models, members).mixed)
    try:
        # From headers, before anything is written.
        candidate.mix({name: members[name].folder for name in found.models})
        scores = evaluator.scores(candidate)
    except ModelGlueError as exc:
        return Mixed(found.models, None, None, False, f"{what} is left out: {exc}")
    wins = bool(scores.mean() >= found.outcome.score)
    sentences = [_standing(zoo, what, found, scores, wins), *_remarks(zoo, said, found.models)]
    return Mixed(found.models, candidate, scores, wins, "; ".join(sentences))


def _standing(zoo: Zoo, what: str, found: Found, scores: Scores, wins: bool) -> str:
    kept = found.outcome.candidate
    best = f"the {kept.method} merge of {kept.name}" if kept.said else f"{kept.name} alone"
    said = f"{what} scores {scores.mean():.4f}, {best} {found.outcome.score:.4f}"
    if zoo.experts != "cluster":
        return said
    return f"{said}: {'it takes its place' if wins else f'{best} stays'}"


def _remarks(zoo: Zoo, said: Mixture, models: Sequence[str]) -> Iterator[str]:
    """What is otherwise than one may think."""
    if said.experts_per_token > len(models):
        yield f"all {len(models)} models answer, not {said.experts_per_token}"
    if _prompted(said):
        for subject in zoo.subjects:
            alike = [model.id for model in zoo.models if model.id in models and model.subject == subject]
            if len(alike) > 1:
                yield f"{', '.join(alike)} have the subject {subject} and so the same gate: the first one is preferred"


def _prompted(said: Mixture) -> bool:
    """Whether prompts alone decide the gates; chance has a say in the others."""
    return said.mixture[2] == "L" and said.gate != "random"
