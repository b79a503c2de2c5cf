"""Which models could be merged, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence

from builder.architecture import family_key, part
from builder.config import Zoo
from builder.journal import Journal
from builder.members import Member, Members
from builder.progress import Progress
from builder.record import FamilyRecord
from builder.similarity import similarity


def families(zoo: Zoo, members: Members, journal: Journal, progress: Progress) -> list[FamilyRecord]:
    """The zoo's models by architecture, in its order, with their similarities."""
    groups: dict[str, list[str]] = {}
    for model in zoo.models:
        groups.setdefault(family_key(members[model.id].checkpoint), []).append(model.id)
    return [
        FamilyRecord(
            key=key,
            models=tuple(names),
            similarity=_similarity([members[name] for name in names], journal, progress),
        )
        for key, names in groups.items()
    ]


def _similarity(
    kin: Sequence[Member], journal: Journal, progress: Progress
) -> dict[str, tuple[tuple[float, ...], ...]]:
    def measure() -> dict[str, list[list[float]]]:
        matrices = [t for name, t in kin[0].checkpoint.tensors.items() if part(name, t.shape)]
        total = sum(tensor.bytes for tensor in matrices) * len(kin)
        with progress.step(f"similarity of {len(kin)} models", total) as advance:
            found = similarity([member.checkpoint for member in kin], advance)
        return {kind: matrix.tolist() for kind, matrix in found.items()}

    found = journal.once("similarity", {"models": [member.sha256 for member in kin]}, measure)
    return {kind: tuple(tuple(row) for row in matrix) for kind, matrix in found.items()}
