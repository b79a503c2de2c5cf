"""What a recipe calls a model: a path or a hub id, a revision, an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Reference:
    """A model and, maybe, an adapter on it; each a path or a hub id, the latter maybe at a revision."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def parse(cls, text: str, exists: Callable[[str], bool]) -> Self:
        """The parts of `MODEL[@REVISION][+ADAPTER[@REVISION]]`.

        Names hold + and @ too: the longest model that exists is the model, then the longest adapter that exists the
        adapter. Where none does, the first + and the first @ divide.
        """
        readings = [
            cls(*left, *right)
            for model, adapter in _divided(text, "+")
            for left in _divided(model, "@")
            for right in (_divided(adapter, "@") if adapter else [(None, None)])
        ]

        def known(one: Self) -> list[int]:
            return [len(part) if part and exists(part) else 0 for part in (one.model, one.adapter)]

        return max(readings, key=known)


def resolve(text: str, folder: Path) -> Reference:
    """A reference with every part that is on this disk as an absolute path, hub ids as written.

    A relative path counts from `folder` if it is there, else from the current directory.
    """

    def found(part: str) -> Path | None:
        return next((path.resolve() for path in (folder / part, Path(part)) if part and path.exists()), None)

    written = Reference.parse(text, lambda part: found(part) is not None)
    adapter = written.adapter and str(found(written.adapter) or written.adapter)
    return replace(written, model=str(found(written.model) or written.model), adapter=adapter)


def _divided(text: str, mark: str) -> list[tuple[str, str | None]]:
    """The ways to divide a text at one mark: at the first one first, and last not at all."""
    cuts = [i for i, letter in enumerate(text) if letter == mark and 0 < i < len(text) - 1]
    return [*((text[:cut], text[cut + 1 :]) for cut in cuts), (text, None)]
