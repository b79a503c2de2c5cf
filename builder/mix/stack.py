"""Models on one another as a recipe: all layers of one and then the next's, or by turns; the rest is their mean."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, zip_longest
from typing import Any

import yaml

from builder.errors import MixError
from builder.merge import models as opening
from builder.merge import plan as merging
from builder.merge import recipe
from builder.merge.models import Find, Found, Model
from builder.mix.layouts import STACK
from builder.mix.spec import Spec

Layer = tuple[str, int]
"""A layer of a model."""


def plan(spec: Spec, find: Find, *, allow: Collection[str] = ()) -> merging.Plan:
    """The merge that a stack is; its recipe's text runs by `builder merge` too. Raises ModelGlueError."""
    found = {name: find(name) for name in spec.references()}
    models = opening.open_models(spec.references(), lambda name: found[name])

    def opened(name: str) -> Found:
        return replace(found[name], opened=models[name].checkpoint)

    said = recipe_of(spec, models)
    return merging.plan(recipe.parse(said, "the stack", spec.folder), opened, allow=allow)


def recipe_of(spec: Spec, models: Mapping[str, Model]) -> str:
    """The recipe: layers as they are; embeddings, norm and head are averaged where slices of all models meet."""
    order = _order(spec, models)
    members = list(dict.fromkeys(each.source_model for each in spec.experts))
    # The first slice gives what comes before the layers, the last what comes after them: those two are of all models.
    slices = [_meeting(order[0], members), *_runs(order[1:-1]), _meeting(order[-1], members)]
    said: dict[str, Any] = {"merge_method": "linear", "slices": slices}
    for key in ("dtype", "chat_template"):
        if value := getattr(spec, key):
            said[key] = value
    if spec.tokenizer:
        said["tokenizer"] = spec.tokenizer.model_dump(exclude_none=True)
    return yaml.safe_dump(said, sort_keys=False)


def _order(spec: Spec, models: Mapping[str, Model]) -> list[Layer]:
    """Every layer of the stack, from the first to the last."""
    assert spec.stack is not None
    kept: list[list[Layer]] = []
    for i, expert in enumerate(spec.experts):
        model = models[expert.source_model]
        depth = model.stacks.get(STACK, 0)
        if not depth:
            raise MixError(f"the layers of {model.name} are not in {STACK}: it cannot be stacked")
        drop = spec.stack.drop[i if len(spec.stack.drop) > 1 else 0] if spec.stack.drop else ()
        if drop and drop[1] > depth:
            raise MixError(f"{model.name} has {depth} layers: drop {list(drop)} goes beyond them")
        out = range(*drop) if drop else ()
        kept.append([(model.name, layer) for layer in range(depth) if layer not in out])
    turns = chain.from_iterable(zip_longest(*kept)) if spec.stack.order == "interleave" else chain.from_iterable(kept)
    order = [layer for layer in turns if layer is not None]
    if len(order) < 2:
        raise MixError(f"{len(order)} layers would be left: drop fewer")
    return order


def _runs(order: Sequence[Layer]) -> Iterator[dict[str, Any]]:
    """A slice for all layers that follow each other in one model."""
    for _, run in groupby(enumerate(order), key=lambda pair: (pair[1][0], pair[1][1] - pair[0])):
        layers = [layer for _, layer in run]
        model, first = layers[0]
        source = {"model": model, "layer_range": [first, first + len(layers)], "parameters": {"weight": 1.0}}
        yield {"sources": [source]}


def _meeting(layer: Layer, members: Sequence[str]) -> dict[str, Any]:
    """One layer as it is, with the mean of all members around it."""
    return {"sources": list(_sources(layer, members))}


def _sources(layer: Layer, members: Sequence[str]) -> Iterator[dict[str, Any]]:
    model, number = layer
    for member in sorted(members, key=lambda member: member != model):
        weight = [{"filter": f"{STACK}.", "value": float(member == model)}, {"value": 1 / len(members)}]
        here = number if member == model else 0
        yield {"model": member, "layer_range": [here, here + 1], "parameters": {"weight": weight}}
