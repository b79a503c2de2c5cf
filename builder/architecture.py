"""Which models may be merged at all, from config.json and headers alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from builder.checkpoints import Checkpoint

Part = Literal["attention", "mlp"]

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_forward|ffn")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|output_projection|embed_out)\.weight$|^(model\.)?output\.weight$")


def family_key(checkpoint: Checkpoint) -> str:
    """Equal for models that one merge may mix (PAPER.md 3): class, shapes, rotary base and scaling, norm eps, tiedness.

    The number of vocabulary rows is left out: real families hold 32000, 32001, 32016 and 32032 rows.
    """
    config = checkpoint.config
    rope, heads = rope_parameters(config), config.get("num_attention_heads")
    shapes = {
        name: list(tensor.shape[1:] if is_vocabulary(name) else tensor.shape)
        for name, tensor in sorted(checkpoint.tensors.items())
    }
    facts = {
        "class": config.get("architectures"),
        "rope": rope,
        "norm_eps": norm_eps(config),
        "tied": bool(config.get("tie_word_embeddings", False)),
        # Configs from before grouped queries leave the number of key and value heads out.
        "heads": [heads, config.get("num_key_value_heads") or heads],
        "activation": config.get("hidden_act", config.get("activation_function")),
        "shapes": shapes,
    }
    text = json.dumps(facts, sort_keys=True)
    return f"{(config.get('architectures') or ['unknown'])[0]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary base and scaling, from the new key or the old ones; transformers' default base is 10000."""
    facts = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = facts.pop("type", "default")
    theta = facts.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {"rope_type": kind, **facts, "rope_theta": float(theta)}


def context_window(config: Mapping[str, Any]) -> int:
    """Tokens of prompt and answer together."""
    return int(config.get("max_position_embeddings", config.get("n_positions", 2048)))


def norm_eps(config: Mapping[str, Any]) -> str | None:
    """What the norms add to the variance, rounded: GGUF keeps 1e-5 as a float32, 9.99999974e-06."""
    eps = config.get("rms_norm_eps", config.get("layer_norm_eps", config.get("layer_norm_epsilon")))
    return None if eps is None else f"{eps:.6g}"


def is_embedding(name: str) -> bool:
    """Whether a tensor is the table of input embeddings."""
    return _EMBEDDING.search(name) is not None


def is_head(name: str) -> bool:
    """Whether a tensor is the output head."""
    return _HEAD.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row a token."""
    return is_embedding(name) or is_head(name) or name.endswith("lm_head.bias")


def part(name: str, shape: tuple[int, ...]) -> Part | None:
    """Which part of a decoder layer a matrix is of; None for embeddings, head, norms and biases."""
    if len(shape) != 2 or "norm" in name:
        return None
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else None
