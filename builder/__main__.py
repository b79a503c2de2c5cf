"""The builder's command line."""

from __future__ import annotations

import os

# Before torch loads: threads that spin collapse when anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import errno
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from builder import cluster_command
from builder.files import default_cache
from builder.merge import command
from builder.mix import command as mixing
from builder.proxy import command as scoring
from builder.routing import command as routing
from builder.search import command as searching
from builder.show import print_plan, print_table, table
from routers.errors import ModelGlueError

# What a command needs is imported when it runs: a merge of small models takes less than the imports of a build.
if TYPE_CHECKING:
    from builder.config import Zoo
    from builder.sources import Store

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
zoo_app = typer.Typer(help="The zoos: list, show, fetch.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
STOPPED = 128 + signal.SIGINT
"""What typer exits with after Ctrl-C."""

ZooName = Annotated[str, typer.Option("--zoo", help="A shipped zoo, or a TOML file.")]
ModelsDir = Annotated[Path | None, typer.Option(help="A folder that holds models already.")]
Cache = Annotated[Path | None, typer.Option(help="Where models and results are kept [MODELGLUE_CACHE].")]


@app.command()
def build(
    zoo: ZooName,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder [bundles/ZOO].")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done, and stop.")] = False,
    executor: searching.ExecutorName = "local",
    devices: searching.Devices = None,
    ray_address: searching.RayAddress = None,
    storage: searching.Storage = None,
    retry: searching.Retry = False,
    unsafe_code: searching.UnsafeCode = False,
    models_dir: ModelsDir = None,
    cache: Cache = None,
) -> None:
    """Turn a zoo into a bundle."""
    from builder import pipeline
    from builder.config import load_zoo
    from builder.plan import plan as planned
    from builder.progress import Terminal

    loaded = load_zoo(zoo)
    store = _store(loaded, cache, models_dir)
    todo = planned(loaded, store)
    if plan:
        print_plan(todo)
        return
    out = out or Path("bundles") / loaded.name
    workers = searching.executor_of(executor, devices, ray_address, unsafe_code)
    if pipeline.build(loaded, out, store, Terminal(), executor=workers, storage=storage, retry=retry):
        print(f"{out} is built; serve it: service --bundle {out}")
    else:
        print(f"{out} is up to date")


app.command()(command.merge)
app.command()(command.stats)
app.command()(mixing.mix)
app.command()(cluster_command.cluster)
app.command()(searching.search)
app.command(name="eval")(scoring.evaluate)
app.command(name="route-eval")(routing.route_eval)
app.command()(routing.route)
app.command(name="route-diff")(routing.route_diff)
app.command(name="route-replay")(routing.route_replay)
app.add_typer(routing.expert_app, name="expert")


@app.command()
def verify(path: Annotated[Path, typer.Argument(metavar="BUNDLE")]) -> None:
    """Hash every file of a bundle against its manifest."""
    from routers import bundle

    files = sum(1 for _ in bundle.verify(path))
    print(f"{path}: {files} files, all as they were built")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|RUN")],
    out: Annotated[Path | None, typer.Option(help="The page [beside it, with .html at its name's end].")] = None,
) -> None:
    """Write one self-contained HTML page on how a bundle, or a search, came about."""
    from builder.report import render

    out = out or path.resolve().with_name(f"{path.resolve().name}.html")
    out.write_text(render(path), "utf-8")
    print(f"{out} is written")


@zoo_app.command("list")
def zoo_list() -> None:
    """The zoos that ship."""
    from builder.config import load_zoo, zoo_names

    shown = table("zoo", "models", "what")
    for name in zoo_names():
        loaded = load_zoo(name)
        shown.add_row(name, str(len(loaded.models)), loaded.note)
    print_table(shown)


@zoo_app.command("show")
def zoo_show(name: str, models_dir: ModelsDir = None, cache: Cache = None) -> None:
    """The models of a zoo, and which of them are here."""
    from builder.config import load_zoo

    loaded = load_zoo(name)
    store = _store(loaded, cache, models_dir)
    shown = table("model", "source", "revision", "subject", "here", "note")
    for model in loaded.models:
        source = model.source or f"{model.base} + {model.adapter}"
        here = "yes" if store.locate(model.id) else "no"
        shown.add_row(model.id, source, model.revision or "", model.subject, here, model.note)
    print_table(shown)


@zoo_app.command("fetch")
def zoo_fetch(name: str, models_dir: ModelsDir = None, cache: Cache = None) -> None:
    """Bring every model of a zoo to this machine, as plain model folders."""
    from builder.config import load_zoo
    from builder.progress import Terminal

    for fetched in _store(load_zoo(name), cache, models_dir).fetch(Terminal()).values():
        print(f"{fetched.id}: {fetched.folder}")


def main() -> None:
    """Run the command; a failure that the user can mend is one sentence on stderr."""
    try:
        app()
    except ModelGlueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)
    except OSError as exc:
        if exc.filename is None and exc.errno != errno.ENOSPC:
            raise
        where = f"{exc.filename}: " if exc.filename else ""
        print(f"error: {where}{exc.strerror}: make room or choose another place, and run it again", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == STOPPED:
            print("stopped; run it again to go on", file=sys.stderr)
        raise


def _store(zoo: Zoo, cache: Path | None, models_dir: Path | None) -> Store:
    from builder.sources import Store

    return Store(zoo, cache or default_cache(), models_dir)


if __name__ == "__main__":
    main()
