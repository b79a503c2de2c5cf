"""Which models may be merged at all, from config.json and headers alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from builder.checkpoints import Checkpoint

Part = Literal["attention", "mlp", "other"]

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_forward|ffn")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
_BESIDE = {
    *("architectures", "auto_map", "model_type", "_name_or_path", "_commit_hash", "transformers_version"),
    *("dtype", "torch_dtype", "use_cache", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("n_positions", "max_position_embeddings"),
}
"""Keys of a config that do not change what the weights mean."""
_HEAD = re.compile(r"(^|\.)(lm_head|output_projection|embed_out)\.weight$|^(model\.)?output\.weight$")


def family_key(checkpoint: Checkpoint) -> str:
    """Equal for models that one merge may mix (PAPER.md 3): class, shapes, rotary base and scaling, norm eps, tiedness.

    The number of vocabulary rows is left out: real families hold 32000, 32001, 32016 and 32032 rows. Nobody knows what
    code of a model's own makes of its config: there every key counts that may mean something, and the class does not.
    """
    config = checkpoint.config
    shapes = {
        name: list(tensor.shape[1:] if is_vocabulary(name) else tensor.shape)
        for name, tensor in sorted(checkpoint.tensors.items())
    }
    if has_own_code(config):
        said = {key: value for key, value in config.items() if key not in _BESIDE}
        return f"custom-{_digest({'config': said, 'shapes': shapes})}"
    rope, heads = rope_parameters(config), config.get("num_attention_heads")
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
    return f"{(config.get('architectures') or ['unknown'])[0]}-{_digest(facts)}"


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether the model runs by code in its own repository; a tokenizer's code is another matter."""
    own = config.get("auto_map")
    return isinstance(own, dict) and any(name.startswith("AutoModel") for name in own)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


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
    if not _is_matrix(name, shape):
        return None
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else None


def matrices(checkpoint: Checkpoint) -> dict[str, Part]:
    """What similarity compares, by name: attention and MLP matrices; where no name tells them, every matrix."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    known = {name: kind for name, shape in shapes.items() if (kind := part(name, shape))}
    return known or {n: "other" for n, shape in shapes.items() if _is_matrix(n, shape) and not is_vocabulary(n)}


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "norm" not in name
