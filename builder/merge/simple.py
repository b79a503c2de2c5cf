"""Plans that need no recipe file: members with their weights, and a base with its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from builder import architecture
from builder.checkpoints import Checkpoint
from builder.merge import recipe, stream
from builder.merge.models import Found
from builder.merge.plan import Plan, plan


def of_members(method: str, weights: Mapping[str, float], folders: Mapping[str, Path]) -> Plan:
    """The merge of members by name, config and tokenizer of the first. Raises MergeError as `plan` does.

    Where their vocabularies differ in size the first member's tokens are kept.
    """
    said: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name, "parameters": {"weight": float(weight)}} for name, weight in weights.items()],
    }
    if len({_rows(Checkpoint(folders[name])) for name in weights}) > 1:
        said["tokenizer"] = {"source": "base"}
    return _planned(said, {name: Found(folders[name]) for name in weights})


def apply(adapter: Path, base: Path, out: Path) -> None:
    """Write base + adapter as a plain model folder, rounded once. Raises SourceError for an adapter of another kind."""
    said = {"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}
    stream.write(_planned(said, {"base+adapter": Found(base, adapter)}), out)


def _planned(said: Mapping[str, Any], found: Mapping[str, Found]) -> Plan:
    text = yaml.safe_dump(dict(said), sort_keys=False)
    return plan(recipe.parse(text, "the merge", Path()), found.__getitem__)


def _rows(checkpoint: Checkpoint) -> int | None:
    shapes = [tensor.shape for name, tensor in checkpoint.tensors.items() if architecture.is_embedding(name)]
    return shapes[0][0] if shapes else None
