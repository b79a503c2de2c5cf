"""Which models could be merged, and how alike they are."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Literal

from builder.architecture import family_key, matrices
from builder.config import Zoo
from builder.errors import ZooError
from builder.journal import Journal
from builder.members import Member, Members
from builder.progress import Progress
from builder.record import FamilyRecord
from builder.similarity import Likeness, Matrix, Similarity, all_pairs, compare, table

On = Literal["weights", "deltas"]
PAIR = "pair"
"""What the journal calls a pair's likeness."""


def families(
    zoo: Zoo, members: Members, journal: Journal, progress: Progress, on: On = "weights"
) -> list[FamilyRecord]:
    """The zoo's models by architecture, in its order, with their similarities by weights; or by deltas, where models of
    one architecture and another base are another family.

    Raises ZooError for a model that names no base, or one of other shapes.
    """
    groups: dict[str, list[str]] = {}
    for model in zoo.models:
        key = family_key(members[model.id].checkpoint)
        # Deltas are alike or not from one base alone.
        groups.setdefault(f"{key}, deltas from {model.base}" if on == "deltas" else key, []).append(model.id)
    bases = {key: _base(names, zoo, members) if on == "deltas" else None for key, names in groups.items()}
    found = {
        key: measure([members[name] for name in names], bases[key], journal, progress) for key, names in groups.items()
    }
    return [
        FamilyRecord(
            key=key,
            models=tuple(names),
            similarity={part: _rows(matrix) for part, matrix in found[key].parts.items()},
            dots=_rows(found[key].dots),
        )
        for key, names in groups.items()
    ]


def bases(zoo: Zoo) -> list[str]:
    """The bases that deltas are from. Raises ZooError for models that name none."""
    for model in zoo.models:
        if model.base is None:
            raise _no_base(model.id)
    return list(dict.fromkeys(model.base for model in zoo.models if model.base))


def measure(kin: Sequence[Member], base: Member | None, journal: Journal, progress: Progress) -> Similarity:
    """The similarity of models of one family; only pairs that the journal does not know are computed."""
    keys = {(i, j): _key(kin[i], kin[j], base) for i, j in all_pairs(len(kin))}
    # By key, not by pair: models of the same weights are one.
    known = {key: journal.known(PAIR, json.loads(key)) for key in keys.values()}
    wanted = {key: pair for pair, key in keys.items() if known[key] is None}
    if wanted:
        checkpoints, started = [member.checkpoint for member in kin], time.monotonic()
        read = [kin[i] for i in {i for pair in wanted.values() for i in pair}] + ([base] if base else [])
        with progress.step(f"similarity of {len(kin)} models", sum(_bytes(member) for member in read)) as advance:
            found = compare(checkpoints, list(wanted.values()), base.checkpoint if base else None, advance)
        for key, likeness in zip(wanted, found, strict=True):
            known[key] = {"cosines": dict(likeness.cosines), "dot": likeness.dot}
            journal.keep(PAIR, json.loads(key), known[key], (time.monotonic() - started) / len(found))
    return table(len(kin), {pair: _likeness(known[key]) for pair, key in keys.items()})


def _key(a: Member, b: Member, base: Member | None) -> str:
    """What a pair's result is known by, as JSON."""
    return json.dumps({"models": sorted([a.weights, b.weights]), "base": base.weights if base else None})


def _likeness(found: Any) -> Likeness:
    cosines = {kind: (float(total), int(count)) for kind, (total, count) in found["cosines"].items()}
    return Likeness(cosines, found["dot"])


def _bytes(member: Member) -> int:
    return sum(member.checkpoint.tensors[name].bytes for name in matrices(member.checkpoint))


def _base(names: Sequence[str], zoo: Zoo, members: Members) -> Member:
    """The base that models of one architecture name. Raises ZooError."""
    first = names[0]
    base = next(model.base for model in zoo.models if model.id == first)
    if base is None:
        raise _no_base(first)
    own, theirs = members[first].checkpoint, members[base].checkpoint
    for name in matrices(own):
        if name not in theirs.tensors or theirs.tensors[name].shape != own.tensors[name].shape:
            raise ZooError(
                f"{first} is of another architecture than its base {base} ({name}), so no deltas are to be had: name "
                "the model that it was tuned from, or use --on weights"
            )
    return members[base]


def _no_base(name: str) -> ZooError:
    return ZooError(f"deltas are from a base, and {name} names none: add `base`, or use --on weights")


def _rows(matrix: Matrix) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
