"""A base with its adapter: a merge that needs no recipe file."""

from __future__ import annotations

from pathlib import Path

import yaml

from builder.merge import recipe, stream
from builder.merge.models import Found
from builder.merge.plan import plan


def apply(adapter: Path, base: Path, out: Path) -> None:
    """Write base + adapter as a plain model folder, rounded once. Raises SourceError for an adapter of another kind."""
    said = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}
    text = yaml.safe_dump(said, sort_keys=False)
    stream.write(plan(recipe.parse(text, "the merge", Path()), lambda _: Found(base, adapter)), out)
