"""Model folders of a few hundred bytes, shaped like a Llama, written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from builder import checkpoints
from builder.checkpoints import Array, Checkpoint, Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}


def random_tensors(seed: int, rows: int = 10, layers: int = 1, width: int = 8) -> dict[str, Array]:
    """Decoder layers, embeddings and head of `rows` tokens; magnitudes from 0.5 to 2, signs mixed."""
    rng = np.random.default_rng(seed)
    inner = width * 3 // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (width, width),
            f"model.layers.{layer}.self_attn.o_proj.weight": (width, width),
            f"model.layers.{layer}.mlp.gate_proj.weight": (inner, width),
            f"model.layers.{layer}.mlp.down_proj.weight": (width, inner),
            f"model.layers.{layer}.input_layernorm.weight": (width,),
        }
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (rows, width)}
    return {
        name: (rng.uniform(0.5, 2.0, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_model(
    folder: Path, tensors: Mapping[str, Array], dtype: str = "F32", config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A model folder with these tensors, opened; `config` changes single keys."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}), "utf-8")
    layout = {name: Tensor(dtype, values.shape) for name, values in tensors.items()}
    checkpoints.write(folder, layout, iter(tensors.items()))
    return Checkpoint(folder)


def reference_model(folder: Path, tensors: Mapping[str, Array]) -> None:
    """The same by the safetensors library alone, for tests of the reader."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    save_file(dict(tensors), folder / "model.safetensors")
