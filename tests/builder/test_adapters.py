"""Adapters: base + LoRA is what PEFT makes of them, and an adapter of another base is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import random_tensors, write_model

from builder.checkpoints import Array, Checkpoint
from builder.errors import SourceError
from builder.merge import simple

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
TARGET = "model.layers.0.mlp.gate_proj"


def factors(rows: int = 12, columns: int = 8, rank: int = 2, target: str = TARGET) -> dict[str, Array]:
    rng = np.random.default_rng(4)
    return {
        f"base_model.model.{target}.lora_A.weight": rng.normal(size=(rank, columns)).astype(np.float32),
        f"base_model.model.{target}.lora_B.weight": rng.normal(size=(rows, rank)).astype(np.float32),
    }


def write_adapter(folder: Path, tensors: dict[str, Array], **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}), "utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapted_matrix_is_the_base_plus_the_scaled_product(tmp_path: Path) -> None:
    base, tensors = write_model(tmp_path / "base", random_tensors(1)), factors()
    simple.apply(write_adapter(tmp_path / "lora", tensors), base.folder, tmp_path / "out")

    adapted = Checkpoint(tmp_path / "out")
    down, up = (values.astype(np.float64) for values in tensors.values())
    np.testing.assert_allclose(
        adapted.read(f"{TARGET}.weight"), base.read(f"{TARGET}.weight") + 4.0 * up @ down, atol=1e-5
    )
    for name in set(base.tensors) - {f"{TARGET}.weight"}:
        assert np.array_equal(adapted.read(name), base.read(name)), name
    assert adapted.config == {**base.config, "dtype": "float32"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models, float32: a Llama with biases and a head of its own; a GPT-2, whose matrices are [in, out]."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("bases")
    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(folder / "llama")
    gpt2 = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    return {"llama": folder / "llama", "gpt2": folder / "gpt2"}


LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "every layer": ("llama", {"target_modules": LAYERS}),
    "rank-stabilised": ("llama", {"target_modules": LAYERS, "use_rslora": True}),
    "alpha by module": ("llama", {"target_modules": LAYERS, "alpha_pattern": {"q_proj": 3, r"layers\.1\..*": 20}}),
    "rank by module": (
        "llama",
        {"target_modules": LAYERS, "rank_pattern": {"up_proj": 2, "0.self_attn.q_proj": 6}, "use_rslora": True},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "whole modules": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "biases of all layers": ("llama", {"target_modules": ["v_proj"], "bias": "all"}),
    "biases of adapted layers": ("llama", {"target_modules": ["v_proj"], "bias": "lora_only"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "transposed, rank-stabilised": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True}),
    "drawn from a normal distribution": ("llama", {"target_modules": LAYERS, "init_lora_weights": "gaussian"}),
}


def save(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        model.save_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_makes_of_them(tmp_path: Path, bases: dict[str, Path], kind: str) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = bases[KINDS[kind][0]]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=12, **KINDS[kind][1]))
    torch.manual_seed(4)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in learnt:
            parameter += 0.5 * torch.randn_like(parameter)
    save(model, tmp_path / "lora")

    simple.apply(tmp_path / "lora", base, tmp_path / "out")

    ours, before = Checkpoint(tmp_path / "out"), Checkpoint(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    theirs = {name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()}
    assert ours.tensors == before.tensors
    for name in ours.tensors:
        np.testing.assert_allclose(ours.read(name), theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)
    changed = sum(not np.array_equal(theirs[name], before.read(name)) for name in ours.tensors)
    assert changed == sum(not np.array_equal(ours.read(name), before.read(name)) for name in ours.tensors) > 0


@pytest.mark.parametrize(
    "modules",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "init_lora_weights": False},
    ],
    ids=["as it grew", "trained", "adapted"],
)
def test_a_vocabulary_that_grew_with_the_adapter_is_the_adapters(
    tmp_path: Path, bases: dict[str, Path], modules: dict[str, Any]
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    base.resize_token_embeddings(23, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=4, **modules))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += torch.randn_like(parameter)
    save(model, tmp_path / "lora")

    simple.apply(tmp_path / "lora", bases["llama"], tmp_path / "out")

    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert ours.config.vocab_size == 23
    theirs = model.merge_and_unload().state_dict()
    for name, values in ours.state_dict().items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-5, atol=1e-6)


def test_what_an_adapter_replaces_has_the_dtype_of_its_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_tensors(1), "BF16")
    norm = {"base_model.model.model.norm.weight": np.linspace(1, 2, 8, dtype=np.float32)}
    simple.apply(write_adapter(tmp_path / "lora", {**factors(), **norm}), base.folder, tmp_path / "out")

    merged = Checkpoint(tmp_path / "out")
    assert {tensor.dtype for tensor in merged.tensors.values()} == {"BF16"}
    np.testing.assert_allclose(merged.read("model.norm.weight"), np.linspace(1, 2, 8), rtol=2.0**-8)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            factors(target="model.layers.7.mlp.gate_proj"),
            "adapts model.layers.7.mlp.gate_proj.weight, which .* does not",
        ),
        (factors(rows=16), r"by \(16, 2\) times \(2, 8\), and in .* it is \(12, 8\): is it of another base"),
        (factors(columns=1), r"by \(12, 2\) times \(2, 1\)"),
        (dict([next(iter(factors().items()))]), r"by \(\) times \(2, 8\)"),
        (
            {**factors(), "base_model.model.lm_head.weight": np.ones((10, 2), np.float32)},
            r"replaces lm_head.weight by \(10, 2\), and in .* it is \(10, 8\): is it of another base",
        ),
        (
            {**factors(), "base_model.model.model.norm.weight": np.ones(9, np.float32)},
            r"replaces model.norm.weight by \(9,\), and in .* it is \(8,\)",
        ),
        (
            {**factors(), "base_model.model.stranger.weight": np.ones(9, np.float32)},
            "adapts stranger.weight, which .* does not have",
        ),
        (
            {**factors(), f"base_model.model.{TARGET}.lora_magnitude_vector": np.ones(12, np.float32)},
            "is not a plain LoRA: it holds .*lora_magnitude_vector",
        ),
        ({}, "holds nothing"),
    ],
)
def test_an_adapter_of_another_base_or_kind_is_refused(
    tmp_path: Path, tensors: dict[str, Array], sentence: str
) -> None:
    base = write_model(tmp_path / "base", random_tensors(1))

    with pytest.raises(SourceError, match=sentence):
        simple.apply(write_adapter(tmp_path / "lora", tensors), base.folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"trainable_token_indices": [1]},
        {"lora_bias": True},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"alora_invocation_tokens": [5]},
        # Their factors start with a part of the base, which is taken out of it.
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    base = write_model(tmp_path / "base", random_tensors(1))

    with pytest.raises(SourceError, match=f"is not a plain LoRA .*({next(iter(change))}|IA3)"):
        simple.apply(write_adapter(tmp_path / "lora", factors(), **change), base.folder, tmp_path / "out")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"lora_alpha": "x", "r": 2}', '{"lora_alpha": 1, "r": 0}'])
def test_an_adapter_without_a_readable_config_is_refused(tmp_path: Path, text: str | None) -> None:
    base, lora = write_model(tmp_path / "base", random_tensors(1)), write_adapter(tmp_path / "lora", factors())
    (lora / "adapter_config.json").unlink()
    if text is not None:
        (lora / "adapter_config.json").write_text(text)

    with pytest.raises(SourceError, match=r"no readable adapter_config\.json"):
        simple.apply(lora, base.folder, tmp_path / "out")
