"""A bundle with one expert more or less: newcomers are scored on the kept routing set, routers fitted anew."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from builder import experts as writing
from builder import files, fit_router
from builder.candidate import whole
from builder.config import Zoo, is_task_file
from builder.errors import BuildError
from builder.evaluate import Evaluator, places
from builder.executors.local import InProcess
from builder.journal import Journal, digest
from builder.members import open_all
from builder.progress import Progress
from builder.record import Record
from builder.routing import gate, space
from builder.routing.crossval import by_chance, predict
from builder.routing.gate import FOLDS
from builder.routing.matrix import Matrix
from builder.routing.portfolio import Portfolio, portfolio
from builder.sources import Fetched
from routers import bundle
from routers.bundle import Bundle, Expert, Manifest


def add(
    path: Path,
    model: Path,
    out: Path,
    *,
    name: str,
    prompts: Sequence[str] = (),
    tasks_from: Path | None = None,
    cache: Path,
    progress: Progress,
) -> str:
    """Write to `out` the bundle at `path` with the model in the folder `model` as one expert more.

    prompts: what it is to be asked, for the linear router's gate. tasks_from: where the task files are that the bundle
    was scored on, if it was on any. Returns the note on its router. Raises ModelGlueError, with nothing half-written.
    """
    read, record = _read(path)
    if name in read.manifest.names:
        raise BuildError(f"{path} has an expert {name!r} already: give another --name, or drop that one first")
    rows = read.routing
    zoo = _zoo(record, name, model, tasks_from)
    with Journal(cache / "journal.sqlite") as journal:
        members = open_all(zoo, {name: Fetched(name, model, None)}, journal)
        evaluator = Evaluator(zoo, members, journal, progress, InProcess(places(members)))
        asked = [item.prompt for _, item in evaluator.items("routing")]
        if asked != [row.prompt for row in rows]:
            raise BuildError(f"the tasks of {path} have changed since it was built: build it again")
        scores_N = evaluator.scores(whole(name), "routing")
        found = evaluator.by_task(whole(name))
        known_NE = np.array([[row.scores[expert] for expert in read.manifest.names] for row in rows])
        matrix = Matrix(
            tuple(row.prompt for row in rows),
            tuple(row.task for row in rows),
            (*read.manifest.names, name),
            np.column_stack([known_NE, scores_N]),
        )
        owned = {expert.name: expert.subjects for expert in read.manifest.experts} | {name: (name,) if prompts else ()}
        subjects = dict(record.choices["subjects"]) | ({name: list(prompts)} if prompts else {})
        with files.locked(out.with_name(f"{out.name}.partial")) as partial:
            _refuse(out)
            target = partial / bundle.EXPERTS / name
            writing.write(target, whole(name), members)
            for extra in (partial / bundle.EXPERTS).glob("*.made-of"):
                extra.unlink()
            entry = writing.entry(target, whole(name), members, tuple(owned[name]), found)
            _share(path, partial, read.manifest.names)
            note = _finish(
                read,
                record,
                matrix,
                (*read.manifest.experts, entry),
                owned,
                subjects,
                partial,
                digest(read.manifest.inputs_sha256, "add", name, members[name].sha256, *prompts),
            )
            partial.rename(out)
    return note


def drop(path: Path, name: str, out: Path) -> str:
    """Write to `out` the bundle at `path` without the expert `name`. Returns the note on its router."""
    read, record = _read(path)
    if name not in read.manifest.names:
        raise BuildError(f"no expert {name!r} in {path}; there are: {', '.join(read.manifest.names)}")
    if len(read.manifest.names) == 1:
        raise BuildError(f"{name} is the only expert of {path}: a bundle needs one")
    kept = tuple(expert for expert in read.manifest.experts if expert.name != name)
    matrix = _matrix(read).only([expert.name for expert in kept])
    owned = {expert.name: expert.subjects for expert in kept}
    # A subject that nobody answers for any more is nobody's opposite either.
    left = {subject for own in owned.values() for subject in own}
    subjects = {name: prompts for name, prompts in record.choices["subjects"].items() if name in left}
    with files.locked(out.with_name(f"{out.name}.partial")) as partial:
        _refuse(out)
        _share(path, partial, [expert.name for expert in kept])
        inputs = digest(read.manifest.inputs_sha256, "drop", name)
        note = _finish(read, record, matrix, kept, owned, subjects, partial, inputs)
        partial.rename(out)
    return note


def worth(path: Path) -> Portfolio:
    """What every expert of a bundle adds to the routed score of its routing set, by routers that had not seen it."""
    read, _ = _read(path)
    matrix, manifest = _matrix(read), read.manifest
    vectors_ND = np.stack([read.router.features.vector(prompt) for prompt in matrix.prompts])
    kind = manifest.router.kind
    if kind == "fixed" and manifest.scorecards:  # who is worth what under the best router there is
        cards = {name: card for name, card in manifest.scorecards.items() if name != "fixed"}
        kind = max(cards, key=lambda name: cards[name].routed)
    fit = gate.fits(matrix.experts, manifest.seed)[kind]
    predicted = predict(fit, vectors_ND, matrix.scores_NE, by_chance(len(vectors_ND), FOLDS, manifest.seed))
    sizes = {expert.name: sum(file.bytes for file in expert.files.values()) for expert in manifest.experts}
    return portfolio(matrix.experts, predicted.quality_NE, matrix.scores_NE, sizes)


def _read(path: Path) -> tuple[Bundle, Record]:
    read = bundle.read(path)
    try:
        record = Record.model_validate_json((path / bundle.RECORD).read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise BuildError(f"{path / bundle.RECORD} cannot be read: build the bundle again") from exc
    if not record.choices:
        raise BuildError(f"{path} does not say how it was scored: build it again")
    return read, record


def _matrix(read: Bundle) -> Matrix:
    rows, names = read.routing, read.manifest.names
    scores_NE = np.array([[row.scores[name] for name in names] for row in rows])
    return Matrix(tuple(row.prompt for row in rows), tuple(row.task for row in rows), names, scores_NE)


def _zoo(record: Record, name: str, model: Path, tasks_from: Path | None) -> Zoo:
    """A zoo of the newcomer alone, scored as the bundle's experts were."""
    choices: dict[str, Any] = {key: record.choices[key] for key in ("proxy", "test", "seed")}
    for part in ("proxy", "test"):
        if choices[part] is None:
            continue
        own = [task for task in choices[part]["tasks"] if is_task_file(task)]
        if own and tasks_from is None:
            raise BuildError(f"the bundle was scored on {', '.join(own)}: say with --tasks-from where that is")
        if tasks_from is not None:
            tasks = [str(tasks_from / task) if is_task_file(task) else task for task in choices[part]["tasks"]]
            choices[part] = choices[part] | {"tasks": tasks}
    said = {"id": name, "source": str(model), "subject": name}
    return Zoo.model_validate(
        {"name": record.zoo, "models": [said], "subjects": {name: ["-"]}, "router": {"features": name}, **choices}
    )


def _share(path: Path, partial: Path, names: Sequence[str]) -> None:
    """The experts' files once more: linked where the disk can, for they are the same; copied where not."""
    for name in names:
        source, target = path / bundle.EXPERTS / name, partial / bundle.EXPERTS / name
        files.remove(target)
        target.mkdir(parents=True)
        for file in sorted(source.iterdir()):
            try:
                os.link(file, target / file.name)
            except OSError:
                files.copy(file, target / file.name)


def _finish(
    read: Bundle,
    record: Record,
    matrix: Matrix,
    experts: tuple[Expert, ...],
    owned: Mapping[str, Sequence[str]],
    subjects: Mapping[str, Sequence[str]],
    partial: Path,
    inputs: str,
) -> str:
    """Fit the routers for the experts in `partial`, and write all that a bundle has beside them."""
    manifest = read.manifest
    features = space.carry(read, partial)
    prompts = gate.gates(owned, subjects, features) if all(owned.values()) else None
    kind = record.choices["router"]["kind"]
    found = gate.publish(matrix, features, manifest.seed, kind=kind, prompts=prompts)
    entry, about = fit_router.write(
        partial, found, features, matrix, k=manifest.router.k, cost_weight=manifest.router.cost_weight
    )
    routed = fit_router.routed(matrix, found.picks)
    choices = {**record.choices, "subjects": {name: list(each) for name, each in subjects.items()}}
    changed = record.model_copy(update={"routing": routed, "router_note": found.note, "choices": choices})
    (partial / bundle.RECORD).write_text(changed.model_dump_json(indent=2) + "\n", "utf-8")
    names = (*fit_router.written(partial, features.kind), bundle.RECORD)
    updated = manifest.model_copy(
        update={
            "inputs_sha256": inputs,
            "default": found.default,
            "experts": experts,
            "router": entry,
            "features": about.model_copy(update={"model": manifest.features.model, "layers": manifest.features.layers}),
            "scorecard": found.proven.card if found.proven else None,
            "scorecards": found.scorecards,
            "files": {name: bundle.digest(partial / name) for name in names},
        }
    )
    bundle.write(partial, Manifest.model_validate(updated.model_dump()))
    return found.note


def _refuse(out: Path) -> None:
    if out.exists():
        raise BuildError(f"{out} exists: choose another --out, or remove it")
