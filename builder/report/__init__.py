"""One self-contained HTML page on how a bundle or a search came about: no script, no font, no request to anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from builder.explore import estimate
from builder.record import Record, SearchRecord
from builder.report import charts, views
from builder.report.importance import ENOUGH, FORESTS
from builder.search.command import RECORD
from routers import bundle
from routers.bundle import Manifest
from routers.errors import BundleError

R = TypeVar("R", bound=SearchRecord)


def render(path: Path) -> str:
    """The page of the bundle, or of the search's folder, at `path`. Raises BundleError for what cannot be read."""
    if (path / bundle.MANIFEST).exists():
        manifest = bundle.read_manifest(path)
        built = _read(path / bundle.RECORD, Record, "build the bundle again")
        return _page(built, manifest=manifest, **_bundle(built, manifest))
    if (path / RECORD).exists():
        return _page(_read(path / RECORD, SearchRecord, "search again"), manifest=None)
    raise BundleError(f"no {bundle.MANIFEST} in {path}, nor {RECORD}: name a bundle, or the folder of a search")


def _read(file: Path, kind: type[R], advice: str) -> R:
    try:
        return kind.model_validate_json(file.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise BundleError(f"{file} cannot be read: {advice}") from exc


def _page(record: SearchRecord, **more: Any) -> str:
    clusters = [views.cluster(record, each) for each in record.clusters]
    return (
        _environment()
        .get_template("page.html")
        .render(
            record=record,
            families=[views.family(record, each) for each in record.families],
            clusters=clusters,
            rule=views.rule(record.search),
            failed=sum(each.failed for each in clusters),
            proven=sum(each.proven for each in clusters),
            model_bounds=_bounds([model.scores for model in record.models]),
            **more,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("builder.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shade": _shade, "number": charts.number}
    environment.globals |= {"charts": charts, "enough": ENOUGH, "forests": FORESTS}
    return environment


def _bundle(record: Record, manifest: Manifest) -> dict[str, Any]:
    """What only a bundle has."""
    return {
        "tasks": list(record.models[0].scores),
        "task_bounds": _bounds([candidate.scores for candidate in record.candidates]),
        "always": {
            expert: float(np.mean([item.scores[expert] for item in record.routing])) for expert in manifest.names
        },
        "picks": _picks(record, manifest.names),
        "gigabytes": {e.name: sum(f.bytes for f in e.files.values()) / 1e9 for e in manifest.experts},
    }


def _picks(record: Record, experts: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each task of the routing set: how often each expert was picked, and the mean scores."""
    rows = []
    for task in dict.fromkeys(item.task for item in record.routing):
        items = [item for item in record.routing if item.task == task]
        counts = Counter(item.picked for item in items)
        rows.append(
            {
                "task": task,
                "prompts": len(items),
                "counts": {expert: counts[expert] for expert in experts},
                "routed": estimate(np.array([item.scores[item.picked] for item in items]), record.seed),
                "experts": {
                    expert: estimate(np.array([item.scores[expert] for item in items]), record.seed)
                    for expert in experts
                },
            }
        )
    return rows


def _bounds(scores: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """The lowest and the highest score of each task."""
    found = {task: [each[task] for each in scores] for task in scores[0]}
    return {task: (min(values), max(values)) for task, values in found.items()}


def _shade(value: float, bounds: tuple[float, float]) -> int:
    """Where a value is between its bounds, in percent; what a cell's colour is mixed by."""
    low, high = bounds
    return 50 if high <= low else round(100 * (value - low) / (high - low))
