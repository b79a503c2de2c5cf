"""What a recipe says of a method's parameters: values, gradients over the layers, filters by tensor name, levels."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.errors import MergeError
from builder.merge.method import REQUIRED, Parameter, Scalar
from builder.merge.methods import METHODS

IDLE = {"int8_mask": "masks are not kept in memory"}
"""Settings of mergekit's that nothing here needs, and why; like a setting of another method they have no effect."""
Place = tuple[str | int, ...]
"""Where in the file: keys and positions, outermost first."""
Mistake = tuple[Place, str]


@dataclass(frozen=True, slots=True)
class Conditional:
    """A gradient over the layers, one value or more, for the tensors whose name contains `filter`, or for all."""

    values: tuple[Scalar, ...]
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        """Whether it speaks of that tensor."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


Setting = tuple[Conditional, ...]
"""What one level says of one parameter: the first conditional that matches decides."""


def value(
    parameter: Parameter, name: str, settings: Iterable[Mapping[str, Setting]], tensor: str, t: float, model: str = ""
) -> Any:
    """What `settings`, highest level first, say of a parameter for one tensor; else its default.

    t: how deep the tensor lies, from 0 in the first layer to 1 in the last. Numbers are interpolated linearly along a
    gradient; of flags, choices and paths the last one begun is taken. Raises MergeError where nothing is said and
    something must be, naming the model too if one is given.
    """
    here = f"{tensor} of {model}" if model else tensor
    for conditional in (conditional for level in settings for conditional in level.get(name, ())):
        if conditional.matches(tensor):
            try:
                return _at(t, conditional.values, parameter)
            except ValueError as exc:
                raise MergeError(f"{name} for {here}: {exc}") from exc
    if parameter.default is REQUIRED:
        raise MergeError(f"no {name} for {here}: give one without a filter")
    return parameter.default


def _at(t: float, values: Sequence[Any], parameter: Parameter) -> Any:
    begun = int(t * (len(values) - 1))
    if parameter.kind not in ("number", "integer"):
        return values[begun]
    part = t * (len(values) - 1) - begun
    return parameter.validate((1 - part) * values[begun] + part * values[min(begun + 1, len(values) - 1)])


class Mistakes(ValueError):
    """Mistakes inside one value, each with its place there."""

    def __init__(self, found: Iterable[Mistake]) -> None:
        super().__init__("mistakes inside")
        self.found = tuple(found)


def read_settings(raw: Any, method: str, notes: list[str]) -> dict[str, Setting]:
    """The settings of the method's own parameters; others are noted, or refused where no method knows them.

    Raises ValueError, and Mistakes where several are wrong.
    """
    if not isinstance(raw, dict):
        raise ValueError("give a mapping of parameters to their values")
    if method not in METHODS:
        return {}
    own, settings, mistakes = METHODS[method].parameters, dict[str, Setting](), list[Mistake]()
    for name, said in raw.items():
        if name in own:
            settings[name] = _setting(said, own[name], (name,), mistakes)
        elif name in IDLE:
            notes.append(f"{name} has no effect here: {IDLE[name]}")
        elif any(name in each.parameters for each in METHODS.values()):
            notes.append(f"{name} has no effect on {method}")
        else:
            mistakes.append(((str(name),), f"{method} has no such parameter{nearest(str(name), own)}"))
    if mistakes:
        raise Mistakes(mistakes)
    return settings


def _setting(raw: Any, parameter: Parameter, place: Place, mistakes: list[Mistake]) -> Setting:
    if isinstance(raw, dict):
        return (_conditional(raw, parameter, place, mistakes),)
    if isinstance(raw, list) and any(isinstance(one, dict) for one in raw):
        return tuple(_conditional(one, parameter, (*place, i), mistakes) for i, one in enumerate(raw))
    return (Conditional(_values(raw, parameter, place, mistakes)),)


def _conditional(raw: Any, parameter: Parameter, place: Place, mistakes: list[Mistake]) -> Conditional:
    if not isinstance(raw, dict):
        mistakes.append((place, f"beside a value with a filter, write `value: {raw}`"))
        return Conditional(())
    known, part = ["filter", "value"], raw.get("filter")
    mistakes += [((*place, str(key)), unknown(str(key), known)) for key in raw if key not in known]
    if not isinstance(part, str | None):
        mistakes.append(((*place, "filter"), f"{part!r} is no part of a tensor's name"))
    if "value" not in raw:
        mistakes.append((place, "value is missing"))
        return Conditional(())
    return Conditional(_values(raw["value"], parameter, (*place, "value"), mistakes), part)


def _values(raw: Any, parameter: Parameter, place: Place, mistakes: list[Mistake]) -> tuple[Scalar, ...]:
    if raw == []:
        mistakes.append((place, "an empty gradient says nothing: give it a value"))
    values = []
    for i, one in enumerate(raw if isinstance(raw, list) else [raw]):
        try:
            # mergekit's own search writes `normalize: 1.0`.
            switch = parameter.kind == "flag" and isinstance(one, int | float) and one in (0, 1)
            values.append(parameter.validate(bool(one) if switch else one))
        except ValueError as exc:
            mistakes.append(((*place, i) if isinstance(raw, list) else place, str(exc)))
    return tuple(values)


def unknown(key: str, known: Sequence[str]) -> str:
    """The sentence on a key that is not known here."""
    if "parameters" in known and any(
        key in settings for settings in (IDLE, *(one.parameters for one in METHODS.values()))
    ):
        return "unknown key (it belongs under parameters)"
    return f"unknown key{nearest(key, known)}; known here: {', '.join(known)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A question after the nearest known word, if one is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
