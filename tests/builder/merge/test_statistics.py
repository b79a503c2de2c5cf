from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from builder.checkpoints import Checkpoint
from builder.errors import CheckpointError, MergeError
from builder.merge.statistics import KEY, Statistics, measure, read_texts

TEXTS = [
    "Question: Ann has 12 apples and gets 7 more. How many now?",
    "Once upon a time there was a shy fox who lived near the lake. It had a red kite.",
    "def add(x, y):\n    return x + y",
]


@pytest.fixture(scope="module")
def untied(micro_zoo: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a head and biases of its own."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in micro_zoo["base"].glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def regmean(micro_zoo: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    out = tmp_path_factory.mktemp("regmean") / "math.safetensors"
    measure(micro_zoo["math"], TEXTS, out, kind="regmean")
    return Statistics(out)


def load(folder: Path) -> tuple[Any, Any]:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def closeness(values: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, of the largest value."""
    return float(np.abs(values - expected).max() / np.abs(expected).max())


def gram(folder: Path, name: str, texts: Sequence[str]) -> np.ndarray:
    """X^T X / n at a layer's input, in float64."""
    model, tokenizer = load(folder)
    inputs: list[torch.Tensor] = []
    model.double().get_submodule(name.removesuffix(".weight")).register_forward_hook(
        lambda _, args, __: inputs.append(args[0][0].detach())
    )
    for text in texts:
        model(**tokenizer(text, return_tensors="pt"))
    x = torch.cat(inputs).numpy()
    return np.einsum("ni,nj->ij", x, x) / len(x)


@pytest.mark.parametrize("part", ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_regmean_holds_the_mean_outer_product_of_a_layers_inputs(
    part: str, regmean: Statistics, micro_zoo: dict[str, Path]
) -> None:
    name = f"model.layers.1.{part}.weight"
    assert closeness(regmean.read(name), gram(micro_zoo["math"], name, TEXTS)) < 1e-5


def test_regmean_knows_every_linear_layer_and_nothing_else(regmean: Statistics, micro_zoo: dict[str, Path]) -> None:
    tensors = Checkpoint(micro_zoo["math"]).tensors
    linear = {name for name in tensors if "_proj" in name}
    assert regmean.tensors.keys() == linear
    assert all(regmean.tensors[name].shape == (tensors[name].shape[1],) * 2 for name in linear)


def test_regmean_knows_a_head_that_is_not_tied(untied: Path, tmp_path: Path) -> None:
    measure(untied, TEXTS, tmp_path / "s", kind="regmean", max_tokens=64)
    expected = gram(untied, "lm_head.weight", TEXTS)
    assert closeness(Statistics(tmp_path / "s").read("lm_head.weight"), expected) < 1e-5


def test_layers_that_share_an_input_share_what_is_stored(regmean: Statistics) -> None:
    layer = "model.layers.0."
    assert regmean.locate(layer + "self_attn.v_proj.weight") == layer + "self_attn.q_proj.weight"
    assert regmean.locate(layer + "mlp.up_proj.weight") == layer + "mlp.gate_proj.weight"
    assert regmean.locate(layer + "self_attn.o_proj.weight") == layer + "self_attn.o_proj.weight"
    assert len(load_file(regmean.path)) == 8
    assert len(regmean.tensors) == 14
    up, gate = (regmean.read(f"{layer}mlp.{part}_proj.weight") for part in ("up", "gate"))
    assert np.array_equal(up, gate)


def sampled(model: Any, ids: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    with torch.no_grad():
        return torch.multinomial(model(ids).logits[0].softmax(-1), 1, generator=draws)[:, 0]


def expected_fisher(folder: Path, seed: int) -> dict[str, np.ndarray]:
    model, tokenizer = load(folder)
    sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    draws, tokens = torch.Generator().manual_seed(seed), 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        labels = sampled(model, ids, draws)

        def log_likelihood(parameters: Any, ids: Any = ids, labels: Any = labels) -> Any:
            logits = torch.func.functional_call(model, parameters, (ids,)).logits[0]
            return -torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

        gradients = torch.func.grad(log_likelihood)(dict(model.named_parameters()))
        sums = {name: value + gradients[name] ** 2 for name, value in sums.items()}
        tokens += len(labels)
    return {name: (value / tokens).detach().numpy() for name, value in sums.items()}


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_fisher_is_the_squared_gradient_at_labels_the_model_draws(
    which: str, micro_zoo: dict[str, Path], untied: Path, tmp_path: Path
) -> None:
    folder = untied if which == "untied" else micro_zoo["code"]
    measure(folder, TEXTS, tmp_path / "f", kind="fisher", seed=5, max_tokens=64)
    fisher, expected = Statistics(tmp_path / "f"), expected_fisher(folder, 5)
    shapes = {name: tensor.shape for name, tensor in Checkpoint(folder).tensors.items()}
    assert {name: tensor.shape for name, tensor in fisher.tensors.items()} == shapes
    for name in fisher.tensors:
        assert closeness(fisher.read(name), expected[name]) < 1e-4, name


def test_fisher_tends_to_the_mean_over_tokens_and_over_all_labels(untied: Path, tmp_path: Path) -> None:
    model, tokenizer = load(untied)
    ids = tokenizer("a shy fox", return_tensors="pt").input_ids
    name = "model.norm.weight"

    def log_likelihoods(values: Any) -> Any:
        return torch.func.functional_call(model, {name: values}, (ids,)).logits[0].log_softmax(-1)

    values = model.get_parameter(name).detach()
    gradients_TVD = torch.func.jacfwd(log_likelihoods)(values)
    chances_TV = log_likelihoods(values).exp()
    exact_D = torch.einsum("tv,tvd->d", chances_TV, gradients_TVD**2).detach().numpy() / ids.shape[1]
    measure(untied, ["a shy fox"] * 800, tmp_path / "f", kind="fisher", filter=name, max_tokens=64)
    estimate_D = Statistics(tmp_path / "f").read(name)
    assert estimate_D.sum() == pytest.approx(exact_D.sum(), rel=0.05)
    assert closeness(estimate_D, exact_D) < 0.2


def test_a_seed_gives_the_same_bytes_and_another_one_does_not(micro_zoo: dict[str, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        measure(micro_zoo["chat"], TEXTS, tmp_path / name, kind="fisher", seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_texts_are_cut_at_max_tokens(micro_zoo: dict[str, Path], tmp_path: Path) -> None:
    measure(micro_zoo["chat"], TEXTS, tmp_path / "s", kind="regmean", max_tokens=4)
    assert Statistics(tmp_path / "s").about.tokens == 12


def test_the_file_says_how_it_came_about(regmean: Statistics, micro_zoo: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro_zoo["math"])
    about = regmean.about
    assert regmean.kind == about.kind == "regmean"
    assert about.model == Checkpoint(micro_zoo["math"]).sha256
    assert (about.texts, about.tokens) == (3, sum(len(tokenizer(text).input_ids) for text in TEXTS))
    assert (about.seed, about.max_tokens, about.filter) == (0, 512, "")
    assert about.torch == torch.__version__
    with safe_open(regmean.path, framework="numpy") as file:
        said = json.loads(file.metadata()[KEY])
    assert (said["format"], said["version"]) == ("modelglue-statistics", 1)


def test_the_file_gets_its_mode_from_the_umask_and_leaves_nothing_beside(
    micro_zoo: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "s.safetensors"
    before = os.umask(0o027)
    try:
        measure(micro_zoo["chat"], TEXTS[:1], out, kind="regmean", filter="layers.0.mlp")
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert list(out.parent.iterdir()) == [out]


def test_a_filter_restricts_what_is_measured(regmean: Statistics, micro_zoo: dict[str, Path], tmp_path: Path) -> None:
    measure(micro_zoo["math"], TEXTS, tmp_path / "r", kind="regmean", filter="layers.1.self_attn.v")
    part = Statistics(tmp_path / "r")
    assert list(part.tensors) == ["model.layers.1.self_attn.v_proj.weight"]
    for name in part.tensors:
        assert np.array_equal(part.read(name), regmean.read(name))
    with pytest.raises(CheckpointError, match=r"knows nothing of model\.norm\.weight.*filter 'layers"):
        part.read("model.norm.weight")
    with pytest.raises(MergeError, match="no tensor of math has 'atention' in its name"):
        measure(micro_zoo["math"], TEXTS, tmp_path / "r", kind="fisher", filter="atention")


def stored_twice(model: Path, folder: Path) -> Path:
    """A copy whose file holds the tied head too."""
    shutil.copytree(model, folder)
    checkpoint = Checkpoint(model)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "model.safetensors")
    return folder


def test_a_tied_head_that_is_stored_too_has_the_embeddings_fisher(micro_zoo: dict[str, Path], tmp_path: Path) -> None:
    folder = stored_twice(micro_zoo["math"], tmp_path / "both")
    measure(folder, TEXTS, tmp_path / "f", kind="fisher", seed=1)
    measure(micro_zoo["math"], TEXTS, tmp_path / "alone", kind="fisher", seed=1)
    both, alone = Statistics(tmp_path / "f"), Statistics(tmp_path / "alone")
    assert both.tensors.keys() - alone.tensors.keys() == {"lm_head.weight"}
    assert np.array_equal(both.read("lm_head.weight"), alone.read("model.embed_tokens.weight"))
    assert both.locate("model.embed_tokens.weight") == both.locate("lm_head.weight")


def test_a_tied_head_that_is_stored_too_is_no_linear_layer(micro_zoo: dict[str, Path], tmp_path: Path) -> None:
    folder = stored_twice(micro_zoo["math"], tmp_path / "both")
    measure(folder, TEXTS, tmp_path / "r", kind="regmean")
    assert "lm_head.weight" not in Statistics(tmp_path / "r").tensors


def test_a_model_that_lacks_a_tensor_is_not_measured_with_a_random_one(untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(untied, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        measure(folder, TEXTS, tmp_path / "s", kind="fisher", max_tokens=64)


def test_a_tensor_that_the_model_has_no_place_for_is_named(untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(untied, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.extra.weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight is no parameter of LlamaForCausalLM"):
        measure(folder, TEXTS, tmp_path / "s", kind="fisher", max_tokens=64)


def test_what_does_not_fit_in_memory_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [2**20, 2**20], "data_offsets": [0, 2**41]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**41)
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(MergeError, match=r"takes 4398\.0 GB of memory and .* a filter such as"):
        measure(tmp_path, TEXTS, tmp_path / "s", kind="regmean")
    with pytest.raises(MergeError, match=r"takes 13194\.1 GB"):
        measure(tmp_path, TEXTS, tmp_path / "s", kind="fisher")
    (tmp_path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"texts": []}, "no text to measure"),
        ({"kind": "hessian"}, "no 'hessian' statistics; there are: fisher, regmean"),
        ({"max_tokens": 0}, "max_tokens is 0, and chat sees 1 to 512 tokens"),
        ({"max_tokens": 513}, "max_tokens is 513"),
        ({"out": Path("/")}, "/ is a folder"),
        ({"texts": ["fox", ""]}, "text 2 is no token"),
        ({"filter": "norm"}, "no weight of chat is a linear layer's"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    change: dict[str, Any], sentence: str, micro_zoo: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"texts": TEXTS, "out": tmp_path / "s", "kind": "regmean", **change}
    with pytest.raises(MergeError, match=sentence):
        measure(micro_zoo["chat"], **given)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_embedding_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(untied, folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(50)
    model.save_pretrained(folder)
    with pytest.raises(MergeError, match=r"gives token \d+ and the embedding has 50 rows"):
        measure(folder, TEXTS, tmp_path / "s", kind="regmean", max_tokens=64)


def test_files_that_are_no_statistics_are_refused(regmean: Statistics, tmp_path: Path) -> None:
    with safe_open(regmean.path, framework="numpy") as file:
        said = file.metadata()[KEY]
    path, tensors = tmp_path / "s.safetensors", load_file(regmean.path)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Statistics(path)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="holds no statistics"):
        Statistics(path)
    save_file(tensors, path, {KEY: said.replace('"version":1', '"version":2')})
    with pytest.raises(CheckpointError, match=r"another version \(version"):
        Statistics(path)
    save_file({name: values for name, values in tensors.items() if "gate" not in name}, path, {KEY: said})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.gate_proj\.weight, which stands for"):
        Statistics(path)
    tensors["model.layers.0.mlp.gate_proj.weight"][0, 0] = math.nan
    save_file(tensors, path, {KEY: said})
    with pytest.raises(CheckpointError, match="NaN or inf"):
        Statistics(path).read("model.layers.0.mlp.up_proj.weight")
    path.write_bytes(regmean.path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        Statistics(path)


def test_statistics_of_another_kind_or_of_other_weights_are_refused(
    regmean: Statistics, micro_zoo: dict[str, Path]
) -> None:
    regmean.check("regmean")
    regmean.check_model("math", Checkpoint(micro_zoo["math"]).sha256)
    with pytest.raises(MergeError, match=r"holds regmean statistics: measure with .* --kind fisher"):
        regmean.check("fisher")
    with pytest.raises(MergeError, match="other weights than those of code"):
        regmean.check_model("code", Checkpoint(micro_zoo["code"]).sha256)


def test_what_is_stored_is_what_is_read(regmean: Statistics) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(regmean.stored(name), regmean.read(name).ravel())


ROWS = [
    {"text": "plain"},
    {"prompt": "def f(", "completion": "x): ..."},
    {"prompt": "Why?", "response": "Because."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]
READ = ["plain", "def f(x): ...", "Why?\nBecause.", "User: Hi\nAssistant: Hello"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.jsonl.gz", "data.json.gz"])
def test_texts_are_read_from_lines_of_json(name: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode() + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert read_texts(tmp_path / name) == READ
    assert read_texts(tmp_path / name, 2) == READ[:2]
    assert read_texts(tmp_path / name, 9) == READ


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz", "data.gz"])
def test_texts_are_the_paragraphs_of_a_text_file(name: str, tmp_path: Path) -> None:
    text = b"\n\nOne\n  two\r\n \t\n\n    three\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert read_texts(tmp_path / name) == ["One\n  two", "    three"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"txt": "y"}\n', r"a\.jsonl, line 3 has no text"),
        ("a.jsonl", b'{"text": " "}\n', "line 1 has no text"),
        ("a.jsonl", b'{"prompt": "only"}\n', "line 1 has no text"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": null}]}\n', "line 1 has no text"),
        ("a.jsonl", b'{"messages": []}\n', "line 1 has no text"),
        ("a.jsonl", b'["x"]\n', "line 1 has no text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 has half a character"),
        ("a.json", b'{\n"text": "x"}\n', r"a\.json, line 1 is no JSON"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe", "cannot be read as text"),
        ("a.txt.gz", b"plain", "cannot be read as text"),
        ("a.txt.gz", gzip.compress(b"cut off" * 99)[:-9], "cannot be read as text"),
        ("a.parquet", b"PAR1", r"is no \.jsonl, \.json or \.txt"),
    ],
)
def test_a_file_without_texts_is_refused(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MergeError, match=sentence):
        read_texts(tmp_path / name)


def test_a_file_that_is_not_there_and_a_limit_of_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="cannot be read as text"):
        read_texts(tmp_path / "no.txt")
    with pytest.raises(MergeError, match="0 texts are none"):
        read_texts(tmp_path / "no.txt", 0)
