"""`builder mix`: a spec's models found, its plan printed or run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from builder.errors import MixError
from builder.files import default_cache
from builder.journal import Journal
from builder.merge import command, stream
from builder.merge.models import FACTS
from builder.merge.plan import NAMES
from builder.merge.plan import Plan as Weights
from builder.mix import stack, train
from builder.mix.plan import Plan
from builder.mix.plan import plan as planned
from builder.mix.spec import load
from builder.mix.train import Text
from builder.mix.write import write


def mix(
    file: Annotated[Path, typer.Argument(metavar="SPEC.yaml")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The mixture's folder.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print every tensor's source; stop.")] = False,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print the recipe that a stack is; stop.")] = False,
    data: Annotated[Path | None, typer.Option(help="Texts to train MLP gates on: .jsonl [the prompts].")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Texts of it at most.")] = 512,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors written at a time [one a core].")] = None,
    shard_size: Annotated[str, typer.Option(help="Bytes of an output file at most.")] = "5GB",
    max_memory: Annotated[str | None, typer.Option(help="Memory for the writing, mapped inputs not counted.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    allow_mismatch: Annotated[list[str] | None, typer.Option(help=f"May differ: {', '.join(FACTS)}.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="A folder that holds models already.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where models and digests are kept [MODELGLUE_CACHE].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the plan, as JSON.")] = False,
) -> None:
    """Mix models into one checkpoint, or stack them, by a spec; mergekit-moe's files work unchanged."""
    cache = cache or default_cache()
    limits = (
        command.size(shard_size, "--shard-size"),
        None if max_memory is None else command.size(max_memory, "--max-memory"),
    )
    if unknown := sorted(set(allow_mismatch or ()) - set(FACTS)):
        raise MixError(f"--allow-mismatch {unknown[0]}: what may differ is one of {', '.join(FACTS)}")
    spec, progress = load(file), command.bars(quiet=as_json)
    find = command.finder(spec.references(), spec.folder, cache, models_dir, progress)
    mixture = None if spec.stack else planned(spec, find, allow=allow_mismatch or ())
    weights = mixture.weights if mixture else stack.plan(spec, find, allow=allow_mismatch or ())
    if recipe:
        if mixture:
            raise MixError("--recipe prints what a stack is as a recipe, and this is a mixture: look at --plan")
        print(weights.recipe.text, end="")
        return
    if plan:
        print(json.dumps(_facts(weights, mixture), indent=2)) if as_json else command.print_plan(
            weights, [*_rows(mixture)]
        )
        return
    if out is None:
        raise MixError("give the folder to write: builder mix SPEC.yaml OUT, or --plan to look first")
    texts = _texts(data, limit, mixture)
    _say("note", weights.notes)
    with Journal(cache / "journal.sqlite") as journal:
        options: dict[str, Any] = {
            "threads": threads,
            "shard_bytes": limits[0],
            "max_memory": limits[1],
            "overwrite": overwrite,
            "journal": journal,
            "progress": progress,
        }
        if mixture:
            written = write(mixture, out, texts=texts, **options)
            result, warnings = written.result, written.warnings
        else:
            result, warnings = stream.write(weights, out, **options), ()
    _say("warning", warnings)
    if as_json:
        facts = {"out": str(out), **asdict(result), "notes": weights.notes, "warnings": warnings}
        print(json.dumps(facts, indent=2))
    else:
        print(
            f"{out} is written: {result.tensors} tensors, {result.read / 1e9:.2f} GB read, "
            f"{result.written / 1e9:.2f} GB written in {result.seconds:.1f} s by {result.threads} threads"
        )


def _texts(data: Path | None, limit: int, mixture: Plan | None) -> list[Text]:
    if data and (mixture is None or mixture.spec.source != "mlp"):
        raise MixError("--data trains MLP gates, and this has none: leave it out, or say mixture: M-M-S or another MLP")
    return train.read(data, limit) if data else []


def _say(kind: str, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        print(f"{kind}: {sentence}", file=sys.stderr)


def _facts(weights: Weights, mixture: Plan | None) -> dict[str, Any]:
    """A plan for programs."""
    facts = command.facts(weights)
    made = {**mixture.gates, **mixture.zeros} if mixture else {}
    facts["made"] = [
        {"tensor": name, "shape": tensor.shape, "dtype": NAMES[tensor.dtype]} for name, tensor in made.items()
    ]
    return facts


def _rows(mixture: Plan | None) -> Iterator[tuple[str, ...]]:
    """A plan's tensors that come of no model, as `builder merge` prints its own."""
    if mixture is None:
        return
    spec = mixture.spec
    said = {"prompts": "gate of the prompts", "random": f"random gate, seed {spec.seed}", "mlp": "trained gate"}
    made = [(mixture.gates, said[spec.source]), (mixture.zeros, "zeros: a shared expert that adds nothing")]
    for tensors, what in made:
        for name, tensor in tensors.items():
            yield name, "x".join(map(str, tensor.shape)), NAMES[tensor.dtype], what, ""
