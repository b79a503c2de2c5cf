"""Plans: what becomes of every tensor, decided from configs and headers alone; what cannot be merged is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import random_tensors, write_model

from builder import checkpoints
from builder.checkpoints import Array, Tensor
from builder.errors import CheckpointError, MergeError, SourceError
from builder.merge.models import Found
from builder.merge.plan import Origin, Output, Plan, plan
from builder.merge.recipe import parse

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]\n"
TASK = "merge_method: task_arithmetic\nbase_model: base\n"
QUERY = "self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers may be looked at, and nothing else."""

    def refuse(_: object, name: str) -> Array:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(checkpoints.Safetensors, "stored", refuse)
    monkeypatch.setattr(checkpoints.Safetensors, "fetch", refuse)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model: random tensors of `layers` layers, without those in `lacks`, and with those of `extra`."""

    def model(
        name: str,
        *,
        layers: int = 2,
        rows: int = 10,
        width: int = 8,
        lacks: Collection[str] = (),
        extra: Mapping[str, tuple[int, ...]] | None = None,
        dtype: str = "F32",
        **config: Any,
    ) -> Path:
        tensors = {key: values for key, values in random_tensors(1, rows, layers, width).items() if key not in lacks}
        tensors |= {key: np.ones(shape, np.float32) for key, shape in (extra or {}).items()}
        write_model(tmp_path / name, tensors, dtype, {"num_hidden_layers": layers, **config})
        return tmp_path / name

    return model


def planned(text: str, folder: Path, allow: Collection[str] = ()) -> Plan:
    """The plan of a recipe whose models are folders beside each other; MODEL+ADAPTER as in a recipe."""

    def find(name: str) -> Found:
        model, _, adapter = name.partition("+")
        return Found(folder / model, folder / adapter if adapter else None)

    return plan(parse(text, "the recipe", folder), find, allow=allow)


def outputs(text: str, folder: Path, allow: Collection[str] = ()) -> dict[str, Output]:
    return {output.name: output for output in planned(text, folder, allow).outputs}


def stack(*slices: Sequence[tuple[str, int, int]], method: str = "passthrough", more: str = "") -> str:
    """A recipe of slices, each a list of (model, first layer, end)."""
    written = [
        {"sources": [{"model": model, "layer_range": [first, end]} for model, first, end in sources]}
        for sources in slices
    ]
    return f"merge_method: {method}\n{more}\nslices: {json.dumps(written)}\n"


def lora(folder: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    save_file(
        {f"base_model.model.{name}": np.ones(shape, np.float32) for name, shape in tensors.items()},
        folder / "adapter_model.safetensors",
    )


# What a plan says


def test_a_plan_says_of_every_tensor_what_it_is_made_of(write: Write, tmp_path: Path) -> None:
    write("a", dtype="BF16"), write("b")
    found = planned(LINEAR, tmp_path)

    assert [output.name for output in found.outputs] == list(random_tensors(1, layers=2))
    name = f"model.layers.1.{QUERY}"
    assert found.outputs[[*found.layout].index(name)] == Output(
        name,
        Tensor("BF16", (8, 8)),
        "linear",
        (Origin("a", name), Origin("b", name)),
        None,
        {"weight": [1.0, 3.0], "normalize": True},
    )
    size = sum(np.prod(values.shape) for values in random_tensors(1, layers=2).values())
    assert (found.written, found.read) == (2 * size, 2 * size + 4 * size)


def test_a_base_is_told_from_the_models_that_are_merged_into_it(write: Write, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        write(name)
    models = "[{model: a, parameters: {weight: 1}}, {model: base}, {model: b, parameters: {weight: 2}}]"

    for output in outputs(f"{TASK}models: {models}", tmp_path).values():
        assert output.base == Origin("base", output.name)
        assert [origin.model for origin in output.inputs] == ["a", "b"]
        assert output.parameters["weight"] == [1.0, 2.0]


def test_the_config_is_the_bases_else_the_first_models(write: Write, tmp_path: Path) -> None:
    write("a", pad_token_id=1), write("b", pad_token_id=2)

    assert planned(LINEAR, tmp_path).config["pad_token_id"] == 1
    assert planned(LINEAR + "base_model: b", tmp_path).config["pad_token_id"] == 2


# Parameters


def weights(text: str, folder: Path, parts: Sequence[str]) -> list[float]:
    """The first model's weight for the tensors whose names hold these parts."""
    found = outputs(text, folder)
    names = [next(name for name in found if part in name) for part in parts]
    return [found[name].parameters["weight"][0] for name in names]


def test_a_gradient_is_interpolated_over_the_layers_and_begins_outside_of_them(write: Write, tmp_path: Path) -> None:
    write("a", layers=5), write("b", layers=5)
    text = LINEAR.replace("weight: 1}", "weight: [0, 1, 3]}")

    layers = [f"layers.{i}.{QUERY}" for i in range(5)]
    # t = i / 4; three values lie at 0, 1/2 and 1.
    assert weights(text, tmp_path, layers) == [0.0, 0.5, 1.0, 2.0, 3.0]
    assert weights(text, tmp_path, ["embed_tokens", "model.norm", "lm_head"]) == [0.0, 0.0, 0.0]


def test_the_first_filter_that_matches_decides(write: Write, tmp_path: Path) -> None:
    write("a"), write("b")
    said = "[{filter: mlp, value: 5}, {filter: layers.1, value: [6, 7]}, {filter: down_proj, value: 8}, {value: 9}]"
    text = LINEAR.replace("weight: 1}", f"weight: {said}}}")

    parts = ["0.mlp.gate", "1.mlp.down", f"0.{QUERY}", f"1.{QUERY}", "embed_tokens"]
    assert weights(text, tmp_path, parts) == [5.0, 5.0, 9.0, 7.0, 9.0]


def test_what_a_model_says_goes_before_slice_and_recipe(write: Write, tmp_path: Path) -> None:
    write("a"), write("b")
    text = """
merge_method: linear
parameters: {weight: [{filter: o_proj, value: 1}, {value: 2}]}
slices:
  - parameters: {weight: {filter: mlp, value: 3}}
    sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: {filter: gate_proj, value: 4}}}
      - {model: b, layer_range: [0, 2]}
"""
    found = outputs(text, tmp_path)

    def said(part: str) -> list[float]:
        return next(output.parameters["weight"] for name, output in found.items() if part in name)

    assert said("gate_proj") == [4.0, 3.0]
    assert said("down_proj") == [3.0, 3.0]
    assert said("o_proj") == [1.0, 1.0]
    assert said("q_proj") == [2.0, 2.0]


def test_a_parameter_that_a_filter_leaves_unsaid_is_named_with_tensor_and_model(write: Write, tmp_path: Path) -> None:
    write("a"), write("b")
    text = LINEAR.replace("weight: 3", "weight: {filter: mlp, value: 3}")

    with pytest.raises(MergeError, match=r"no weight for model.embed_tokens.weight of b: give one without a filter"):
        planned(text, tmp_path)


def test_the_gradient_of_a_slice_runs_over_its_own_layers(write: Write, tmp_path: Path) -> None:
    write("a", layers=4)
    text = stack([("a", 0, 3)], [("a", 3, 4)], more="parameters: {scale: [1, 2]}")

    found = outputs(text, tmp_path)

    scales = [found[f"model.layers.{i}.{QUERY}"].parameters["scale"] for i in range(4)]
    assert scales == [[1.0], [1.5], [2.0], [2.0]]  # one layer counts as the last
    assert found["model.norm.weight"].parameters["scale"] == [1.0]


def test_a_filter_speaks_of_the_layers_of_the_input_for_what_a_model_says(write: Write, tmp_path: Path) -> None:
    write("a", layers=4)
    text = stack([("a", 2, 4)]).replace(
        '"layer_range"', '"parameters": {"scale": {"filter": "layers.3", "value": 2}}, "layer_range"'
    )

    found = outputs(text, tmp_path)

    assert found[f"model.layers.0.{QUERY}"].parameters["scale"] == [None]
    assert found[f"model.layers.1.{QUERY}"].parameters["scale"] == [2.0]


# Slices


def test_slices_are_stacked_and_renumbered(write: Write, tmp_path: Path) -> None:
    write("a", layers=3), write("b", layers=3)

    found = planned(stack([("a", 0, 2)], [("b", 1, 3)], [("a", 1, 2)]), tmp_path)

    layers = [next(o for o in found.outputs if o.name == f"model.layers.{i}.{QUERY}").inputs for i in range(5)]
    expected = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 1)]
    assert layers == [(Origin(model, f"model.layers.{layer}.{QUERY}"),) for model, layer in expected]
    assert len(found.outputs) == 5 * 5 + 3
    assert found.config["num_hidden_layers"] == 5
    assert found.config["architectures"] == ["LlamaForCausalLM"]


def test_embeddings_are_the_first_slices_and_norm_and_head_the_last_ones(write: Write, tmp_path: Path) -> None:
    write("a", extra={"transformer.embed_positions.weight": (4, 8)})
    write("b", extra={"transformer.embed_positions.weight": (4, 8)})

    found = outputs(stack([("a", 0, 1)], [("b", 1, 2)]), tmp_path)

    made_of = {name: output.inputs[0].model for name, output in found.items() if ".layers." not in name}
    assert made_of == {
        "model.embed_tokens.weight": "a",
        "transformer.embed_positions.weight": "a",
        "model.norm.weight": "b",
        "lm_head.weight": "b",
    }
    assert [*found][:2] == ["model.embed_tokens.weight", "transformer.embed_positions.weight"]
    assert [*found][-2:] == ["model.norm.weight", "lm_head.weight"]


def test_a_head_that_is_called_embed_out_is_the_last_slices(write: Write, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(name, lacks=["lm_head.weight"], extra={"embed_out.weight": (10, 8)})

    found = outputs(stack([("a", 0, 1)], [("b", 1, 2)]), tmp_path)

    assert found["embed_out.weight"].inputs == (Origin("b", "embed_out.weight"),)


def test_layers_of_several_models_are_merged_slice_by_slice(write: Write, tmp_path: Path) -> None:
    write("a", layers=4), write("b", layers=2)
    text = stack([("a", 2, 4), ("b", 0, 2)], method="linear", more="parameters: {weight: 1}")

    found = outputs(text, tmp_path)

    assert [*found] == [*random_tensors(1, layers=2)]
    name = f"model.layers.1.{QUERY}"
    assert found[name].inputs == (Origin("a", f"model.layers.3.{QUERY}"), Origin("b", name))


def test_settings_of_single_layers_follow_their_layers(write: Write, tmp_path: Path) -> None:
    write("a", layers=3, layer_types=["a0", "a1", "a2"])
    write("b", layers=4, layer_types=["b0", "b1", "b2", "b3"])

    config = planned(stack([("a", 0, 2)], [("b", 2, 4)], [("a", 2, 3)]), tmp_path).config

    assert config["layer_types"] == ["a0", "a1", "b2", "b3", "a2"]


def test_a_list_that_is_as_long_as_there_are_layers_by_chance_stays(write: Write, tmp_path: Path) -> None:
    write("a", layers=1, eos_token_id=[7])

    config = planned(stack([("a", 0, 1)], [("a", 0, 1)]), tmp_path).config

    assert config["num_hidden_layers"] == 2
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == [7]


def test_a_model_whose_config_is_silent_on_single_layers_follows_the_others(write: Write, tmp_path: Path) -> None:
    write("a", layers=3, layer_types=["a0", "a1", "a2"]), write("b", layers=3), write("c", layers=5)

    config = planned(stack([("a", 0, 1)], [("b", 1, 3)]), tmp_path).config

    assert config["layer_types"] == ["a0", "a1", "a2"]
    with pytest.raises(MergeError, match=r"layer_types in config.json says nothing of layer 3: add it"):
        planned(stack([("a", 0, 1)], [("c", 1, 5)]), tmp_path)


def test_the_layers_of_one_part_of_a_model_are_counted_in_that_parts_config(write: Write, tmp_path: Path) -> None:
    tower = {f"vision.blocks.{i}.norm.weight": (8,) for i in range(3)}
    write("a", extra=tower, num_hidden_layers=9, text_config={"num_hidden_layers": 2, "layer_types": ["x", "y"]})

    found = planned(stack([("a", 0, 2)], [("a", 1, 2)]), tmp_path)

    assert found.config["text_config"] == {"num_hidden_layers": 3, "layer_types": ["x", "y", "y"]}
    assert found.config["num_hidden_layers"] == 9
    assert tower.keys() <= found.layout.keys()


def test_a_slice_beyond_a_models_layers_is_refused(write: Write, tmp_path: Path) -> None:
    write("a")

    with pytest.raises(MergeError, match=r"a has 2 layers: layer_range \[1, 3\] goes beyond them"):
        planned(stack([("a", 1, 3)]), tmp_path)


def test_slices_of_a_model_without_one_stack_of_layers_are_refused(write: Write, tmp_path: Path) -> None:
    write("a", extra={f"decoder.layers.{i}.norm.weight": (8,) for i in range(2)})
    write("b", layers=0)

    with pytest.raises(MergeError, match="a has more than one stack of layers: give slices per module"):
        planned(stack([("a", 0, 2)]), tmp_path)
    with pytest.raises(MergeError, match="b has no layers"):
        planned(stack([("b", 0, 2)]), tmp_path)


def test_layers_that_do_not_fit_on_one_another_are_refused(write: Write, tmp_path: Path) -> None:
    write("a"), write("wide", width=16)
    write("biased", extra={f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(2)})

    with pytest.raises(MergeError, match=r"q_proj.weight is \[8, 8\] in a and \[16, 16\] in wide: they do not mix"):
        planned(stack([("a", 0, 1)], [("wide", 1, 2)]), tmp_path)
    with pytest.raises(MergeError, match=r"layers.0.self_attn.q_proj.bias is missing in a and \[8\] in biased"):
        planned(stack([("a", 0, 1)], [("biased", 1, 2)]), tmp_path)


def test_a_rule_may_drop_what_only_some_layers_would_have(write: Write, tmp_path: Path) -> None:
    write("a"), write("biased", extra={f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(2)})

    found = planned(stack([("a", 0, 1)], [("biased", 1, 2)]) + "tensors: [{filter: bias, source: drop}]", tmp_path)

    assert found.layout.keys() == random_tensors(1, layers=2).keys()
    assert found.notes == (f"{BIAS.replace('0', '1')} is dropped, as the recipe says",)


def test_a_rule_may_give_every_layer_what_only_some_models_have(write: Write, tmp_path: Path) -> None:
    write("a"), write("biased", extra={f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(2)})
    rule = "parameters: {weight: 1}\ntensors: [{filter: bias, source: biased}]"
    whole = [("a", 0, 1), ("biased", 0, 1)]

    found = outputs(stack(whole, whole, method="linear", more=rule), tmp_path)

    for layer in "01":
        assert found[BIAS.replace("0", layer)].inputs == (Origin("biased", BIAS),)
    with pytest.raises(MergeError, match=r"q_proj\.bias is missing in a and"):
        planned(stack(whole, [("a", 1, 2)], method="linear", more=rule), tmp_path)


def test_layers_of_a_model_may_differ_from_one_another(write: Write, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(name, extra={"model.layers.1.mlp.router.weight": (4, 8)})

    found = outputs(stack([("a", 0, 1)], [("b", 0, 2)]), tmp_path)

    assert [name for name in found if "router" in name] == ["model.layers.2.mlp.router.weight"]


# Modules

MODULES = """
merge_method: linear
parameters: {weight: 1}
modules:
  vision: {models: [{model: a}]}
  text_decoder: {models: [{model: a}, {model: b}]}
"""
VISION = {"model.vision.patch.weight": (4, 8), "model.vision.layers.0.norm.weight": (8,)}


def test_a_module_has_the_tensors_with_its_name_and_one_without_a_match_the_rest(write: Write, tmp_path: Path) -> None:
    write("a", extra=VISION), write("b", extra=VISION)

    found = outputs(MODULES, tmp_path)

    assert found.keys() == {*random_tensors(1, layers=2), *VISION}
    for name, output in found.items():
        assert [origin.model for origin in output.inputs] == (["a"] if name in VISION else ["a", "b"])


def test_a_module_may_be_stacked(write: Write, tmp_path: Path) -> None:
    write("a", extra=VISION)
    text = """
merge_method: passthrough
modules:
  vision: {models: [{model: a}]}
  text_decoder: {slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: a, layer_range: [0, 2]}]}]}
"""
    found = planned(text, tmp_path)

    assert found.layout.keys() == {*random_tensors(1, layers=4), *VISION}
    assert found.config["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        (
            "{vision: {models: [{model: a}]}, sound: {models: [{model: a}]}, text: {models: [{model: a}]}}",
            r"modules.sound has no tensor: the parts of the names here are model, embed_tokens, .*vision",
        ),
        ("{vision: {models: [{model: a}]}}", r"model.embed_tokens.weight is in none of the modules: name one more"),
        (
            "{model: {models: [{model: a}]}, lm_head: {models: [{model: a}]}, sound: {models: [{model: a}]}}",
            "modules.sound has no tensor",
        ),
    ],
)
def test_modules_that_do_not_divide_the_tensors_are_refused(
    write: Write, tmp_path: Path, modules: str, sentence: str
) -> None:
    write("a", extra=VISION)

    with pytest.raises(MergeError, match=sentence):
        planned(f"merge_method: linear\nparameters: {{weight: 1}}\nmodules: {modules}", tmp_path)


# Dtypes


@pytest.mark.parametrize(
    ("more", "dtype", "config"),
    [
        ("", "F16", "float16"),
        ("dtype: bfloat16", "BF16", "bfloat16"),
        ("dtype: bfloat16\nout_dtype: float32", "F32", "float32"),
        ("out_dtype: float16", "F16", "float16"),
    ],
)
def test_the_output_has_the_recipes_dtype_else_the_first_models(
    write: Write, tmp_path: Path, more: str, dtype: str, config: str
) -> None:
    write("a", dtype="F16"), write("b", dtype="F32")

    found = planned(LINEAR + more, tmp_path)

    assert {tensor.dtype for tensor in found.layout.values()} == {dtype}
    assert found.config["dtype"] == config


def test_without_a_dtype_the_base_decides(write: Write, tmp_path: Path) -> None:
    write("base", dtype="BF16", torch_dtype="float32"), write("a", dtype="F32")

    found = planned(f"{TASK}models: [{{model: a, parameters: {{weight: 1}}}}]", tmp_path)

    assert {tensor.dtype for tensor in found.layout.values()} == {"BF16"}
    assert found.config["torch_dtype"] == "bfloat16"
    assert "dtype" not in found.config


# Tied heads


def test_models_that_tie_their_heads_give_one_that_does(write: Write, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(name, lacks=["lm_head.weight"], tie_word_embeddings=True)

    found = planned(LINEAR, tmp_path)

    assert "lm_head.weight" not in found.layout
    assert found.config["tie_word_embeddings"] is True
    assert found.notes == ()


def test_a_stored_head_that_the_config_ties_does_not_count(write: Write, tmp_path: Path) -> None:
    write("a", tie_word_embeddings=True), write("b", lacks=["lm_head.weight"], tie_word_embeddings=True)

    assert "lm_head.weight" not in planned(LINEAR, tmp_path).layout


@pytest.mark.parametrize("tied", ["a", "b"])
def test_a_tied_and_an_untied_head_give_an_untied_one_and_a_note(write: Write, tmp_path: Path, tied: str) -> None:
    for name in ("a", "b"):
        lacks = ["lm_head.weight"] if name == tied else []
        write(name, lacks=lacks, tie_word_embeddings=name == tied)
    said = LINEAR.replace("weight: 3", "weight: [{filter: lm_head, value: 5}, {value: 3}]")

    found = planned(said.replace("weight: 1", "weight: [{filter: lm_head, value: 4}, {value: 1}]"), tmp_path)

    head = found.outputs[[*found.layout].index("lm_head.weight")]
    names = ["model.embed_tokens.weight" if name == tied else "lm_head.weight" for name in ("a", "b")]
    assert head.inputs == (Origin("a", names[0]), Origin("b", names[1]))
    assert head.parameters["weight"] == [4.0, 5.0]
    assert found.config["tie_word_embeddings"] is False
    assert found.notes == (f"{tied} ties its head to its embeddings, others do not: the merge has a head of its own",)


def test_a_stack_that_ends_with_a_tied_model_takes_its_embeddings_as_head(write: Write, tmp_path: Path) -> None:
    write("a", tie_word_embeddings=False), write("b", lacks=["lm_head.weight"], tie_word_embeddings=True)

    found = planned(stack([("a", 0, 1)], [("b", 1, 2)]), tmp_path)

    made_of = {output.name: output.inputs for output in found.outputs}
    assert made_of["lm_head.weight"] == (Origin("b", "model.embed_tokens.weight"),)
    assert made_of["model.embed_tokens.weight"] == (Origin("a", "model.embed_tokens.weight"),)
    assert found.config["tie_word_embeddings"] is False
    assert "b ties its head" in found.notes[0]


# Tensors that only some models have

BIAS = "model.layers.0.self_attn.q_proj.bias"


def test_a_tensor_that_only_some_have_is_refused_by_name_with_the_fix(write: Write, tmp_path: Path) -> None:
    write("a"), write("b", extra={BIAS: (8,)})
    sentence = f"{BIAS} is in b and not in a: say in the recipe where it comes from, tensors: "

    with pytest.raises(MergeError, match=re.escape(f"{sentence}[{{filter: {BIAS}, source: b}}], or source: drop")):
        planned(LINEAR, tmp_path)


def test_a_rule_takes_a_lone_tensor_from_a_model_as_it_is(write: Write, tmp_path: Path) -> None:
    write("a"), write("b", extra={BIAS: (8,)}, dtype="BF16")

    found = outputs(LINEAR + "tensors: [{filter: bias, source: b}]", tmp_path)

    assert found[BIAS] == Output(
        BIAS, Tensor("BF16", (8,)), "passthrough", (Origin("b", BIAS),), None, {"scale": [None]}
    )
    assert len(found) == len(random_tensors(1, layers=2)) + 1


def test_a_rule_drops_a_lone_tensor_with_a_note(write: Write, tmp_path: Path) -> None:
    write("a"), write("b", extra={BIAS: (8,)})

    found = planned(LINEAR + "tensors: [{filter: q_proj.bias, source: drop}]", tmp_path)

    assert found.layout.keys() == random_tensors(1, layers=2).keys()
    assert found.notes == (f"{BIAS} is dropped, as the recipe says",)


def test_a_rule_that_names_a_model_without_the_tensor_is_refused(write: Write, tmp_path: Path) -> None:
    write("a"), write("b", extra={BIAS: (8,)})

    with pytest.raises(MergeError, match=f"{re.escape(BIAS)} is to come from a, which does not have it; b do"):
        planned(LINEAR + "tensors: [{filter: bias, source: a}]", tmp_path)


def test_a_rule_is_for_lone_tensors_alone(write: Write, tmp_path: Path) -> None:
    write("a"), write("b")

    found = outputs(LINEAR + "tensors: [{filter: q_proj, source: drop}]", tmp_path)

    assert [origin.model for origin in found[f"model.layers.0.{QUERY}"].inputs] == ["a", "b"]


@pytest.mark.parametrize("models", ["ab", "ba"])
def test_a_tensor_that_no_slice_takes_is_refused(write: Write, tmp_path: Path, models: str) -> None:
    write("a"), write("b", extra={"visual.proj.weight": (4, 8), "embed_extra.weight": (4, 8)})
    text = stack(*([(name, i, i + 1)] for i, name in enumerate(models)))

    with pytest.raises(MergeError, match=r"(visual.proj|embed_extra).weight is in b and not in a: say in the recipe"):
        planned(text, tmp_path)
    rule = "tensors: [{filter: visual, source: b}, {filter: embed_extra, source: drop}]"
    found = outputs(text + rule, tmp_path)
    assert "visual.proj.weight" in found
    assert ("embed_extra.weight" in found) == (models == "ba")


def test_a_tensor_that_no_module_takes_is_refused(write: Write, tmp_path: Path) -> None:
    write("a", extra=VISION), write("b", extra={**VISION, "model.vision.more.weight": (3,)})

    with pytest.raises(MergeError, match=r"model.vision.more.weight is in b and not in a"):
        planned(MODULES, tmp_path)


def test_tensors_that_no_table_of_architectures_knows_are_kept(write: Write, tmp_path: Path) -> None:
    extra = {BIAS: (8,), "model.vision_tower.patch.weight": (3, 2, 4, 4), "model.odd": (), "model.empty": (0, 8)}
    write("a", extra=extra), write("b", extra=extra)

    found = outputs(LINEAR, tmp_path)

    assert found.keys() == {*random_tensors(1, layers=2), *extra}
    assert {name: found[name].tensor.shape for name in extra} == extra


# What does not mix


@pytest.mark.parametrize(
    ("fact", "mine", "theirs", "said"),
    [
        ("rope", {"rope_theta": 1e6}, {"rope_theta": 1e4}, "rope_theta 1e+06 and rope_type default, rope_theta 10000"),
        ("rope", {"rope_scaling": {"type": "linear", "factor": 4}}, {}, "rope_type linear, factor 4"),
        ("rope", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, {}, "rope_type yarn"),
        ("norm", {"rms_norm_eps": 1e-6}, {}, "1e-06 and 1e-05"),
        ("heads", {"num_attention_heads": 4}, {}, "[4, 2] and [2, 2]"),
        ("heads", {"num_key_value_heads": 1}, {}, "[2, 1] and [2, 2]"),
        ("class", {"architectures": ["MistralForCausalLM"]}, {}, "['MistralForCausalLM'] and ['LlamaForCausalLM']"),
        ("activation", {"hidden_act": "gelu"}, {"hidden_act": "silu"}, "gelu and silu"),
    ],
)
def test_models_that_compute_otherwise_are_refused_unless_that_is_allowed(
    write: Write, tmp_path: Path, fact: str, mine: dict[str, Any], theirs: dict[str, Any], said: str
) -> None:
    write("a", **mine), write("b", **theirs)

    with pytest.raises(MergeError, match=re.escape(f"a and b differ in {fact}: ")) as refused:
        planned(LINEAR, tmp_path)
    assert said in str(refused.value)
    assert f"--allow-mismatch {fact} merges them all the same" in str(refused.value)
    others = {"class", "rope", "norm", "heads", "activation"} - {fact}
    with pytest.raises(MergeError):
        planned(LINEAR, tmp_path, allow=others)
    (note,) = planned(LINEAR, tmp_path, allow=[fact]).notes
    assert note.startswith(f"a and b differ in {fact}: ")
    assert planned(LINEAR, tmp_path, allow=[fact]).config.items() >= mine.items()


def test_what_two_files_say_in_other_words_is_the_same(write: Write, tmp_path: Path) -> None:
    write("a", rope_theta=1e4, num_key_value_heads=None)
    write("b", rope_parameters={"rope_type": "default", "rope_theta": 10000}, rms_norm_eps=9.99999974e-06)

    assert planned(LINEAR, tmp_path).notes == ()


def test_another_depth_is_refused_with_the_way_to_merge_some_layers(write: Write, tmp_path: Path) -> None:
    write("a", layers=2), write("b", layers=3)

    with pytest.raises(MergeError, match="a has 2 layers and b has 3: say with slices which of them are merged"):
        planned(LINEAR, tmp_path)


def test_another_width_is_refused(write: Write, tmp_path: Path) -> None:
    write("a"), write("b", width=16)

    with pytest.raises(MergeError, match=r"is \[.*8.*\] in a and \[.*16.*\] in b: they do not mix"):
        planned(LINEAR, tmp_path)


def test_another_shape_is_named(write: Write, tmp_path: Path) -> None:
    write("a"), write("b", extra={"model.layers.1.mlp.gate_proj.weight": (16, 8)})

    with pytest.raises(MergeError, match=r"layers.1.mlp.gate_proj.weight is \[12, 8\] in a and \[16, 8\] in b"):
        planned(LINEAR, tmp_path)


def test_vocabularies_of_other_sizes_are_refused_with_the_fix(write: Write, tmp_path: Path) -> None:
    write("a"), write("b", rows=12)

    with pytest.raises(
        MergeError, match=r"embed_tokens.weight has 10 rows in a and 12 in b\. Add tokenizer: "
    ) as refused:
        planned(LINEAR, tmp_path)
    assert "{source: union}" in str(refused.value)
    assert "{source: base}" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LINEAR.replace("weight: 3", "weight: -1"), "model.embed_tokens.weight: the weights sum to zero"),
        (
            LINEAR.replace("weight: 3", "weight: [{filter: down_proj, value: -1}, {value: 1}]"),
            "model.layers.0.mlp.down_proj.weight: the weights sum to zero",
        ),
        (LINEAR.replace("weight: 3", "weight: [3, -1]"), "model.layers.1.self_attn.q_proj.weight: the weights sum to"),
        (
            "merge_method: della\nbase_model: base\nmodels:\n"
            "- {model: a, parameters: {weight: 1, density: [0.5, 0.1], epsilon: 0.2}}\n",
            r"layers.1.self_attn.q_proj.weight: density 0.1 with epsilon 0.2 is no probability: choose .* below 0.1",
        ),
    ],
)
def test_parameters_that_make_no_sense_for_a_tensor_are_refused(
    write: Write, tmp_path: Path, text: str, sentence: str
) -> None:
    for name in ("base", "a", "b"):
        write(name)

    with pytest.raises(MergeError, match=sentence):
        planned(text, tmp_path)


def test_weights_that_need_no_sum_may_cancel(write: Write, tmp_path: Path) -> None:
    write("a"), write("b")

    found = outputs(LINEAR.replace("weight: 3", "weight: -1") + "parameters: {normalize: false}", tmp_path)

    assert found["model.norm.weight"].parameters == {"weight": [1.0, -1.0], "normalize": False}


def test_quantised_models_are_refused(write: Write, tmp_path: Path) -> None:
    write("a"), write("b", quantization_config={"quant_method": "gptq", "bits": 4})

    with pytest.raises(MergeError, match=r"b is quantised \(gptq\): merge the model it was made from"):
        planned(LINEAR, tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_quantised_tensors_are_refused(write: Write, tmp_path: Path, dtype: str) -> None:
    write("a")
    file = write("b") / "model.safetensors"
    header = {"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))

    with pytest.raises(CheckpointError, match=f"x is {dtype}; only F32, F16, BF16 can be merged: use the unquantised"):
        planned(LINEAR, tmp_path)


def test_a_recipe_that_merges_nothing_is_refused(write: Write, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model(tmp_path / name, {})

    with pytest.raises(MergeError, match="the recipe merges no tensor"):
        planned(LINEAR, tmp_path)


# Adapters


def test_an_adapters_base_may_be_merged_beside_it(write: Write, tmp_path: Path) -> None:
    write("base")
    target = f"model.layers.1.{QUERY}".removesuffix(".weight")
    lora(tmp_path / "lora", {f"{target}.lora_A.weight": (2, 8), f"{target}.lora_B.weight": (8, 2)})

    found = planned(f"{TASK}models: [{{model: base+lora, parameters: {{weight: 1}}}}]", tmp_path)

    assert found.layout.keys() == random_tensors(1, layers=2).keys()
    assert {(output.inputs[0].model, output.base.model) for output in found.outputs if output.base} == {
        ("base+lora", "base")
    }


def test_an_adapter_of_another_base_is_refused(write: Write, tmp_path: Path) -> None:
    write("base")
    lora(
        tmp_path / "lora",
        {"model.layers.7.mlp.up_proj.lora_A.weight": (2, 8), "model.layers.7.mlp.up_proj.lora_B.weight": (8, 2)},
    )

    with pytest.raises(SourceError, match=r"adapts model.layers.7.mlp.up_proj.weight, which .*base does not have"):
        planned("merge_method: passthrough\nmodels: [{model: base+lora}]", tmp_path)


@pytest.mark.parametrize("kind", ["low rank", "whole"])
def test_an_adapter_of_a_head_that_does_not_count_is_refused(write: Write, tmp_path: Path, kind: str) -> None:
    write("base", tie_word_embeddings=True)
    factors = {"lm_head.lora_A.weight": (2, 8), "lm_head.lora_B.weight": (10, 2)}
    lora(tmp_path / "lora", factors if kind == "low rank" else {"lm_head.weight": (10, 8)})

    with pytest.raises(SourceError, match=r"changes lm_head.weight, and .*base ties its head to its embeddings"):
        planned("merge_method: passthrough\nmodels: [{model: base+lora}]", tmp_path)


def test_a_tensor_that_an_adapter_replaces_has_the_shape_that_it_gives(write: Write, tmp_path: Path) -> None:
    write("base")
    lora(tmp_path / "lora", {"model.embed_tokens.weight": (13, 8), "lm_head.weight": (13, 8)})

    found = planned("merge_method: passthrough\nmodels: [{model: base+lora}]", tmp_path)

    assert found.layout["model.embed_tokens.weight"].shape == (13, 8)
    assert found.config["vocab_size"] == 13
