"""Writes the experts of a bundle: whole models, copied, merged or mixed, each once."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from builder import files
from builder.architecture import context_window
from builder.candidate import Candidate
from builder.checkpoints import Checkpoint, read_config, weight_files
from builder.config import Base, Model
from builder.members import Members
from builder.merge import folder as model_folder
from builder.sources import is_local
from routers import bundle
from routers.bundle import Expert, Source

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""In a mixture's names of tensors."""


def write(folder: Path, candidate: Candidate, members: Members) -> tuple[str, ...]:
    """Write a candidate as the model folder `folder`; what is to be said of it.

    Nothing to do when a killed build finished it.
    """
    made_of = json.dumps([candidate.key, [members[name].sha256 for name in candidate.references]])
    note = folder.with_name(f"{folder.name}.made-of")
    if folder.exists() and note.exists() and note.read_text("utf-8") == made_of:
        return ()
    files.remove(folder)
    said: tuple[str, ...] = ()
    if candidate.said:
        said = candidate.write(_folders(candidate, members), folder)
    else:
        _copy(members[candidate.members[0]].folder, folder)
    note.write_text(made_of, "utf-8")
    return said


def size(candidate: Candidate, members: Members) -> int:
    """Bytes that writing it takes."""
    if candidate.mixture:
        return candidate.mix(_folders(candidate, members)).weights.written
    return members[candidate.members[0]].checkpoint.bytes


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Remove what a killed build with other choices left beside the experts."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in names:
            files.remove(path)
        elif path.is_file():
            path.unlink()


def entry(
    folder: Path,
    candidate: Candidate,
    members: Members,
    subjects: tuple[str, ...],
    scores: Mapping[str, float],
) -> Expert:
    """What the manifest says of a written expert."""
    sources = tuple(
        Source(
            model=name,
            source=public_source(members[name].entry),
            revision=members[name].revision,
            weights=members[name].weights,
            coefficient=weight,
        )
        for name, weight in candidate.weights.items()
    )
    return Expert(
        name=folder.name,
        method=candidate.method,
        sources=sources,
        subjects=subjects,
        scores=dict(scores),
        context_window=context_window(_own(read_config(folder))),
        parameters=_active(Checkpoint(folder)),
        files={path.name: bundle.digest(path) for path in sorted(folder.iterdir())},
    )


def _active(checkpoint: Checkpoint) -> int:
    """How many parameters a token runs through: of a mixture's experts those of as many as answer."""
    shared, own = 0, Counter[str]()
    for name, tensor in checkpoint.tensors.items():
        if found := _EXPERT.search(name):
            own[found[1]] += math.prod(tensor.shape)
        else:
            shared += math.prod(tensor.shape)
    answering = checkpoint.config.get("experts_per_token", checkpoint.config.get("num_experts_per_tok"))
    # All experts of a mixture are of one size.
    return shared + sum(size for _, size in own.most_common(answering))


def _folders(candidate: Candidate, members: Members) -> dict[str, Path]:
    return {name: members[name].folder for name in candidate.references}


def _copy(source: Path, folder: Path) -> None:
    """Weights, config, tokenizer, and a custom model's own code; nothing else that lies in the folder."""
    with files.whole(folder) as partial:
        indices = [path for path in source.glob("*.index.json") if path.name.startswith(("model", "pytorch_model"))]
        for path in [*weight_files(source), *indices, *model_folder.companions(source)]:
            files.copy(path, partial / path.name)


def _own(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's config; of a composed one that of its experts."""
    inner: Mapping[str, Any] = config.get("inner", config)
    return inner


def public_source(entry: Base) -> str:
    """A model's source without the paths of this machine."""
    if isinstance(entry, Model) and entry.adapter:
        return f"{entry.base} + {entry.adapter if entry.adapter.startswith('demo:') else Path(entry.adapter).name}"
    if entry.source.startswith("gguf:"):
        return f"gguf:{Path(entry.source).name}"
    return Path(entry.source).name if is_local(entry) else entry.source
