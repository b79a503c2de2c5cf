"""`builder search`: the best merge of every cluster of a zoo, as recipes and a record of how they were found."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from builder.errors import SearchError
from builder.files import default_cache

# What a command needs is imported when it runs.
if TYPE_CHECKING:
    from builder.candidate import Candidate
    from builder.config import Zoo
    from builder.executors import Executor
    from builder.members import Members
    from builder.record import Estimate, SearchRecord
    from builder.sources import Store

RECORD = "search.json"

ExecutorName = Annotated[
    Literal["local", "ray"], typer.Option("--executor", help="Who scores: this machine, or a Ray cluster.")
]
Devices = Annotated[str | None, typer.Option(help="Of --executor local: cpu, or cuda:0,cuda:1 [every GPU, or cpu].")]
RayAddress = Annotated[str | None, typer.Option(help="Of a running Ray cluster [one on this machine].")]
Storage = Annotated[str | None, typer.Option(help="Optuna storage URL (postgresql://...) that several machines share.")]
Retry = Annotated[bool, typer.Option("--retry", help="Try candidates again that failed before.")]
UnsafeCode = Annotated[
    bool, typer.Option("--unsafe-code", help="Run programs that models write even where no sandbox holds them.")
]


def search(
    zoo: Annotated[str, typer.Option("--zoo", help="A shipped zoo, or a TOML file.")],
    out: Annotated[Path | None, typer.Option(help="The run's folder [runs/ZOO].")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="average, coefficient, similarity, evolution, ..., auto.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Merge method of evolution.")] = None,
    trials: Annotated[int | None, typer.Option(help="Evolution's budget.")] = None,
    groups: Annotated[int | None, typer.Option(help="Layer groups with coefficients of their own.")] = None,
    constraint: Annotated[str | None, typer.Option(help="normalise or raw weights.")] = None,
    similar: Annotated[str | None, typer.Option(help="most or least: whom the similarity strategy tries next.")] = None,
    accept: Annotated[str | None, typer.Option(help="paper (no worse) or paired (better beyond luck).")] = None,
    level: Annotated[float | None, typer.Option(help="Of --accept paired.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Proxy tasks or presets, with commas between them.")] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of a task.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything that draws.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done, and stop.")] = False,
    executor: ExecutorName = "local",
    devices: Devices = None,
    ray_address: RayAddress = None,
    storage: Storage = None,
    retry: Retry = False,
    unsafe_code: UnsafeCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line: trials, then the result.")] = False,
    models_dir: Annotated[Path | None, typer.Option(help="A folder that holds models already.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where models and results are kept [MODELGLUE_CACHE].")] = None,
) -> None:
    """Find the best merge of every cluster: which members, which coefficients."""
    from builder.config import load_zoo, with_choices
    from builder.plan import plan as planned
    from builder.progress import Lines, Terminal
    from builder.sources import Store

    choices = {
        "strategy": strategy,
        "method": method,
        "trials": trials,
        "groups": groups,
        "constraint": constraint,
        "similar": similar,
        "accept": accept,
        "level": level,
    }
    scored = {"tasks": tasks.split(",") if tasks else None, "limit": limit}
    loaded = with_choices(load_zoo(zoo), search=choices, proxy=scored, seed=seed)
    store = Store(loaded, cache or default_cache(), models_dir)
    if plan:
        from builder.show import print_plan

        print_plan(planned(loaded, store))
        return
    out = out or Path("runs") / loaded.name
    workers = executor_of(executor, devices, ray_address, unsafe_code)
    run(loaded, out, store, workers, Lines() if as_json else Terminal(), storage, retry, as_json)


def run(
    zoo: Zoo,
    out: Path,
    store: Store,
    executor: Callable[[Members], Executor],
    progress: Any,
    storage: str | None,
    retry: bool,
    as_json: bool,
) -> None:
    """Search, then write the record and the recipes to `out`, and print how the merges stand."""
    from builder import explore, pipeline
    from builder.evaluate import Evaluator
    from builder.journal import Journal
    from builder.members import open_all

    pipeline.check_tasks(zoo, store)
    fetched = store.fetch(progress)
    with Journal(store.cache / "journal.sqlite") as journal:
        members = open_all(zoo, fetched, journal)
        with contextlib.closing(executor(members)) as workers:
            evaluator = Evaluator(zoo, members, journal, progress, workers, retry)
            explored = explore.explore(zoo, members, evaluator, storage)
            record = explore.record(zoo, members, evaluator, explored)
            merges = explore.merges(explored, [model.id for model in zoo.models])
    write(out, record, merges, {name: member.folder for name, member in members.items()})
    print(json.dumps({"event": "result", "out": str(out), **_facts(record)})) if as_json else _print(record, out)


def write(out: Path, record: SearchRecord, merges: Mapping[str, Candidate], folders: Mapping[str, Path]) -> None:
    """The run's folder: the record, and a recipe that `builder merge` runs for every merge."""
    import yaml

    (out / "recipes").mkdir(parents=True, exist_ok=True)
    for old in (out / "recipes").glob("*.yaml"):
        old.unlink()
    for name, candidate in merges.items():
        said = _placed(candidate.said, folders)
        (out / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(said, sort_keys=False), "utf-8")
    partial = out / f"{RECORD}.partial"
    partial.write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
    partial.replace(out / RECORD)


def _placed(said: Any, folders: Mapping[str, Path]) -> Any:
    """A recipe with the models' folders for their names."""
    if isinstance(said, Mapping):
        return {
            key: str(folders[value])
            if key in ("model", "base_model", "source") and value in folders
            else _placed(value, folders)
            for key, value in said.items()
        }
    return [_placed(each, folders) for each in said] if isinstance(said, list) else said


def executor_of(
    name: str, devices: str | None, address: str | None, unsafe_code: bool
) -> Callable[[Members], Executor]:
    """Makes the executor that the options name, once the models are known."""
    from builder.evaluate import places
    from builder.executors.local import InProcess, Processes, gpus
    from builder.proxy import programs

    if unsafe_code:
        programs.allow_unsafe()
        print("warning: --unsafe-code: programs that models write may harm this machine", file=sys.stderr)
    if name == "ray" and devices:
        raise SearchError("--devices is of --executor local: Ray knows its own")
    if name == "local" and address:
        raise SearchError("--ray-address is of --executor ray")
    named = devices.split(",") if devices else gpus()

    def make(members: Members) -> Executor:
        if name == "ray":
            from builder.executors.ray import Ray

            return Ray(places(members), address, unsafe_code=unsafe_code)
        if len(named) > 1:
            return Processes(places(members), named, unsafe_code=unsafe_code)
        return InProcess(places(members), named[0] if named else None)

    return make


def _facts(record: SearchRecord) -> dict[str, Any]:
    return {
        "clusters": [
            {
                "models": each.models,
                "method": each.method,
                "weights": each.weights,
                "recipe": each.said,
                "score": each.score,
                "trials": len(each.trials),
                "standings": [one.model_dump() for one in each.standings],
            }
            for each in record.clusters
        ]
    }


def _print(record: SearchRecord, out: Path) -> None:
    from builder.show import print_table, table

    for cluster in record.clusters:
        if len(cluster.models) == 1:
            print(f"{cluster.models[0]}: nothing to merge it with; {record.metric} {cluster.score:.4f}")
            continue
        print(f"\n{', '.join(cluster.models)}; {record.metric}, higher is better:")
        shown = table("model", "score", "95 %", *record.tasks)
        for one in cluster.standings:
            tasks = [f"{one.tasks[task].mean:.3f}" for task in record.tasks]
            shown.add_row(one.name, f"{one.score.mean:.4f}", _interval(one.score), *tasks)
        print_table(shown)
        tried, failed = len(cluster.trials), sum(trial.failure is not None for trial in cluster.trials)
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in cluster.weights.items())
        print(f"kept: {weights} ({cluster.method}); {tried} trials, {failed} failed")
    print(f"\n{out} holds the record and the recipes, scored on {record.samples} samples: builder report {out}")


def _interval(score: Estimate) -> str:
    return f"{score.low:.3f} to {score.high:.3f}"
