"""build(): a zoo becomes a bundle, step by step. Read first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic.main import IncEx

from builder import experts, explore, files, fit_router, mixtures, select
from builder.candidate import Candidate, whole
from builder.config import Zoo, is_task_file
from builder.errors import BuildError, ZooError
from builder.evaluate import Evaluator, places
from builder.executors import Executor
from builder.executors.local import InProcess
from builder.explore import Explored
from builder.fit_router import Routing
from builder.journal import Journal, digest
from builder.members import Members, open_all
from builder.mixtures import Mixed
from builder.progress import Progress
from builder.proxy import tasks
from builder.record import CandidateRecord, Record
from builder.sources import Store
from routers import bundle
from routers.bundle import Manifest
from routers.errors import BundleError

Experts = Mapping[str, Candidate]
"""What becomes each expert."""


def build(
    zoo: Zoo,
    out: Path,
    store: Store,
    progress: Progress,
    *,
    executor: Callable[[Members], Executor] = lambda members: InProcess(places(members)),
    storage: str | None = None,
    retry: bool = False,
) -> bool:
    """Write the bundle of `zoo` to `out`; False when it was there already.

    A killed build is resumed: every score is in the journal, every finished expert beside `out`. Same zoo, same
    weights, same bytes. executor: who scores candidates. storage: of Optuna's trials, where several machines search.
    retry: whether candidates that failed before are tried again. Raises ModelGlueError: what stops a build says what to
    do, and leaves no `out`.
    """
    check_tasks(zoo, store)
    fetched = store.fetch(progress)
    with Journal(store.cache / "journal.sqlite") as journal:
        members = open_all(zoo, fetched, journal)
        inputs = _digest(zoo, members)
        if _is_there(out, inputs):
            return False
        with files.locked(out.with_name(f"{out.name}.partial")) as partial:
            if _is_there(out, inputs):  # another build finished it meanwhile
                return False
            with contextlib.closing(executor(members)) as workers:
                evaluator = Evaluator(zoo, members, journal, progress, workers, retry)
                explored = explore.explore(zoo, members, evaluator, storage)
                mixed = mixtures.mix(zoo, members, evaluator, explored)
                candidates = _candidates(zoo, explored, mixed)
                chosen = _choose(zoo, candidates, explored, mixed, evaluator)
                made = {name: candidates[name] for name in chosen}
                _write_experts(partial / bundle.EXPERTS, made, members, evaluator)
                routing = fit_router.publish(zoo, made, members, evaluator, partial)
                record = Record(
                    **dict(explore.record(zoo, members, evaluator, explored)),
                    candidates=_candidate_records(candidates, chosen, evaluator),
                    mixtures=mixtures.record(zoo, mixed, candidates),
                    routing=routing.items,
                    router_note=routing.published.note,
                    choices=_choices(zoo),
                )
                (partial / bundle.RECORD).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
                bundle.write(partial, _manifest(zoo, inputs, made, members, routing, evaluator, partial))
            partial.rename(out)
    progress.say(routing.published.note)
    return True


def check_tasks(zoo: Zoo, store: Store) -> None:
    """Refuse tasks that cannot be scored before anything is downloaded; what else is missing is told with it."""
    try:
        tasks.check([*zoo.proxy.tasks, *(zoo.test.tasks if zoo.test else ())])
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
    for part in ("proxy", "test"):
        told[part] = {"tasks"}
    asked = [*zoo.proxy.tasks, *(zoo.test.tasks if zoo.test else ())]
    named = [bundle.digest(Path(task)).sha256 if is_task_file(task) else task for task in asked]
    told["router"] = {"encoder"}
    encoder = sorted(Path(zoo.router.encoder).rglob("*")) if zoo.router.encoder else []
    named += [f"{path.name} {bundle.digest(path).sha256}" for path in encoder if path.is_file()]
    return digest(zoo.model_dump_json(exclude=told), *named, *(member.sha256 for member in members.values()))


def _choices(zoo: Zoo) -> dict[str, Any]:
    """What scoring one expert more, and fitting the router anew, has to know; task files by their names alone."""
    chosen = zoo.model_dump(mode="json", include={"proxy", "test", "subjects", "router", "seed"})
    chosen["router"].pop("encoder")
    for part in ("proxy", "test"):
        if chosen[part] is not None:
            chosen[part]["tasks"] = [Path(task).name if is_task_file(task) else task for task in chosen[part]["tasks"]]
    return chosen


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


def _candidates(zoo: Zoo, explored: Explored, mixed: Mapping[int, Mixed]) -> dict[str, Candidate]:
    """What may become an expert: mixtures, merges, and every model whole; none takes the name of another candidate."""
    wholes = {model.id: whole(model.id) for model in zoo.models}
    merges = explore.merges(explored, list(wholes))
    return {**mixtures.named(mixed, [*merges, *wholes]), **merges, **wholes}


def _choose(
    zoo: Zoo, candidates: Experts, explored: Explored, mixed: Mapping[int, Mixed], evaluator: Evaluator
) -> dict[str, float]:
    """The experts, each with the perfect router's score once it was chosen."""
    if zoo.experts == "cluster":
        best = [found.outcome.candidate for found in explored.found]
        kept = [mixed[i].candidate if i in mixed and mixed[i].wins else each for i, each in enumerate(best)]
        scores = {name: evaluator.scores(each) for name, each in candidates.items() if each in kept}
        return select.choose(scores, len(scores), stop_early=False)
    return select.choose({name: evaluator.scores(each) for name, each in candidates.items()}, zoo.experts)


def _write_experts(folder: Path, made: Experts, members: Members, evaluator: Evaluator) -> None:
    lacking = [each for name, each in made.items() if not (folder / name).exists()]
    need, free = sum(experts.size(each, members) for each in lacking), files.free(folder)
    if need > free:
        raise BuildError(
            f"the experts need {need / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: make room, or set --out"
        )
    for name, candidate in made.items():
        for sentence in experts.write(folder / name, candidate, members):
            evaluator.progress.say(f"{name}: {sentence}")
        if candidate.said:
            evaluator.check_written(candidate, folder / name)
    experts.keep_only(folder, made)


def _manifest(
    zoo: Zoo,
    inputs: str,
    made: Experts,
    members: Members,
    routing: Routing,
    evaluator: Evaluator,
    partial: Path,
) -> Manifest:
    entries = tuple(
        experts.entry(
            partial / bundle.EXPERTS / name,
            candidate,
            members,
            routing.subjects[name],
            evaluator.by_task(candidate),
        )
        for name, candidate in made.items()
    )
    return Manifest(
        zoo=zoo.name,
        inputs_sha256=inputs,
        seed=zoo.seed,
        default=routing.published.default,
        experts=entries,
        router=routing.router,
        features=routing.about_features,
        scorecard=routing.published.proven.card if routing.published.proven else None,
        scorecards=routing.published.scorecards,
        files={name: bundle.digest(partial / name) for name in (*routing.files, bundle.RECORD)},
    )


def _candidate_records(
    candidates: Experts, chosen: Mapping[str, float], evaluator: Evaluator
) -> tuple[CandidateRecord, ...]:
    return tuple(
        CandidateRecord(
            name=name,
            scores=evaluator.by_task(each),
            score=explore.estimate(evaluator.scores(each), evaluator.zoo.seed),
            reach=chosen.get(name),
        )
        for name, each in candidates.items()
    )
