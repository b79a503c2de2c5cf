"""`builder mix` as a user meets it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixable
import pytest
import torch
import yaml
from command_line import Run
from safetensors.torch import load_file, save_file

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llamas")
    mixable.write(folder / "base", seed=9)
    return mixable.experts(folder)


@pytest.fixture
def spec(members: dict[str, Path], tmp_path: Path) -> Write:
    def write(**more: Any) -> Path:
        file = tmp_path / "spec.yaml"
        file.write_text(mixable.said(members, **more), "utf-8")
        return file

    return write


def test_a_mixture_says_what_it_wrote(run: Run, spec: Write, tmp_path: Path) -> None:
    result = run("mix", spec(), tmp_path / "out")

    assert result.code == 0
    # 2 of the vocabulary, the norm, and by layer 6 shared, 9 experts' and the gate
    assert f"{tmp_path}/out is written: {3 + 3 * (6 + 9 + 1)} tensors" in result.out
    assert "note: negative prompts are the other experts' positive ones" in result.err
    assert {"config.json", "tokenizer.json", "README.md", "spec.yaml"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_the_same_spec_gives_the_same_bytes(run: Run, spec: Write, tmp_path: Path) -> None:
    for name in "ab":
        run("mix", spec(mixture="B-L-S"), tmp_path / name)

    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()} for name in "ab")
    assert a == b


def test_the_card_names_inputs_and_no_path_of_this_machine_but_the_specs(
    run: Run, spec: Write, members: dict[str, Path], tmp_path: Path
) -> None:
    run("mix", spec(), tmp_path / "out")

    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "# A F-L-T mixture of math, code, story" in card
    assert card.count("| model.safetensors | `") == 3
    assert str(tmp_path) not in card.replace(str(members["math"].parent), "")


def test_a_plan_tells_where_every_tensor_is_from(run: Run, spec: Write, tmp_path: Path) -> None:
    result = run("mix", spec(), tmp_path / "out", "--plan")

    rows = {words[0]: " ".join(words[1:]) for line in result.out.splitlines() if (words := line.split())}
    moe = "model.layers.0.block_sparse_moe"
    assert rows[f"{moe}.experts.1.w1.weight"].startswith("48x32 float32 passthrough of 2:model.layers.0.mlp.gate_proj")
    assert rows["model.norm.weight"].startswith("32 float32 linear of 1, 2, 3 weight [1, 1, 1]")
    assert rows[f"{moe}.gate.weight"] == "3x32 float32 gate of the prompts"
    assert not (tmp_path / "out").exists()


def test_a_plan_for_programs_is_json(run: Run, spec: Write) -> None:
    facts = json.loads(run("mix", spec(mixture="M-L-S"), "--plan", "--json").out)

    made = {each["tensor"]: each["shape"] for each in facts["made"]}
    assert made == {"model.gate.weight": [3, 32], "model.gate.mean": [32], "model.gate.bias": [3]}
    assert facts["written"] > facts["read"]


def test_a_result_for_programs_is_json(run: Run, spec: Write, tmp_path: Path) -> None:
    facts = json.loads(run("mix", spec(gate="random"), tmp_path / "out", "--json").out)
    assert facts["tensors"] == 51
    assert facts["warnings"] == []


def test_a_stack_is_written_and_printed_as_a_recipe(run: Run, members: dict[str, Path], tmp_path: Path) -> None:
    listed = [{"source_model": str(members[name])} for name in ("math", "code")]
    file = tmp_path / "stack.yaml"
    file.write_text(yaml.safe_dump({"experts": listed, "stack": {"drop": [1, 2]}}), "utf-8")

    printed = run("mix", file, "--recipe").out
    (tmp_path / "recipe.yaml").write_text(printed, "utf-8")
    assert run("mix", file, tmp_path / "mixed").code == 0
    assert run("merge", tmp_path / "recipe.yaml", tmp_path / "merged").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mixed", "merged")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "mixed" / "config.json").read_text("utf-8"))["num_hidden_layers"] == 4


def test_mlp_gates_are_trained_on_the_data_that_is_given(run: Run, spec: Write, tmp_path: Path) -> None:
    rows = [{"prompt": "sum three", "completion": " plus seven"}, {"text": "once upon a time"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")

    result = run("mix", spec(mixture="M-M-S"), tmp_path / "out", "--data", tmp_path / "data.jsonl")
    assert result.code == 0
    assert "model.gate.up.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_folder_that_is_there_is_replaced_only_when_told(run: Run, spec: Write, tmp_path: Path) -> None:
    run("mix", spec(), tmp_path / "out")
    refused = run("mix", spec(), tmp_path / "out")
    assert (refused.code, "exists: choose another folder, or replace it with --overwrite" in refused.err) == (1, True)
    assert run("mix", spec(mixture="B-L-S"), tmp_path / "out", "--overwrite").code == 0
    assert (tmp_path / "out" / "modeling_composed.py").exists()


def test_a_mixture_that_fails_leaves_nothing(
    run: Run, spec: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builder.checkpoints.os.pwrite", full)
    result = run("mix", spec(), tmp_path / "out")
    assert result.code == 1
    assert "make room" in result.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "error: give the folder to write: builder mix SPEC.yaml OUT"),
        (["--recipe"], "error: --recipe prints what a stack is as a recipe, and this is a mixture"),
        (["out", "--data", "x.jsonl"], "error: --data trains MLP gates, and this has none"),
        (["out", "--allow-mismatch", "ropes"], "error: --allow-mismatch ropes: what may differ is one of class, rope"),
        (["out", "--shard-size", "many"], "error: --shard-size many: give a size such as 5GB"),
    ],
)
def test_a_command_that_cannot_be_followed_is_told(run: Run, spec: Write, words: list[str], sentence: str) -> None:
    result = run("mix", spec(), *words)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith(sentence)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "differ in rope: rope_type default"),
    "eps": ({"rms_norm_eps": 1e-3}, "differ in norm: 1e-06 and 0.001"),
    "depth": ({"num_hidden_layers": 2}, "has 2: say with slices|layers"),
    "width": ({"intermediate_size": 64}, "they do not mix"),
    "rows": ({"vocab_size": 40}, "the vocabularies differ: "),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("based", [False, True])
def test_models_that_do_not_fit_are_refused(
    run: Run, members: dict[str, Path], tmp_path: Path, case: str, based: bool
) -> None:
    config, sentence = OTHERS[case]
    odd = mixable.write(tmp_path / "odd", seed=5, **config)
    more = {"base_model": str(members["math"].parent / "base")} if based else {}
    file = tmp_path / "spec.yaml"
    file.write_text(mixable.said({**members, "story": odd}, mixture="M-L-S", **more), "utf-8")

    result = run("mix", file, tmp_path / "out")
    assert result.code == 1
    assert any(each in result.err for each in sentence.split("|")), result.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("quantization_config", {"quant_method": "gptq"}, "is quantised (gptq): merge the model it was made from"),
        ("auto_map", {"AutoModelForCausalLM": "x.Y"}, "runs by its own code, which cannot be mixed"),
        ("model_type", "gemma", "gemma models are not mixed here, only llama, mistral, qwen2, qwen3 ones"),
    ],
)
def test_models_of_another_kind_are_refused_by_name(
    run: Run, members: dict[str, Path], tmp_path: Path, key: str, value: Any, sentence: str
) -> None:
    odd = {}
    for name in members:
        odd[name] = mixable.write(tmp_path / name)
        said = json.loads((odd[name] / "config.json").read_text("utf-8"))
        (odd[name] / "config.json").write_text(json.dumps({**said, key: value}), "utf-8")
    file = tmp_path / "spec.yaml"
    file.write_text(mixable.said(odd), "utf-8")

    result = run("mix", file, tmp_path / "out")
    assert result.code == 1
    assert sentence in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("mixture", ["F-L-T", "M-M-S"])
def test_an_expert_may_be_an_adapter_on_its_base(
    run: Run, members: dict[str, Path], tmp_path: Path, mixture: str
) -> None:
    torch.manual_seed(4)
    part, lora = "model.layers.1.mlp.up_proj", tmp_path / "lora"
    down, up = torch.randn(2, 32), torch.randn(48, 2)
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}), "utf-8")
    names = {f"base_model.model.{part}.lora_A.weight": down, f"base_model.model.{part}.lora_B.weight": up}
    save_file(names, lora / "adapter_model.safetensors")
    adapted = {**members, "code": Path(f"{members['math']}+{lora}")}
    (tmp_path / "spec.yaml").write_text(mixable.said(adapted, mixture=mixture), "utf-8")

    result = run("mix", tmp_path / "spec.yaml", tmp_path / "out")

    assert result.code == 0, result.err
    standard = mixture == "F-L-T"
    mine = "model.layers.1.block_sparse_moe.experts.1.w3" if standard else "model.experts.1.layers.1.mlp.up_proj"
    base = load_file(members["math"] / "model.safetensors")[f"{part}.weight"]
    stored = load_file(tmp_path / "out" / "model.safetensors")[f"{mine}.weight"]
    torch.testing.assert_close(stored, base + 3 * up @ down, rtol=1e-5, atol=1e-5)
