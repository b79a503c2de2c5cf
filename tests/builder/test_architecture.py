"""Families: what one merge may mix, told from config.json and headers as real repositories write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import random_tensors, write_model

from builder.architecture import family_key, part
from builder.checkpoints import Checkpoint


def model(folder: Path, rows: int = 10, **config: Any) -> Checkpoint:
    return write_model(folder, random_tensors(1, rows), config=config)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 1e6},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-6},
        {"tie_word_embeddings": True},
        {"num_attention_heads": 4},
        {"num_key_value_heads": 1},
        {"architectures": ["MistralForCausalLM"]},
        {"hidden_act": "gelu"},
    ],
)
def test_what_a_merge_must_not_mix_is_another_family(tmp_path: Path, config: dict[str, Any]) -> None:
    assert family_key(model(tmp_path / "a")) != family_key(model(tmp_path / "b", **config))


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": None},
        {"rope_theta": 10000},
        {"rope_theta": None},
        {"rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rms_norm_eps": 9.999999747378752e-06},
        {"torch_dtype": "float16", "use_cache": False, "vocab_size": 32001, "max_position_embeddings": 4096},
    ],
)
def test_the_same_architecture_written_another_way_is_the_same_family(tmp_path: Path, config: dict[str, Any]) -> None:
    assert family_key(model(tmp_path / "a")) == family_key(model(tmp_path / "b", **config))


def test_old_and_new_names_of_rotary_scaling_are_the_same(tmp_path: Path) -> None:
    old = model(tmp_path / "old", rope_scaling={"type": "linear", "factor": 2.0})
    new = model(tmp_path / "new", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})

    assert family_key(old) == family_key(new)


def test_added_tokens_do_not_leave_the_family_and_other_shapes_do(tmp_path: Path) -> None:
    first = family_key(model(tmp_path / "a", rows=10))
    wider = {**random_tensors(1), "model.layers.0.mlp.gate_proj.weight": np.ones((16, 8), np.float32)}

    assert family_key(model(tmp_path / "b", rows=13)) == first
    assert family_key(write_model(tmp_path / "c", wider)) != first


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (8, 8), "attention"),
        ("transformer.h.3.attn.c_attn.weight", (24, 8), "attention"),
        ("model.layers.3.mlp.down_proj.weight", (8, 12), "mlp"),
        ("model.layers.3.self_attn.q_proj.bias", (8,), None),
        ("model.layers.3.post_attention_layernorm.weight", (8,), None),
        ("model.embed_tokens.weight", (10, 8), None),
        ("lm_head.weight", (10, 8), None),
    ],
)
def test_similarity_counts_attention_and_mlp_matrices_alone(
    name: str, shape: tuple[int, ...], expected: str | None
) -> None:
    assert part(name, shape) == expected
