"""A PEFT LoRA adapter applied to its base, tensor by tensor: W + (alpha / r) B A (arXiv 2106.09685)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from builder import checkpoints, files
from builder.checkpoints import Array, Checkpoint
from builder.errors import SourceError
from builder.merge.stream import companions

_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")


def apply(adapter: Path, base: Path, out: Path) -> None:
    """Write base + adapter as a plain model folder, rounded once. Raises SourceError for an adapter of another kind."""
    model = Checkpoint(base)
    with files.whole(out) as folder:
        checkpoints.write(folder, model.tensors, _tensors(adapter, model))
        for path in companions(base):
            files.copy(path, folder / path.name)


def _tensors(adapter: Path, base: Checkpoint) -> Iterator[tuple[str, Array]]:
    scale, factors = _scale(adapter), checkpoints.Safetensors(adapter / "adapter_model.safetensors")
    targets = _targets(adapter, factors, base)
    for name in base.tensors:
        values = base.read(name)
        if name in targets:
            down, up = (factors.read(factor) for factor in targets[name])
            values += np.float32(scale) * (up @ down)
        yield name, values


def _targets(adapter: Path, factors: checkpoints.Safetensors, base: Checkpoint) -> dict[str, tuple[str, str]]:
    """The base's tensors that are adapted, each with the names of its A and B."""
    targets = {}
    for name in sorted(factors.tensors):
        module, a, _ = name.partition(".lora_A.weight")
        if a:
            targets[f"{module.removeprefix(_PREFIX)}.weight"] = (name, f"{module}.lora_B.weight")
    unread = sorted(set(factors.tensors) - {factor for pair in targets.values() for factor in pair})
    if unread or not targets:
        raise SourceError(f"{adapter} is not a plain LoRA: it holds {unread[0] if unread else 'nothing'}")
    for target, (a, b) in targets.items():
        if target not in base.tensors:
            raise SourceError(f"{adapter} adapts {target}, which {base.folder} does not have: is it of another base?")
        down, up = factors.tensors[a].shape, factors.tensors[b].shape if b in factors.tensors else ()
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or (up[0], down[1]) != base.tensors[target].shape:
            raise SourceError(
                f"{adapter} adapts {target} by {up} times {down}, and in {base.folder} it is "
                f"{base.tensors[target].shape}: is it of another base?"
            )
    return targets


def _scale(adapter: Path) -> float:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        scale = float(config["lora_alpha"]) / float(config["r"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as exc:
        raise SourceError(f"{adapter} has no readable adapter_config.json: is it a PEFT LoRA?") from exc
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or unsupported:
        raise SourceError(f"{adapter} is not a plain LoRA ({', '.join(unsupported) or config.get('peft_type')})")
    return scale
