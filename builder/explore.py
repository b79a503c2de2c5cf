"""From models to merges: families, clusters, and the best merge of each; what `builder search` and a build share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from builder.candidate import Candidate, Kin, short, whole
from builder.cluster import clusters
from builder.config import Zoo
from builder.evaluate import Evaluator, Scores, by_task, shares
from builder.executors import Failed
from builder.families import families
from builder.journal import digest
from builder.members import Members
from builder.proxy.task import Task
from builder.record import ClusterRecord, Estimate, FamilyRecord, ModelRecord, ScoredRecord, SearchRecord, TrialRecord
from builder.search.average import uniform
from builder.search.problem import Outcome, Problem, Trial
from builder.search.strategies import STRATEGIES, search
from routers.scorecard import interval


@dataclass(frozen=True)
class Found:
    """A cluster, the best merge that was found in it, and every trial on the way.

    soup: the scores of all members' uniform mean; None for a lone model, or where it could not be scored.
    """

    models: tuple[str, ...]
    outcome: Outcome
    trials: tuple[Trial, ...]
    soup: Scores | None


@dataclass(frozen=True)
class Explored:
    """The families of a zoo, and what was found in their clusters."""

    families: tuple[FamilyRecord, ...]
    found: tuple[Found, ...]


def explore(zoo: Zoo, members: Members, evaluator: Evaluator, storage: str | None = None) -> Explored:
    """Compare the zoo's models, cluster them and search every cluster. `storage` is shared by several machines."""
    kin = families(zoo, members, evaluator.journal, evaluator.progress)
    found = [
        _search(zoo, family, group, members, evaluator, storage)
        for family in kin
        for group in clusters(family.models, family.similarity["all"], zoo.cluster.threshold, zoo.cluster.linkage)
    ]
    return Explored(tuple(kin), tuple(found))


def _search(
    zoo: Zoo, family: FamilyRecord, group: tuple[str, ...], members: Members, evaluator: Evaluator, storage: str | None
) -> Found:
    singles = {name: evaluator.scores(whole(name)) for name in group}
    kin = kinship(zoo, group, members)
    places = [family.models.index(name) for name in group]
    facts = json.dumps([[members[name].sha256 for name in group], zoo.search.model_dump(), zoo.seed])
    with evaluator.progress.trials(f"search {short(group)}", budget(zoo, len(group))) as hear:
        problem = Problem(
            kin,
            singles,
            zoo.search,
            zoo.seed,
            evaluator.evaluate,
            dots=np.array(family.dots)[np.ix_(places, places)],
            storage=storage,
            study=digest(facts)[:16],
            hear=lambda trial: hear({"event": "trial", **_facts(trial), "failure": trial.failure}),
            took=lambda trial: hear({"event": "accepted", **_facts(trial)}),
        )
        outcome = search(problem)
    return Found(group, outcome, tuple(problem.trials), _soup(kin, evaluator))


def _soup(kin: Kin, evaluator: Evaluator) -> Scores | None:
    if len(kin.names) == 1:
        return None
    (scores,) = evaluator.evaluate([kin.linear(uniform(kin.names))])
    return None if isinstance(scores, Failed) else scores


def kinship(zoo: Zoo, group: Sequence[str], members: Members) -> Kin:
    """What recipes of a cluster need to know; its base where all name the same one, and it is here."""
    named = {model.base for model in zoo.models if model.id in group}
    base = named.pop() if len(named) == 1 else None
    opened = members.get(base) if base else None
    checkpoints = {name: members[name].checkpoint for name in group}
    return Kin.of(checkpoints, base if opened else None, opened.checkpoint if opened else None)


def budget(zoo: Zoo, size: int) -> int:
    """How many trials a cluster of so many models takes at most."""
    if size == 1:
        return 0
    grow = 9 * (size - 1)
    refining = min(zoo.search.trials, 100)
    costs = {
        "average": size - 1,
        "coefficient": grow,
        "similarity": grow,
        "evolution": zoo.search.trials,
        "heuristic+evolution": grow + refining,
        "auto": size - 1 + 2 * grow + zoo.search.trials + refining,
    }
    assert costs.keys() == STRATEGIES.keys()
    return costs[zoo.search.strategy]


def _facts(trial: Trial) -> dict[str, object]:
    """What a watcher is told of a trial."""
    weights = {name: round(weight, 6) for name, weight in trial.candidate.weights.items()}
    return {"strategy": trial.strategy, "tried": trial.tried, "weights": weights, "score": trial.score}


def record(zoo: Zoo, members: Members, evaluator: Evaluator, explored: Explored) -> SearchRecord:
    """All of that as it is kept."""
    loaded = evaluator.tasks("proxy")
    return SearchRecord(
        zoo=zoo.name,
        seed=zoo.seed,
        metric=zoo.proxy.metric,
        threshold=zoo.cluster.threshold,
        linkage=zoo.cluster.linkage,
        search=zoo.search.model_dump(mode="json"),
        tasks=tuple(task.name for task in loaded),
        samples=sum(len(task.samples) for task in loaded),
        models=_models(zoo, members, evaluator, explored.families),
        families=explored.families,
        clusters=tuple(_cluster(found, evaluator, zoo.seed) for found in explored.found),
    )


def _models(zoo: Zoo, members: Members, evaluator: Evaluator, kin: Sequence[FamilyRecord]) -> tuple[ModelRecord, ...]:
    return tuple(
        ModelRecord(
            id=model.id,
            subject=model.subject,
            family=next(family.key for family in kin if model.id in family.models),
            bytes=members[model.id].checkpoint.bytes,
            scores=evaluator.by_task(whole(model.id)),
            score=estimate(evaluator.scores(whole(model.id)), zoo.seed),
        )
        for model in zoo.models
    )


def _cluster(found: Found, evaluator: Evaluator, seed: int) -> ClusterRecord:
    loaded = evaluator.tasks("proxy")
    best_name = max(found.models, key=lambda name: evaluator.mean(whole(name)))
    best = evaluator.scores(whole(best_name))
    standings = {best_name: best}
    if found.soup is not None:
        standings["uniform soup"] = found.soup
    if len(found.outcome.candidate.members) > 1:
        standings[f"{found.outcome.candidate.name} ({found.outcome.candidate.method})"] = found.outcome.scores
    return ClusterRecord(
        models=found.models,
        method=found.outcome.candidate.method,
        weights=dict(found.outcome.candidate.weights),
        said=dict(found.outcome.candidate.said),
        score=found.outcome.score,
        trials=tuple(_trial(trial, best, loaded, seed) for trial in found.trials),
        standings=tuple(_scored(name, scores, loaded, seed) for name, scores in standings.items()),
    )


def _trial(trial: Trial, best: Scores, loaded: Sequence[Task], seed: int) -> TrialRecord:
    scores = trial.scores
    return TrialRecord(
        strategy=trial.strategy,
        tried=trial.tried,
        weights=dict(trial.candidate.weights),
        said=dict(trial.candidate.said),
        score=None if scores is None else estimate(scores, seed),
        gain=None if scores is None else estimate(scores - best, seed),
        tasks={} if scores is None else by_task(scores, loaded),
        failure=trial.failure,
        accepted=trial.accepted,
    )


def _scored(name: str, scores: Scores, loaded: Sequence[Task], seed: int) -> ScoredRecord:
    plain, found, at = scores / shares(loaded), {}, 0
    for task in loaded:
        found[task.name] = estimate(plain[at : at + len(task.samples)], seed)
        at += len(task.samples)
    return ScoredRecord(name=name, score=estimate(scores, seed), tasks=found)


def estimate(scores: Scores, seed: int) -> Estimate:
    """A mean over samples with its uncertainty."""
    low, high = interval(scores, seed)
    return Estimate(mean=float(scores.mean()), low=low, high=high)


def merges(explored: Explored, taken: Sequence[str]) -> Mapping[str, Candidate]:
    """The merges that were found, each by a name that nothing else has."""
    named: dict[str, Candidate] = {}
    for found in explored.found:
        candidate = found.outcome.candidate
        if len(candidate.members) > 1:
            name = candidate.name
            while name in taken or name in named:
                name += "-merged"
            named[name] = candidate
    return named
