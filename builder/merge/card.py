"""The model card of a merge: recipe, inputs with the sha256 of their weight files, versions, seed."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np

from builder import adapters
from builder.merge.plan import Plan

RECIPE = "recipe.yaml"


def weight_files(plan: Plan) -> list[Path]:
    """All weight files that are read, adapters' and statistics' too."""
    paths = [path for model in plan.models.values() for path in model.checkpoint.files]
    paths += [model.adapter.folder / adapters.FILES[0] for model in plan.models.values() if model.adapter]
    return [*dict.fromkeys([*paths, *(each.path for each in plan.statistics.values())])]


def write(plan: Plan, hashes: Mapping[Path, str], target: Path) -> None:
    """README.md and the recipe."""
    (target / RECIPE).write_text(plan.recipe.text, "utf-8")
    (target / "README.md").write_text(render(plan, hashes), "utf-8")


def render(plan: Plan, hashes: Mapping[Path, str]) -> str:
    """The card's Markdown; it names models as the recipe does, and no path or time of this machine."""
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- merge",
        "- modelglue",
        "---",
        "",
        f"# A {plan.recipe.merge_method} merge",
        "",
        f"{len(plan.outputs)} tensors, {plan.written / 1e9:.2f} GB, of {len(plan.models)} models, by Model-GLUE "
        f"{metadata.version('modelglue')}.",
        "",
        "## Recipe",
        "",
        "```yaml",
        plan.recipe.text.rstrip(),
        "```",
        "",
        f"Seed {plan.recipe.seed}; arithmetic in fp32, norms and dot products in fp64, rounded once.",
        "",
        "## Inputs",
        "",
        "| model | file | sha256 |",
        "| --- | --- | --- |",
        *(f"| {name} | {path.name} | `{hashes[path]}` |" for name, path in inputs(plan)),
        "",
    ]
    if plan.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in plan.notes), ""]
    lines += [f"Made with Python {platform.python_version()}, numpy {np.__version__}.", ""]
    return "\n".join(lines)


def inputs(plan: Plan) -> Iterator[tuple[str, Path]]:
    """Every model with each of its weight files; statistics too."""
    for model in plan.models.values():
        yield from ((model.name, path) for path in model.checkpoint.files)
        if model.adapter:
            yield model.name, model.adapter.folder / adapters.FILES[0]
    yield from ((written, each.path) for written, each in plan.statistics.items())
