"""The zoo's models as a build handles them: open, and known by digests of what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from builder.checkpoints import Checkpoint
from builder.config import Base, Zoo
from builder.journal import Journal, digest
from builder.merge.folder import companions
from builder.sources import Fetched
from routers import bundle


@dataclass(frozen=True)
class Member:
    """A model of the zoo: what the zoo says of it, where it is, its headers.

    weights: digest of the weight files; sha256: of all that decides what the model says, tokenizer and template too.
    """

    entry: Base
    folder: Path
    revision: str | None
    checkpoint: Checkpoint
    weights: str
    sha256: str


Members = Mapping[str, Member]


def open_all(zoo: Zoo, fetched: Mapping[str, Fetched], journal: Journal) -> dict[str, Member]:
    """Every fetched model, opened; a file is hashed again only when its size or time changed."""
    return {name: _open(zoo.entry(name), model, journal) for name, model in fetched.items()}


def _open(entry: Base, model: Fetched, journal: Journal) -> Member:
    checkpoint = Checkpoint(model.folder)
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    weights: str = journal.once("weights", {"files": files}, lambda: checkpoint.sha256)
    beside = [f"{path.name} {bundle.digest(path).sha256}" for path in companions(model.folder)]
    return Member(entry, model.folder, model.revision, checkpoint, weights, digest(weights, *beside))
