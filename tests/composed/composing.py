"""Tiny random models, and composed ones made of them."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from composed import ComposedConfig, ComposedForCausalLM

VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def expert(seed: int = 0, architecture: str = "llama", **changes: Any) -> Any:
    """A random model of transformers' own."""
    own = {"sliding_window": None} if architecture == "mistral" else {}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture](**{**SHAPE, **own, **changes})).eval()


def compose(
    models: list[Any], level: str, *, gate_scale: float = 1.0, seed: int = 0, **choices: Any
) -> ComposedForCausalLM:
    """The models under one roof, shared tensors from the first; gates are random, or 0 with `gate_scale` 0."""
    if choices.get("gate") == "mlp":
        choices.setdefault("gate_width", 16)
    config = ComposedConfig(
        inner=models[0].config, level=level, experts=[f"expert{e}" for e in range(len(models))], **choices
    )
    composed: Any = ComposedForCausalLM(config).eval()
    sources = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, tensor in composed.state_dict().items():
            if ".gate." in name:
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + crc32(name.encode())))
                # So that the features decide.
                tensor.copy_(gate_scale * noise * (1.0 if name.endswith("weight") else 0.02))
            else:
                tensor.copy_(_source(name, sources))
    return composed


def _source(name: str, sources: list[dict[str, Tensor]]) -> Tensor:
    if ".experts." not in name:
        return sources[0][name]
    before, _, after = name.partition(".experts.")
    number, _, inside = after.partition(".")
    if before == "model":
        inside = inside if inside.startswith("lm_head") else f"model.{inside}"
    else:
        inside = f"{before}.{inside}"
    return sources[int(number)][inside]


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    choose = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=choose).tolist() for length in lengths]


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    longest = max(map(len, rows))
    blank = [[0] * (longest - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    pairs = list(zip(blank, rows, ones, strict=True))
    if side == "left":
        ids, mask = [b + r for b, r, _ in pairs], [b + o for b, _, o in pairs]
    else:
        ids, mask = [r + b for b, r, _ in pairs], [o + b for b, _, o in pairs]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def assert_close(got: Tensor, expected: Tensor) -> None:
    """The same to rounding: to 1e-5 of the largest."""
    assert got.shape == expected.shape
    difference = float((got - expected).abs().max() / expected.abs().max())
    assert difference < 1e-5, difference
