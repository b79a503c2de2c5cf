"""Mixtures in the standard layouts: exact against transformers' own classes and a mixture computed token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixable
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from builder.errors import MixError
from builder.mix.write import write

CLASSES = {"llama": "MixtralForCausalLM", "qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}
GATES = {"llama": "block_sparse_moe.gate.weight", "qwen2": "mlp.gate.weight", "qwen3": "mlp.gate.weight"}


@pytest.fixture(scope="module")
def llamas_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return mixable.experts(tmp_path_factory.mktemp("llamas"))


def gates(out: Path, kind: str) -> list[torch.Tensor]:
    stored = load_file(out / "model.safetensors")
    return [stored[f"model.layers.{i}.{GATES[kind]}"] for i in range(mixable.LAYERS)]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", mixable.KINDS)
def test_a_mixture_is_its_experts_mlps_behind_the_gates(tmp_path: Path, kind: str, k: int) -> None:
    members = mixable.experts(tmp_path, kind)
    write(mixable.planned(members, experts_per_token=k), tmp_path / "out")

    mixed, dense = mixable.load(tmp_path / "out"), [mixable.load(path) for path in members.values()]
    expected = mixable.reference(mixable.mean_of(dense), dense, gates(tmp_path / "out", kind), k)

    assert type(mixed).__name__ == CLASSES[kind]
    ids = mixable.tokens()
    torch.testing.assert_close(mixable.logits(mixed, ids), mixable.logits(expected, ids), rtol=1e-4, atol=1e-4)


def test_mixtral_has_the_names_that_its_authors_published(llamas_of: dict[str, Path], tmp_path: Path) -> None:
    write(mixable.planned(llamas_of), tmp_path / "out")

    stored, dense = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(llamas_of["code"] / "model.safetensors"),
    )
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    here = "model.layers.2.block_sparse_moe"
    layer = {name for name in stored if name.startswith(here)}
    assert layer == {f"{here}.gate.weight", *(f"{here}.experts.{e}.w{w}.weight" for e in range(3) for w in (1, 2, 3))}
    for part, w in names.items():
        assert torch.equal(stored[f"{here}.experts.1.{w}.weight"], dense[f"model.layers.2.mlp.{part}.weight"])


@pytest.mark.parametrize("kind", mixable.KINDS)
def test_a_mixture_of_equal_experts_is_the_expert(tmp_path: Path, kind: str) -> None:
    path = mixable.write(tmp_path / "one", kind)
    spec = {"experts": [{"source_model": str(path), "positive_prompts": p} for p in mixable.PROMPTS.values()]}
    write(mixable.planned({"math": path}, **spec), tmp_path / "out")

    mixed, alone = mixable.load(tmp_path / "out"), mixable.load(path)
    many = mixable.tokens()
    torch.testing.assert_close(mixable.logits(mixed, many), mixable.logits(alone, many), rtol=1e-5, atol=1e-5)
    # In fp32 the last bits are those of the product that a processor has for so many outputs.
    mixed.set_experts_implementation("eager")
    exact = mixable.logits(mixed.double(), many), mixable.logits(alone.double(), many)
    torch.testing.assert_close(*exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", mixable.KINDS)
def test_all_experts_behind_equal_gates_are_averaged(tmp_path: Path, kind: str) -> None:
    members = mixable.experts(tmp_path, kind)
    write(mixable.planned(members, experts_per_token=3), tmp_path / "out")

    mixed, dense = mixable.load(tmp_path / "out"), [mixable.load(path) for path in members.values()]
    for layer in mixed.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    states = torch.randn(1, 5, mixable.HIDDEN)
    with torch.no_grad():
        for i, layer in enumerate(mixed.model.layers):
            mean = torch.stack([member.model.layers[i].mlp(states) for member in dense]).mean(0)
            torch.testing.assert_close(layer.mlp(states), mean, rtol=1e-4, atol=1e-5)


def test_a_base_gives_what_the_experts_share(llamas_of: dict[str, Path], tmp_path: Path) -> None:
    base = mixable.write(tmp_path / "base", seed=9)
    write(mixable.planned(llamas_of, base_model=str(base)), tmp_path / "out")

    stored, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    shared = [name for name in own if ".mlp." not in name]
    assert len(shared) == 3 + 6 * mixable.LAYERS
    assert all(torch.equal(stored[name], own[name]) for name in shared)


def test_without_a_base_the_experts_share_their_mean(llamas_of: dict[str, Path], tmp_path: Path) -> None:
    write(mixable.planned(llamas_of), tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    mean = mixable.mean_of([mixable.load(path) for path in llamas_of.values()]).state_dict()
    for name in mean:
        if ".mlp." not in name:
            torch.testing.assert_close(stored[name], mean[name], rtol=1e-6, atol=1e-7)


def reference_gates(model: Any, folded: bool) -> np.ndarray:
    """[layers, experts, hidden] by numpy from hidden states that hooks saw, each prompt alone."""
    per_text = {
        text: mixable.seen(model, text, lambda model: [layer.mlp for layer in model.model.layers])
        for texts in mixable.PROMPTS.values()
        for text in texts
    }
    found = []
    for i in range(mixable.LAYERS):
        means = {name: np.mean([per_text[t][i] for t in texts], 0) for name, texts in mixable.PROMPTS.items()}
        common, rows = np.mean(list(means.values()), 0), []
        for name in mixable.PROMPTS:
            others = [per_text[t][i] for other, texts in mixable.PROMPTS.items() if other != name for t in texts]
            row = means[name] - np.mean(others, 0)
            row = row - common * (row @ common) / (common @ common) if folded else row
            rows.append(row / np.linalg.norm(row))
        found.append(rows)
    return np.array(found)


@pytest.mark.parametrize("centre", [True, False])
def test_gates_are_the_prompts_difference_in_what_the_mlps_see(
    llamas_of: dict[str, Path], tmp_path: Path, centre: bool
) -> None:
    write(mixable.planned(llamas_of, centre=centre), tmp_path / "out")

    model = mixable.mean_of([mixable.load(path) for path in llamas_of.values()])
    mine = np.array([gate.numpy() for gate in gates(tmp_path / "out", "llama")])
    np.testing.assert_allclose(mine, reference_gates(model, folded=centre), rtol=1e-4, atol=1e-5)


def test_cheap_embed_gates_see_the_token_embeddings_in_every_layer(llamas_of: dict[str, Path], tmp_path: Path) -> None:
    base = mixable.write(tmp_path / "base", seed=9)
    write(mixable.planned(llamas_of, base_model=str(base), gate_mode="cheap_embed", centre=False), tmp_path / "out")

    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double().numpy()
    mean = [
        np.mean([table[[mixable.WORDS.index(w) for w in t.split()]].mean(0) for t in texts], 0)
        for texts in mixable.PROMPTS.values()
    ]
    others = [t for name, texts in mixable.PROMPTS.items() if name != "math" for t in texts]
    row = mean[0] - np.mean([table[[mixable.WORDS.index(w) for w in t.split()]].mean(0) for t in others], 0)
    for gate in gates(tmp_path / "out", "llama"):
        np.testing.assert_allclose(gate[0].numpy(), row / np.linalg.norm(row), rtol=1e-4, atol=1e-5)


def test_mergekits_own_file_runs_unchanged(llamas_of: dict[str, Path], tmp_path: Path) -> None:
    base = mixable.write(tmp_path / "base", seed=9)
    listed = [
        {"source_model": str(path), "positive_prompts": mixable.PROMPTS[name], "negative_prompts": ["the a of"]}
        for name, path in llamas_of.items()
    ]
    plan = mixable.planned({}, experts=listed, base_model=str(base), gate_mode="hidden", dtype="bfloat16")
    write(plan, tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.bfloat16}
    mixed = mixable.load(tmp_path / "out")
    assert mixed.config.num_experts_per_tok == 2
    assert any("gate_mode hidden" in note for note in plan.notes)


def test_random_gates_depend_on_the_seed_alone(llamas_of: dict[str, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(mixable.planned(llamas_of, gate="random", seed=seed), tmp_path / name)

    a, b, c = (torch.stack(gates(tmp_path / name, "llama")) for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert abs(float(a.std()) - 1) < 0.2


def test_residual_scale_multiplies_what_an_experts_mlps_add(llamas_of: dict[str, Path], tmp_path: Path) -> None:
    listed = [{"source_model": str(path), "positive_prompts": mixable.PROMPTS[n]} for n, path in llamas_of.items()]
    listed[1]["residual_scale"] = 0.5
    write(mixable.planned({}, experts=listed), tmp_path / "out")

    stored, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(llamas_of["code"] / "model.safetensors")
    here = "model.layers.0.block_sparse_moe.experts.1"
    assert torch.equal(stored[f"{here}.w2.weight"], own["model.layers.0.mlp.down_proj.weight"] / 2)
    assert torch.equal(stored[f"{here}.w1.weight"], own["model.layers.0.mlp.gate_proj.weight"])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_shared_expert_answers_beside_the_chosen_ones(tmp_path: Path, kind: str) -> None:
    members = mixable.experts(tmp_path, kind)
    common = mixable.write(tmp_path / "common", kind, seed=7)
    shared = [{"source_model": str(common), "positive_prompts": ["what of the"]}]
    write(mixable.planned(members, shared_experts=shared), tmp_path / "out")

    mixed = mixable.load(tmp_path / "out")
    assert type(mixed).__name__ == "Qwen2MoeForCausalLM"
    dense, own = mixable.load(members["math"]), mixable.load(common)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    states = torch.randn(1, 5, mixable.HIDDEN)
    for i, layer in enumerate(mixed.model.layers):
        with torch.no_grad():
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[0] = 1e3 * states.mean(dim=(0, 1))
            expert = torch.stack([dense.model.layers[i].mlp(states)])[0]
            gate = stored[f"model.layers.{i}.mlp.shared_expert_gate.weight"]
            beside = torch.sigmoid(states @ gate.T) * own.model.layers[i].mlp(states)
            mine = layer.mlp(states)
        chosen = (states @ layer.mlp.gate.weight[0]) > 0
        assert chosen.any()
        torch.testing.assert_close(mine[chosen], (expert + beside)[chosen], rtol=1e-4, atol=1e-5)


def test_a_window_of_attention_is_kept(tmp_path: Path) -> None:
    members = mixable.experts(tmp_path, "mistral", sliding_window=4)
    write(mixable.planned(members), tmp_path / "out")

    mixed, dense = mixable.load(tmp_path / "out"), [mixable.load(path) for path in members.values()]
    expected = mixable.reference(mixable.mean_of(dense), dense, gates(tmp_path / "out", "llama"), 1)
    ids = mixable.tokens(length=16)
    torch.testing.assert_close(mixable.logits(mixed, ids), mixable.logits(expected, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
)
def test_rotary_settings_are_kept(tmp_path: Path, rope: dict[str, Any]) -> None:
    members = mixable.experts(tmp_path, rope_parameters=rope)
    write(mixable.planned(members), tmp_path / "out")

    mixed, one = mixable.load(tmp_path / "out"), mixable.load(members["math"])
    assert torch.equal(mixed.model.rotary_emb.inv_freq, one.model.rotary_emb.inv_freq)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    members = mixable.experts(tmp_path, tie_word_embeddings=True)
    write(mixable.planned(members), tmp_path / "out")

    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    mixed = mixable.load(tmp_path / "out")
    assert mixed.lm_head.weight is mixed.model.embed_tokens.weight


def test_biases_that_mixtral_has_no_place_for_are_refused_by_name(tmp_path: Path) -> None:
    members = mixable.experts(tmp_path, attention_bias=True)

    with pytest.raises(MixError, match=r"Mixtral has no place for model\.layers\.\d\.self_attn\.\w+\.bias: say layout"):
        mixable.planned(members)
