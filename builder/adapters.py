"""A PEFT LoRA adapter as what it does to each tensor of its base: W + scale B A (arXiv 2106.09685)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import architecture
from builder.checkpoints import Array, Checkpoint, Safetensors
from builder.errors import SourceError

FILES = ("adapter_model.safetensors", "adapter_config.json")
_PREFIX = "base_model.model."
_FACTORS = {"lora_A": ("lora_B", False), "lora_embedding_A": ("lora_embedding_B", True)}
_UNSUPPORTED = (
    "use_dora",
    "trainable_token_indices",
    "megatron_config",
    "corda_config",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take from the base what the factors start with: base + adapter would count it twice."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update of one tensor: scale * left @ right, left [rows, rank], right [rank, columns]."""

    left: Array
    right: Array
    scale: float


@dataclass(frozen=True, slots=True)
class _Factors:
    """The names of A and B of one tensor, and whether the tensor is the transpose of B A."""

    a: str
    b: str
    scale: float
    transposed: bool


class Adapter:
    """An adapter folder, its header read. Raises SourceError for one that is not a plain LoRA."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _config(folder)
        self.file = Safetensors(folder / FILES[0])
        self._low_rank: dict[str, _Factors] = {}
        self.whole: dict[str, str] = {}
        """Tensors that it replaces (`modules_to_save`, biases), each with its name in the file."""
        for name in self.file.tensors:
            module, kind, rest = _parts(name)
            if kind in _FACTORS and rest in ("", "weight"):
                partner, embedding = _FACTORS[kind]
                b = name.replace(f".{kind}", f".{partner}")
                scale = _scale(config, module, self.file.tensors[name].shape[0])
                transposed = embedding or bool(config.get("fan_in_fan_out"))
                self._low_rank[f"{module}.weight"] = _Factors(name, b, scale, transposed)
            # With a resized vocabulary PEFT stores a module twice, under its own name too, and what it was before.
            elif kind == "" or (kind == "modules_to_save" and module not in self.whole):
                self.whole[module] = name
        factors = {name for each in self._low_rank.values() for name in (each.a, each.b)}
        unread = sorted(n for n in self.file.tensors if n not in factors and _parts(n)[0] not in self.whole)
        if unread or not self.file.tensors:
            raise SourceError(f"{folder} is not a plain LoRA: it holds {unread[0] if unread else 'nothing'}")

    @property
    def adapted(self) -> Iterable[str]:
        """The names of the base's tensors that it adds to."""
        return self._low_rank

    def check(self, base: Checkpoint) -> None:
        """Raises SourceError for a tensor that the base has not, or has in another shape."""
        for target in [*self._low_rank, *self.whole]:
            if target not in base.tensors:
                raise SourceError(
                    f"{self.folder} adapts {target}, which {base.folder} does not have: is it of another base?"
                )
        for target, stored in self.whole.items():
            ours, theirs = self._shape(stored), base.tensors[target].shape
            # A vocabulary may have grown, or have lost its padding.
            first = 1 if architecture.is_vocabulary(target) else 0
            if len(ours) != len(theirs) or ours[first:] != theirs[first:]:
                raise SourceError(
                    f"{self.folder} replaces {target} by {ours}, and in {base.folder} it is {theirs}: "
                    "is it of another base?"
                )
        for target, factors in self._low_rank.items():
            down, up = (self._shape(name) for name in (factors.a, factors.b))
            if (
                len(up) != 2
                or len(down) != 2
                or up[1] != down[0]
                or self._product(factors) != self._target(target, base)
            ):
                raise SourceError(
                    f"{self.folder} adapts {target} by {up} times {down}, and in {base.folder} it is "
                    f"{base.tensors[target].shape}: is it of another base?"
                )

    def update(self, target: str) -> LowRank | None:
        """What it adds to a tensor; None where it adds nothing."""
        factors = self._low_rank.get(target)
        if factors is None:
            return None
        a, b = self.file.read(factors.a), self.file.read(factors.b)
        left, right = (a.T, b.T) if factors.transposed else (b, a)
        return LowRank(left.copy(), right.copy(), factors.scale)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[name].shape if name in self.file.tensors else ()

    def _product(self, factors: _Factors) -> tuple[int, ...]:
        a, b = self._shape(factors.a), self._shape(factors.b)
        return (a[1], b[0]) if factors.transposed else (b[0], a[1])

    def _target(self, target: str, base: Checkpoint) -> tuple[int, ...]:
        if target in self.whole:
            return self.file.tensors[self.whole[target]].shape
        return base.tensors[target].shape


def _parts(name: str) -> tuple[str, str, str]:
    """The module or tensor that a stored tensor belongs to, how it changes it, "" for in whole, and what comes then."""
    path = name.removeprefix(_PREFIX)
    if found := re.fullmatch(r"(.+)\.(lora_\w+)(?:\.(.+))?", path):
        return found[1], found[2], found[3] or ""
    if found := re.fullmatch(r"(.+)\.(modules_to_save|original_module)(?:\.default)?\.(.+)", path):
        return f"{found[1]}.{found[3]}", found[2], ""
    return path.replace(".base_layer", ""), "", ""


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / FILES[1]).read_text("utf-8"))
        float(config["lora_alpha"]) / float(config["r"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as exc:
        raise SourceError(f"{folder} has no readable adapter_config.json: is it a PEFT LoRA?") from exc
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        unsupported.append(f"init_lora_weights {config['init_lora_weights']}")
    if config.get("peft_type") != "LORA" or unsupported:
        raise SourceError(f"{folder} is not a plain LoRA ({', '.join(unsupported) or config.get('peft_type')})")
    return dict(config)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); alpha may differ by module."""
    patterns = config.get("alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = float(next(own, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
