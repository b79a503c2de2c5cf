"""What commands print: tables, and the plan of a build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder.plan import Plan


def table(*columns: str) -> Any:
    """A table with these columns; what is too long is folded, not cut."""
    from rich.table import Column, Table

    return Table(*(Column(name, overflow="fold") for name in columns))


def print_table(shown: Any) -> None:
    """The table on stdout."""
    from rich.console import Console

    console = Console()
    # A file or a pipe has no width; rich takes 80 columns, in which numbers are folded.
    Console(width=None if console.is_terminal else max(console.width, 150)).print(shown)


def print_plan(plan: Plan) -> None:
    """The models, what they need, and the steps."""
    shown = table("model", "source", "family", "GB", "here")
    for model in plan.models:
        size = "unknown" if model.bytes is None else f"{model.bytes / 1e9:.2f}"
        shown.add_row(model.id, model.source, model.family, size, "yes" if model.here else "no")
    print_table(shown)
    families = "; ".join(f"{key}: {len(members)}" for key, members in plan.families.items())
    lines = [
        f"families: {families}",
        f"disk: {_gigabytes(plan.disk)} for models and bundle; memory: {_gigabytes(plan.memory)} at most",
        *(f"{i}. {step}" for i, step in enumerate(plan.steps, 1)),
    ]
    print("\n".join(lines))


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
