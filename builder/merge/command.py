"""`builder merge` and `builder stats`: a recipe's models found, its plan printed or run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from builder.errors import MergeError, SourceError
from builder.files import default_cache
from builder.journal import Journal
from builder.merge import stream
from builder.merge.models import FACTS, Find, Found
from builder.merge.plan import NAMES, Origin, Output, Plan
from builder.merge.plan import plan as planned
from builder.merge.recipe import load_recipe
from builder.merge.reference import resolve

if TYPE_CHECKING:
    from builder.progress import Progress

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge(
    file: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The merged model's folder.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print every tensor's sources and parameters; stop.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors merged at a time [one a core].")] = None,
    shard_size: Annotated[str, typer.Option(help="Bytes of an output file at most.")] = "5GB",
    max_memory: Annotated[str | None, typer.Option(help="Memory for it, mapped input files not counted.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of random methods [the recipe's, or 0].")] = None,
    allow_mismatch: Annotated[list[str] | None, typer.Option(help=f"May differ: {', '.join(FACTS)}.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="A folder that holds models already.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where models and digests are kept [MODELGLUE_CACHE].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the plan, as JSON.")] = False,
) -> None:
    """Merge models by a recipe in mergekit's YAML schema."""
    cache = cache or default_cache()
    limits = (size(shard_size, "--shard-size"), None if max_memory is None else size(max_memory, "--max-memory"))
    if unknown := sorted(set(allow_mismatch or ()) - set(FACTS)):
        raise MergeError(f"--allow-mismatch {unknown[0]}: what may differ is one of {', '.join(FACTS)}")
    said = load_recipe(file)
    if seed is not None:
        said = said.model_copy(update={"seed": seed})
    progress = bars(quiet=as_json)
    find = finder(said.references(), said.folder, cache, models_dir, progress)
    todo = planned(said, find, allow=allow_mismatch or ())
    if plan:
        print(json.dumps(facts(todo), indent=2)) if as_json else print_plan(todo)
        return
    if out is None:
        raise MergeError("give the folder to write: builder merge RECIPE.yaml OUT, or --plan to look first")
    for note in todo.notes:
        print(f"note: {note}", file=sys.stderr)
    with Journal(cache / "journal.sqlite") as journal:
        result = stream.write(
            todo,
            out,
            device=device,
            threads=threads,
            shard_bytes=limits[0],
            max_memory=limits[1],
            overwrite=overwrite,
            journal=journal,
            progress=progress,
        )
    if as_json:
        print(json.dumps({"out": str(out), **asdict(result), "notes": todo.notes}, indent=2))
    else:
        print(
            f"{out} is written: {result.tensors} tensors, {result.read / 1e9:.2f} GB read, "
            f"{result.written / 1e9:.2f} GB written in {result.seconds:.1f} s by {result.threads} threads"
        )


def stats(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.")],
    data: Annotated[
        Path, typer.Option(help="Text: .jsonl (text, prompt and completion, or messages) or .txt; .gz too.")
    ],
    out: Annotated[Path, typer.Option(help="The statistics' .safetensors file.")],
    kind: Annotated[Literal["fisher", "regmean"], typer.Option(help="What the merge method needs.")],
    limit: Annotated[int, typer.Option(min=1, help="Texts at most.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a text at most.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Draws fisher's labels.")] = 0,
    only: Annotated[str, typer.Option("--filter", help="Only tensors whose name holds this.")] = "",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Measure a model on text, for fisher and regmean merges."""
    from builder.merge.statistics import Statistics, measure, read_texts

    texts = read_texts(data, limit)
    measure(
        model,
        texts,
        out,
        kind=kind,
        seed=seed,
        max_tokens=max_tokens,
        filter=only,
        trust_remote_code=trust_remote_code,
        progress=bars(),
    )
    print(f"{out} is written: {kind} statistics of {len(Statistics(out).tensors)} tensors on {len(texts)} texts")


def finder(
    references: Sequence[str], folder: Path, cache: Path, models_dir: Path | None, progress: Progress | None
) -> Find:
    """Finds the models of a file in `folder`: folders first, then those of `models_dir`, then the hub's, all at once.

    Raises SourceError with a line for each that is not to be had, before any download.
    """
    found = {name: resolve(name, folder) for name in references}
    wanted = {(each.model, each.revision) for each in found.values()}
    wanted |= {(each.adapter, each.adapter_revision) for each in found.values() if each.adapter}
    here = {one: _here(one[0], models_dir) for one in wanted}
    here |= _fetched(sorted((one for one, path in here.items() if path is None), key=str), cache, progress)

    def find(name: str) -> Found:
        each = found[name]
        folder, adapter = here[each.model, each.revision], None
        if each.adapter:
            adapter = here[each.adapter, each.adapter_revision]
        assert folder is not None
        return Found(folder, adapter)

    return find


def locate(name: str, cache: Path, models_dir: Path | None, progress: Progress | None) -> Path:
    """The folder of one model: a folder first, then one of `models_dir`, then the hub's. Raises SourceError."""
    found = resolve(name, Path())
    here = _here(found.model, models_dir)
    return here or _fetched([(found.model, found.revision)], cache, progress)[found.model, found.revision]


def _here(name: str, models_dir: Path | None) -> Path | None:
    """A folder of that name on this machine."""
    names = dict.fromkeys((name, name.replace("/", "--"), name.rpartition("/")[2]))
    own = [] if models_dir is None or name.startswith("/") else [models_dir / each for each in names]
    return next((path for path in [Path(name), *own] if path.is_dir()), None)


def _fetched(wanted: Sequence[tuple[str, str | None]], cache: Path, progress: Progress | None) -> dict[Any, Path]:
    """Hub models, downloaded at the commits that their revisions name."""
    if not wanted:
        return {}
    from builder import hub
    from builder.config import Base
    from builder.progress import Quiet

    lost = [f"  {name}: there is no such folder" for name, _ in wanted if not _is_hub_id(name)]
    wanted = [one for one in wanted if _is_hub_id(one[0])]
    entries = [Base(id=f"m{i}", source=name, revision=revision) for i, (name, revision) in enumerate(wanted)]
    downloads, refused = hub.look_up(entries)
    if lost or refused:
        raise SourceError("\n".join(["these models are not here and cannot be had:", *lost, *refused]))
    hub.check_space(cache / "hub", downloads)
    folders = {each.id: hub.download(each, cache / "hub", progress or Quiet()).folder for each in downloads}
    return {one: folders[f"m{i}"] for i, one in enumerate(wanted)}


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def size(text: str, option: str) -> int:
    """Bytes of a text such as 5GB, 500MB or 2GiB. Raises MergeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    count = int(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0
    if not count:
        raise MergeError(f"{option} {text}: give a size such as 5GB, 500MB or 2GiB")
    return count


def bars(*, quiet: bool = False) -> Progress | None:
    """Bars for people; none where nobody looks."""
    if quiet or not sys.stderr.isatty():
        return None
    from builder.progress import Terminal

    return Terminal()


def print_plan(plan: Plan, beside: Sequence[Sequence[str]] = ()) -> None:
    """One line a tensor, models by number: text that can be searched and compared.

    beside: rows on tensors that are made otherwise.
    """
    numbers = {name: str(i) for i, name in enumerate(plan.models, 1)}
    print(*(f"{number}: {name}" for name, number in numbers.items()), "", sep="\n")
    rows = [*(_row(output, numbers) for output in plan.outputs), *beside]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(*("", *(f"note: {note}" for note in plan.notes)), sep="\n")
    print(f"{len(rows)} tensors; {plan.read / 1e9:.2f} GB to read, {plan.written / 1e9:.2f} GB to write")


def _row(output: Output, numbers: Mapping[str, str]) -> tuple[str, ...]:
    def told(origin: Origin) -> str:
        return numbers[origin.model] + (f":{origin.tensor}" if origin.tensor != output.name else "")

    base = [] if output.base is None else [f"base {told(output.base)}"]
    return (
        output.name,
        "x".join(map(str, output.tensor.shape)) or "scalar",
        NAMES[output.tensor.dtype],
        f"{output.method} of {', '.join([*map(told, output.inputs), *base])}",
        ", ".join(f"{key} {_said(each)}" for key, each in output.parameters.items()),
    )


def _said(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_said, value))}]"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def facts(plan: Plan) -> dict[str, Any]:
    """A plan for programs."""
    return {
        "outputs": [_output(output) for output in plan.outputs],
        "read": plan.read,
        "written": plan.written,
        "notes": plan.notes,
    }


def _output(output: Output) -> dict[str, Any]:
    return {
        "tensor": output.name,
        "shape": output.tensor.shape,
        "dtype": NAMES[output.tensor.dtype],
        "method": output.method,
        "inputs": [asdict(origin) for origin in output.inputs],
        "base": None if output.base is None else asdict(output.base),
        "parameters": output.parameters,
    }
