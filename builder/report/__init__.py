"""One self-contained HTML page on how a bundle came about: no script, no font, no request to anywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from builder.record import Record
from routers import bundle
from routers.errors import BundleError


def render(path: Path) -> str:
    """The page of the bundle at `path`. Raises BundleError for a bundle or a record that cannot be read."""
    manifest = bundle.read_manifest(path)
    try:
        record = Record.model_validate_json((path / bundle.RECORD).read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path / bundle.RECORD} cannot be read: build the bundle again") from exc
    environment = Environment(
        loader=PackageLoader("builder.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["shade"] = _shade
    tasks = list(record.models[0].scores)
    return environment.get_template("page.html").render(
        manifest=manifest,
        record=record,
        tasks=tasks,
        family_bounds=[_bounds(family.similarity["all"]) for family in record.families],
        task_bounds={task: _bounds([[c.scores[task] for c in record.candidates]]) for task in tasks},
        picks=_picks(record, manifest.names),
        gigabytes={e.name: sum(f.bytes for f in e.files.values()) / 1e9 for e in manifest.experts},
    )


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
                "routed": sum(item.scores[item.picked] for item in items) / len(items),
                "experts": {e: sum(item.scores[e] for item in items) / len(items) for e in experts},
            }
        )
    return rows


def _bounds(rows: Any) -> tuple[float, float]:
    values = [value for row in rows for value in row]
    return min(values), max(values)


def _shade(value: float, bounds: tuple[float, float]) -> int:
    """Where a value is between its bounds, in percent; what a cell's colour is mixed by."""
    low, high = bounds
    return 50 if high <= low else round(100 * (value - low) / (high - low))
