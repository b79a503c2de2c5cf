"""The models that a recipe names: found, opened, their headers compared. No weight is read here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from builder import architecture
from builder.adapters import Adapter
from builder.checkpoints import Checkpoint, Tensor
from builder.errors import MergeError, SourceError

FACTS = ("class", "rope", "norm", "heads", "activation")
"""What must agree between the models of a merge, beside the shapes of their tensors."""
_STACK = re.compile(r"^((?:.+?\.)??[A-Za-z_]\w*)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Found:
    """Where a reference's model is on this machine, and the adapter that goes on it; opened, if it is already."""

    folder: Path
    adapter: Path | None = None
    opened: Checkpoint | None = None


Find = Callable[[str], Found]


@dataclass(frozen=True)
class Model:
    """One model of a recipe, its headers read; `name` is the reference as written."""

    name: str
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.config

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, with the adapter's in place; without a head that is tied to the embeddings."""
        found = dict(self.checkpoint.tensors)
        if self.adapter:
            # PEFT keeps what it trains in float32, whatever the base is in.
            shapes = {name: self.adapter.file.tensors[stored].shape for name, stored in self.adapter.whole.items()}
            found |= {name: Tensor(found[name].dtype, shape) for name, shape in shapes.items()}
        if self.tied and self.head:
            del found[self.head]
        return found

    @cached_property
    def head(self) -> str | None:
        """The stored output head."""
        return next((name for name in self.checkpoint.tensors if architecture.is_head(name)), None)

    @cached_property
    def embeddings(self) -> str | None:
        """The input embeddings."""
        return next((name for name in self.checkpoint.tensors if architecture.is_embedding(name)), None)

    @cached_property
    def tied(self) -> bool:
        """Whether the embeddings are the output head too: none is stored, or the config says that it does not count."""
        said = self.config.get("tie_word_embeddings", text_config(self.config).get("tie_word_embeddings", False))
        return self.embeddings is not None and (self.head is None or said is True)

    @cached_property
    def stacks(self) -> dict[str, int]:
        """The numbers of layers, by the part of their tensors' names before the number."""
        found: dict[str, int] = {}
        for name in self.tensors:
            if layer := layer_of(name):
                found[layer[0]] = max(found.get(layer[0], 0), layer[1] + 1)
        return found

    def facts(self) -> dict[str, Any]:
        """What must agree: FACTS and their values."""
        config = text_config(self.config)
        heads = config.get("num_attention_heads")
        return {
            "class": self.config.get("architectures"),
            "rope": architecture.rope_parameters(config),
            "norm": architecture.norm_eps(config),
            "heads": [heads, config.get("num_key_value_heads") or heads],
            "activation": config.get("hidden_act", config.get("activation_function")),
        }


def open_models(references: Sequence[str], find: Find) -> dict[str, Model]:
    """Every model of a recipe, by its reference. Raises ModelGlueError for one that is not there or not readable."""
    opened = {}
    for name in references:
        found = find(name)
        checkpoint = found.opened or Checkpoint(found.folder)
        if quantised := checkpoint.config.get("quantization_config"):
            kind = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise MergeError(f"{found.folder} is quantised ({kind}): merge the model it was made from")
        adapter = Adapter(found.adapter) if found.adapter else None
        if adapter:
            adapter.check(checkpoint)
        opened[name] = model = Model(name, checkpoint, adapter)
        if adapter and model.head in {*adapter.adapted, *adapter.whole} and model.tied:
            raise SourceError(
                f"{adapter.folder} changes {model.head}, and {checkpoint.folder} ties its head to its embeddings: "
                "untie them in the base"
            )
    return opened


def check_alike(models: Mapping[str, Model], allowed: Collection[str]) -> list[str]:
    """Notes on differences that were allowed. Raises MergeError for models that are not of one architecture."""
    (first, *others), notes = models.values(), []
    mine = first.facts()
    for other in others:
        theirs = other.facts()
        for fact in FACTS:
            if mine[fact] == theirs[fact]:
                continue
            sentence = f"{first.name} and {other.name} differ in {fact}: {_said(mine[fact])} and {_said(theirs[fact])}"
            if fact not in allowed:
                raise MergeError(f"{sentence}. They do not mix; --allow-mismatch {fact} merges them all the same")
            notes.append(f"{sentence}; the merge keeps that of the model whose config it has")
    return notes


def layer_of(name: str) -> tuple[str, int, str] | None:
    """The stack of layers that a tensor is in, its layer, and the rest of its name; None outside of layers."""
    found = _STACK.match(name)
    return (found[1], int(found[2]), name[found.end() :]) if found else None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that speaks of the language model, in models of several parts."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(each)}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def folder_of(path: Path) -> Found:
    """A model folder by its path. Raises SourceError where there is none."""
    if not (path / "config.json").exists():
        raise SourceError(f"there is no model in {path}: give a folder with config.json and weights")
    return Found(path)
