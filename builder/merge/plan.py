"""What a merge will do, as data: every tensor of the output, from what, by which parameters; from headers alone.

Every tensor of the inputs is in the output or the plan is refused: names and shapes decide, no table of architectures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder import architecture
from builder.checkpoints import Tensor
from builder.errors import MergeError
from builder.merge import chat
from builder.merge import models as opening
from builder.merge.models import Find, Model, layer_of, text_config
from builder.merge.recipe import Group, Input, Recipe
from builder.merge.recipe import Source as SlicedSource
from builder.merge.settings import value
from builder.merge.vocabulary import TokenSource, Vocabulary, reconcile, special_ids

if TYPE_CHECKING:
    from builder.merge.statistics import Statistics

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMES = {code: name for name, code in DTYPES.items()}
COPY = {"scale": [None]}
"""passthrough's parameters for a tensor that is taken as it is."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor of one model, by the model's reference and the tensor's name there."""

    model: str
    tensor: str


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the merged model, and all that decides it; per-model parameters are aligned with `inputs`."""

    name: str
    tensor: Tensor
    method: str
    inputs: tuple[Origin, ...]
    base: Origin | None
    parameters: Mapping[str, Any]

    @property
    def origins(self) -> tuple[Origin, ...]:
        """All that is read for it."""
        return self.inputs if self.base is None else (*self.inputs, self.base)


@dataclass(frozen=True)
class Plan:
    """A merge that can be printed, tested and run.

    donor: the model whose config, code and, without `vocabulary`, tokenizer the merge keeps; config: its config.json
    with what differs. statistics: by path as the recipe gives it; measured: every path, with each model that it should
    be of. notes: sentences for the reader.
    """

    recipe: Recipe
    models: Mapping[str, Model]
    outputs: tuple[Output, ...]
    donor: Model
    config: Mapping[str, Any]
    vocabulary: Vocabulary | None
    chat_template: str | None
    statistics: Mapping[str, Statistics]
    measured: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """The merged model's tensors, in order."""
        return {output.name: output.tensor for output in self.outputs}

    @cached_property
    def written(self) -> int:
        """Bytes of the merged weights."""
        return sum(tensor.bytes for tensor in self.layout.values())

    @cached_property
    def read(self) -> int:
        """Bytes of all that is read once."""
        found = {origin for output in self.outputs for origin in output.origins}
        return sum(self.models[origin.model].tensors[origin.tensor].bytes for origin in found)


def plan(recipe: Recipe, find: Find, *, allow: Collection[str] = (), vocabulary: Vocabulary | None = None) -> Plan:
    """The plan of a recipe; reads configs, headers and tokenizers. Raises ModelGlueError for what cannot be merged.

    allow: facts that may differ between the models, of `models.FACTS`. vocabulary: that of an earlier plan with the
    same models and tokens, which need not be reconciled again.
    """
    models = opening.open_models(recipe.references(), find)
    groups = recipe.groups()
    merged = {one.model: models[one.model] for group in groups for one in group.inputs}
    donor = models[recipe.base_model or groups[0].inputs[0].model]
    notes = [*recipe.notes(), *opening.check_alike(merged, allow)]
    folders = [model.checkpoint.folder for model in models.values()]
    vocabulary = vocabulary or _vocabulary(recipe, models, merged)
    planner = _Planner(recipe, merged, vocabulary, notes)
    outputs = tuple(planner.outputs(groups))
    if not outputs:
        raise MergeError("the recipe merges no tensor: give models that have weights")
    return Plan(
        recipe,
        models,
        outputs,
        donor,
        _config(donor, planner, outputs, vocabulary),
        vocabulary,
        chat.template(recipe.chat_template, folders) if recipe.chat_template else None,
        planner.statistics,
        tuple(planner.measured),
        tuple(dict.fromkeys(notes)),
    )


@dataclass
class _Planner:
    recipe: Recipe
    models: Mapping[str, Model]
    vocabulary: Vocabulary | None
    notes: list[str]
    statistics: dict[str, Statistics] = field(default_factory=dict)
    measured: dict[tuple[str, str], None] = field(default_factory=dict)
    layers: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """By stack, the first input of each layer of the output and its layer there; only for stacks that slices made."""

    def outputs(self, groups: Sequence[Group]) -> Iterator[Output]:
        """Every tensor of the merge."""
        modules: dict[str | None, list[Group]] = {}
        for group in groups:
            modules.setdefault(str(group.place[1]) if group.place[0] == "modules" else None, []).append(group)
        taken = self._divided([name for name in modules if name is not None])
        written = set()
        for module, parts in modules.items():
            names = None if module is None else taken[module]
            stacked = "slices" in parts[0].place
            for output in self._stacked(parts, names) if stacked else self._whole(parts[0], names):
                written.add(output.name)
                yield output
        yield from self._left(written)

    def _left(self, written: Collection[str]) -> Iterator[Output]:
        """What no slice or module takes, though some model has it; a layer that slices leave out is not wanted."""
        names = dict.fromkeys(name for model in self.models.values() for name in model.tensors)
        for name in names:
            if name not in written and not any(name.startswith(f"{stack}.") for stack in self.layers):
                own = {key: Origin(key, name) if name in model.tensors else None for key, model in self.models.items()}
                yield from self._lone(name, own, {key: origin for key, origin in own.items() if origin is not None})

    def _divided(self, modules: Sequence[str]) -> dict[str, set[str]]:
        """The tensors of every module. Raises MergeError for one that is in none, and for a module without any."""
        names = dict.fromkeys(name for model in self.models.values() for name in model.tensors)
        found: dict[str, set[str]] = {module: set() for module in modules}
        if not modules:
            return found
        rest = []
        for name in names:
            parts = name.split(".")
            owner = next((module for module in modules if module in parts), None)
            rest.append(name) if owner is None else found[owner].add(name)
        without = [module for module in modules if not found[module]]
        if len(without) == 1 and rest:
            found[without[0]] = set(rest)
            return found
        known = ", ".join(dict.fromkeys(part for name in names for part in name.split(".")[:2] if not part.isdigit()))
        if without:
            raise MergeError(f"modules.{without[0]} has no tensor: the parts of the names here are {known}")
        if rest:
            raise MergeError(f"{rest[0]} is in none of the modules: name one more; the parts here are {known}")
        return found

    def _whole(self, group: Group, module: set[str] | None) -> Iterator[Output]:
        """Models merged tensor by tensor under the same names."""
        inputs = [self.models[one.model] for one in group.inputs]
        self._check_depth(inputs, module)
        names = dict.fromkeys(name for model in inputs for name in model.tensors if module is None or name in module)
        depths = inputs[0].stacks
        for name in names:
            layer = layer_of(name)
            depth = depths.get(layer[0], 1) if layer else 1
            t = 0.0 if layer is None else _fraction(layer[1], depth)
            yield from self._output(group, name, dict.fromkeys((one.model for one in group.inputs), name), t)

    def _stacked(self, groups: Sequence[Group], module: set[str] | None) -> Iterator[Output]:
        """Slices on one another: layers renumbered, embeddings from the first slice, norm and head from the last."""
        first, last = groups[0], groups[-1]
        stack = self._stack(first, module)
        dropped = self._check_layers(groups, stack)
        for name in self._outside(first, module, stack, before=True):
            yield from self._output(first, name, dict.fromkeys((one.model for one in first.inputs), name), 0.0)
        at, self.layers[stack] = 0, []
        for group in groups:
            begin, end = _layers_of(group.inputs[0])
            for offset in range(end - begin):
                yield from self._layer(group, stack, at, offset, _fraction(offset, end - begin), dropped)
                self.layers[stack].append((group.inputs[0].model, begin + offset))
                at += 1
        for name in self._outside(last, module, stack, before=False):
            yield from self._output(last, name, dict.fromkeys((one.model for one in last.inputs), name), 0.0)

    def _layer(
        self, group: Group, stack: str, at: int, offset: int, t: float, dropped: Collection[str]
    ) -> Iterator[Output]:
        prefixes = {}
        for one in group.inputs:
            begin, end = _layers_of(one)
            depth = self.models[one.model].stacks.get(stack, 0)
            if end > depth:
                raise MergeError(f"{one.model} has {depth} layers: layer_range [{begin}, {end}] goes beyond them")
            prefixes[one.model] = f"{stack}.{begin + offset}."
        rests = dict.fromkeys(
            name.removeprefix(prefix)
            for model, prefix in prefixes.items()
            for name in self.models[model].tensors
            if name.startswith(prefix)
        )
        for rest in rests:
            if rest in dropped:
                self.notes.append(f"{stack}.{at}.{rest} is dropped, as the recipe says")
                continue
            names = {model: prefix + rest for model, prefix in prefixes.items()}
            yield from self._output(group, f"{stack}.{at}.{rest}", names, t)

    def _stack(self, group: Group, module: set[str] | None) -> str:
        """The stack of layers that slices are of."""
        model = self.models[group.inputs[0].model]
        stacks = {stack: depth for stack, depth in model.stacks.items() if module is None or _any(module, stack)}
        if len(stacks) > 1:
            depth = text_config(model.config).get("num_hidden_layers")
            stacks = {stack: found for stack, found in stacks.items() if found == depth}
        if len(stacks) != 1:
            raise MergeError(
                f"{model.name} has {'no' if not stacks else 'more than one stack of'} layers: give slices per module"
            )
        return next(iter(stacks))

    def _outside(self, group: Group, module: set[str] | None, stack: str, *, before: bool) -> list[str]:
        """The tensors outside of the layers that come before them, or after."""
        heads = [name for model in self.models.values() for name in model.tensors if architecture.is_head(name)]
        names = dict.fromkeys(
            name
            for one in group.inputs
            # A head that only other slices have is tied to the embeddings here.
            for name in [*self.models[one.model].tensors, *heads]
            if (module is None or name in module) and not name.startswith(f"{stack}.")
        )
        return [name for name in names if _is_before(name) == before]

    def _check_layers(self, groups: Sequence[Group], stack: str) -> set[str]:
        """The parts of layers to drop, as the recipe says, for only some models have them.

        Raises MergeError where layers of different models do not fit on one another.
        """
        first, *others = dict.fromkeys(one.model for group in groups for one in group.inputs)
        mine, dropped = self._shapes(first, stack), set()
        for other in others:
            theirs = self._shapes(other, stack)
            for rest in dict.fromkeys([*mine, *theirs]):
                here, there = mine.get(rest, {}), theirs.get(rest, {})
                name = next(iter([*here.values(), *there.values()]))
                source = next((rule.source for rule in self.recipe.tensors if rule.filter in name), None)
                lone = not here or not there
                if lone and source == "drop":
                    dropped.add(rest)
                elif lone and all(source in [one.model for one in group.inputs] for group in groups):
                    continue  # every layer takes it from there
                elif not here.keys() & there.keys():
                    said = [" or ".join(str(list(shape)) for shape in each) or "missing" for each in (here, there)]
                    raise MergeError(f"{name} is {said[0]} in {first} and {said[1]} in {other}: they do not mix")
        return dropped

    def _shapes(self, model: str, stack: str) -> dict[str, dict[tuple[int, ...], str]]:
        """By the rest of a name, the shapes that it has in the layers of a stack, each with a tensor of that shape."""
        found: dict[str, dict[tuple[int, ...], str]] = {}
        for name, tensor in self.models[model].tensors.items():
            layer = layer_of(name)
            if layer and layer[0] == stack:
                found.setdefault(layer[2], {}).setdefault(tensor.shape, name)
        return found

    def _check_depth(self, inputs: Sequence[Model], module: set[str] | None) -> None:
        first = inputs[0]
        for other in inputs[1:]:
            for stack, depth in first.stacks.items():
                theirs = other.stacks.get(stack, 0)
                if (module is None or _any(module, stack)) and theirs and theirs != depth:
                    raise MergeError(
                        f"{first.name} has {depth} layers and {other.name} has {theirs}: say with slices which of them "
                        "are merged"
                    )

    def _output(self, group: Group, name: str, names: Mapping[str, str], t: float) -> Iterator[Output]:
        """The tensor `name` of the merge from a tensor of every input; nothing for one that the recipe drops."""
        origins = {one.model: self._origin(one.model, names[one.model]) for one in group.inputs}
        having = {model: origin for model, origin in origins.items() if origin is not None}
        if len(having) < len(origins):
            yield from self._lone(name, origins, having)
            return
        shape = self._shape(name, having)
        lead = having[group.base or group.inputs[0].model]
        stored = self.models[lead.model].tensors[lead.tensor].dtype
        dtype = self.recipe.out_dtype or self.recipe.dtype
        base = having[group.base] if group.base else None
        others = tuple(having[one.model] for one in group.others)
        parameters = self._parameters(group, name, names, t)
        if wrong := self.recipe.method.check(parameters):
            raise MergeError(f"{name}: {wrong}")
        tensor = Tensor(DTYPES[dtype] if dtype else stored, shape)
        yield Output(name, tensor, self.recipe.merge_method, others, base, parameters)

    def _origin(self, model: str, name: str) -> Origin | None:
        """The tensor of that name; of a model without a head of its own the embeddings serve as one."""
        opened = self.models[model]
        if name in opened.tensors:
            return Origin(model, name)
        if architecture.is_head(name) and name.endswith(".weight") and opened.tied and opened.embeddings:
            self.notes.append(
                f"{model} ties its head to its embeddings, others do not: the merge has a head of its own"
            )
            return Origin(model, opened.embeddings)
        return None

    def _lone(self, name: str, origins: Mapping[str, Origin | None], having: Mapping[str, Origin]) -> Iterator[Output]:
        """A tensor that only some inputs have."""
        rule = next((rule for rule in self.recipe.tensors if rule.filter in name), None)
        if rule is None:
            lacking = [model for model in origins if model not in having]
            raise MergeError(
                f"{name} is in {', '.join(having)} and not in {', '.join(lacking)}: say in the recipe where it comes "
                f"from, tensors: [{{filter: {name}, source: {next(iter(having))}}}], or source: drop"
            )
        if rule.source == "drop":
            self.notes.append(f"{name} is dropped, as the recipe says")
            return
        if rule.source not in having:
            raise MergeError(f"{name} is to come from {rule.source}, which does not have it; {', '.join(having)} do")
        origin = having[rule.source]
        dtype = self.recipe.out_dtype or self.recipe.dtype
        stored = self.models[origin.model].tensors[origin.tensor].dtype
        tensor = Tensor(DTYPES[dtype] if dtype else stored, self._shape(name, {origin.model: origin}))
        yield Output(name, tensor, "passthrough", (origin,), None, COPY)

    def _shape(self, name: str, origins: Mapping[str, Origin]) -> tuple[int, ...]:
        """The one shape that all have, or will have in the merged vocabulary."""
        shapes = {model: self.models[model].tensors[origin.tensor].shape for model, origin in origins.items()}
        token_rows = architecture.is_vocabulary(name)
        if token_rows and self.vocabulary:
            shapes = {model: (self.vocabulary.rows, *shape[1:]) for model, shape in shapes.items()}
        (first, shape), *others = shapes.items()
        for model, other in others:
            if other == shape:
                continue
            if token_rows and other[1:] == shape[1:]:
                raise MergeError(
                    f"the vocabularies differ: {name} has {shape[0]} rows in {first} and {other[0]} in {model}. Add "
                    "tokenizer: {source: union} to the recipe, or {source: base} to keep the base's tokens alone"
                )
            raise MergeError(f"{name} is {list(shape)} in {first} and {list(other)} in {model}: they do not mix")
        return shape

    def _parameters(self, group: Group, name: str, names: Mapping[str, str], t: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, parameter in self.recipe.method.parameters.items():
            if not parameter.per_model:
                found[key] = value(parameter, key, group.outer, name, t)
                continue
            found[key] = [
                value(parameter, key, (one.parameters, *group.outer), names[one.model], t, one.model)
                for one in group.others
            ]
            if parameter.kind == "path":
                self._open(found[key], group.others)
        return found

    def _open(self, paths: Sequence[str], inputs: Sequence[Input]) -> None:
        for path, one in zip(paths, inputs, strict=True):
            if path not in self.statistics:
                from builder.merge.statistics import Statistics

                here = self.recipe.folder / path
                self.statistics[path] = Statistics(here if here.exists() else Path(path))
                self.statistics[path].check(self.recipe.merge_method)
            self.measured[path, one.model] = None


def _is_before(name: str) -> bool:
    """Whether a tensor outside of the layers comes before them; GPT-NeoX's head is embed_out."""
    return (architecture.is_embedding(name) or "embed" in name) and not architecture.is_head(name)


def _fraction(layer: int, depth: int) -> float:
    """t, how deep a layer lies, 0 to 1; the only layer of a slice counts as its last, as in mergekit."""
    return layer / (depth - 1) if depth > 1 else 1.0


def _layers_of(one: Input) -> tuple[int, int]:
    """The layers that a slice takes of a model."""
    assert isinstance(one, SlicedSource)
    return one.layer_range


def _any(names: set[str], stack: str) -> bool:
    return any(name.startswith(f"{stack}.") for name in names)


def _vocabulary(recipe: Recipe, models: Mapping[str, Model], merged: Mapping[str, Model]) -> Vocabulary | None:
    """The merged vocabulary, where the recipe asks for one."""
    source = recipe.tokenizer.source if recipe.tokenizer else recipe.tokenizer_source
    if source is None:
        return None
    rows = {}
    for name, model in merged.items():
        if model.embeddings is None:
            raise MergeError(f"{name} has no embedding table of a known name: leave tokenizer out of the recipe")
        rows[name] = model.tensors[model.embeddings].shape[0]
    folders = {name: models[name].checkpoint.folder for name in [*merged, *([source] if source in models else [])]}
    if recipe.base_model:
        folders.setdefault(recipe.base_model, models[recipe.base_model].checkpoint.folder)
    tokens: dict[str, TokenSource | None] = {}
    for token, said in (recipe.tokenizer.tokens if recipe.tokenizer else {}).items():
        row = said.source
        tokens[token] = TokenSource(row.model, row.token, row.token_id, said.force) if row else None
    pad = recipe.tokenizer.pad_to_multiple_of if recipe.tokenizer else None
    return reconcile(folders, recipe.base_model, source, rows, tokens=tokens, pad_to_multiple_of=pad)


def _config(
    donor: Model, planner: _Planner, outputs: Sequence[Output], vocabulary: Vocabulary | None
) -> dict[str, Any]:
    """The donor's config.json with the depth, vocabulary, dtype and tiedness of the merge."""
    config = {key: each for key, each in donor.config.items() if key != "_name_or_path"}
    inner, nested = dict(text_config(config)), isinstance(config.get("text_config"), dict)
    for stack, layers in planner.layers.items():
        if donor.stacks.get(stack) == inner.get("num_hidden_layers", inner.get("n_layer")):
            inner |= _layers(inner, layers, planner.models)
    shapes = {output.name: output.tensor.shape for output in outputs}
    rows = shapes[donor.embeddings][0] if donor.embeddings in shapes else None
    stored = donor.checkpoint.tensors.get(donor.embeddings or "")
    if rows is not None and stored is not None and rows != stored.shape[0]:
        inner["vocab_size"] = rows
    if donor.embeddings in shapes:
        tied = not any(architecture.is_head(name) for name in shapes)
        if tied != bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False))):
            (config if nested and "tie_word_embeddings" in config else inner)["tie_word_embeddings"] = tied
    if vocabulary and vocabulary.folder != donor.checkpoint.folder:
        inner |= special_ids(vocabulary.folder)
    if nested:
        config["text_config"] = inner
    else:
        config |= inner
    dtypes = {output.tensor.dtype for output in outputs}
    if len(dtypes) == 1:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = NAMES[dtypes.pop()]
    return config


def _layers(
    config: Mapping[str, Any], layers: Sequence[tuple[str, int]], models: Mapping[str, Model]
) -> dict[str, Any]:
    """The number of layers, and lists that say something of each."""
    key = "num_hidden_layers" if "num_hidden_layers" in config else "n_layer"
    cut: dict[str, Any] = {key: len(layers)}
    for name, own in config.items():
        if _is_by_layer(name, own, config[key]):
            cut[name] = [_said(text_config(models[model].config), key, name, own, layer) for model, layer in layers]
    return cut


def _said(config: Mapping[str, Any], key: str, name: str, default: Sequence[Any], layer: int) -> Any:
    """What a model's config says of its layer; older files leave lists out that newer ones have."""
    said: Any = config.get(name)
    if not _is_by_layer(name, said, config.get(key)):
        said = default
    if layer >= len(said):
        raise MergeError(f"{name} in config.json says nothing of layer {layer}: add it to every model's config.json")
    return said[layer]


def _is_by_layer(name: str, said: Any, depth: Any) -> bool:
    """Whether a setting has an entry for every layer; lists of token ids and classes may be as long by chance."""
    by_chance = name == "architectures" or name.endswith(("_token_id", "_token_ids"))
    return isinstance(said, list) and len(said) == depth and not by_chance
