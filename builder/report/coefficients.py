"""The numbers in a recipe, by parameter, member and layer group: what evolution chose, read back from what it said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.merge import METHODS
from builder.search.evolution import Axis

OUTSIDE = "outside"
"""The column of what is in no layer: embeddings, the last norm, the head."""


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of a member, or of the whole merge: values by layer group and a last one for what is outside of
    the layers; or one value for everything.
    """

    parameter: str
    member: str | None
    values: tuple[float, ...]

    @property
    def label(self) -> str:
        """What it is, in words."""
        return self.parameter if self.member is None else f"{self.parameter} of {self.member}"


def rows(said: Mapping[str, Any], groups: int) -> list[Row]:
    """Every number of a recipe that a search with so many layer groups wrote; flags are left out."""
    owned = [(model["model"], model.get("parameters", {})) for model in said.get("models", ())]
    return [
        Row(key, owner, _values(value, groups))
        for owner, parameters in [*owned, (None, said.get("parameters", {}))]
        for key, value in parameters.items()
        if not isinstance(value, bool)
    ]


def numbers(said: Mapping[str, Any], groups: int) -> dict[str, float]:
    """The same by the names that evolution gives them."""
    return {
        Axis(row.parameter, row.member, group, 0, 1).name: value
        for row in rows(said, groups)
        for group, value in enumerate(row.values)
    }


def labels(said: Mapping[str, Any], groups: int) -> dict[str, str]:
    """What each of them is, in words, by the same names."""
    spans = columns(said, groups)
    return {
        Axis(row.parameter, row.member, group, 0, 1).name: f"{row.label}, {spans[group]}"
        if len(row.values) > 1
        else row.label
        for row in rows(said, groups)
        for group in range(len(row.values))
    }


def columns(said: Mapping[str, Any], groups: int) -> list[str]:
    """The layer groups of a recipe in words; none where every number is for all layers."""
    lists = [value for value in _all_values(said) if isinstance(value, list)]
    if not lists:
        return []
    layers = len(lists[0]) - 1
    found = []
    for group in range(groups):
        within = [layer for layer in range(layers) if layer * groups // layers == group]
        found.append(f"layers {within[0]}–{within[-1]}" if len(within) > 1 else f"layer {within[0]}")
    return [*found, OUTSIDE]


def shares(said: Mapping[str, Any], given: Sequence[Row]) -> list[Row]:
    """Rows of `weight` with each column divided by its sum where the merge does that; else as they are."""
    normalize = METHODS[said["merge_method"]].parameters.get("normalize")
    divides = normalize is not None and said.get("parameters", {}).get("normalize", normalize.default)
    sums = [sum(column) for column in zip(*(row.values for row in given), strict=True)]
    if not divides or not all(sums):
        return list(given)
    return [
        Row(row.parameter, row.member, tuple(v / s for v, s in zip(row.values, sums, strict=True))) for row in given
    ]


def _all_values(said: Mapping[str, Any]) -> list[Any]:
    owned = [model.get("parameters", {}) for model in said.get("models", ())]
    return [value for parameters in [*owned, said.get("parameters", {})] for value in parameters.values()]


def _values(value: Any, groups: int) -> tuple[float, ...]:
    """The value of each group is that of its first layer; the last entry, without a filter, is outside."""
    if not isinstance(value, list):
        return (float(value),)
    *layers, outside = [float(entry["value"]) for entry in value]
    firsts = [next(i for i in range(len(layers)) if i * groups // len(layers) == group) for group in range(groups)]
    return (*(layers[first] for first in firsts), outside)
