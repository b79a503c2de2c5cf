"""What a merge method is: a pure function of one tensor's values, and what a recipe may say to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Scalar = bool | int | float | str
Kind = Literal["number", "integer", "flag", "choice", "path"]

REQUIRED = object()
"""The default of a parameter that a recipe must give."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One setting of a method.

    per_model: every input has a value of its own; else the merged tensor has one.
    low, high: bounds of a number, both included; `above` and `below` leave them out.
    """

    kind: Kind = "number"
    default: Any = REQUIRED
    per_model: bool = False
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    choices: tuple[Scalar, ...] = ()

    def validate(self, value: object) -> Any:
        """The value in the parameter's type. Raises ValueError with what is allowed."""
        if self.kind == "choice":
            if any(value is choice or (type(value) is type(choice) and value == choice) for choice in self.choices):
                return value
            raise ValueError(f"{value!r} is none of {', '.join(_written(choice) for choice in self.choices)}")
        if self.kind == "flag":
            if isinstance(value, bool):
                return value
            raise ValueError(f"{value!r} is neither true nor false")
        if self.kind == "path":
            if isinstance(value, str) and value:
                return value
            raise ValueError(f"{value!r} is no path")
        return self._number(value)

    def _number(self, value: object) -> float:
        try:
            # YAML 1.1 reads 1e-5 as a string.
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is no number")
        if not (self.low <= number <= self.high and self.above < number < self.below):
            raise ValueError(f"{value!r} is out of range: {self._range()}")
        if self.kind == "integer":
            if number != int(number):
                raise ValueError(f"{value!r} is no whole number")
            return int(number)
        return number

    def _range(self) -> str:
        low = f"at least {self.low:g}" if self.low > -math.inf else f"above {self.above:g}"
        high = f"at most {self.high:g}" if self.high < math.inf else f"below {self.below:g}"
        bounds = [low] if max(self.low, self.above) > -math.inf else []
        return " and ".join(bounds + ([high] if min(self.high, self.below) < math.inf else []))


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method and its contract.

    merge: called as `merge(inputs, **parameters)`, yields the merged tensor's pieces in the order of
        `inputs.pieces()`; a per-model parameter arrives as a list aligned with the inputs beside the base.
    base: whether one input is the base that the others are fine-tunes of. With "none" a `base_model` gives config and
        tokenizer only, and is merged only where the recipe lists it among the models.
    least, most: how many inputs there must be beside the base.
    check: a sentence on what is wrong with one tensor's parameters, or None; asked before any weight is read.
    random: whether it draws random numbers, and a recipe's seed matters.
    survey: a pass over all tensors before the first is merged; what it returns for a tensor is passed to `merge` too.
    """

    merge: Callable[..., Iterator[Any]]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["required", "optional", "none"] = "none"
    least: int = 1
    most: int | None = None
    check: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    random: bool = False
    survey: Callable[..., Sequence[Mapping[str, Any]]] | None = None


def _written(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
