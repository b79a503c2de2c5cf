"""What a mixture will be, as data: every tensor, from what; from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import yaml

from builder import architecture
from builder.checkpoints import Tensor
from builder.errors import MixError
from builder.merge import models as opening
from builder.merge import plan as merging
from builder.merge import recipe
from builder.merge.models import Find, Found, Model
from builder.merge.plan import COPY, DTYPES, Origin, Output
from builder.mix.layouts import STACK, Layout, Look, layout_of
from builder.mix.spec import Expert, Spec


@dataclass(frozen=True)
class Plan:
    """A mixture that can be printed, tested and written.

    shared: the dense model that gives what the experts share, every tensor of it; the gates are made from its hidden
    states. weights: what is written of the models' tensors, with the mixture's config.
    """

    spec: Spec
    shared: merging.Plan
    weights: merging.Plan
    layout: Layout

    @cached_property
    def looks(self) -> dict[str, Look]:
        """The places that have a gate, with what it looks at."""
        return self.layout.gates()

    @cached_property
    def hidden(self) -> int:
        """The width of what a gate looks at."""
        return int(self.shared.config["hidden_size"])

    @cached_property
    def dtype(self) -> str:
        """The code of the dtype that most of the shared model has."""
        return Counter(output.tensor.dtype for output in self.shared.outputs).most_common(1)[0][0]

    @cached_property
    def gates(self) -> dict[str, Tensor]:
        """The gates' tensors."""
        parts = self.layout.gate(len(self.spec.experts), self.hidden, self.dtype)
        return {f"{place}{part}": tensor for place in self.looks for part, tensor in parts.items()}

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Tensors that the layout insists on and that say nothing."""
        return self.layout.zeros(self.hidden, self.dtype)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the reader."""
        return self.weights.notes


def plan(spec: Spec, find: Find, *, allow: Collection[str] = ()) -> Plan:
    """The plan of a spec; reads configs, headers and tokenizers. Raises ModelGlueError for what cannot be mixed.

    allow: facts that may differ between the models, of `merge.models.FACTS`.
    """
    found = {name: find(name) for name in spec.references()}
    models = opening.open_models(spec.references(), lambda name: found[name])
    notes = [*spec.notes(), *opening.check_alike(_merged(spec, models), allow)]

    def opened(name: str) -> Found:
        return replace(found[name], opened=models[name].checkpoint)

    shared = merging.plan(_shared(spec), opened, allow=allow)
    _check(spec, shared, models)
    names = [output.name for output in shared.outputs]
    layout = layout_of(spec, shared.config, names)
    weights = replace(
        shared,
        models=models,
        outputs=tuple(_outputs(spec, shared, models, layout)),
        config=layout.config(shared.config, spec.names),
        notes=tuple(dict.fromkeys([*notes, *shared.notes, *_remarks(spec, layout)])),
    )
    return Plan(spec, shared, weights, layout)


def _merged(spec: Spec, models: Mapping[str, Model]) -> dict[str, Model]:
    """The models whose weights are in the mixture; a tokenizer's may be of another kind."""
    members = [each.source_model for each in (*spec.experts, *spec.shared_experts)]
    return {name: models[name] for name in dict.fromkeys([*([spec.base_model] if spec.base_model else []), *members])}


def _shared(spec: Spec) -> recipe.Recipe:
    """The recipe of the dense model: the base as it is, or the experts' uniform mean."""
    said: dict[str, Any]
    if spec.base_model:
        said = {"merge_method": "passthrough", "models": [{"model": spec.base_model}]}
    else:
        counts = Counter(each.source_model for each in spec.experts)
        listed = [{"model": name, "parameters": {"weight": count}} for name, count in counts.items()]
        said = {"merge_method": "linear", "models": listed}
    for key in ("dtype", "chat_template"):
        if value := getattr(spec, key):
            said[key] = value
    if spec.tokenizer:
        said["tokenizer"] = spec.tokenizer.model_dump(exclude_none=True)
    return recipe.parse(yaml.safe_dump(said, sort_keys=False), "the shared parameters", spec.folder)


def _check(spec: Spec, shared: merging.Plan, models: Mapping[str, Model]) -> None:
    """Raises MixError for models that are no plain decoders, or whose tensors do not fit on one another."""
    if architecture.has_own_code(shared.config):
        raise MixError(f"{shared.donor.name} runs by its own code, which cannot be mixed: route between such models")
    if {*shared.donor.stacks} != {STACK}:
        stacks = ", ".join(shared.donor.stacks) or "none"
        raise MixError(f"the layers of {shared.donor.name} are in {stacks}, not in {STACK}: it cannot be mixed")
    for expert in (*spec.experts, *spec.shared_experts):
        model = models[expert.source_model]
        for output in shared.outputs:
            if not output.name.startswith(f"{STACK}.") and spec.level != "model":
                continue
            origin = _origin(model, output.name)
            if origin is None:
                raise MixError(f"{output.name} is not in {model.name}, and in {shared.donor.name}: they do not mix")
            theirs, mine = model.tensors[origin.tensor].shape, output.tensor.shape
            if theirs == mine or (shared.vocabulary and architecture.is_vocabulary(output.name)):
                continue
            if architecture.is_vocabulary(output.name) and theirs[1:] == mine[1:]:
                raise MixError(
                    f"the vocabularies differ: {output.name} has {mine[0]} rows in the shared model and {theirs[0]} in "
                    f"{model.name}. Leave base_model out and say tokenizer: {{source: union}}, or take experts of one "
                    "vocabulary"
                )
            first = shared.donor.name
            raise MixError(
                f"{output.name} is {list(mine)} in {first} and {list(theirs)} in {model.name}: they do not mix"
            )
        extra = [n for n in model.tensors if n.startswith(f"{STACK}.") and n not in shared.layout]
        if extra:
            raise MixError(f"{extra[0]} is in {model.name} alone: they do not mix")


def _origin(model: Model, name: str) -> Origin | None:
    """A model's tensor of that name; where it has no head, its embeddings."""
    if name in model.tensors:
        return Origin(model.name, name)
    if architecture.is_head(name) and model.tied and model.embeddings:
        return Origin(model.name, model.embeddings)
    return None


def _outputs(spec: Spec, shared: merging.Plan, models: Mapping[str, Model], layout: Layout) -> Iterator[Output]:
    for output in shared.outputs:
        if layout.shares(output.name):
            yield output
        for number, expert in enumerate(spec.experts):
            if name := layout.own(output.name, number):
                yield _copy(spec, expert, models, output, name)
        for expert in spec.shared_experts:
            if name := layout.common(output.name):
                yield _copy(spec, expert, models, output, name)


def _copy(spec: Spec, expert: Expert, models: Mapping[str, Model], output: Output, name: str) -> Output:
    """An expert's tensor under its name in the mixture."""
    model = models[expert.source_model]
    origin = _origin(model, output.name)
    assert origin is not None
    dtype = DTYPES[spec.dtype] if spec.dtype else model.tensors[origin.tensor].dtype
    scaled = expert.residual_scale is not None and ".mlp.down_proj." in output.name
    parameters = {"scale": [expert.residual_scale]} if scaled else COPY
    return Output(name, Tensor(dtype, output.tensor.shape), "passthrough", (origin,), None, parameters)


def _remarks(spec: Spec, layout: Layout) -> Iterator[str]:
    if layout.name != "composed" and spec.centred and spec.source == "prompts":
        yield f"{layout.name}'s gates have no mean: they are made orthogonal to it, so that it has no say"
