from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from composing import SHAPE, compose, expert
from transformers import AutoConfig, DynamicCache, GemmaConfig, LlamaConfig

from composed import ComposedConfig

CHOICES: dict[str, Any] = {"inner": LlamaConfig(**SHAPE), "level": "block", "experts": ["a", "b"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": None}, "needs `inner`"),
        ({"inner": GemmaConfig()}, "'gemma' cannot be composed, only of llama, mistral"),
        ({"inner": {"model_type": "mamba"}}, "'mamba' cannot be composed"),
        ({"inner": {**SHAPE}}, "architecture None"),
        ({"level": "layer"}, "level 'layer' is none of ffn, block, model"),
        ({"routing": "tokens"}, "routing 'tokens' is none of"),
        ({"gate": "cosine"}, "gate 'cosine' is none of"),
        ({"routing": "token"}, "level 'block' cannot be routed by token"),
        ({"level": "model", "routing": "token"}, "level 'model' cannot be routed by token"),
        ({"experts": []}, "experts_per_token is 1, with 0 experts"),
        ({"experts_per_token": 3}, "experts_per_token is 3, with 2 experts"),
        ({"experts_per_token": 0}, "experts_per_token is 0"),
        ({"trunk_layers": 4}, "trunk_layers is 4, the experts have 3 layers"),
        ({"trunk_layers": -1}, "trunk_layers is -1"),
        ({"gate": "mlp"}, "an mlp gate needs its width"),
    ],
)
def test_what_cannot_be_is_refused_in_words(changes: dict[str, Any], message: str) -> None:
    ComposedConfig(**CHOICES)
    with pytest.raises(ValueError, match=message):
        ComposedConfig(**{**CHOICES, **changes})


def test_what_it_does_not_say_the_experts_config_does() -> None:
    config = ComposedConfig(**CHOICES)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "rope_parameters"):
        assert getattr(config, name) == getattr(config.inner, name)
    assert config.get_text_config(decoder=True).num_key_value_heads == 2
    assert len(DynamicCache(config=config).layers) == 3
    with pytest.raises(AttributeError, match="sliding_window"):
        _ = config.sliding_window


@pytest.mark.parametrize(
    ("level", "gate", "routing", "name"),
    [
        ("ffn", "linear", "token", "F-L-T"),
        ("ffn", "mlp", "token", "F-M-T"),
        ("ffn", "linear", "sample", "F-L-S"),
        ("block", "linear", "sample", "B-L-S"),
        ("block", "mlp", "sample", "B-M-S"),
        ("model", "linear", "sample", "M-L-S"),
    ],
)
def test_short_names_are_the_papers(level: str, gate: str, routing: str, name: str) -> None:
    assert compose([expert()], level, gate=gate, routing=routing).config.short_name == name


def test_the_file_holds_the_choices_the_whole_inner_config_and_the_way_to_the_code(tmp_path: Path) -> None:
    ComposedConfig(**CHOICES, trunk_layers=1).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "modelglue_composed"
    assert written["architectures"] == ["ComposedForCausalLM"]
    assert written["auto_map"] == {
        "AutoConfig": "configuration_composed.ComposedConfig",
        "AutoModelForCausalLM": "modeling_composed.ComposedForCausalLM",
    }
    assert written["inner"]["model_type"] == "llama"
    assert written["inner"]["rms_norm_eps"] == 1e-6  # a default too: other versions may have others
    assert "hidden_size" not in written
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is ComposedConfig
    assert read.to_dict() == ComposedConfig(**CHOICES, trunk_layers=1).to_dict() | {"_name_or_path": str(tmp_path)}


def test_the_config_it_was_made_of_stays_as_it_was() -> None:
    inner = LlamaConfig(**SHAPE)
    config = ComposedConfig(**{**CHOICES, "inner": inner}, attn_implementation="eager")
    assert config.inner._attn_implementation == "eager"
    assert inner._attn_implementation is None
