"""Families: what one merge may mix, told from config.json and headers as real repositories write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import random_tensors, write_model

from builder.architecture import family_key, matrices, part
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


CUSTOM = {
    "architectures": ["OwnForCausalLM"],
    "model_type": "own",
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    "mup_embeddings_scale": 14.6,
}


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["RenamedForCausalLM"], "model_type": "renamed"},
        {"auto_map": {"AutoModelForCausalLM": "elsewhere--own.RenamedForCausalLM"}},
        {"torch_dtype": "float16", "vocab_size": 13, "_name_or_path": "/home/me/own", "transformers_version": "4.30"},
    ],
)
def test_models_with_code_of_their_own_are_told_by_tensors_and_config_not_by_class(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    first = family_key(model(tmp_path / "a", **CUSTOM))

    assert first.startswith("custom-")
    assert family_key(model(tmp_path / "b", rows=13, **{**CUSTOM, **config})) == first


@pytest.mark.parametrize("config", [{"mup_embeddings_scale": 10.0}, {"rotary_dim": 4}, {"rms_norm_eps": 1e-6}])
def test_any_other_key_of_their_config_may_mean_something(tmp_path: Path, config: dict[str, Any]) -> None:
    first = family_key(model(tmp_path / "a", **CUSTOM))

    assert family_key(model(tmp_path / "b", **{**CUSTOM, **config})) != first


def test_other_tensor_names_are_another_family_whatever_the_class(tmp_path: Path) -> None:
    renamed = {name.replace("gate_proj", "c_fc"): values for name, values in random_tensors(1).items()}

    assert family_key(write_model(tmp_path / "a", renamed, config=CUSTOM)) != family_key(
        model(tmp_path / "b", **CUSTOM)
    )


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["own.OwnTokenizer", None]}, None, "own.py", []])
def test_a_tokenizer_of_its_own_makes_no_other_architecture(tmp_path: Path, auto_map: Any) -> None:
    assert family_key(model(tmp_path / "a", auto_map=auto_map)) == family_key(model(tmp_path / "b"))


def test_the_key_of_a_known_architecture_stays_what_recorded_results_say(tmp_path: Path) -> None:
    assert family_key(model(tmp_path)) == "LlamaForCausalLM-2712655a"


def test_every_matrix_but_vocabulary_and_norms_is_compared_where_no_name_tells(tmp_path: Path) -> None:
    values = np.ones((8, 8), np.float32)
    names = ["wte.weight", "blocks.0.mix", "blocks.0.grow", "blocks.0.norm.scale", "lm_head.weight"]
    tensors = {**dict.fromkeys(names, values), "blocks.0.shift": np.ones(8, np.float32)}

    assert matrices(write_model(tmp_path / "a", tensors)) == {"blocks.0.mix": "other", "blocks.0.grow": "other"}
    assert set(matrices(model(tmp_path / "b")).values()) == {"attention", "mlp"}


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
