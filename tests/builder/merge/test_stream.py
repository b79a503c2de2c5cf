"""Whole merges: each tensor equals its reference, rounded once; the folder appears whole and loads, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llamas
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from reference import REFERENCE, della_probabilities, global_trim
from safetensors.numpy import save_file

from builder import checkpoints, files, kernels
from builder.checkpoints import Checkpoint
from builder.errors import CheckpointError, MergeError
from builder.journal import Journal
from builder.merge import stream
from builder.merge.inputs import Inputs
from builder.merge.methods import METHODS
from builder.merge.models import Found
from builder.merge.plan import Plan, plan
from builder.merge.recipe import load_recipe
from builder.merge.statistics import KEY, About
from builder.merge.stream import Result
from builder.merge.torch_arrays import TorchArrays

Doubles = NDArray[np.float64]
Models = dict[str, dict[str, Doubles]]

NAMES = ("base", "a", "b", "c")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes, in every dtype and format; all their differences are exact in float32."""
    folder = tmp_path_factory.mktemp("family")
    base = llamas.random(0)
    llamas.write(folder / "base", base, "BF16")
    llamas.write(folder / "a", llamas.tuned(base, 1, 1024), "F32", files=3)
    llamas.write(folder / "b", llamas.tuned(base, 2, 512), "F16", pickled=True)
    llamas.write(folder / "c", llamas.tuned(base, 3, 64), "BF16", pickled=True, files=2)
    return folder


@pytest.fixture(scope="module")
def values(family: Path) -> Models:
    """The same models in float64, as they are known to be."""
    base = llamas.random(0)
    tensors = {"base": base, **{name: llamas.tuned(base, i + 1, (1024, 512, 64)[i]) for i, name in enumerate("abc")}}
    return {name: {key: x.astype(np.float64) for key, x in each.items()} for name, each in tensors.items()}


def planned(recipe: Path, folder: Path) -> Plan:
    """The plan of a recipe file; models are folders of that name, adapters too."""

    def find(name: str) -> Found:
        model, _, adapter = name.partition("+")
        return Found(folder / model, folder / adapter if adapter else None)

    return plan(load_recipe(recipe), find)


def write_recipe(path: Path, method: str, models: Mapping[str, Mapping[str, Any]], **more: Any) -> Path:
    listed = [{"model": name, "parameters": dict(parameters)} for name, parameters in models.items()]
    path.write_text(yaml.safe_dump({"merge_method": method, "models": listed, **more}, sort_keys=False), "utf-8")
    return path


def merge(
    tmp_path: Path, folder: Path, method: str, models: Mapping[str, Mapping[str, Any]], out: str = "out", **more: Any
) -> dict[str, Doubles]:
    """What a merge by a recipe file writes."""
    options = {key: more.pop(key) for key in ("threads", "shard_bytes", "overwrite", "journal") if key in more}
    stream.write(
        planned(write_recipe(tmp_path / "recipe.yaml", method, models, **more), folder), tmp_path / out, **options
    )
    return llamas.read(tmp_path / out)


HALVES = {"a": {"weight": 0.5}, "b": {"weight": 0.5}}


# Every method against its reference

PLAIN = {name: {"weight": weight} for name, weight in zip("abc", (0.25, 0.7, 1.6), strict=True)}
# Multiples of 1/4: whether votes cancel is exact.
MIXED = {
    "a": {"weight": [0.25, 1.5], "density": 0.5},
    "b": {"weight": [{"filter": "mlp", "value": -0.5}, {"value": 1.25}], "density": [0.3, 0.8]},
    "c": {"weight": 0.75, "density": [{"filter": "self_attn", "value": 1.0}, {"value": 0.1}]},
}
STATISTICS = {
    name: {"weight": w, "statistics": f"{name}.stats"} for name, w in zip("abc", (1.0, 0.5, 2.0), strict=True)
}
RECIPES: dict[str, list[tuple[dict[str, dict[str, Any]], dict[str, Any]]]] = {
    "linear": [(PLAIN, {}), ({name: {"weight": MIXED[name]["weight"]} for name in "abc"}, {"normalize": False})],
    "passthrough": [({"c": {}}, {}), ({"a": {"scale": {"filter": "o_proj", "value": 0.3}}}, {})],
    "slerp": [({"a": {}}, {"t": [0.2, 0.9]}), ({"c": {}}, {"t": [{"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]})],
    "nuslerp": [
        ({"a": {"weight": 0.3}, "b": {"weight": 0.9}}, {}),
        ({"a": {"weight": 0.3}, "b": {"weight": 0.9}}, {"nuslerp_flatten": False}),
        ({"a": {"weight": 0.3}, "b": {"weight": 0.9}}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
    "multislerp": [(PLAIN, {})],
    "karcher": [({name: {} for name in "abc"}, {"max_iter": 5})],
    "model_stock": [({name: {} for name in "abc"}, {}), ({name: {} for name in "abc"}, {"filter_wise": True})],
    "task_arithmetic": [(PLAIN, {"lambda": 0.6}), (PLAIN, {"normalize": True})],
    "ties": [(MIXED, {}), (MIXED, {"normalize": False, "rescale": True, "lambda": [0.5, 1.2]})],
    "dare_linear": [(MIXED, {}), (MIXED, {"rescale": "density", "lambda": 0.7})],
    "dare_ties": [(MIXED, {}), (MIXED, {"rescale": False, "normalize": True})],
    "della": [
        ({k: {"weight": 0.8, "density": d, "epsilon": 0.1} for k, d in zip("abc", (0.5, 0.2, 1.0), strict=True)}, {})
    ],
    "della_linear": [
        ({k: {"weight": 0.8, "density": [0.5, 0.3]} for k in "abc"}, {"rescale": "density"}),
    ],
    "breadcrumbs": [({k: {**MIXED[k], "gamma": 0.05} for k in "abc"}, {})],
    "breadcrumbs_ties": [({k: {**MIXED[k], "gamma": 0.05} for k in "abc"}, {"normalize": True})],
    "sce": [({"a": {}, "b": {}}, {"select_topk": 0.3})],
    "arcee_fusion": [({"a": {}}, {})],
    "nearswap": [({"b": {}}, {"t": 0.01})],
    "ram": [({name: {} for name in "abc"}, {"epsilon": 0.004})],
    "ramplus_tl": [({name: {} for name in "abc"}, {"epsilon": 0.004, "r": 0.5, "alpha": 0.3})],
    "fisher": [(STATISTICS, {})],
    "regmean": [(STATISTICS, {"reduction": 0.8})],
}
CASES = [pytest.param(method, i, id=f"{method}-{i}") for method, each in RECIPES.items() for i in range(len(each))]
WITHOUT_BASE = [name for name, method in METHODS.items() if method.base == "none"]


def recipe_of(path: Path, method: str, case: int, **more: Any) -> Path:
    models, parameters = RECIPES[method][case]
    base = {} if method in WITHOUT_BASE else {"base_model": "base"}
    return write_recipe(path, method, models, parameters=parameters, **base, **more)


def write_statistics(folder: Path, kind: str, models: Sequence[str], seed: int = 0) -> dict[str, dict[str, Doubles]]:
    """A file of statistics for each model, of some of its tensors; what they hold."""
    held = {}
    for i, name in enumerate(models):
        rng, checkpoint = np.random.default_rng(seed + i), Checkpoint(folder / name)
        found = {}
        for key, tensor in checkpoint.tensors.items():
            if kind == "regmean" and "mlp" in key:
                features = rng.standard_normal((300, tensor.shape[1]))
                found[key] = features.T @ features / 300
            elif kind == "fisher" and "layernorm" not in key:
                found[key] = rng.random(tensor.shape) ** 4 * (rng.random(tensor.shape) < 0.8)
        stored = {key: each.astype(np.float32) for key, each in found.items()}
        save_statistics(folder / f"{name}.stats", kind, checkpoint.sha256, stored)
        held[name] = {key: each.astype(np.float64) for key, each in stored.items()}
    return held


def save_statistics(path: Path, kind: Any, model: str, stored: Mapping[str, NDArray[np.float32]]) -> None:
    about = About(
        kind=kind, model=model, texts=1, texts_sha256="", tokens=1, max_tokens=1, seed=0, filter="", torch="",
        transformers="", aliases={},
    )  # fmt: skip
    save_file(dict(stored), path, {KEY: about.model_dump_json()})


def expected(todo: Plan, models: Models, statistics: Models | None = None) -> dict[str, Doubles]:
    """The merge in float64, by the parameters that the plan gives every tensor."""
    merged = {}
    for output in todo.outputs:
        parameters = {key: said for key, said in output.parameters.items() if key not in ("trim", "statistics")}
        tensors = [models[origin.model][origin.tensor] for origin in output.inputs]
        base = models[output.base.model][output.base.tensor] if output.base else None
        if output.method.startswith(("dare", "della")):
            assert base is not None
            parameters["kept"] = [
                kept(
                    output.name,
                    i,
                    todo.recipe.seed,
                    x - base,
                    {key: said[i] for key, said in parameters.items() if isinstance(said, list)},
                )
                for i, x in enumerate(tensors)
            ]
        if statistics and output.name in statistics["a"]:
            parameters["statistics"] = [statistics[origin.model][origin.tensor] for origin in output.inputs]
        merged[output.name] = REFERENCE[output.method](tensors, base, **parameters)
    return merged


def kept(name: str, i: int, seed: int, delta: Doubles, said: Mapping[str, float]) -> NDArray[np.bool_]:
    """What chance keeps of a task vector."""
    numbers = kernels.random(Inputs(name, (), seed=seed).key(i), 0, delta.size).reshape(delta.shape)
    chance: Any = said["density"]
    if "epsilon" in said:
        chance = della_probabilities(delta, said["density"], said["epsilon"])
    return numbers < chance * 2.0**32


BITS = {"F32": 24, "F16": 11, "BF16": 8}


def assert_rounded(got: Doubles, want: Doubles, dtype: str, others: Sequence[Doubles]) -> None:
    """The number of the dtype that is nearest to the reference, but for the rounding of a few operations in float32.

    So one beside the nearest is right only where the reference lies between the two.
    """
    half_step = 2.0 ** (np.frexp(want)[1] - 1 - BITS[dtype])
    arithmetic = 1e-6 * (np.abs(want) + np.max([np.abs(x) for x in others], axis=0))
    wrong = ~(np.abs(got - want) <= half_step + arithmetic)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size}, up to {np.abs(got - want).max()}"


def assert_merged(out: Path, todo: Plan, models: Models, want: Mapping[str, Doubles]) -> None:
    written = llamas.read(out)
    assert written.keys() == want.keys() == todo.layout.keys()
    for output in todo.outputs:
        inputs = [models[origin.model][origin.tensor] for origin in output.origins]
        assert_rounded(written[output.name], want[output.name], output.tensor.dtype, inputs)


def test_every_method_has_a_recipe_here() -> None:
    assert RECIPES.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("method", "case", "dtype"),
    [(*case.values, "bfloat16") for case in CASES] + [(method, 0, "float32") for method in RECIPES],
)
def test_a_merge_of_whole_models_equals_its_reference_rounded_once(
    family: Path, values: Models, tmp_path: Path, method: str, case: int, dtype: str
) -> None:
    statistics = write_statistics(family, method, "abc") if method in ("fisher", "regmean") else None
    recipe = recipe_of(tmp_path / "recipe.yaml", method, case, out_dtype=dtype, seed=5)
    if statistics:  # paths count from the recipe's folder
        for name in "abc":
            (tmp_path / f"{name}.stats").symlink_to(family / f"{name}.stats")
    todo = planned(recipe, family)

    stream.write(todo, tmp_path / "out")

    assert llamas.dtypes(tmp_path / "out") == {getattr(torch, dtype)}
    assert_merged(tmp_path / "out", todo, values, expected(todo, values, statistics))


def test_a_global_trim_cuts_a_model_as_one_vector(family: Path, values: Models, tmp_path: Path) -> None:
    models = {name: {"weight": 1, "density": density} for name, density in (("a", 0.4), ("b", 0.07), ("c", 1))}
    parameters = {"trim": "global"}
    recipe = write_recipe(tmp_path / "r", "ties", models, base_model="base", parameters=parameters, dtype="bfloat16")
    todo = planned(recipe, family)

    stream.write(todo, tmp_path / "out", threads=3)

    names = [*todo.layout]
    masks = {}
    for model, said in models.items():
        deltas = [values[model][name] - values["base"][name] for name in names]
        masks[model] = dict(zip(names, global_trim(deltas, said["density"]), strict=True))
    want = {}
    for output in todo.outputs:
        tensors = [values[model][output.name] for model in models]
        chosen = [masks[model][output.name] for model in models]
        want[output.name] = REFERENCE["ties"](tensors, values["base"][output.name], weight=[1.0] * 3, kept=chosen)
    assert_merged(tmp_path / "out", todo, values, want)


def test_a_global_trim_wants_one_density(family: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r",
        "ties",
        {"a": {"weight": 1, "density": [0.1, 0.9]}},
        base_model="base",
        parameters={"trim": "global"},
    )

    with pytest.raises(MergeError, match="trim: global needs one density a model for all tensors"):
        stream.write(planned(recipe, family), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


# The same bytes


@pytest.mark.parametrize(("method", "case"), CASES)
def test_neither_threads_nor_pieces_change_a_byte(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, case: int
) -> None:
    write_statistics(family, method, "abc") if method in ("fisher", "regmean") else None
    recipe = recipe_of(family / "recipe.yaml", method, case, out_dtype="float32")
    todo = planned(recipe, family)
    stream.write(todo, tmp_path / "whole", threads=1)
    for piece, threads in ((1, 1), (5000, 3)):
        monkeypatch.setattr(stream, "PIECE", piece)
        stream.write(todo, tmp_path / "out", threads=threads, overwrite=True)

        assert llamas.contents(tmp_path / "out") == llamas.contents(tmp_path / "whole"), (piece, threads)


@pytest.mark.parametrize("method", RECIPES)
def test_neither_the_compiler_nor_the_device_changes_a_byte(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    write_statistics(family, method, "abc") if method in ("fisher", "regmean") else None
    case = len(RECIPES[method]) - 1
    todo = planned(recipe_of(family / "recipe.yaml", method, case, out_dtype="float32"), family)
    stream.write(todo, tmp_path / "compiled", threads=2)
    monkeypatch.setenv("MODELGLUE_KERNELS", "numpy")
    kernels._compiled.cache_clear()
    stream.write(todo, tmp_path / "numpy", threads=2)
    monkeypatch.delenv("MODELGLUE_KERNELS")
    kernels._compiled.cache_clear()
    # torch on the processor stands for a GPU.
    monkeypatch.setattr(stream, "arrays_of", lambda _: TorchArrays("cpu"))
    stream.write(todo, tmp_path / "torch", threads=2)

    whole = llamas.contents(tmp_path / "compiled")
    assert llamas.contents(tmp_path / "numpy") == whole
    assert llamas.contents(tmp_path / "torch") == whole


def test_a_seed_decides_the_bytes(family: Path, tmp_path: Path) -> None:
    models = {"a": {"weight": 1, "density": 0.5}}
    outs = {
        name: merge(tmp_path, family, "dare_linear", models, name, base_model="base", seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    }

    assert llamas.contents(tmp_path / "first") == llamas.contents(tmp_path / "again")
    assert not np.array_equal(outs["first"][DOWN], outs["other"][DOWN])


def test_the_size_of_shards_changes_no_weight(family: Path, tmp_path: Path) -> None:
    whole = merge(tmp_path, family, "linear", HALVES, "whole")
    parts = merge(tmp_path, family, "linear", HALVES, "parts", shard_bytes=50_000, threads=3)

    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text("utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(4 * x.size for x in parts.values())
    assert Checkpoint(tmp_path / "parts").tensors.keys() == whole.keys()
    # A shard is larger only where one tensor is.
    for shard in shards:
        held = [name for name, file in index["weight_map"].items() if file == shard]
        assert len(held) == 1 or sum(4 * whole[name].size for name in held) <= 50_000


@pytest.mark.parametrize("form", [{"files": 4}, {"pickled": True}, {"pickled": True, "files": 3}], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_form_of_an_input_changes_no_weight(tmp_path: Path, dtype: str, form: dict[str, Any]) -> None:
    base = llamas.random(0)
    llamas.write(tmp_path / "a", base, dtype)
    llamas.write(tmp_path / "plain", llamas.tuned(base, 1, 64), dtype)
    llamas.write(tmp_path / "other", llamas.tuned(base, 1, 64), dtype, **form)
    outs = [
        merge(tmp_path, tmp_path, "slerp", {name: {}}, f"of {name}", base_model="a", parameters={"t": 0.3})
        for name in ("plain", "other")
    ]

    assert all(np.array_equal(outs[0][name], outs[1][name]) for name in base)


def test_merging_a_model_with_itself_gives_that_model(family: Path, values: Models, tmp_path: Path) -> None:
    for name in "xyz":
        (tmp_path / name).symlink_to(family / "c")

    merged = merge(tmp_path, tmp_path, "linear", {"x": {"weight": 0.2}, "y": {"weight": 5}, "z": {"weight": 0.3}})

    assert all(np.array_equal(merged[name], values["c"][name]) for name in values["c"])


# Other inputs


def lora(folder: Path, targets: Sequence[str], rank: int = 4) -> dict[str, Doubles]:
    """An adapter; what it adds to each tensor."""
    rng = np.random.default_rng(7)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 6}), "utf-8")
    tensors, added = {}, {}
    for target in targets:
        module = target.removesuffix(".weight")
        rows, columns = llamas.random(0)[target].shape
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
        tensors[f"base_model.model.{module}.lora_A.weight"], tensors[f"base_model.model.{module}.lora_B.weight"] = a, b
        added[target] = 6 / rank * b.astype(np.float64) @ a.astype(np.float64)
    save_file(tensors, folder / "adapter_model.safetensors")
    return added


@pytest.mark.parametrize("piece", [1, 5000, 1 << 16])
def test_an_adapter_is_merged_with_its_base(
    family: Path, values: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(stream, "PIECE", piece)
    (tmp_path / "base").symlink_to(family / "base"), (tmp_path / "a").symlink_to(family / "a")
    added = lora(tmp_path / "lora", [DOWN, "model.layers.0.self_attn.k_proj.weight"])
    models = {"a": {"weight": 0.5}, "base+lora": {"weight": 0.25}}

    merged = merge(tmp_path, tmp_path, "task_arithmetic", models, base_model="base", out_dtype="float32")

    base = values["base"]
    for name, got in merged.items():
        want = base[name] + 0.5 * (values["a"][name] - base[name]) + 0.25 * added.get(name, 0)
        assert_rounded(got, want, "F32", [4 * base[name], values["a"][name], added.get(name, base[name])])


def test_an_adapter_with_nan_is_named(family: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(family / "base")
    lora(tmp_path / "lora", [DOWN])
    file = tmp_path / "lora/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + np.float32(np.nan).tobytes())

    with pytest.raises((MergeError, CheckpointError), match=r"lora.*down_proj.lora_B.weight holds NaN or inf"):
        merge(tmp_path, tmp_path, "passthrough", {"base+lora": {}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "recipe.yaml"]


def test_tied_and_untied_heads_give_an_untied_one(tmp_path: Path) -> None:
    tied, untied = llamas.random(0, tied=True), llamas.random(1)
    llamas.write(tmp_path / "tied", tied), llamas.write(tmp_path / "untied", untied)

    merged = merge(tmp_path, tmp_path, "linear", {"tied": {"weight": 1}, "untied": {"weight": 3}})

    assert np.array_equal(merged[HEAD], 0.25 * tied[EMBEDDING] + 0.75 * untied[HEAD])
    assert np.array_equal(merged[EMBEDDING], 0.25 * tied[EMBEDDING] + 0.75 * untied[EMBEDDING])
    model = loaded(tmp_path / "out")
    assert np.array_equal(model.lm_head.weight.detach().double(), merged[HEAD])


def test_lone_tensors_come_from_where_the_recipe_says(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    plain = llamas.random(0)
    llamas.write(tmp_path / "plain", plain)
    llamas.write(tmp_path / "biased", {**llamas.random(1), bias: np.arange(64, dtype=np.float32)})
    rules = [{"filter": bias, "source": "biased"}]

    merged = merge(tmp_path, tmp_path, "linear", {"plain": {"weight": 1}, "biased": {"weight": 1}}, tensors=rules)

    assert np.array_equal(merged[bias], np.arange(64))
    assert np.array_equal(merged[DOWN], (plain[DOWN] + llamas.random(1)[DOWN]) / 2)


def test_tensors_of_any_shape_are_merged(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "empty": (0, 4), "conv": (3, 2, 4, 4), "row": (1, 9)}
    rng = np.random.default_rng(0)
    models = [
        {name: np.asarray(rng.integers(-9, 9, shape) / 4, np.float32) for name, shape in shapes.items()} for _ in "ab"
    ]
    for name, tensors in zip("ab", models, strict=True):
        llamas.write(tmp_path / name, tensors)

    merged = merge(tmp_path, tmp_path, "linear", HALVES)

    assert {name: x.shape for name, x in merged.items()} == shapes
    assert all(np.array_equal(merged[name], (models[0][name] + models[1][name]) / 2) for name in shapes)


# In transformers


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def test_a_stack_loads_and_answers(family: Path, values: Models, tmp_path: Path) -> None:
    layers = [("base", 0), ("base", 1), ("a", 0), ("c", 1)]
    slices = [{"sources": [{"model": model, "layer_range": [layer, layer + 1]}]} for model, layer in layers]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices, "dtype": "float32"}), "utf-8")

    stream.write(planned(recipe, family), tmp_path / "out")

    model = loaded(tmp_path / "out")
    assert model.config.num_hidden_layers == 4
    for i, (name, layer) in enumerate(layers):
        written = model.state_dict()[f"model.layers.{i}.mlp.up_proj.weight"].double().numpy()
        assert np.array_equal(written, values[name][f"model.layers.{layer}.mlp.up_proj.weight"])
    assert np.array_equal(model.lm_head.weight.detach().double(), values["c"][HEAD])
    answer = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, 8)


def test_a_merge_of_trained_models_loads_with_its_tokenizer_and_template(
    tmp_path: Path, micro_zoo: dict[str, Path]
) -> None:
    from transformers import AutoTokenizer

    models = {name: {"weight": 1, "density": 0.5} for name in ("math", "code")}
    merge(tmp_path, micro_zoo["base"].parent, "ties", models, base_model="base")

    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", micro_zoo["base"]))
    text = "Question: Ann has 12 apples."
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template is not None
    logits = loaded(tmp_path / "out")(input_ids=torch.tensor([ours(text).input_ids])).logits
    assert torch.isfinite(logits).all()


def test_fisher_of_measured_models_stays_near_to_what_each_depends_on(
    tmp_path: Path, micro_zoo: dict[str, Path]
) -> None:
    from builder.merge.statistics import measure

    texts = {"math": ["Question: Ann has 12 apples and gets 7 more."], "code": ["def add(x, y):\n    return x + y"]}
    models = {}
    for name, each in texts.items():
        measure(micro_zoo[name], each, tmp_path / name, kind="fisher", filter="layers.0.mlp.up")
        models[name] = {"statistics": str(tmp_path / name)}

    merged = merge(tmp_path, micro_zoo["base"].parent, "fisher", models, out_dtype="float32")

    from builder.merge.statistics import Statistics

    name = "model.layers.0.mlp.up_proj.weight"
    x, y = (Checkpoint(micro_zoo[model]).read(name).astype(np.float64) for model in texts)
    f, g = (Statistics(tmp_path / model).read(name).astype(np.float64) for model in texts)
    want = np.where(f + g > 0, (f * x + g * y) / np.where(f + g > 0, f + g, 1), (x + y) / 2)
    assert_rounded(merged[name], want, "F32", [x, y])


# Tokens

COMMON = ["<unk>", "the", "fox", "and", "owl"]
WORDS = {"x": [*COMMON, "apple", "pear", "plum"], "y": ["<unk>", "owl", "def", "the", "return", "fox", "and"]}


@pytest.fixture
def tongues(tmp_path: Path) -> dict[str, dict[str, Doubles]]:
    """Two models of other words: their rows of each word, by model."""
    rows = {}
    for i, (name, words) in enumerate(WORDS.items()):
        # A row more than there are words, as padding.
        tensors = llamas.random(i, rows=len(words) + 1)
        llamas.write(tmp_path / name, tensors, words=words)
        rows[name] = {kind: tensors[kind].astype(np.float64) for kind in (EMBEDDING, HEAD)}
    return rows


def row(tongues: Mapping[str, Mapping[str, Doubles]], kind: str, model: str, word: str) -> Doubles:
    return tongues[model][kind][WORDS[model].index(word)]


def test_a_union_of_vocabularies_is_merged_word_by_word_and_padded(
    tmp_path: Path, tongues: dict[str, dict[str, Doubles]]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = {"source": "union", "pad_to_multiple_of": 16}
    models = {"x": {"weight": 0.25}, "y": {"weight": 0.75}}

    merged = merge(tmp_path, tmp_path, "linear", models, tokenizer=tokenizer)

    model, words = loaded(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    vocabulary = words.get_vocab()
    assert vocabulary.keys() == {*WORDS["x"], *WORDS["y"]}
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 16
    for kind in (EMBEDDING, HEAD):
        for word, i in vocabulary.items():
            having = {name: row(tongues, kind, name, word) for name in WORDS if word in WORDS[name]}
            want = 0.25 * having["x"] + 0.75 * having["y"] if len(having) == 2 else next(iter(having.values()))
            assert np.array_equal(merged[kind][i], want), word
        # A row without a word is the mean of all words' rows.
        np.testing.assert_allclose(merged[kind][10:], np.tile(merged[kind][:10].mean(axis=0), (6, 1)), atol=1e-6)
    assert words("the fox def").input_ids == [vocabulary[word] for word in ("the", "fox", "def")]


@pytest.mark.parametrize("source", ["base", "y"])
def test_one_models_vocabulary_is_kept(tmp_path: Path, tongues: dict[str, dict[str, Doubles]], source: str) -> None:
    kept = "x" if source == "base" else "y"

    merged = merge(
        tmp_path, tmp_path, "linear", {"x": {"weight": 0.25}, "y": {"weight": 0.75}}, tokenizer={"source": source}
    )

    assert merged[EMBEDDING].shape == (len(WORDS[kept]), 64)
    for i, word in enumerate(WORDS[kept]):
        having = {name: row(tongues, EMBEDDING, name, word) for name in WORDS if word in WORDS[name]}
        want = 0.25 * having["x"] + 0.75 * having["y"] if len(having) == 2 else having[kept]
        assert np.array_equal(merged[EMBEDDING][i], want), word
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / kept / "tokenizer.json").read_bytes()


def test_a_token_takes_the_row_that_the_recipe_gives_it(tmp_path: Path, tongues: dict[str, dict[str, Doubles]]) -> None:
    tokens = {
        "fox": {"source": "y", "force": True},
        "def": {"source": {"kind": "model_token", "model": "x", "token": "pear"}},
        "new": {"source": {"kind": "zero"}},
    }
    merged = merge(
        tmp_path,
        tmp_path,
        "linear",
        {"x": {"weight": 1}, "y": {"weight": 1}},
        tokenizer={"source": "base", "tokens": tokens},
    )

    names = [*WORDS["x"], "def", "new"]
    assert len(merged[EMBEDDING]) == len(names)
    by_word = dict(zip(names, merged[EMBEDDING], strict=True))
    assert np.array_equal(by_word["fox"], row(tongues, EMBEDDING, "y", "fox"))
    assert np.array_equal(
        by_word["def"], (row(tongues, EMBEDDING, "x", "pear") + row(tongues, EMBEDDING, "y", "def")) / 2
    )
    assert not by_word["new"].any()


def test_a_stack_has_the_words_of_all_its_models(tmp_path: Path, tongues: dict[str, dict[str, Doubles]]) -> None:
    slices = [{"sources": [{"model": name, "layer_range": [i, i + 1]}]} for i, name in enumerate("xy")]
    recipe = tmp_path / "recipe.yaml"
    said = {"merge_method": "passthrough", "slices": slices, "tokenizer": {"source": "union"}}
    recipe.write_text(yaml.safe_dump(said), "utf-8")

    stream.write(planned(recipe, tmp_path), tmp_path / "out")

    merged = llamas.read(tmp_path / "out")
    vocabulary = json.loads((tmp_path / "out/tokenizer.json").read_text("utf-8"))
    ids = {**vocabulary["model"]["vocab"], **{entry["content"]: entry["id"] for entry in vocabulary["added_tokens"]}}
    for word, i in ids.items():
        for kind, first in ((EMBEDDING, "x"), (HEAD, "y")):
            having = first if word in WORDS[first] else {"x": "y", "y": "x"}[first]
            assert np.array_equal(merged[kind][i], row(tongues, kind, having, word)), (word, kind)


def test_fisher_knows_the_rows_of_every_word(tmp_path: Path, tongues: dict[str, dict[str, Doubles]]) -> None:
    held = write_statistics(tmp_path, "fisher", "xy")
    models = {name: {"statistics": f"{name}.stats"} for name in "xy"}

    merged = merge(tmp_path, tmp_path, "fisher", models, tokenizer={"source": "union"})

    rows = {name: dict(zip(WORDS[name], held[name][EMBEDDING], strict=False)) for name in WORDS}
    for i, word in enumerate([*WORDS["x"], "def", "return"]):
        having = [name for name in WORDS if word in WORDS[name]]
        above = sum(rows[name][word] * row(tongues, EMBEDDING, name, word) for name in having)
        below = sum(rows[name][word] for name in having)
        mean = sum(row(tongues, EMBEDDING, name, word) for name in having) / len(having)
        want = np.where(below > 0, above / np.where(below > 0, below, 1), mean)
        np.testing.assert_allclose(merged[EMBEDDING][i], want, rtol=1e-5, atol=1e-6, err_msg=word)


# Alignment


def permuted(tensors: Mapping[str, llamas.Array], seed: int) -> dict[str, llamas.Array]:
    """The same function of tokens, its residual stream and the units of every MLP in another order."""
    rng = np.random.default_rng(seed)
    stream_order = rng.permutation(llamas.WIDTH)
    moved = {}
    for name, values in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            moved[name] = values[stream_order]
        else:
            moved[name] = values[..., stream_order]
    for layer in range(2):
        order = rng.permutation(llamas.INNER)
        for part in ("gate", "up"):
            moved[f"model.layers.{layer}.mlp.{part}_proj.weight"] = moved[
                f"model.layers.{layer}.mlp.{part}_proj.weight"
            ][order]
        moved[f"model.layers.{layer}.mlp.down_proj.weight"] = moved[f"model.layers.{layer}.mlp.down_proj.weight"][
            :, order
        ]
    return {name: np.ascontiguousarray(values) for name, values in moved.items()}


@pytest.mark.parametrize("piece", [1, 5000])
def test_an_aligned_copy_in_another_order_is_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(stream, "PIECE", piece)
    original = llamas.random(0)
    llamas.write(tmp_path / "a", original, "BF16"), llamas.write(tmp_path / "b", permuted(original, 1), "F16")

    apart = merge(tmp_path, tmp_path, "linear", HALVES, "apart")
    aligned = merge(tmp_path, tmp_path, "linear", HALVES, "aligned", align=True)

    assert not np.array_equal(apart[DOWN], original[DOWN])
    assert all(np.array_equal(aligned[name], original[name]) for name in original)


def test_alignment_is_to_the_base(tmp_path: Path) -> None:
    original = llamas.random(0)
    llamas.write(tmp_path / "base", original), llamas.write(tmp_path / "a", permuted(original, 1))

    merged = merge(tmp_path, tmp_path, "task_arithmetic", {"a": {"weight": 0.7}}, base_model="base", align=True)

    assert all(np.array_equal(merged[name], original[name]) for name in original)


def test_what_cannot_be_aligned_is_refused(family: Path, tmp_path: Path) -> None:
    for name in ("a", "base"):
        (tmp_path / name).symlink_to(family / name)
    lora(tmp_path / "lora", [DOWN])
    write_statistics(tmp_path, "fisher", ["a", "base"])

    with pytest.raises(MergeError, match="align: a model with an adapter cannot be aligned"):
        merge(tmp_path, tmp_path, "linear", {"a": {"weight": 1}, "base+lora": {"weight": 1}}, align=True)
    models = {name: {"statistics": f"{name}.stats"} for name in ("a", "base")}
    with pytest.raises(MergeError, match="align: statistics are of units in their own order"):
        merge(tmp_path, tmp_path, "fisher", models, align=True)


# Statistics that are of something else


def test_statistics_of_other_weights_are_refused(family: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).symlink_to(family / name)
    (tmp_path / "base").symlink_to(family / "base")
    write_statistics(tmp_path, "fisher", "ac")
    lora(tmp_path / "lora", [DOWN])

    for models, sentence in (
        (
            {"a": {"statistics": "c.stats"}, "c": {"statistics": "a.stats"}},
            "c.stats was measured on other weights than",
        ),
        (
            {"a": {"statistics": "a.stats"}, "c": {"statistics": "a.stats"}},
            "a.stats was measured on other weights than",
        ),
        (
            {"a": {"statistics": "c.stats"}, "c": {"statistics": "c.stats"}},
            "c.stats was measured on other weights than",
        ),
        ({"a+lora": {"statistics": "a.stats"}}, r"a.stats cannot be of a\+lora: merge the adapter into a folder"),
    ):
        with pytest.raises(MergeError, match=sentence):
            merge(tmp_path, tmp_path, "fisher", models)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_kind_are_refused(family: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(family / "a")
    write_statistics(tmp_path, "fisher", "a")

    with pytest.raises(MergeError, match="holds fisher statistics: measure with `builder stats --kind regmean`"):
        merge(tmp_path, tmp_path, "regmean", {"a": {"statistics": "a.stats"}})


def test_a_tensor_that_only_some_measured_is_refused(family: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).symlink_to(family / name)
    write_statistics(tmp_path, "fisher", "a")
    norm = {"model.norm.weight": np.ones(64, np.float32)}
    save_statistics(tmp_path / "c.stats", "fisher", Checkpoint(tmp_path / "c").sha256, norm)
    models = {name: {"statistics": f"{name}.stats"} for name in "ac"}

    with pytest.raises(MergeError, match=r"weight is in a.stats and not in c.stats: measure both on the same tensors"):
        merge(tmp_path, tmp_path, "fisher", models)


@pytest.mark.parametrize("kind", ["fisher", "regmean"])
def test_statistics_with_nan_are_named(family: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").symlink_to(family / "a")
    held = write_statistics(tmp_path, kind, "a")["a"]
    bad = {name: each.astype(np.float32) for name, each in held.items()}
    bad[DOWN][-1, -1] = np.nan
    save_statistics(tmp_path / "a.stats", kind, Checkpoint(tmp_path / "a").sha256, bad)

    with pytest.raises(MergeError, match=f"a.stats: {DOWN} holds NaN or inf"):
        merge(tmp_path, tmp_path, kind, {"a": {"statistics": "a.stats"}})


# What stops a merge


def is_clean(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted([*names, "recipe.yaml"])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize(("dtype", "bad"), [("F32", np.nan), ("F16", np.inf), ("BF16", -np.inf)])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_value_that_is_not_finite_stops_the_merge_with_model_and_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str, bad: float, place: int, threads: int
) -> None:
    monkeypatch.setattr(stream, "PIECE", 4096)
    good = llamas.random(0)
    broken = llamas.tuned(good, 1, 64)
    broken[HEAD].reshape(-1)[place] = bad
    llamas.write(tmp_path / "good", good), llamas.write(tmp_path / "bad", broken, dtype)
    base = {"base_model": "good"} if method == "ties" else {}

    with pytest.raises(MergeError, match=rf"{tmp_path}/bad: lm_head.weight holds NaN or inf: fetch the model again"):
        merge(
            tmp_path,
            tmp_path,
            method,
            {"good" if not base else "bad": {"weight": 1}, "bad": {"weight": 1}},
            threads=threads,
            **base,
        )
    assert is_clean(tmp_path, "good", "bad")


def test_a_result_that_its_dtype_has_no_number_for_stops_the_merge(tmp_path: Path) -> None:
    tensors = llamas.random(0)
    llamas.write(tmp_path / "a", tensors, "F16")

    with pytest.raises(MergeError, match=r"model.norm.weight would hold NaN or inf in F16: look at its sources"):
        merge(
            tmp_path, tmp_path, "passthrough", {"a": {"scale": [{"filter": "model.norm", "value": 1e6}, {"value": 1}]}}
        )
    assert is_clean(tmp_path, "a")


def test_a_folder_that_exists_is_replaced_whole_or_not_at_all(family: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine", "utf-8")

    with pytest.raises(
        MergeError, match=f"{tmp_path}/out exists: choose another folder, or replace it with --overwrite"
    ):
        merge(tmp_path, family, "linear", HALVES)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]

    merge(tmp_path, family, "linear", HALVES, overwrite=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "recipe.yaml"}
    assert is_clean(tmp_path, "out")


def test_a_failed_merge_keeps_what_it_would_have_replaced(family: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine", "utf-8")
    scale = {"scale": 1e38}

    with pytest.raises(MergeError, match="would hold NaN or inf"):
        merge(tmp_path, family, "passthrough", {"c": scale}, overwrite=True, out_dtype="float16")
    assert (tmp_path / "out/precious.txt").read_text("utf-8") == "mine"
    assert is_clean(tmp_path, "out")


@pytest.mark.parametrize("out", ["models/a", "models", "models/lora", "models/a/../a"])
def test_a_folder_that_holds_an_input_is_never_replaced(tmp_path: Path, out: str) -> None:
    llamas.write(tmp_path / "models/a", llamas.random(0))
    lora(tmp_path / "models/lora", [DOWN])

    with pytest.raises(MergeError, match=r"holds the input a\+lora: choose another folder"):
        merge(tmp_path, tmp_path / "models", "passthrough", {"a+lora": {}}, out, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["a", "lora"]


def test_a_folder_that_holds_statistics_is_never_replaced(family: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(family / "a")
    (tmp_path / "stats").mkdir()
    write_statistics(tmp_path, "fisher", "a")
    (tmp_path / "a.stats").rename(tmp_path / "stats/a")

    with pytest.raises(MergeError, match="stats holds the input stats/a"):
        merge(tmp_path, tmp_path, "fisher", {"a": {"statistics": "stats/a"}}, "stats", overwrite=True)


@pytest.mark.parametrize("out", ["taken", ".", ".."])
def test_what_cannot_be_a_folder_is_refused(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "taken").write_text("a file", "utf-8")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep" if out != "taken" else tmp_path)
    todo = planned(write_recipe(tmp_path / "recipe.yaml", "linear", HALVES), family)

    with pytest.raises(MergeError, match="cannot be the merged model's folder: choose another name"):
        stream.write(todo, Path(out), overwrite=True)
    assert is_clean(tmp_path, "taken", "deep")


def test_missing_parents_of_the_folder_are_made(family: Path, tmp_path: Path) -> None:
    merge(tmp_path, family, "linear", HALVES, "deep/er/out")

    assert Checkpoint(tmp_path / "deep/er/out").tensors


def test_a_disk_without_room_is_refused_up_front(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free", lambda _: 12_340_000)
    monkeypatch.setattr(stream, "_needed", lambda _: 45_600_000)

    with pytest.raises(MergeError, match=f"the merge needs 0.05 GB and {tmp_path} has 0.01 GB free: make room, or"):
        merge(tmp_path, family, "linear", HALVES)
    assert is_clean(tmp_path)


def test_what_is_needed_is_what_is_written(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(4 * x.size for x in merge(tmp_path, family, "linear", HALVES, "first").values())
    monkeypatch.setattr(files, "free", lambda _: size + (family / "a/config.json").stat().st_size)
    merge(tmp_path, family, "linear", HALVES, "second")
    monkeypatch.setattr(files, "free", lambda _: size + (family / "a/config.json").stat().st_size - 1)

    with pytest.raises(MergeError, match="the merge needs"):
        merge(tmp_path, family, "linear", HALVES, "third")


@pytest.mark.parametrize("step", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_a_sentence_and_leaves_nothing(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    def full(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, full)

    with pytest.raises(MergeError, match=r"the merge needs 0.00 GB and .* has \d+\.\d\d GB free: make room"):
        merge(tmp_path, family, "linear", HALVES, threads=3)
    assert is_clean(tmp_path)


def test_another_failure_of_the_disk_is_not_taken_for_a_full_one(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", broken)

    with pytest.raises(OSError, match="Input/output error"):
        merge(tmp_path, family, "linear", HALVES)
    assert is_clean(tmp_path)


def dying(error: type[BaseException], after: int) -> Callable[..., Iterator[Any]]:
    """linear, until so many pieces were merged."""
    linear, done = METHODS["linear"].merge, iter(range(10**9))

    def method(inputs: Inputs, **parameters: Any) -> Iterator[Any]:
        for values in linear(inputs, **parameters):
            if next(done) >= after:
                raise error
            yield values

    return method


def open_files() -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(str(descriptor.readlink()))
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_merge_that_is_interrupted_leaves_nothing(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], threads: int
) -> None:
    monkeypatch.setitem(METHODS, "linear", dataclasses.replace(METHODS["linear"], merge=dying(error, 5)))

    with pytest.raises(error):
        merge(tmp_path, family, "linear", HALVES, threads=threads, shard_bytes=50_000)
    assert is_clean(tmp_path)
    assert not [path for path in open_files() if "out.partial" in path]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_failure_ends_what_the_others_do(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    todo = planned(write_recipe(tmp_path / "recipe.yaml", "linear", HALVES), family)
    first, merged = max(todo.outputs, key=lambda output: output.tensor.bytes).name, []
    all_at_work, seen = threading.Barrier(threads, timeout=60), []

    class Watched(stream.Executor):
        def __init__(self, *what: Any) -> None:
            super().__init__(*what)
            seen.append(self._stop)

    def failing(inputs: Inputs, **_: Any) -> Iterator[Any]:
        all_at_work.wait()
        for piece in inputs.pieces():
            if inputs.name == first:
                raise MergeError("no")
            assert seen[0].wait(60)
            merged.append(inputs.name)
            yield piece.values[0]

    monkeypatch.setattr(stream, "PIECE", 4096)
    monkeypatch.setattr(stream, "Executor", Watched)
    monkeypatch.setitem(METHODS, "linear", dataclasses.replace(METHODS["linear"], merge=failing))

    with pytest.raises(MergeError, match="no"):
        stream.write(todo, tmp_path / "out", threads=threads)
    assert len(merged) == threads - 1  # the largest tensors have three pieces


def test_a_merge_ends_with_who_watches_it(family: Path, tmp_path: Path) -> None:
    class Watcher:
        def step(self, title: str, total: int) -> Any:
            assert title == "merge to out"
            return self

        def __enter__(self) -> Callable[[int], None]:
            def advance(_: int) -> None:
                raise KeyboardInterrupt

            return advance

        def __exit__(self, *_: object) -> None: ...

    todo = planned(write_recipe(tmp_path / "recipe.yaml", "linear", HALVES), family)
    with pytest.raises(KeyboardInterrupt):
        stream.write(todo, tmp_path / "out", threads=2, progress=Watcher())
    assert is_clean(tmp_path)


INTERRUPTED = """
import dataclasses, itertools, signal, sys, threading
from builder.merge.methods import METHODS

linear, pieces, told = METHODS["linear"], itertools.count(), threading.Event()

def handle(*signalled):
    told.set()
    signal.default_int_handler(*signalled)

def interrupted(inputs, **parameters):
    for values in linear.merge(inputs, **parameters):
        if next(pieces) == 0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert told.wait(60)
        yield values

signal.signal(signal.SIGINT, handle)
METHODS["linear"] = dataclasses.replace(linear, merge=interrupted)
from builder.__main__ import main
sys.argv = ["builder", "merge", *sys.argv[1:]]
main()
"""


def test_ctrl_c_ends_a_merge_with_a_sentence_and_leaves_nothing(family: Path, tmp_path: Path) -> None:
    models = {str(family / name): {"weight": 1} for name in ("base", "a")}
    recipe = write_recipe(tmp_path / "recipe.yaml", "linear", models)
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, recipe, tmp_path / "out"],
        env={**os.environ, "MODELGLUE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert ended.returncode == 130
    assert "stopped; run it again to go on" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "ignored" not in ended.stderr
    assert is_clean(tmp_path, "cache")


def test_what_a_killed_merge_left_is_no_hindrance(family: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/model-00001-of-00009.safetensors").write_bytes(b"half")

    merge(tmp_path, family, "linear", HALVES)

    assert not (tmp_path / "out.partial").exists()
    assert not [*(tmp_path / "out").glob("model-*")]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(family: Path, tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        merge(tmp_path, family, "linear", HALVES)
    finally:
        os.umask(before)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, mode)


def test_everything_is_on_the_disk_before_the_folder_has_its_name(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync, rename = [], os.fsync, Path.rename

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def named(path: Path, target: Path) -> Path:
        assert {path, *path.iterdir()} <= set(synced)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", named)

    merge(tmp_path, family, "linear", HALVES, shard_bytes=50_000)

    assert (tmp_path / "out").exists()


# Memory


def result(family: Path, tmp_path: Path, method: str, models: Mapping[str, Any], **options: Any) -> Result:
    base = {} if method in WITHOUT_BASE else {"base_model": "base"}
    recipe = write_recipe(tmp_path / "recipe.yaml", method, models, **base)
    return stream.write(planned(recipe, family), tmp_path / "out", overwrite=True, **options)


def test_less_memory_means_fewer_threads_and_too_little_is_refused(family: Path, tmp_path: Path) -> None:
    assert result(family, tmp_path, "linear", HALVES, threads=7).threads == 7
    assert result(family, tmp_path, "linear", HALVES, threads=7, max_memory=10**10).threads == 7
    few = result(family, tmp_path, "linear", HALVES, threads=7, max_memory=stream.OVERHEAD + 10**7).threads
    assert 1 <= few < 7
    more = result(family, tmp_path, "linear", HALVES, threads=7, max_memory=stream.OVERHEAD + 2 * 10**7).threads
    assert few < more <= 7

    with pytest.raises(MergeError, match=r"one thread needs 0\.3\d GB, more than --max-memory: raise it"):
        result(family, tmp_path, "linear", HALVES, max_memory=stream.OVERHEAD)


def test_a_result_says_what_was_read_and_written(family: Path, tmp_path: Path) -> None:
    found = result(family, tmp_path, "linear", {"a": {"weight": 1}, "c": {"weight": 1}}, threads=2)

    size = sum(x.size for x in llamas.random(0).values())
    assert (found.tensors, found.read, found.written) == (len(llamas.random(0)), 6 * size, 4 * size)
    assert found.seconds > 0


def test_the_merged_tensors_may_be_had_without_a_folder(family: Path, tmp_path: Path) -> None:
    todo = planned(recipe_of(tmp_path / "recipe.yaml", "dare_ties", 0, out_dtype="float32"), family)
    stream.write(todo, tmp_path / "out")

    held = dict(stream.tensors(todo))

    written = llamas.read(tmp_path / "out")
    assert [*held] == [*todo.layout]
    assert all(np.array_equal(held[name], written[name]) for name in written)


# The files beside the weights


def test_the_card_says_what_the_merge_is_made_of(family: Path, tmp_path: Path) -> None:
    from importlib.metadata import version

    (tmp_path / "base").symlink_to(family / "base"), (tmp_path / "a").symlink_to(family / "a")
    lora(tmp_path / "lora", [DOWN])
    models = {"a": {"weight": 0.5}, "base+lora": {"weight": [0.25, 0.5]}}
    more = {"base_model": "base", "seed": 11, "parameters": {"int8_mask": True}}

    merge(tmp_path, tmp_path, "task_arithmetic", models, **more)

    card = (tmp_path / "out/README.md").read_text("utf-8")
    recipe = (tmp_path / "recipe.yaml").read_text("utf-8")
    assert f"```yaml\n{recipe.rstrip()}\n```" in card
    assert (tmp_path / "out/recipe.yaml").read_text("utf-8") == recipe
    inputs = [
        *(("a", path) for path in sorted((tmp_path / "a").glob("*.safetensors"))),
        ("base", tmp_path / "base/model.safetensors"),
        ("base+lora", tmp_path / "base/model.safetensors"),
        ("base+lora", tmp_path / "lora/adapter_model.safetensors"),
    ]
    assert len(inputs) == 6
    for model, path in inputs:
        assert f"| {model} | {path.name} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in card
    assert "Seed 11" in card
    assert "- int8_mask has no effect here: masks are not kept in memory" in card
    for words in (
        f"Model-GLUE {version('modelglue')}",
        f"numpy {np.__version__}",
        sys.version.split()[0],
        "task_arithmetic",
    ):
        assert words in card
    assert str(tmp_path) not in card


def test_the_card_names_statistics(family: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(family / "a")
    write_statistics(tmp_path, "fisher", "a")

    merge(tmp_path, tmp_path, "fisher", {"a": {"statistics": "a.stats"}})

    digest = hashlib.sha256((tmp_path / "a.stats").read_bytes()).hexdigest()
    assert f"| a.stats | a.stats | `{digest}` |" in (tmp_path / "out/README.md").read_text("utf-8")


def test_files_that_were_hashed_before_are_not_hashed_again(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path / "journal") as journal:
        merge(tmp_path, family, "linear", HALVES, "first", journal=journal)

        def refuse(path: Path) -> str:
            raise AssertionError(f"{path} was hashed")

        monkeypatch.setattr(checkpoints, "sha256", refuse)
        merge(tmp_path, family, "linear", HALVES, "second", journal=journal)
        llamas.write(tmp_path / "x", llamas.random(5))
        with pytest.raises(AssertionError, match=r"x/model\.safetensors was hashed"):
            merge(tmp_path, tmp_path, "passthrough", {"x": {}}, "third", journal=journal)

    assert llamas.contents(tmp_path / "first") == llamas.contents(tmp_path / "second")


def test_what_lies_beside_the_weights_comes_along(tmp_path: Path) -> None:
    llamas.write(tmp_path / "a", llamas.random(0), words=COMMON)
    beside = ["generation_config.json", "modeling_own.py", "chat_template.jinja", "preprocessor_config.json"]
    for name in [*beside, "notes.txt", "optimizer.bin"]:
        (tmp_path / "a" / name).write_text("{}", "utf-8")

    merge(tmp_path, tmp_path, "passthrough", {"a": {}})

    ours = {"model.safetensors", "config.json", "README.md", "recipe.yaml", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == ours | set(beside)
    for name in [*beside, "tokenizer.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_chat_template_of_the_recipe_is_the_only_one(tmp_path: Path) -> None:
    llamas.write(tmp_path / "a", llamas.random(0), words=COMMON)
    config = json.loads((tmp_path / "a/tokenizer_config.json").read_text("utf-8"))
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "old {{ x }}"}), "utf-8")

    merge(tmp_path, tmp_path, "passthrough", {"a": {}}, chat_template="new {{ messages }}")

    assert (tmp_path / "out/chat_template.jinja").read_text("utf-8") == "new {{ messages }}"
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text("utf-8")) == config
