"""build(): a zoo becomes a bundle, step by step. Read first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic.main import IncEx

from builder import experts, files, fit_router, select
from builder.cluster import clusters
from builder.config import Zoo
from builder.errors import BuildError, ZooError
from builder.families import families
from builder.fit_router import Routing
from builder.journal import Journal, digest
from builder.members import Members, open_all
from builder.progress import Progress
from builder.proxy import tasks
from builder.proxy.evaluate import Evaluator, name_of
from builder.record import CandidateRecord, ClusterRecord, FamilyRecord, ModelRecord, Record, TrialRecord
from builder.search.average import Outcome, Weights, average
from builder.sources import Store
from routers import bundle
from routers.bundle import FeaturesEntry, Manifest, RouterEntry
from routers.errors import BundleError


def build(zoo: Zoo, out: Path, store: Store, progress: Progress) -> bool:
    """Write the bundle of `zoo` to `out`; False when it was there already.

    A killed build is resumed: every score is in the journal, every finished expert beside `out`. Same zoo, same
    weights, same bytes. Raises ModelGlueError: what stops a build says what to do, and leaves no `out`.
    """
    _check_tasks(zoo, store)
    fetched = store.fetch(progress)
    with Journal(store.cache / "journal.sqlite") as journal:
        members = open_all(zoo, fetched, journal)
        inputs = _digest(zoo, members)
        if _is_there(out, inputs):
            return False
        with files.locked(out.with_name(f"{out.name}.partial")) as partial:
            if _is_there(out, inputs):  # another build finished it meanwhile
                return False
            evaluator = Evaluator(zoo, members, journal, progress)
            kin = families(zoo, members, journal, progress)
            found = [_search(group, evaluator) for family in kin for group in _groups(family, zoo)]
            candidates = _candidates(zoo, found)
            chosen = _choose(zoo, candidates, found, evaluator)
            made = {name: candidates[name] for name in chosen}
            _write_experts(partial / bundle.EXPERTS, zoo, made, members)
            routing = fit_router.publish(zoo, made, members, evaluator, partial)
            record = Record(
                zoo=zoo.name,
                metric=zoo.proxy.metric,
                threshold=zoo.cluster.threshold,
                models=_model_records(zoo, members, kin, evaluator),
                families=tuple(kin),
                clusters=tuple(_cluster_record(group, outcome) for group, outcome in found),
                candidates=_candidate_records(candidates, chosen, evaluator),
                routing=routing.items,
                router_note=routing.note,
            )
            (partial / bundle.RECORD).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
            bundle.write(partial, _manifest(zoo, inputs, made, members, routing, evaluator, partial))
            partial.rename(out)
    progress.say(routing.note)
    return True


Found = tuple[tuple[str, ...], Outcome]
"""A cluster and the merge that was found in it."""


def _check_tasks(zoo: Zoo, store: Store) -> None:
    """Refuse tasks that cannot be scored before anything is downloaded; what else is missing is told with it."""
    try:
        tasks.check(zoo.proxy.tasks)
    except ZooError as exc:
        raise ZooError("\n".join([str(exc), *store.wanting()])) from exc


def _digest(zoo: Zoo, members: Members) -> str:
    """What decides the bundle's bytes: the zoo's choices, and the weights behind its names."""
    words = {"source", "adapter", "note", "family", "parameters", "revision", "sha256"}
    told: dict[str, IncEx | bool] = {
        "note": True,
        "revision": True,
        "bases": {"__all__": words},
        "models": {"__all__": words},
    }
    return digest(zoo.model_dump_json(exclude=told), *(member.sha256 for member in members.values()))


def _is_there(out: Path, inputs: str) -> bool:
    if not out.exists():
        return False
    try:
        manifest = bundle.read_manifest(out)
    except BundleError as exc:
        raise BuildError(f"{out} exists and is not a bundle: choose another --out, or remove it") from exc
    if manifest.inputs_sha256 != inputs:
        raise BuildError(f"{out} is a bundle of another zoo, or of other weights: choose another --out, or remove it")
    return True


def _groups(family: FamilyRecord, zoo: Zoo) -> list[tuple[str, ...]]:
    return clusters(family.models, family.similarity["all"], zoo.cluster.threshold, zoo.cluster.linkage)


def _search(group: tuple[str, ...], evaluator: Evaluator) -> Found:
    return group, average({name: evaluator.mean({name: 1.0}) for name in group}, evaluator.mean)


def _candidates(zoo: Zoo, found: list[Found]) -> dict[str, Weights]:
    """What may become an expert: the merges, and every model whole. No merge takes the name of another candidate."""
    wholes = {model.id: {model.id: 1.0} for model in zoo.models}
    merges: dict[str, Weights] = {}
    for _, outcome in found:
        if len(outcome.weights) > 1:
            name = name_of(outcome.weights)
            while name in wholes or name in merges:
                name += "-merged"
            merges[name] = outcome.weights
    return merges | wholes


def _choose(zoo: Zoo, candidates: Mapping[str, Weights], found: list[Found], evaluator: Evaluator) -> dict[str, float]:
    """The experts, each with the perfect router's score once it was chosen."""
    if zoo.experts == "cluster":
        kept = [outcome.weights for _, outcome in found]
        scores = {name: evaluator.scores(weights, "proxy") for name, weights in candidates.items() if weights in kept}
        return select.choose(scores, len(scores), stop_early=False)
    return select.choose({name: evaluator.scores(w, "proxy") for name, w in candidates.items()}, zoo.experts)


def _write_experts(folder: Path, zoo: Zoo, made: Mapping[str, Weights], members: Members) -> None:
    lacking = [weights for name, weights in made.items() if not (folder / name).exists()]
    need, free = sum(members[next(iter(weights))].checkpoint.bytes for weights in lacking), files.free(folder)
    if need > free:
        raise BuildError(
            f"the experts need {need / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: make room, or set --out"
        )
    for name, weights in made.items():
        experts.write(folder / name, zoo.search.method, weights, members)
    experts.keep_only(folder, made)


def _manifest(
    zoo: Zoo,
    inputs: str,
    made: Mapping[str, Weights],
    members: Members,
    routing: Routing,
    evaluator: Evaluator,
    partial: Path,
) -> Manifest:
    entries = tuple(
        experts.entry(
            partial / bundle.EXPERTS / name,
            zoo.search.method,
            weights,
            members,
            routing.subjects[name],
            evaluator.by_task(weights),
        )
        for name, weights in made.items()
    )
    return Manifest(
        zoo=zoo.name,
        inputs_sha256=inputs,
        seed=zoo.seed,
        default=routing.default,
        experts=entries,
        router=RouterEntry(kind=routing.router.kind, k=min(zoo.router.k, len(made))),
        features=FeaturesEntry(model=zoo.router.features, dimension=routing.features.dimension),
        scorecard=routing.scorecard,
        files={name: bundle.digest(partial / name) for name in (bundle.ROUTER, bundle.TOKENIZER, bundle.RECORD)},
    )


def _model_records(
    zoo: Zoo, members: Members, kin: list[FamilyRecord], evaluator: Evaluator
) -> tuple[ModelRecord, ...]:
    return tuple(
        ModelRecord(
            id=model.id,
            subject=model.subject,
            family=next(family.key for family in kin if model.id in family.models),
            bytes=members[model.id].checkpoint.bytes,
            scores=evaluator.by_task({model.id: 1.0}),
        )
        for model in zoo.models
    )


def _cluster_record(group: tuple[str, ...], outcome: Outcome) -> ClusterRecord:
    trials = tuple(
        TrialRecord(tried=t.tried, weights=dict(t.weights), score=t.score, accepted=t.accepted) for t in outcome.trials
    )
    return ClusterRecord(models=group, weights=dict(outcome.weights), score=outcome.score, trials=trials)


def _candidate_records(
    candidates: Mapping[str, Weights], chosen: Mapping[str, float], evaluator: Evaluator
) -> tuple[CandidateRecord, ...]:
    return tuple(
        CandidateRecord(
            name=name, scores=evaluator.by_task(weights), score=evaluator.mean(weights), reach=chosen.get(name)
        )
        for name, weights in candidates.items()
    )
