"""`builder eval`: a model, or a bundle with every expert and the router's choice, scored on tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from builder.errors import ZooError
from builder.files import default_cache

# What a command needs is imported when it runs.
if TYPE_CHECKING:
    from builder.proxy.task import Metrics, Task

ROUTED = "(routed)"
"""What the answers of a bundle are called, each from the expert that its router picks."""
Scores = dict[str, "dict[str, list[Metrics]]"]
"""Every sample's metrics by model and task."""


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help="A model folder, a hub id, or a bundle.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks or presets (paper, demo), with commas between them; YAML files too.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of a task [all].")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before a question [the task's].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which samples, and which examples.")] = 42,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [cuda where there is one].")] = None,
    samples: Annotated[Path | None, typer.Option(help="Also write every sample's metrics to this JSONL file.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="Run programs that models write even where no sandbox holds them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    models_dir: Annotated[Path | None, typer.Option(help="A folder that holds models already.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where models are kept [MODELGLUE_CACHE].")] = None,
) -> None:
    """Score a model or a bundle on tasks."""
    from builder.config import task_names
    from builder.merge.command import locate
    from builder.progress import Quiet, Terminal
    from builder.proxy import programs
    from builder.proxy import tasks as known
    from builder.proxy.bench import Bench, Place
    from builder.proxy.task import Spec
    from routers.bundle import MANIFEST

    names = tuple(dict.fromkeys(task_names(tasks.split(","))))
    known.check(names)
    if unsafe_code:
        programs.allow_unsafe()
    progress = Quiet() if as_json or not sys.stderr.isatty() else Terminal()
    folder = locate(model, cache or default_cache(), models_dir, progress)
    specs = [Spec(name, None, limit, seed, fewshot) for name in names]
    loaded = [known.load(spec) for spec in specs]
    if any(task.runs_code for task in loaded):
        programs.ready()
    is_bundle = (folder / MANIFEST).exists()
    folders = _experts(folder) if is_bundle else {folder.resolve().name: folder}
    bench = Bench({name: Place(each, trust_remote_code) for name, each in folders.items()}, device)
    found = {name: _score(bench, name, specs, loaded, progress) for name in folders}
    if is_bundle:
        found[ROUTED] = _routed(folder, found, loaded)
    if samples is not None:
        _write(samples, found, loaded)
    summary = {
        name: {task.name: _summary(task, rows[task.name], seed) for task in loaded} for name, rows in found.items()
    }
    print(json.dumps(summary, indent=2)) if as_json else _print(summary, loaded)


def _experts(bundle_folder: Path) -> dict[str, Path]:
    from routers import bundle

    manifest = bundle.read_manifest(bundle_folder)
    return {name: bundle_folder / bundle.EXPERTS / name for name in manifest.names}


def _score(bench: Any, name: str, specs: Sequence[Any], loaded: Sequence[Task], progress: Any) -> Any:
    from builder.candidate import whole

    total = sum(len(sample.requests) for task in loaded for sample in task.samples)
    with progress.step(f"score {name}", total) as advance:
        return bench.score(whole(name), specs, advance).metrics


def _routed(folder: Path, found: Scores, loaded: Sequence[Task]) -> dict[str, list[Metrics]]:
    """What the bundle's answers score: each sample's from the expert that the router picks by its prompt."""
    from routers import bundle

    router = bundle.read(folder).router
    return {
        task.name: [
            found[router.route(sample.prompt).expert][task.name][place] for place, sample in enumerate(task.samples)
        ]
        for task in loaded
    }


def _summary(task: Task, rows: Sequence[Metrics], seed: int) -> dict[str, Any]:
    """The mean of every metric that all samples have, with its 95 % bootstrap interval."""
    import numpy as np

    from routers.scorecard import interval

    if task.metric not in rows[0]:
        raise ZooError(f"{task.name} has no {task.metric} for each sample, only {', '.join(rows[0])}")
    metrics = {}
    for metric in [name for name in rows[0] if all(name in row for row in rows)]:
        values = np.array([row[metric] for row in rows])
        low, high = interval(values, seed)
        metrics[metric] = {"mean": float(values.mean()), "low": low, "high": high}
    return {"samples": len(rows), "metric": task.metric, "metrics": metrics}


def _write(path: Path, found: Scores, loaded: Sequence[Task]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for name, by_task in found.items():
            for task in loaded:
                for sample, metrics in zip(task.samples, by_task[task.name], strict=True):
                    facts = {"model": name, "task": task.name, "prompt": sample.prompt, "metrics": metrics}
                    file.write(json.dumps(facts, ensure_ascii=False) + "\n")


def _print(summary: Mapping[str, Mapping[str, Any]], loaded: Sequence[Task]) -> None:
    from builder.show import print_table, table

    shown = table("model", "task", "samples", "metric", "score (95 %)", "also")
    for name, tasks in summary.items():
        for place, task in enumerate(loaded):
            facts = tasks[task.name]
            own = facts["metrics"][task.metric]
            also = ", ".join(
                f"{key} {each['mean']:.4f}" for key, each in facts["metrics"].items() if key != task.metric
            )
            score = f"{own['mean']:.3f} ({own['low']:.3f} to {own['high']:.3f})"
            shown.add_row("" if place else name, task.name, str(facts["samples"]), task.metric, score, also)
    print_table(shown)
