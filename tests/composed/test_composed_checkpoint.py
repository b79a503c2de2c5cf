from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import compose, expert, padded, prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from composed import FILES, ComposedForCausalLM

KINDS = [("ffn", "token"), ("ffn", "sample"), ("block", "sample"), ("model", "sample")]
ELSEWHERE = """
import sys
sys.modules["composed"] = None  # importing it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = load_file(folder + "/inputs")
    save_file({"answer": model.generate(**inputs, max_new_tokens=8, do_sample=False)}, folder + "/answer")
    model.save_pretrained(folder + "/again")
"""


def composition(level: str, routing: str = "sample", tied: bool = False, **choices: Any) -> ComposedForCausalLM:
    return compose([expert(seed, tie_word_embeddings=tied) for seed in range(2)], level, routing=routing, **choices)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trunk", [0, 1])
@pytest.mark.parametrize("gate", ["linear", "mlp"])
@pytest.mark.parametrize(("level", "routing"), KINDS)
def test_what_is_saved_is_loaded_to_the_last_bit(
    level: str, routing: str, gate: str, trunk: int, tied: bool, tmp_path: Path
) -> None:
    model = composition(level, routing, tied, gate=gate, trunk_layers=trunk)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ComposedForCausalLM
    assert not any(info.values())
    with torch.inference_mode():
        assert torch.equal(loaded(**padded(prompts(9, 4))).logits, model(**padded(prompts(9, 4))).logits)
    assert {file.name for file in FILES} < {file.name for file in tmp_path.iterdir()}
    assert (tmp_path / "modeling_composed.py").read_bytes() == FILES[1].read_bytes()


@pytest.mark.parametrize(
    ("level", "tied", "names"),
    [
        ("ffn", False, ["model.norm", "lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.experts.1.up_proj"]),
        ("ffn", True, ["model.layers.1.post_attention_layernorm", "model.layers.2.mlp.gate"]),
        ("block", False, ["model.norm", "lm_head", "model.layers.1.experts.0.self_attn.q_proj", "model.layers.1.gate"]),
        ("block", True, ["model.layers.0.input_layernorm", "model.layers.2.experts.1.mlp.up_proj"]),
        ("model", False, ["model.embed_tokens", "model.gate", "model.experts.1.layers.1.mlp.up_proj"]),
        ("model", False, ["model.layers.0.mlp.up_proj", "model.experts.1.norm", "model.experts.0.lm_head"]),
        ("model", True, ["model.experts.0.layers.2.mlp.gate_proj"]),
    ],
)  # fmt: skip
def test_tensors_have_the_names_of_the_format(level: str, tied: bool, names: list[str], tmp_path: Path) -> None:
    composition(level, tied=tied, trunk_layers=1).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    assert {f"{name}.weight" for name in names} <= written
    assert tied == (not any("lm_head" in name for name in written))
    gates = {name for name in written if ".gate." in name}
    assert {name.rpartition(".")[2] for name in gates} == {"weight", "bias", "mean"}
    assert not any("rotary" in name for name in written)


def test_without_a_trunk_a_tied_experts_head_is_its_own_embedding(tmp_path: Path) -> None:
    composition("model", tied=True).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for own in loaded.model.experts:
        assert own.lm_head.weight is own.embed_tokens.weight
    assert not torch.equal(loaded.model.experts[0].lm_head.weight, loaded.model.experts[1].lm_head.weight)


@pytest.mark.parametrize("gate", ["linear", "mlp"])
@pytest.mark.parametrize("level", ["ffn", "block", "model"])
def test_gates_stay_fp32_whatever_the_rest_is(level: str, gate: str, tmp_path: Path) -> None:
    model = composition(level, gate=gate)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in loaded.named_parameters():
        assert tensor.dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name
        if ".gate." in name:
            assert torch.equal(tensor, model.get_parameter(name))
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - it is no dict
    assert {dtype for name, dtype in dtypes.items() if ".gate." in name} == {"F32"}
    assert {dtype for name, dtype in dtypes.items() if ".gate." not in name} == {"BF16"}
    with torch.inference_mode():
        answers = [each(**padded(prompts(9, 4)), logits_to_keep=1).logits for each in (model, loaded)]
    assert answers[1].dtype == torch.bfloat16
    torch.testing.assert_close(answers[1].float(), answers[0], atol=1.0, rtol=0.1)


def test_elsewhere_it_brings_its_own_code_and_gives_it_on(tmp_path: Path) -> None:
    models = {tmp_path / "-".join(kind): composition(*kind, trunk_layers=1) for kind in KINDS}
    inputs = padded(prompts(9, 4))
    for folder, model in models.items():
        model.save_pretrained(folder)
        save_file(inputs, folder / "inputs")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, *map(str, models)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=120)
    for folder, model in models.items():
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(load_file(folder / "answer")["answer"], expected)
        again = AutoModelForCausalLM.from_pretrained(folder / "again")
        assert torch.equal(again.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


def test_a_tensor_that_is_not_there_or_too_many_is_told(tmp_path: Path) -> None:
    composition("block").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.gate.mean"]
    tensors["model.layers.1.gate.scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.gate.mean"}
    assert set(info["unexpected_keys"]) == {"model.layers.1.gate.scale"}
    assert not loaded.model.layers[1].gate.mean.any()


def test_a_fresh_one_has_random_weights_and_gates_in_fp32() -> None:
    config = composition("block").config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    first, second = (own.self_attn.q_proj.weight for own in model.model.layers[0].experts)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
    gate = model.model.layers[0].gate
    assert gate.weight.dtype == torch.float32
    assert gate.weight.any()
    assert not gate.mean.any()


def test_what_stays_on_one_device_is_named_and_answers_end_where_the_experts_do() -> None:
    model = composition("block")
    assert {"LlamaDecoderLayer", "RoutedBlock"} <= set(model._no_split_modules)
    ends = compose([expert(eos_token_id=7)], "ffn")
    assert ends.generation_config.eos_token_id == 7
    assert ends.generation_config.pad_token_id == 0
