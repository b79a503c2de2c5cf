"""A candidate: what may become an expert, one model as it is, or a merge or mixture of several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from builder import architecture
from builder.checkpoints import Checkpoint
from builder.merge import METHODS, recipe, stream
from builder.merge.models import Found, layer_of
from builder.merge.plan import Plan, plan
from builder.merge.vocabulary import Vocabulary
from builder.mix.members import planned, spec_of
from builder.mix.plan import Plan as MixturePlan
from builder.mix.write import write as write_mixture

Weights = Mapping[str, float]
Value = float | Sequence[float]
"""A number, or one for each layer group and a last one for what is outside of the layers."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model of the zoo, a merge, or a mixture.

    weights: how much of each member is in it, in order; the first gives the tokenizer and the chat template. With one
    member it is that model as it is. said: the recipe of a merge in mergekit's schema, by members' names; of a mixture
    `mixture` alone, the keys of a spec with every expert as `model` and `positive_prompts`; empty for one model.
    """

    weights: Weights
    said: Mapping[str, Any]

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(self.weights)

    @property
    def name(self) -> str:
        """The members' names, or the first one's and how many more there are."""
        return short(self.members)

    @property
    def method(self) -> str:
        """The merge method, or the mixture's short name; `copy` of one model."""
        if self.mixture:
            return str(self.mixture["mixture"])
        return str(self.said["merge_method"]) if self.said else "copy"

    @property
    def mixture(self) -> Mapping[str, Any] | None:
        """What a mixture is made of and how; None for a merge, and for one model."""
        return self.said.get("mixture")

    @property
    def references(self) -> tuple[str, ...]:
        """Every model that is read: the members, and the base of task vectors."""
        base = self.said.get("base_model")
        return tuple(dict.fromkeys([*self.members, *([base] if base else [])]))

    @property
    def key(self) -> str:
        """Equal for equal candidates alone."""
        return json.dumps([list(self.weights.items()), self.said])

    def plan(
        self,
        folders: Mapping[str, Path],
        vocabulary: Vocabulary | None = None,
        opened: Mapping[str, Checkpoint] | None = None,
    ) -> Plan:
        """What merging it does. Raises MergeError.

        vocabulary: that of an earlier plan with the same tokens. opened: models whose headers are read already.
        """
        text = yaml.safe_dump(dict(self.said), sort_keys=False)
        said = recipe.parse(text, f"the merge of {', '.join(self.members)}", Path())
        known = opened or {}
        return plan(said, lambda name: Found(folders[name], opened=known.get(name)), vocabulary=vocabulary)

    def mix(self, folders: Mapping[str, Path]) -> MixturePlan:
        """What a mixture will be, from headers alone. Raises ModelGlueError for what does not mix."""
        assert self.mixture is not None
        choices = {key: value for key, value in self.mixture.items() if key != "experts"}
        prompts = {each["model"]: each["positive_prompts"] for each in self.mixture["experts"]}
        return planned(spec_of(prompts, **choices), folders)

    def write(self, folders: Mapping[str, Path], out: Path) -> tuple[str, ...]:
        """Write what is made of several models as the model folder `out`; what is to be said of it."""
        if self.mixture:
            return write_mixture(self.mix(folders), out).warnings
        stream.write(self.plan(folders), out)
        return ()


def short(names: Sequence[str]) -> str:
    """One name for several models: all of theirs, or the first one's and how many more there are."""
    return "-".join(names) if len(names) <= 4 else f"{names[0]}-and-{len(names) - 1}-more"


def whole(name: str) -> Candidate:
    """A model as it is."""
    return Candidate({name: 1.0}, {})


@dataclass(frozen=True)
class Kin:
    """Models that may be merged with one another, and what their recipes need to know; from headers alone.

    names: the members. base: what they are fine-tunes of, None where the zoo names none. stack, layers: the name of
    the decoder's layers and how many there are. mixed: whether their vocabularies differ in size.
    """

    names: tuple[str, ...]
    base: str | None
    stack: str
    layers: int
    mixed: bool

    @classmethod
    def of(cls, checkpoints: Mapping[str, Checkpoint], base: str | None, base_checkpoint: Checkpoint | None) -> Kin:
        """From the models' headers."""
        first = next(iter(checkpoints.values()))
        depths: dict[str, int] = {}
        for name in first.tensors:
            if layer := layer_of(name):
                depths[layer[0]] = max(depths.get(layer[0], 0), layer[1] + 1)
        stack = max(depths, key=lambda each: depths[each]) if depths else ""
        every = [*checkpoints.values(), *([base_checkpoint] if base_checkpoint else [])]
        return cls(tuple(checkpoints), base, stack, depths.get(stack, 0), len({_rows(each) for each in every}) > 1)

    def linear(self, weights: Weights) -> Candidate:
        """The weighted mean of members; of one alone that model. Weights sum to one."""
        if len(weights) == 1:
            return whole(next(iter(weights)))
        return self.merge("linear", weights, {"weight": dict(weights)}, {})

    def merge(
        self,
        method: str,
        weights: Weights,
        per_model: Mapping[str, Mapping[str, Value]],
        shared: Mapping[str, Value],
        seed: int = 0,
    ) -> Candidate:
        """A merge of the members that `weights` names, with parameters by name: of each member, and of the merge."""
        first = next(iter(weights))
        said: dict[str, Any] = {"merge_method": method}
        if METHODS[method].base == "required":
            said["base_model"] = first if METHODS[method].most == 1 else self.base
        said["models"] = [
            self._model(name, {key: values[name] for key, values in per_model.items()})
            for name in weights
            if name != said.get("base_model")
        ]
        if shared:
            said["parameters"] = {key: self._by_layer(value) for key, value in shared.items()}
        if self.mixed or said.get("base_model", first) != first:
            said["tokenizer"] = {"source": first}
        if METHODS[method].random:
            said["seed"] = seed
        return Candidate(dict(weights), said)

    def _model(self, name: str, parameters: Mapping[str, Value]) -> dict[str, Any]:
        said = {key: self._by_layer(value) for key, value in parameters.items()}
        return {"model": name, "parameters": said} if said else {"model": name}

    def group_of(self, layer: int, groups: int) -> int:
        """The group of a layer: adjacent layers together, sizes that differ by one at most."""
        return layer * groups // self.layers

    def _by_layer(self, value: Value) -> Any:
        """A recipe's value: the number, or a list of conditions with the last as the default."""
        if isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            return float(value)
        *inside, outside = map(float, value)
        if not inside:
            return outside
        layers = [
            {"filter": f"{self.stack}.{layer}.", "value": inside[self.group_of(layer, len(inside))]}
            for layer in range(self.layers)
        ]
        return [*layers, {"value": outside}]


def _rows(checkpoint: Checkpoint) -> int | None:
    shapes = [tensor.shape for name, tensor in checkpoint.tensors.items() if architecture.is_embedding(name)]
    return shapes[0][0] if shapes else None
