from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from builder.checkpoints import Array, Checkpoint
from builder.errors import MergeError
from builder.merge.align import Axes, apply, match
from builder.zoos.tiny.train import Size, train

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama, one key head a query": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "llama, one key head": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "llama, biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**{**SHAPE, "num_attention_heads": 8}, head_dim=6),
    "qwen2, tied": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3, tied": lambda: Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True),
}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 49]])


def random_model(folder: Path, config: PreTrainedConfig, seed: int) -> Checkpoint:
    """Every tensor random, norms and biases too, which a fresh model has constant."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder)
    return Checkpoint(folder)


def read(model: Checkpoint) -> dict[str, Array]:
    return {name: model.read(name) for name in model.tensors}


def rewritten(model: Checkpoint, tensors: Mapping[str, Array], folder: Path) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_bytes((model.folder / "config.json").read_bytes())
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def aligned(model: Checkpoint, reference: Checkpoint, **options: int) -> dict[str, Array]:
    axes = match(model, reference, **options)
    assert list(axes) == list(model.tensors)
    return {name: apply(values, axes[name]) for name, values in read(model).items()}


def logits(model: Checkpoint) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    with torch.no_grad():
        return loaded(IDS).logits


def likeness(tensors: Mapping[str, Array], reference: Checkpoint) -> float:
    return sum(float(np.sum(values * reference.read(name), dtype=np.float64)) for name, values in tensors.items())


def shuffled(model: Checkpoint, seed: int) -> dict[str, Array]:
    """The model with its units in another order, every tensor by hand."""
    rng, config, old = np.random.default_rng(seed), model.config, read(model)
    h, k = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or config["hidden_size"] // h
    stream = rng.permutation(config["hidden_size"])
    new = dict(old)
    for name in old:
        if name in VOCABULARY:
            new[name] = old[name][:, stream]
        elif name.endswith(("layernorm.weight", "model.norm.weight", "o_proj.bias", "down_proj.bias")):
            new[name] = old[name][stream]
    for i in range(config["num_hidden_layers"]):
        units = rng.permutation(config["intermediate_size"])
        keys = rng.permutation(k)
        queries = [j * (h // k) + q for j in keys for q in rng.permutation(h // k)]
        key_rows = [head * d + e for head in keys for e in range(d)]
        query_rows = [head * d + e for head in queries for e in range(d)]
        outputs = {"self_attn.q": query_rows, "self_attn.k": key_rows, "self_attn.v": key_rows}
        outputs |= {"mlp.gate": units, "mlp.up": units}
        for part, rows in outputs.items():
            name = f"model.layers.{i}.{part}_proj."
            new[name + "weight"] = old[name + "weight"][rows][:, stream]
            if name + "bias" in old:
                new[name + "bias"] = old[name + "bias"][rows]
        for part, columns in (("self_attn.o", query_rows), ("mlp.down", units)):
            name = f"model.layers.{i}.{part}_proj.weight"
            new[name] = old[name][stream][:, columns]
    return new


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return CONFIGS[request.param]()


def test_an_aligned_model_computes_the_same(config: PreTrainedConfig, tmp_path: Path) -> None:
    model, reference = random_model(tmp_path / "a", config, 0), random_model(tmp_path / "b", config, 1)
    tensors = aligned(model, reference)
    for name, values in read(model).items():
        # Of two heads, or one, each may be in its place; what is inside a head must be.
        assert name.endswith(("_norm.weight", ".bias")) or not np.array_equal(values, tensors[name]), name
    torch.testing.assert_close(
        logits(rewritten(model, tensors, tmp_path / "c")),
        logits(model),
        rtol=1e-4,
        atol=1e-5 * logits(model).abs().max(),
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_shuffled_copy_is_put_back_in_order(config: PreTrainedConfig, seed: int, tmp_path: Path) -> None:
    model = random_model(tmp_path / "a", config, seed)
    copy = rewritten(model, shuffled(model, seed), tmp_path / "b")
    torch.testing.assert_close(logits(copy), logits(model), rtol=1e-4, atol=1e-3)  # else the test itself is wrong
    tensors = aligned(copy, model, seed=seed)
    for name, values in read(model).items():
        assert np.array_equal(tensors[name], values), name


def test_key_heads_are_found_by_their_queries_where_they_say_nothing_themselves(tmp_path: Path) -> None:
    model = random_model(
        tmp_path / "a", LlamaConfig(**{**SHAPE, "num_attention_heads": 8, "num_key_value_heads": 4}), 0
    )
    silent = {n: values * np.float32(0) for n, values in read(model).items() if "k_proj" in n or "v_proj" in n}
    model = rewritten(model, read(model) | silent, tmp_path / "b")
    tensors = aligned(rewritten(model, shuffled(model, 0), tmp_path / "c"), model)
    for name, values in read(model).items():
        assert np.array_equal(tensors[name], values), name


def test_units_that_fit_anywhere_stay_where_they_are(tmp_path: Path) -> None:
    model = random_model(tmp_path / "a", CONFIGS["llama"](), 0)
    tensors = read(model)
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name] = tensors[name][:, [0] * 40] if "down" in name else tensors[name][[0] * 40]
    alike = rewritten(model, tensors, tmp_path / "b")
    assert all(index is None for indices in match(model, alike).values() for index in indices)


def test_sums_are_complete_where_they_are_made_in_parts(
    rough: tuple[Checkpoint, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = match(*rough)
    monkeypatch.setattr("builder.merge.align.CHUNK", 64)
    parts = match(*rough)
    assert all(same(whole[name], parts[name]) for name in whole)


def test_branches_of_one_base_stay_as_they_are(micro_zoo: dict[str, Path]) -> None:
    for name in ("math", "code", "base"):
        axes = match(Checkpoint(micro_zoo[name]), Checkpoint(micro_zoo["story"]))
        assert all(index is None for indices in axes.values() for index in indices)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model of the micro zoo's shape, trained from another initialisation."""
    folder = tmp_path_factory.mktemp("stranger") / "base"
    size = Size(hidden=64, layers=2, vocabulary=400, base_steps=60, rows=8, window=48, lr=4e-3)
    train("base", folder, base=None, size=size, seed=11, done=lambda: None)
    return Checkpoint(folder)


def test_independently_trained_models_come_nearer(stranger: Checkpoint, micro_zoo: dict[str, Path]) -> None:
    base = Checkpoint(micro_zoo["base"])
    start, end = likeness(read(stranger), base), likeness(aligned(stranger, base), base)
    assert end > start + 0.1 * likeness(read(base), base)


@pytest.fixture
def rough(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    """Two random models whose vocabulary says next to nothing: the ascent takes several sweeps."""
    pair = []
    for seed in (0, 1):
        model = random_model(tmp_path / f"full {seed}", CONFIGS["llama"](), seed)
        tensors = {name: values * np.float32(0.01) for name, values in read(model).items() if name in VOCABULARY}
        pair.append(rewritten(model, read(model) | tensors, tmp_path / f"rough {seed}"))
    return pair[0], pair[1]


def test_no_sweep_leads_away(rough: tuple[Checkpoint, Checkpoint]) -> None:
    model, reference = rough
    path = [likeness(aligned(model, reference, seed=1, sweeps=n), reference) for n in (1, 2, 3, 4, 100)]
    assert likeness(read(model), reference) < path[0]
    assert path == sorted(path)
    assert len(set(path)) == 5


def test_further_sweeps_mend_what_a_noisy_vocabulary_misled(tmp_path: Path) -> None:
    model, rng = random_model(tmp_path / "a", CONFIGS["llama"](), 0), np.random.default_rng(1)
    copy = rewritten(model, shuffled(model, 1), tmp_path / "b")
    noise = {name: rng.normal(0, 2.4, copy.tensors[name].shape).astype(np.float32) for name in VOCABULARY}
    tensors = read(copy)
    noisy = rewritten(model, tensors | {name: tensors[name] + noise[name] for name in noise}, tmp_path / "c")
    found, right = match(noisy, model), match(copy, model)
    assert all(same(found[name], right[name]) for name in right)
    once = match(noisy, model, sweeps=1)
    assert not all(same(once[name], right[name]) for name in right)


def same(axes: Axes, other: Axes) -> bool:
    return all(a is b is None or np.array_equal(a, b) for a, b in zip(axes, other, strict=True))


def test_no_single_exchange_of_units_improves_the_end(stranger: Checkpoint, micro_zoo: dict[str, Path]) -> None:
    base = Checkpoint(micro_zoo["base"])
    tensors, rng = aligned(stranger, base), np.random.default_rng(0)
    before = likeness(tensors, base)
    for _ in range(100):
        swap = np.arange(192)
        i, j = rng.choice(192, 2, replace=False)
        swap[[i, j]] = j, i
        changed = dict(tensors)
        for part in ("gate", "up"):
            changed[f"model.layers.1.mlp.{part}_proj.weight"] = tensors[f"model.layers.1.mlp.{part}_proj.weight"][swap]
        down = "model.layers.1.mlp.down_proj.weight"
        changed[down] = tensors[down][:, swap]
        assert likeness(changed, base) <= before + 1e-6


def test_a_first_guess_that_makes_it_worse_is_undone(tmp_path: Path) -> None:
    model = random_model(tmp_path / "a", CONFIGS["llama"](), 0)
    tensors = shuffled(model, 3)
    # The layers are in order; the small embedding alone says otherwise.
    misleading = {name: values for name, values in tensors.items() if name == "model.embed_tokens.weight"}
    head = {"lm_head.weight": read(model)["lm_head.weight"] * np.float32(0.01)}
    copy = rewritten(model, read(model) | misleading | head, tmp_path / "b")
    assert likeness(aligned(copy, model, sweeps=1), model) >= likeness(read(copy), model)


def test_a_seed_gives_the_same_order(rough: tuple[Checkpoint, Checkpoint]) -> None:
    once, again, other = (match(*rough, seed=seed) for seed in (0, 0, 1))
    assert all(same(once[name], again[name]) for name in once)
    assert not all(same(once[name], other[name]) for name in once)


def test_a_longer_vocabulary_counts_in_the_rows_that_both_have(tmp_path: Path) -> None:
    model = random_model(tmp_path / "a", CONFIGS["llama"](), 0)
    longer = shuffled(model, 0)
    for name in VOCABULARY:
        longer[name] = np.concatenate([longer[name], np.ones((3, 32), np.float32)])
    tensors = aligned(rewritten(model, longer, tmp_path / "b"), model)
    for name, values in read(model).items():
        assert np.array_equal(tensors[name][: len(values)], values), name


def test_apply_permutes_the_axes_that_have_an_index() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    rows, columns = np.array([1, 0]), np.array([2, 0, 1])
    assert np.array_equal(apply(values, (rows, columns)), values[np.ix_(rows, columns)])
    assert np.array_equal(apply(values, (None, columns)), values[:, columns])
    assert np.array_equal(apply(values, (None, None)), values)


def q_proj(tensors: dict[str, Array], change: Callable[[Array], Array]) -> dict[str, Array]:
    name = "model.layers.1.self_attn.q_proj.weight"
    return {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors | {"model.layers.0.mlp.experts.0.weight": np.ones(3, np.float32)},
            r"b has model\.layers\.0\.mlp\.experts\.0\.weight: alignment knows Llama-like decoders",
        ),
        (
            lambda tensors: {name: values for name, values in tensors.items() if "1.mlp.up" not in name},
            r"b has no model\.layers\.1\.mlp\.up_proj\.weight: alignment knows",
        ),
        (
            lambda tensors: q_proj(tensors, lambda values: values[:-8]),
            r"model\.layers\.1\.self_attn\.q_proj\.weight of b is \(24, 32\), which does not fit",
        ),
        (
            lambda tensors: q_proj(tensors, lambda values: values[:, :-1]),
            r"model\.layers\.1\.self_attn\.q_proj\.weight of b is \(32, 31\), which does not fit",
        ),
        (lambda tensors: q_proj(tensors, lambda values: values[0]), r"q_proj\.weight of b is \(32,\)"),
        (
            lambda tensors: tensors | {"model.layers.0.mlp.up_proj.bias": np.ones(40, np.float32)},
            r"model\.layers\.0\.mlp\.up_proj\.bias is in b alone",
        ),
        (
            lambda tensors: {name: values for name, values in tensors.items() if name != "lm_head.weight"},
            r"lm_head\.weight is in a alone",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Array]], dict[str, Array]], sentence: str, tmp_path: Path
) -> None:
    model = random_model(tmp_path / "a", CONFIGS["llama"](), 0)
    other = rewritten(model, change(read(model)), tmp_path / "b")
    with pytest.raises(MergeError, match=sentence):
        match(model, other)
    with pytest.raises(MergeError, match=sentence):
        match(other, model)


@pytest.mark.parametrize(
    ("heads", "sentence"),
    [
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "units of"),
        ({"num_attention_heads": None}, "gives None query heads"),
        ({"num_attention_heads": 3}, "gives 3 query heads and 2 key heads"),
    ],
)
def test_other_heads_in_matrices_of_the_same_shape_are_refused(
    heads: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    model = random_model(tmp_path / "a", CONFIGS["llama"](), 0)
    other = rewritten(model, read(model), tmp_path / "b")
    other.config.update(heads)
    with pytest.raises(MergeError, match=sentence):
        match(model, other)


def test_no_sweeps_are_refused(micro_zoo: dict[str, Path]) -> None:
    base = Checkpoint(micro_zoo["base"])
    with pytest.raises(MergeError, match="0 sweeps align nothing"):
        match(base, base, sweeps=0)
