"""Adapters: base + LoRA is what PEFT makes of them, and an adapter of another base is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import random_tensors, write_model

from builder import adapters
from builder.checkpoints import Array, Checkpoint
from builder.errors import SourceError

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
    adapters.apply(write_adapter(tmp_path / "lora", tensors), base.folder, tmp_path / "out")

    adapted = Checkpoint(tmp_path / "out")
    down, up = (values.astype(np.float64) for values in tensors.values())
    np.testing.assert_allclose(
        adapted.read(f"{TARGET}.weight"), base.read(f"{TARGET}.weight") + 4.0 * up @ down, atol=1e-5
    )
    for name in set(base.tensors) - {f"{TARGET}.weight"}:
        assert np.array_equal(adapted.read(name), base.read(name)), name
    assert (tmp_path / "out/config.json").read_bytes() == (base.folder / "config.json").read_bytes()


def test_it_is_what_peft_makes_of_them(tmp_path: Path, micro_zoo: dict[str, Path]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(micro_zoo["base"], dtype=torch.float32)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=layers, init_lora_weights=False))
    peft.save_pretrained(tmp_path / "lora")
    adapters.apply(tmp_path / "lora", micro_zoo["base"], tmp_path / "out")

    ours = Checkpoint(tmp_path / "out")
    theirs = {name: value.numpy() for name, value in peft.merge_and_unload().state_dict().items()}
    changed = 0
    for name in ours.tensors:
        # bf16 keeps 8 bits: rounding to nearest is off by one part in 2^8 at most.
        np.testing.assert_allclose(ours.read(name), theirs[name], rtol=2.0**-8 + 1e-5, atol=1e-7, err_msg=name)
        changed += not np.array_equal(ours.read(name), Checkpoint(micro_zoo["base"]).read(name))
    assert changed == len(layers) * 2


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
            {**factors(), "base_model.model.lm_head.weight": np.ones((2, 2), np.float32)},
            "holds base_model.model.lm_head",
        ),
        ({}, "holds nothing"),
    ],
)
def test_an_adapter_of_another_base_or_kind_is_refused(
    tmp_path: Path, tensors: dict[str, Array], sentence: str
) -> None:
    base = write_model(tmp_path / "base", random_tensors(1))

    with pytest.raises(SourceError, match=sentence):
        adapters.apply(write_adapter(tmp_path / "lora", tensors), base.folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"alpha_pattern": {"q": 3}},
        {"fan_in_fan_out": True},
        {"peft_type": "IA3"},
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    base = write_model(tmp_path / "base", random_tensors(1))

    with pytest.raises(SourceError, match=f"is not a plain LoRA .*({next(iter(change))}|IA3)"):
        adapters.apply(write_adapter(tmp_path / "lora", factors(), **change), base.folder, tmp_path / "out")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"lora_alpha": "x", "r": 2}', '{"lora_alpha": 1, "r": 0}'])
def test_an_adapter_without_a_readable_config_is_refused(tmp_path: Path, text: str | None) -> None:
    base, lora = write_model(tmp_path / "base", random_tensors(1)), write_adapter(tmp_path / "lora", factors())
    (lora / "adapter_config.json").unlink()
    if text is not None:
        (lora / "adapter_config.json").write_text(text)

    with pytest.raises(SourceError, match=r"no readable adapter_config\.json"):
        adapters.apply(lora, base.folder, tmp_path / "out")
