"""Mixtures in the composed layout: what is written, loaded by `composed` and by its own code alike, and its gates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mixable
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import composed
from builder.mix.members import write_mixture
from builder.mix.write import write

SAMPLE = ("F-L-S", "B-L-S", "M-L-S")


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return mixable.experts(tmp_path_factory.mktemp("llamas"))


def load(folder: Path) -> Any:
    model, facts = composed.ComposedForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(facts.values()), facts
    return model.eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def ids(text: str) -> torch.Tensor:
    return torch.tensor([[mixable.WORDS.index(word) for word in text.split()]])


@pytest.mark.parametrize("hybrid", [0, 1])
@pytest.mark.parametrize("mixture", ["F-L-T", *SAMPLE])
@pytest.mark.parametrize("kind", mixable.KINDS)
def test_a_mixture_of_equal_experts_is_the_expert(tmp_path: Path, kind: str, mixture: str, hybrid: int) -> None:
    path = mixable.write(tmp_path / "one", kind)
    listed = [{"source_model": str(path), "positive_prompts": p} for p in mixable.PROMPTS.values()]
    plan = mixable.planned({}, experts=listed, mixture=mixture, hybrid_layers=hybrid, layout="composed")
    write(plan, tmp_path / "out")

    mixed, alone = load(tmp_path / "out"), mixable.load(path)
    one = mixable.tokens(rows=1)
    assert torch.equal(mixable.logits(mixed, one), mixable.logits(alone, one)) or mixture == "F-L-T"
    torch.testing.assert_close(mixable.logits(mixed, one), mixable.logits(alone, one), rtol=1e-4, atol=1e-5)


def test_at_model_level_the_chosen_expert_answers_alone(members: dict[str, Path], tmp_path: Path) -> None:
    write(mixable.planned(members, mixture="M-L-S"), tmp_path / "out")

    mixed = load(tmp_path / "out")
    for number, (name, prompts) in enumerate(mixable.PROMPTS.items()):
        prompt = ids(prompts[0])
        assert mixed.route(prompt).experts.tolist() == [[[number]]]
        assert torch.equal(mixable.logits(mixed, prompt), mixable.logits(mixable.load(members[name]), prompt))


@pytest.mark.parametrize("mixture", ["F-L-T", "F-L-S", "B-L-S"])
def test_every_tensor_is_where_the_layout_has_it(members: dict[str, Path], tmp_path: Path, mixture: str) -> None:
    write(mixable.planned(members, mixture=mixture, hybrid_layers=1), tmp_path / "out")

    mine, own = stored(tmp_path / "out"), load_file(members["code"] / "model.safetensors")
    block = mixture == "B-L-S"
    here = "model.layers.2.experts.1." if block else "model.layers.2.mlp.experts.1."
    there = "model.layers.2." if block else "model.layers.2.mlp."
    parts = [name.removeprefix(there) for name in own if name.startswith(there)]
    assert len(parts) == (9 if block else 3)
    assert all(torch.equal(mine[here + part], own[there + part]) for part in parts)
    assert "model.layers.0.mlp.up_proj.weight" in mine  # the trunk
    assert mine["model.layers.1.gate.weight" if block else "model.layers.1.mlp.gate.weight"].dtype == torch.float32


def test_hybrid_half_merges_the_first_half(members: dict[str, Path], tmp_path: Path) -> None:
    write(mixable.planned(members, mixture="M-L-S", hybrid_layers=True), tmp_path / "out")

    mean = mixable.mean_of([mixable.load(path) for path in members.values()]).state_dict()
    mine = stored(tmp_path / "out")
    trunk = [name for name in mine if name.startswith("model.layers.")]
    assert {name.split(".")[2] for name in trunk} == {"0"}  # of three
    for name in [*trunk, "model.embed_tokens.weight"]:
        torch.testing.assert_close(mine[name], mean[name], rtol=1e-6, atol=1e-7)
    own = load_file(members["story"] / "model.safetensors")
    assert torch.equal(mine["model.experts.2.lm_head.weight"], own["lm_head.weight"])
    assert not any("experts.0.embed_tokens" in name for name in mine)


HOOKS: dict[tuple[str, int], Any] = {
    ("B-L-S", 0): lambda model: list(model.model.layers),
    ("B-L-S", 1): lambda model: list(model.model.layers)[1:],
    ("M-L-S", 1): lambda model: [model.model.layers[1]],
    ("F-L-S", 0): lambda model: [layer.mlp for layer in model.model.layers],
}


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize(("mixture", "hybrid"), HOOKS)
def test_gates_are_the_prompts_difference_in_what_they_will_see(
    members: dict[str, Path], tmp_path: Path, mixture: str, hybrid: int, centre: bool
) -> None:
    write(mixable.planned(members, mixture=mixture, hybrid_layers=hybrid, centre=centre), tmp_path / "out")

    model = mixable.mean_of([mixable.load(path) for path in members.values()])
    mine = stored(tmp_path / "out")
    weights = [mine[name].numpy() for name in sorted(mine) if name.endswith("gate.weight")]
    means = [mine[name].numpy() for name in sorted(mine) if name.endswith("gate.mean")]
    texts = [text for prompts in mixable.PROMPTS.values() for text in prompts]
    hooks = HOOKS[mixture, hybrid]
    per_text = {text: mixable.seen(model, text, hooks) for text in texts}
    firsts = [mixable.seen(model, text.split()[0], hooks) for text in texts]
    assert len(weights) == len(firsts[0])
    for place, (weight, mean) in enumerate(zip(weights, means, strict=True)):
        first = np.mean([each[place] for each in firsts], 0)
        positives = [np.mean([per_text[t][place] for t in prompts], 0) for prompts in mixable.PROMPTS.values()]
        for row, (name, positive) in enumerate(zip(mixable.PROMPTS, positives, strict=True)):
            others = [t for other, prompts in mixable.PROMPTS.items() if other != name for t in prompts]
            expected = positive - np.mean([per_text[t][place] for t in others], 0)
            if centre and mixture != "F-L-S":
                expected -= first * (expected @ first) / (first @ first)
            np.testing.assert_allclose(weight[row], expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean, np.mean(positives, 0) if centre else 0 * mean, rtol=1e-4, atol=1e-5)


def test_a_gate_with_bias_is_zero_half_way(members: dict[str, Path], tmp_path: Path) -> None:
    write(mixable.planned(members, mixture="M-L-S", bias=True), tmp_path / "out")

    mine = stored(tmp_path / "out")
    table = mine["model.embed_tokens.weight"].double()
    vectors = {
        name: torch.stack([table[ids(text)[0]].mean(0) for text in texts]) for name, texts in mixable.PROMPTS.items()
    }
    weight, mean, bias = (mine[f"model.gate.{part}"].double() for part in ("weight", "mean", "bias"))
    for number, name in enumerate(mixable.PROMPTS):
        others = torch.cat([vectors[other] for other in mixable.PROMPTS if other != name])
        half_way = (vectors[name].mean(0) + others.mean(0)) / 2
        assert abs(float(weight[number] @ (half_way - mean) + bias[number])) < 1e-5


@pytest.mark.usefixtures("own_code")
def test_it_loads_elsewhere_by_its_own_code_alone(members: dict[str, Path], tmp_path: Path) -> None:
    write(mixable.planned(members, mixture="B-L-S"), tmp_path / "out")

    program = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True, dtype=torch.float32)
print(model(torch.tensor([[1, 2, 3]])).logits.sum().item())
"""
    found = subprocess.run(
        [sys.executable, "-I", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    here = mixable.logits(load(tmp_path / "out"), torch.tensor([[1, 2, 3]])).sum().item()
    assert float(found.stdout.split()[-1]) == pytest.approx(here, rel=1e-4)


def test_the_config_says_what_was_asked(members: dict[str, Path], tmp_path: Path) -> None:
    write(mixable.planned(members, mixture="B-L-S", hybrid_layers=1, experts_per_token=2), tmp_path / "out")

    said = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert said["inner"]["hidden_size"] == mixable.HIDDEN
    assert "hidden_size" not in said
    config = load(tmp_path / "out").config
    assert (config.short_name, config.experts, config.trunk_layers) == ("B-L-S", ["math", "code", "story"], 1)
    assert config.experts_per_token == 2
    assert (tmp_path / "out" / "modeling_composed.py").exists()


def test_a_mixture_generates(members: dict[str, Path], tmp_path: Path) -> None:
    write(mixable.planned(members, mixture="M-L-S", hybrid_layers=1), tmp_path / "out")

    written = load(tmp_path / "out").generate(ids("sum three"), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 7)


def test_experts_of_different_vocabularies_meet_in_the_union(tmp_path: Path) -> None:
    members = mixable.experts(tmp_path)
    longer = [*mixable.WORDS, "dragon", "castle"]
    members["story"] = mixable.write(tmp_path / "longer", seed=5, vocab_size=len(longer))
    mixable.write_tokenizer(members["story"], longer)
    write(mixable.planned(members, mixture="M-L-S", tokenizer={"source": "union"}), tmp_path / "out")

    mixed = load(tmp_path / "out")
    prompt = torch.tensor([[longer.index(word) for word in ["once", "upon", "a", "dragon"]]])
    assert mixed.route(prompt).experts.tolist() == [[[2]]]
    assert torch.equal(mixable.logits(mixed, prompt), mixable.logits(mixable.load(members["story"]), prompt))
    # An expert that does not know a token reads another's row, and its head's row, not its embeddings'.
    head = stored(tmp_path / "out")["model.experts.0.lm_head.weight"]
    theirs = load_file(members["story"] / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head[-1], theirs[-1])


def test_a_build_mixes_its_experts_by_name(members: dict[str, Path], tmp_path: Path) -> None:
    choices: dict[str, Any] = {"mixture": "M-L-S", "hybrid_layers": "half", "experts_per_token": 2, "seed": 3}
    write_mixture(members, mixable.PROMPTS, tmp_path / "out", **choices)

    config = load(tmp_path / "out").config
    assert (config.experts, config.trunk_layers, config.experts_per_token) == (["math", "code", "story"], 1, 2)
    for name in ("README.md", "spec.yaml"):
        assert str(members["math"].parent) not in (tmp_path / "out" / name).read_text("utf-8")
