"""Writes the experts of a bundle: whole models, copied or merged, each once."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from builder import files
from builder.architecture import context_window
from builder.candidate import Candidate
from builder.checkpoints import Checkpoint, read_config, weight_files
from builder.config import Base, Model
from builder.members import Members
from builder.merge import folder as model_folder
from builder.merge import stream
from builder.sources import is_local
from routers import bundle
from routers.bundle import Expert, Source


def write(folder: Path, candidate: Candidate, members: Members) -> None:
    """Write a candidate as the model folder `folder`; nothing to do when a killed build finished it."""
    made_of = json.dumps([candidate.key, [members[name].sha256 for name in candidate.references]])
    note = folder.with_name(f"{folder.name}.made-of")
    if folder.exists() and note.exists() and note.read_text("utf-8") == made_of:
        return
    files.remove(folder)
    if candidate.said:
        stream.write(candidate.plan({name: members[name].folder for name in candidate.references}), folder)
    else:
        _copy(members[candidate.members[0]].folder, folder)
    note.write_text(made_of, "utf-8")


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
        context_window=context_window(read_config(folder)),
        parameters=sum(math.prod(tensor.shape) for tensor in Checkpoint(folder).tensors.values()),
        files={path.name: bundle.digest(path) for path in sorted(folder.iterdir())},
    )


def _copy(source: Path, folder: Path) -> None:
    """Weights, config, tokenizer, and a custom model's own code; nothing else that lies in the folder."""
    with files.whole(folder) as partial:
        indices = [path for path in source.glob("*.index.json") if path.name.startswith(("model", "pytorch_model"))]
        for path in [*weight_files(source), *indices, *model_folder.companions(source)]:
            files.copy(path, partial / path.name)


def public_source(entry: Base) -> str:
    """A model's source without the paths of this machine."""
    if isinstance(entry, Model) and entry.adapter:
        return f"{entry.base} + {entry.adapter if entry.adapter.startswith('demo:') else Path(entry.adapter).name}"
    if entry.source.startswith("gguf:"):
        return f"gguf:{Path(entry.source).name}"
    return Path(entry.source).name if is_local(entry) else entry.source
