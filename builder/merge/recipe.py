"""A recipe: mergekit's YAML, read strictly. All mistakes of a file are told at once, before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from builder.errors import MergeError
from builder.merge import strict
from builder.merge.method import REQUIRED, Method, Parameter
from builder.merge.methods import METHODS
from builder.merge.settings import Mistake, Mistakes, Place, Setting, nearest, read_settings

FORMS = ("models", "slices", "modules")
"""The ways to say what is merged; a recipe has one."""
FORM = "it must be a mapping with merge_method and models, slices or modules"


@dataclass(slots=True)
class Reading:
    """What each part of a recipe must know while it is read, and where it notes what has no effect."""

    text: str
    folder: Path
    name: str
    notes: list[str] = field(default_factory=list)


_Info = ValidationInfo[Reading]


class Strict(BaseModel):
    """A part of a recipe: frozen, no key beyond the known ones; a known key with nothing behind it is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: said for key, said in data.items() if said is not None or key not in cls.model_fields}


class _Part(Strict):
    path: str = Field(min_length=1)
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class _Mapped(Strict):
    model: _Part
    lora: _Part | None = None
    override_architecture: str | None = None


def _reference(raw: Any, info: _Info) -> Any:
    """mergekit's mapping form of a reference as text."""
    if not isinstance(raw, dict):
        return raw
    try:
        mapped = _Mapped.model_validate(raw)
    except ValidationError as exc:
        raise Mistakes(strict.found(exc, _Mapped)) from exc
    if mapped.override_architecture:
        info.context.notes.append("override_architecture has no effect here: tensors are matched by their names")
    return f"{mapped.model}+{mapped.lora}" if mapped.lora else str(mapped.model)


def _settings(raw: Any, info: _Info) -> dict[str, Setting]:
    return read_settings(raw, info.context.name, info.context.notes)


def _dtype(raw: Any) -> Any:
    return raw.removeprefix("torch.") if isinstance(raw, str) else raw


Model = Annotated[str, Field(min_length=1), BeforeValidator(_reference)]
"""A reference as written; `resolve` tells its parts."""
Settings = Annotated[Mapping[str, Setting], PlainValidator(_settings)]
"""What one level of a recipe says, by parameter."""
Dtype = Annotated[Literal["float32", "float16", "bfloat16"], BeforeValidator(_dtype)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]


class Input(Strict):
    """A model that is merged."""

    model: Model
    parameters: Settings = {}


class Source(Input):
    """Some layers of a model, from the first of layer_range up to the second, which is not included."""

    layer_range: tuple[Whole, Whole]

    @field_validator("layer_range")
    @classmethod
    def _holds_layers(cls, layers: tuple[int, int]) -> tuple[int, int]:
        if layers[0] >= layers[1]:
            raise ValueError(f"[{layers[0]}, {layers[1]}] holds no layer: the second number must be the larger")
        return layers


class Slice(Strict):
    """Consecutive layers of the merged model, merged from equally many layers of every source."""

    sources: tuple[Source, ...]
    base_model: Model | None = None
    residual_weight: float | None = None
    parameters: Settings = {}

    @model_validator(mode="after")
    def _equally_long(self, info: _Info) -> Self:
        if self.residual_weight is not None:
            info.context.notes.append("residual_weight has no effect here, nor in mergekit")
        lengths = [end - first for first, end in (source.layer_range for source in self.sources)]
        if len(set(lengths)) > 1:
            raise ValueError(f"the sources have {', '.join(map(str, lengths))} layers: give equally many of each")
        return self


class Content(Strict):
    """What is merged, as one of two forms: whole models, or slices that are stacked in this order."""

    models: tuple[Input, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Settings = {}


class Module(Content):
    """One part of a model of several, such as its text decoder."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.slices) == bool(self.models):
            raise ValueError("give either slices or models")
        return self


class Embedding(Strict):
    """Where a token's row comes from.

    kind: `model`: that model's row of the same token; `model_token`: its row of another token; `zero`.
    """

    kind: Literal["model", "model_token", "zero"]
    model: Model | None = None
    token: str | None = None
    token_id: Whole | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_reference(cls, data: Any) -> Any:
        is_reference = isinstance(data, str) or (isinstance(data, dict) and data.keys() <= _Mapped.model_fields.keys())
        return {"kind": "model", "model": data} if is_reference else data

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        tokens = (self.token is not None) + (self.token_id is not None)
        if self.kind == "zero" and (self.model or tokens):
            raise ValueError("zero takes neither a model nor a token")
        if self.kind == "model_token" and not (self.model and tokens == 1):
            raise ValueError("model_token takes a model, and either token or token_id")
        return self


class Token(Strict):
    """One token of the merged vocabulary; with `force` models that have it take the source's row too."""

    source: Embedding | None = None
    force: Flag = False

    @model_validator(mode="after")
    def _something_to_force(self) -> Self:
        if self.force and self.source is None:
            raise ValueError("force needs a source")
        return self


class Tokenizer(Strict):
    """The merged model's tokenizer: `base`, `union` (of all), or that of one model."""

    source: Model = "union"
    tokens: dict[str, Token] = {}
    pad_to_multiple_of: Annotated[int, Field(strict=True, ge=1)] | None = None


class Origin(Strict):
    """Where tensors come from that only some inputs have: a model, or `drop`. `filter` is a part of their names."""

    filter: str = Field(min_length=1)
    source: Model


@dataclass(frozen=True, slots=True)
class Group:
    """Inputs that are merged with one another: a list of models, or the sources of a slice.

    inputs: as listed; a base that a list of models leaves out comes last. base: the one that the others are fine-tunes
    of, or None. outer: what slice, module and recipe say, highest first; above them is what an input says.
    """

    place: Place
    inputs: tuple[Input, ...]
    base: str | None
    outer: tuple[Settings, ...]

    @property
    def others(self) -> tuple[Input, ...]:
        """The inputs beside the base."""
        return tuple(one for one in self.inputs if one.model != self.base)


class Recipe(Content):
    """What to merge, and how. Read by `load_recipe` and `parse` alone, which hold it against the method.

    seed: of the methods that draw. align: before the merge, permute every input's units to match those of the base, or
    of the first. tensors: where a tensor comes from that only some inputs have.
    """

    merge_method: str
    base_model: Model | None = None
    modules: Mapping[str, Module] = {}
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer: Tokenizer | None = None
    tokenizer_source: Model | None = None
    chat_template: str | None = None
    seed: Whole = 0
    align: Flag = False
    tensors: tuple[Origin, ...] = ()
    _reading: Reading = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Keep what was learnt while reading."""
        self._reading = context

    @field_validator("merge_method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"no method {name!r}{nearest(name, METHODS)}; there are: {', '.join(METHODS)}")
        return name

    @property
    def text(self) -> str:
        """The YAML as written."""
        return self._reading.text

    @property
    def folder(self) -> Path:
        """What relative paths count from first."""
        return self._reading.folder

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.merge_method]

    def groups(self) -> tuple[Group, ...]:
        """What is merged with what, in the order of the output."""
        groups = [*self._within(self, (), (self.parameters,))]
        for name, module in self.modules.items():
            groups += self._within(module, ("modules", name), (module.parameters, self.parameters))
        return tuple(groups)

    def _within(self, part: Content, place: Place, outer: tuple[Settings, ...]) -> Iterator[Group]:
        base = self.base_model if self.method.base != "none" else None
        if part.models:
            listed = [one.model for one in part.models]
            appended = [Input(model=base)] if base and base not in listed else []
            yield Group((*place, "models"), (*part.models, *appended), base, outer)
        for i, piece in enumerate(part.slices):
            own = piece.base_model if piece.base_model and self.method.base != "none" else base
            yield Group((*place, "slices", i), piece.sources, own, (piece.parameters, *outer))

    def references(self) -> tuple[str, ...]:
        """Every model that is named anywhere, once, the base first, then in the recipe's order."""
        source = self.tokenizer.source if self.tokenizer else self.tokenizer_source
        return tuple(dict.fromkeys([*self._members(), *([source] if source not in (None, "base", "union") else [])]))

    def _members(self) -> Iterator[str]:
        yield from [self.base_model] if self.base_model else []
        parts: tuple[Content, ...] = (self, *self.modules.values())
        for part in parts:
            yield from (one.model for one in part.models)
            for piece in part.slices:
                yield from [piece.base_model] if piece.base_model else []
                yield from (source.model for source in piece.sources)

    def notes(self) -> tuple[str, ...]:
        """A sentence on everything in the recipe that has no effect."""
        return tuple(dict.fromkeys([*self._reading.notes, *self._without_effect()]))

    def _without_effect(self) -> Iterator[str]:
        for group in self.groups():
            yield from _idle(group, self.method)
        listed = {one.model for group in self.groups() for one in group.inputs}
        for model in self._members():
            if model not in listed:
                yield f"{self.merge_method} does not merge the base_model {model!r}: list it to have it merged"

    def _mistakes(self) -> Iterator[Mistake]:
        """What is wrong though every part is right by itself."""
        for group in self.groups():
            yield from _unmergeable(group, self.merge_method, self.method)
        known = list(dict.fromkeys(self._members()))
        origins = [(("tensors", i, "source"), one.source) for i, one in enumerate(self.tensors) if one.source != "drop"]
        for place, model in [*_donors(self.tokenizer or Tokenizer()), *origins]:
            if model not in known:
                yield (
                    place,
                    f"{model!r} is no model of this merge{nearest(model, known)}: name one of {', '.join(known)}",
                )


def _donors(tokenizer: Tokenizer) -> list[tuple[Place, str]]:
    """The models that single tokens' rows come from, and where the recipe says so."""
    rows = [(name, token.source) for name, token in tokenizer.tokens.items()]
    return [(("tokenizer", "tokens", name, "source"), row.model) for name, row in rows if row and row.model]


def _unmergeable(group: Group, name: str, method: Method) -> Iterator[Mistake]:
    models = Counter(one.model for one in group.inputs)
    if group.base is None and method.base == "required":
        yield group.place, f"{name} needs a base_model"
    elif group.base is not None and group.base not in models:
        yield group.place, f"the base {group.base!r} is not among the sources: add it, with its layer_range"
    elif not method.least <= len(group.others) <= (method.most or len(group.others)):
        yield group.place, f"{name} merges {_bounds(group, method)}, not {len(group.others)}"
    yield from ((group.place, f"{model!r} is listed {count} times") for model, count in models.items() if count > 1)
    for key, parameter in method.parameters.items():
        if parameter.default is REQUIRED and not any(key in level for level in group.outer):
            yield from _unsaid(group, f"{name} needs {key}", key, parameter)


def _bounds(group: Group, method: Method) -> str:
    few = len(group.others) < method.least
    bound, number = ("at least", method.least) if few else ("at most", method.most)
    bound = "exactly" if method.least == method.most else bound
    return f"{bound} {number} model{'' if number == 1 else 's'}{' beside the base' if group.base else ''}"


def _unsaid(group: Group, need: str, key: str, parameter: Parameter) -> Iterator[Mistake]:
    """A parameter that must be given, and that no level gives under any filter."""
    if not parameter.per_model:
        yield group.place, f"{need}, and no level gives it"
        return
    place = group.place if group.place[-1] == "models" else (*group.place, "sources")
    for i, one in enumerate(group.inputs):
        if one.model != group.base and key not in one.parameters:
            yield (*place, i), f"{need} for {one.model!r}, and no level gives it"


def _idle(group: Group, method: Method) -> Iterator[str]:
    for one in group.inputs:
        for key in one.parameters:
            if not method.parameters[key].per_model:
                yield f"{key} has no effect on a model alone: give it to the recipe, a module or a slice"
            elif one.model == group.base:
                yield f"{key} has no effect on the base {one.model!r}"


def load_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises MergeError with every mistake in it at once, a line each."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as exc:
        raise MergeError(f"{path} is not YAML: {exc}") from exc
    except OSError as exc:
        raise MergeError(f"no recipe {path}: {exc.strerror}") from exc
    return parse(text, str(path), path.parent.resolve())


def parse(text: str, name: str, folder: Path) -> Recipe:
    """The recipe in a text, which every sentence calls `name`. Raises MergeError with every mistake, a line each."""
    data, mistakes = strict.document(text, name, "recipe", FORM, MergeError)
    mistakes += _forms(data)
    reading = Reading(text, folder, str(data.get("merge_method")))
    try:
        recipe = Recipe.model_validate(data, context=reading)
        mistakes += recipe._mistakes()
    except ValidationError as exc:
        mistakes += strict.found(exc, Recipe)
        mistakes += _sound(data, {str(error["loc"][0]) for error in exc.errors()}, reading)
    if mistakes:
        raise MergeError(strict.told(name, mistakes))
    return recipe


def _sound(data: Mapping[str, Any], wrong: set[str], reading: Reading) -> list[Mistake]:
    """How the keys of a recipe that are right by themselves go together, in spite of those that are not."""
    if wrong & {"merge_method", "base_model", "parameters"}:
        return []
    if wrong & {*FORMS}:
        wrong |= {"tokenizer", "tensors"}
    sound = {key: said for key, said in data.items() if str(key) not in wrong}
    return list(Recipe.model_validate(sound, context=reading)._mistakes())


def _forms(data: Mapping[str, Any]) -> Iterator[Mistake]:
    given = [form for form in FORMS if data.get(form)]
    if len(given) != 1:
        yield (), f"give one of {', '.join(FORMS)}, not {' and '.join(given) or 'none'}"
    if data.get("tokenizer") and data.get("tokenizer_source"):
        yield (), "give either tokenizer or tokenizer_source"
