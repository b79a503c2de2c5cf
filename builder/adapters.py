"""A PEFT LoRA adapter applied to its base, tensor by tensor: W + (alpha / r) B A (arXiv 2106.09685)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from builder import checkpoints, files
from builder.checkpoints import Array, Checkpoint
from builder.errors import SourceError
from builder.merge.stream import COMPANIONS

_PREFIX = "base_model.model."


def apply(adapter: Path, base: Path, out: Path) -> None:
    """Write base + adapter as a plain model folder, rounded once. Raises SourceError for an adapter of another kind."""
    model = Checkpoint(base)
    with files.whole(out) as folder:
        checkpoints.write(folder, model.tensors, _tensors(adapter, model))
        for name in COMPANIONS:
            if (base / name).exists():
                files.copy(base / name, folder / name)


def _tensors(adapter: Path, base: Checkpoint) -> Iterator[tuple[str, Array]]:
    scale, factors = _scale(adapter), checkpoints.Safetensors(adapter / "adapter_model.safetensors")
    targets = {
        name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in factors.tensors if "lora_A" in name
    }
    foreign = sorted(target for target in targets if f"{target}.weight" not in base.tensors)
    if foreign:
        raise SourceError(f"{adapter} adapts {foreign[0]}, which {base.folder} does not have: is it of another base?")
    for name in base.tensors:
        target = name.removesuffix(".weight")
        values = base.read(name)
        if target in targets:
            down = factors.read(f"{_PREFIX}{target}.lora_A.weight")
            up = factors.read(f"{_PREFIX}{target}.lora_B.weight")
            values += np.float32(scale) * (up @ down)
        yield name, values


def _scale(adapter: Path) -> float:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise SourceError(f"{adapter} has no readable adapter_config.json: is it a PEFT folder?") from exc
    unsupported = [key for key in ("use_dora", "use_rslora", "rank_pattern", "modules_to_save") if config.get(key)]
    if config.get("peft_type") != "LORA" or unsupported:
        raise SourceError(f"{adapter} is not a plain LoRA ({', '.join(unsupported) or config.get('peft_type')})")
    return float(config["lora_alpha"]) / float(config["r"])
