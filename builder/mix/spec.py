"""A spec: what a mixture is made of, mergekit-moe's YAML and ours, read strictly with all mistakes at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from builder.errors import MixError
from builder.merge import strict
from builder.merge.recipe import Dtype, Flag, Model, Reading, Strict, Tokenizer, Whole
from builder.merge.settings import Mistake, Place

Level = Literal["ffn", "block", "model"]
Routing = Literal["sample", "token"]
Mixture = Literal["F-L-T", "F-M-T", "F-L-S", "F-M-S", "B-L-S", "B-M-S", "M-L-S", "M-M-S"]
Gate = Literal["prompts", "random", "mlp"]
GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
LEVELS: Mapping[str, Level] = {"F": "ffn", "B": "block", "M": "model"}
FORM = "it must be a mapping with experts, each with a source_model"
OURS = (
    *("mixture", "hybrid_layers", "gate", "gate_width", "centre", "bias", "seed", "layout", "tokenizer"),
    *("chat_template", "stack"),
)
"""The keys that mergekit-moe does not have; a file without any of them is one of its files."""
STACKED = ("experts", "stack", "dtype", "tokenizer", "chat_template")
"""The keys that a stack takes."""
Prompts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field()]


class Expert(Strict):
    """A model that is one of the mixture's experts, and what it is for.

    negative_prompts: those of the other experts' positive ones unless given; an empty list is none.
    residual_scale: multiplies what its MLPs add.
    """

    source_model: Model
    name: str | None = Field(default=None, min_length=1)
    positive_prompts: Prompts = ()
    negative_prompts: Prompts | None = None
    noise_scale: float | None = None
    residual_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Stack(Strict):
    """Models on one another: all layers of the first, then the second's; or by turns.

    drop: layers left out, from the first number up to the second: one range for every model, or one a model, empty for
    none.
    """

    order: Literal["sequence", "interleave"] = "sequence"
    drop: tuple[tuple[Whole, ...], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, data: Any) -> Any:
        drop = data.get("drop") if isinstance(data, dict) else None
        if isinstance(drop, list) and drop and all(isinstance(each, int) for each in drop):
            return {**data, "drop": [drop]}
        return data

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for each in self.drop:
            if each and (len(each) != 2 or each[0] >= each[1]):
                raise ValueError(f"drop {list(each)}: give the first layer to leave out and the first to keep after it")
        return self


def _half(raw: Any) -> Any:
    return {True: "half", False: 0}.get(raw, raw) if isinstance(raw, bool) else raw


def _shortest(raw: Any) -> Any:
    return raw.lower() if isinstance(raw, str) else raw


class Spec(Strict):
    """A mixture. Read by `load` and `parse` alone, which hold its parts against one another.

    base_model: gives the parameters that the experts share; without one they are the experts' uniform linear merge.
    mixture: level F(FN), B(lock) or M(odel); gate L(inear) or M(LP); input T(oken) or S(ample). hybrid_layers: how many
    layers from the first on are the shared model's. centre: the prompts' mean is taken off a gate's input. bias: a
    linear gate says nothing half way between its positive and negative prompts.
    """

    experts: tuple[Expert, ...] = Field(min_length=1)
    base_model: Model | None = None
    mixture: Mixture = "F-L-T"
    hybrid_layers: Annotated[Whole | Literal["half"], BeforeValidator(_half)] = 0
    gate: Gate | None = None
    gate_mode: GateMode | None = None
    gate_width: Annotated[int, Field(strict=True, ge=1)] = 64
    centre: Flag | None = None
    bias: Flag = False
    seed: Whole = 0
    experts_per_token: Annotated[int, Field(strict=True, ge=1)] | None = None
    layout: Literal["standard", "composed"] | None = None
    architecture: Annotated[str, BeforeValidator(_shortest)] | None = None
    shared_experts: tuple[Expert, ...] = ()
    dtype: Dtype | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    stack: Stack | None = None
    _reading: Reading = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Keep what was learnt while reading."""
        self._reading = context

    @property
    def text(self) -> str:
        """The YAML as written."""
        return self._reading.text

    @property
    def folder(self) -> Path:
        """What relative paths count from first."""
        return self._reading.folder

    @property
    def is_mergekits(self) -> bool:
        """Whether it is one of mergekit-moe's files: their defaults are others."""
        return self.base_model is not None and not self.model_fields_set & {*OURS}

    @property
    def level(self) -> Level:
        """Where the experts part."""
        return LEVELS[self.mixture[0]]

    @property
    def routing(self) -> Routing:
        """What a gate looks at: each token, or a prompt's mean."""
        return "token" if self.mixture[-1] == "T" else "sample"

    @property
    def source(self) -> Gate:
        """What the gates are made from."""
        if self.gate_mode in ("random", "uniform_random"):
            return "random"
        return self.gate or ("mlp" if self.mixture[2] == "M" else "prompts")

    @property
    def centred(self) -> bool:
        """Whether the mean of the prompts is taken off; not in mergekit's files, whose gates have no mean."""
        return not self.is_mergekits if self.centre is None else self.centre

    @property
    def k(self) -> int:
        """How many experts answer: the paper's one, mergekit's two."""
        return self.experts_per_token or (2 if self.is_mergekits else 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names: as given, else the end of the reference; numbered where two would be alike."""
        found: list[str] = []
        for expert in self.experts:
            name = wanted = expert.name or expert.source_model.rstrip("/").rpartition("/")[2]
            number = 1
            while name in found:
                number += 1
                name = f"{wanted}-{number}"
            found.append(name)
        return tuple(found)

    def trunk(self, layers: int) -> int:
        """How many layers are the shared model's. Raises MixError where none would be left."""
        count = layers // 2 if self.hybrid_layers == "half" else self.hybrid_layers
        if count >= layers:
            raise MixError(f"hybrid_layers {count}: the models have {layers} layers, and some must be the mixture's")
        return count

    def references(self) -> tuple[str, ...]:
        """Every model that is named, once, the base first."""
        base = [self.base_model] if self.base_model else []
        source = [self.tokenizer.source] if self.tokenizer and self.tokenizer.source not in ("base", "union") else []
        members = [each.source_model for each in (*self.experts, *self.shared_experts)]
        return tuple(dict.fromkeys([*base, *members, *source]))

    def notes(self) -> tuple[str, ...]:
        """A sentence on everything that has no effect, or another one than in mergekit."""
        return tuple(dict.fromkeys([*self._reading.notes, *self._differences()]))

    def _differences(self) -> Iterator[str]:
        if self.gate_mode in ("hidden", "hidden_avg", "hidden_last"):
            yield (
                f"gate_mode {self.gate_mode}: here a gate is made from what it will see, the MLP's input averaged over "
                "the prompt's tokens; mergekit takes the layer's input, and for hidden its last token"
            )
        if self.source == "prompts" and any(each.negative_prompts is None for each in self.experts):
            yield "negative prompts are the other experts' positive ones, where none are given"
        if self.source == "random" and any(each.positive_prompts for each in self.experts):
            yield "prompts have no effect on random gates"

    def _mistakes(self) -> Iterator[Mistake]:
        """What is wrong though every part is right by itself."""
        if self.stack is not None:
            yield from self._stack_mistakes(self.stack)
            return
        if len(self.experts) < 2:
            yield ("experts",), "a mixture needs two experts or more"
        if self.k > len(self.experts):
            yield ("experts_per_token",), f"{self.k} of {len(self.experts)} experts cannot be chosen"
        given = [each.name for each in self.experts if each.name]
        for name in dict.fromkeys(name for name in given if given.count(name) > 1):
            yield ("experts",), f"{given.count(name)} experts are called {name!r}: give each its own name"
        yield from self._gate_mistakes()
        yield from self._prompt_mistakes()
        yield from self._layout_mistakes()
        for place, each in self._members():
            if each.noise_scale:
                yield (*place, "noise_scale"), "noise is not added here: it needs training afterwards; leave it out"
            if each.residual_scale is not None and self.level != "ffn":
                yield (*place, "residual_scale"), f"it scales the MLPs of F mixtures: {self.mixture} has none apart"

    def _members(self) -> Iterator[tuple[Place, Expert]]:
        for key, members in (("experts", self.experts), ("shared_experts", self.shared_experts)):
            yield from (((key, i), each) for i, each in enumerate(members))

    def _gate_mistakes(self) -> Iterator[Mistake]:
        linear = self.mixture[2] == "L"
        if self.gate and self.gate_mode:
            yield (), "give either gate or gate_mode"
        elif linear and self.source == "mlp":
            yield ("gate",), f"{self.mixture} has linear gates: mlp belongs to {self.mixture.replace('-L-', '-M-')}"
        elif not linear and self.source != "mlp":
            wrong = "gate" if self.gate else "gate_mode"
            yield (wrong,), f"{self.mixture} has MLP gates, which are trained: leave {wrong} out, or say gate: mlp"
        if self.gate_mode == "cheap_embed" and self.level != "ffn":
            yield ("gate_mode",), f"cheap_embed is of F mixtures: for {self.mixture} leave it out"
        if self.source == "random":
            for key, said in (("centre", self.centre), ("bias", self.bias)):
                if said:
                    yield (key,), "random gates have none: leave it out"
        if self.source == "mlp" and self.bias:
            yield ("bias",), "an MLP gate has its own, trained: leave it out"

    def _prompt_mistakes(self) -> Iterator[Mistake]:
        if self.source != "prompts":
            return
        for place, each in self._members():
            if not each.positive_prompts:
                yield (*place, "positive_prompts"), "is missing: the gate is made from them"
        alike = {(each.positive_prompts, each.negative_prompts) for each in self.experts}
        if len(alike) == 1 and len(self.experts) > 1 and self.experts[0].positive_prompts:
            yield ("experts",), "all have the same prompts, so no gate could tell them apart: give each its own"

    def _layout_mistakes(self) -> Iterator[Mistake]:
        if self.layout == "standard" and (self.mixture != "F-L-T" or self.hybrid_layers):
            what = f"{self.mixture}{' with hybrid_layers' if self.hybrid_layers else ''}"
            yield ("layout",), f"no standard architecture is {what}, F-L-T in every layer alone: leave layout out"
        if self.architecture and (self.layout == "composed" or self.mixture != "F-L-T" or self.hybrid_layers):
            yield ("architecture",), "it names a standard architecture, and this is none: leave it out"
        if len(self.shared_experts) > 1:
            yield ("shared_experts",), "no architecture here has more than one shared expert"

    def _stack_mistakes(self, stack: Stack) -> Iterator[Mistake]:
        for key in sorted(self.model_fields_set - {*STACKED}):
            yield (key,), f"a stack has no gates and no shared parameters: it takes {', '.join(STACKED)}"
        if len(self.experts) < 2:
            yield ("experts",), "a stack needs two models or more"
        if len(stack.drop) not in (0, 1, len(self.experts)):
            yield ("stack", "drop"), f"give one range for all, or one for each of the {len(self.experts)} models"
        for i, each in enumerate(self.experts):
            for key in sorted(each.model_fields_set - {"source_model", "name"}):
                yield ("experts", i, key), "a stack has no gates: leave it out"


def load(path: Path) -> Spec:
    """The spec in a file. Raises MixError with every mistake in it at once, a line each."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as exc:
        raise MixError(f"{path} is not YAML: {exc}") from exc
    except OSError as exc:
        raise MixError(f"no spec {path}: {exc.strerror}") from exc
    return parse(text, str(path), path.parent.resolve())


def parse(text: str, name: str, folder: Path) -> Spec:
    """The spec in a text, which every sentence calls `name`. Raises MixError with every mistake, a line each."""
    data, mistakes = strict.document(text, name, "spec", FORM, MixError)
    try:
        spec = Spec.model_validate(data, context=Reading(text, folder, ""))
        mistakes += spec._mistakes()
    except ValidationError as exc:
        mistakes += strict.found(exc, Spec)
    if mistakes:
        raise MixError(strict.told(name, mistakes))
    return spec
