"""Recipes: those that people publish are read unchanged, and every mistake in one is told at once, with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import MergeError
from builder.merge.method import Parameter
from builder.merge.methods import METHODS
from builder.merge.recipe import Recipe, Source, load_recipe, parse
from builder.merge.reference import Reference, resolve
from builder.merge.settings import Conditional, value

LINEAR = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {weight: 1.0}
  - model: WizardLM/WizardLM-13B-V1.2
    parameters: {weight: 0.3}
  - model: garage-bAInd/Platypus2-13B
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
"""
SLERP = """
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5  # fallback for rest of tensors
dtype: bfloat16
"""
TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1]  # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]  # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
DARE_TIES = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
"""
FRANKENMERGE = """
slices:
  - sources:
      - model: teknium/OpenHermes-2.5-Mistral-7B
        layer_range: [0, 24]
  - sources:
      - model: Intel/neural-chat-7b-v3
        layer_range: [8, 32]
        parameters:
          scale:
            - filter: o_proj
              value: 0.7071067812
            - value: 1.0
merge_method: passthrough
dtype: bfloat16
"""
MODEL_STOCK = """
models:
  - model: NousResearch/Hermes-3-Llama-3.1-8B
  - model: ArliAI/Llama-3.1-8B-ArliAI-RPMax-v1.2
  - model: SicariusSicariiStuff/Dusk_Rainbow
merge_method: model_stock
base_model: NousResearch/Meta-Llama-3.1-8B
dtype: float32
out_dtype: bfloat16
"""
DELLA = """
models:
  - model: Qwen/Qwen2.5-7B-Instruct
    parameters: {weight: 0.6, density: 0.5, epsilon: 0.1}
  - model: Qwen/Qwen2.5-Coder-7B
    parameters: {weight: 0.4, density: 0.6}
merge_method: della
base_model: Qwen/Qwen2.5-7B
parameters:
  lambda: 1.05
  rescale: false
dtype: bfloat16
"""
BREADCRUMBS = """
merge_method: breadcrumbs_ties
base_model: ./base
models:
  - model: ./math
    parameters: {weight: 1, density: 0.9, gamma: 0.01}
  - model: ./code+./lora
    parameters: {weight: 0.5, density: 0.9, gamma: 1e-2}
"""
NUSLERP = """
models:
  - model: elinas/Chronos-Gold-12B-1.0
    parameters:
      weight: 0.4
  - model: PygmalionAI/Eleusis-12B
    parameters:
      weight:
        - filter: embed_tokens
          value: 0.2
        - value: [0.6, 0.4]
merge_method: nuslerp
parameters:
  nuslerp_flatten: false
  nuslerp_row_wise: true
"""
UNION = """
merge_method: dare_linear
base_model: ReadyArt/The-Omega-Directive-M-24B-v1.1
models:
  - model: ReadyArt/The-Omega-Directive-M-24B-v1.1
    parameters: {weight: 0.2}
  - model: TheDrummer/Cydonia-24B-v4.1@main
    parameters: {weight: 0.2}
parameters:
  density: 0.3
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>:
      source: TheDrummer/Cydonia-24B-v4.1@main
      force: true
    <|im_end|>:
      source: {kind: model_token, model: TheDrummer/Cydonia-24B-v4.1@main, token_id: 2}
    <unused>:
      source: {kind: zero}
chat_template: auto
"""
MODULES = """
merge_method: task_arithmetic
base_model: org/vlm
modules:
  text_decoder:
    parameters: {weight: 0.5}
    slices:
      - sources:
          - {model: org/vlm, layer_range: [0, 2]}
          - {model: org/vlm-math, layer_range: [0, 2], parameters: {weight: 0.7}}
        parameters: {lambda: 2}
      - sources:
          - {model: org/vlm, layer_range: [2, 4]}
          - {model: org/vlm-math, layer_range: [2, 4]}
  vision_tower:
    models:
      - model: org/vlm-math
parameters: {weight: 0.1, lambda: 0.9}
"""
EVOLVED = """
base_model: EleutherAI/pythia-70m-deduped
dtype: bfloat16
merge_method: linear
parameters:
  int8_mask: 1.0
  normalize: 1.0
slices:
- parameters: {int8_mask: 1.0, normalize: 0.0}
  sources:
  - layer_range: [0, 6]
    model: lomahony/pythia-70m-helpful-sft
    parameters: {weight: 0.8374437093734741}
  - layer_range: [0, 6]
    model: EleutherAI/pythia-70m-deduped
    parameters: {weight: 0.003805825486779213}
tokenizer_source: base
"""
KARCHER = """
models: [{model: org/a}, {model: org/b}, {model: org/c}]
merge_method: karcher
parameters: {max_iter: 20, tol: 1e-6}
dtype: torch.bfloat16
"""
PUBLISHED = {
    "linear": LINEAR,
    "slerp": SLERP,
    "ties": TIES,
    "dare_ties": DARE_TIES,
    "frankenmerge": FRANKENMERGE,
    "model_stock": MODEL_STOCK,
    "della": DELLA,
    "breadcrumbs": BREADCRUMBS,
    "nuslerp": NUSLERP,
    "union": UNION,
    "modules": MODULES,
    "evolved": EVOLVED,
    "karcher": KARCHER,
}


def read(text: str) -> Recipe:
    return parse(text, "mine.yml", Path("/recipes"))


def mistakes(text: str) -> list[str]:
    """The lines of what is said of a recipe, without its name."""
    with pytest.raises(MergeError) as caught:
        read(text)
    lines = str(caught.value).splitlines()
    assert all(line.startswith("mine.yml") for line in lines)
    return [line.removeprefix("mine.yml: ") for line in lines]


def two(method: str = "linear", more: str = "", first: str = "{weight: 1}") -> str:
    """A recipe of two models, A and B."""
    return f"""
merge_method: {method}
models:
  - model: A
    parameters: {first}
  - model: B
    parameters: {{weight: 1}}
{more}
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_read_as_it_is(name: str) -> None:
    recipe = read(PUBLISHED[name])

    assert recipe.merge_method in METHODS
    assert recipe.text == PUBLISHED[name]
    assert recipe.folder == Path("/recipes")


def test_a_recipe_names_its_models_once_the_base_first_then_in_order() -> None:
    assert read(TIES).references() == (
        "TheBloke/Llama-2-13B-fp16",
        "psmathur/orca_mini_v3_13b",
        "garage-bAInd/Platypus2-13B",
        "WizardLM/WizardMath-13B-V1.0",
    )
    assert read(MODULES).references() == ("org/vlm", "org/vlm-math")
    assert read(FRANKENMERGE).references() == ("teknium/OpenHermes-2.5-Mistral-7B", "Intel/neural-chat-7b-v3")


def test_models_that_only_lend_a_tokenizer_are_named_too() -> None:
    assert read(two(more="tokenizer_source: T")).references() == ("A", "B", "T")
    assert read(two(more="tokenizer: {source: T@v1, tokens: {x: {source: B}}}")).references() == ("A", "B", "T@v1")
    assert read(two(more="tokenizer_source: union")).references() == ("A", "B")
    assert read(two(more="tensors: [{filter: rotary, source: drop}]")).references() == ("A", "B")


def test_a_base_of_one_slice_is_named_where_it_appears() -> None:
    text = SLERP.replace("merge_method: slerp\nbase_model: OpenPipe/mistral-ft-optimized-1218", "merge_method: slerp")
    text = text.replace("  - sources:", "  - base_model: mlabonne/NeuralHermes-2.5-Mistral-7B\n    sources:")

    (group,) = read(text).groups()

    assert read(text).references()[0] == group.base == "mlabonne/NeuralHermes-2.5-Mistral-7B"
    assert [one.model for one in group.others] == ["OpenPipe/mistral-ft-optimized-1218"]


def test_a_base_that_is_not_listed_joins_the_models_at_the_end() -> None:
    (group,) = read(TIES).groups()
    (listed,) = read(DARE_TIES).groups()

    assert group.inputs[-1].model == group.base == "TheBloke/Llama-2-13B-fp16"
    assert len(group.others) == 3
    assert listed.inputs[0].model == listed.base
    assert len(listed.others) == 2


def test_a_method_without_a_base_merges_the_base_model_only_where_it_is_listed() -> None:
    (group,) = read(EVOLVED).groups()
    (unlisted,) = read(two(more="base_model: C")).groups()

    assert group.base is None
    assert group.others[-1].model == "EleutherAI/pythia-70m-deduped"
    assert [one.model for one in unlisted.inputs] == ["A", "B"]


def test_slices_keep_their_order_and_their_layers() -> None:
    groups = read(FRANKENMERGE).groups()
    sources = [source for group in groups for source in group.inputs if isinstance(source, Source)]

    assert [source.layer_range for source in sources] == [(0, 24), (8, 32)]
    assert [group.place for group in groups] == [("slices", 0), ("slices", 1)]


def test_choices_have_mergekits_defaults_and_ours() -> None:
    recipe, union = read(LINEAR), read(UNION)

    assert (recipe.dtype, recipe.out_dtype, recipe.seed, recipe.align, recipe.tensors) == (
        "float16",
        None,
        0,
        False,
        (),
    )
    assert (recipe.tokenizer, recipe.tokenizer_source, recipe.chat_template) == (None, None, None)
    assert union.tokenizer is not None
    assert union.tokenizer.pad_to_multiple_of == 64
    assert read(two(more="tokenizer: {}")).tokenizer is not None
    assert read(KARCHER).dtype == "bfloat16"


def test_a_tokens_row_is_a_models_own_another_tokens_or_zero() -> None:
    tokenizer = read(UNION).tokenizer
    assert tokenizer is not None
    start, end, unused = (token.source for token in tokenizer.tokens.values())

    assert start is not None
    assert (start.kind, start.model) == ("model", "TheDrummer/Cydonia-24B-v4.1@main")
    assert end is not None
    assert (end.kind, end.model, end.token_id) == ("model_token", "TheDrummer/Cydonia-24B-v4.1@main", 2)
    assert unused is not None
    assert unused.kind == "zero"
    assert [token.force for token in tokenizer.tokens.values()] == [True, False, False]


def test_our_own_choices_are_read() -> None:
    recipe = read(two(more="seed: 7\nalign: true\ntensors: [{filter: visual, source: B}, {filter: x, source: drop}]"))

    assert (recipe.seed, recipe.align) == (7, True)
    assert [(origin.filter, origin.source) for origin in recipe.tensors] == [("visual", "B"), ("x", "drop")]


def test_keys_with_nothing_behind_them_are_left_out() -> None:
    assert read(two(more="parameters:\ntokenizer:\nslices:\nbase_model:")).parameters == {}


def test_mergekits_mapping_form_of_a_reference_is_read_as_text() -> None:
    text = two().replace("model: A", "model: {model: {path: org/a, revision: v1}, lora: {path: org/l, revision: v2}}")
    text = text.replace("model: B", "model: {model: org/b@v3, override_architecture: LlamaForCausalLM}")

    assert read(text).references() == ("org/a@v1+org/l@v2", "org/b@v3")
    assert read(text).notes() == ("override_architecture has no effect here: tensors are matched by their names",)


def test_anchors_and_merged_keys_may_be_used() -> None:
    recipe = read("""
merge_method: ties
base_model: C
models:
  - {model: A, parameters: &usual {weight: 1, density: 0.5}}
  - {model: B, parameters: {<<: *usual, weight: 2}}
""")

    assert [dict(one.parameters) for one in recipe.models] == [
        {"weight": (Conditional((1.0,)),), "density": (Conditional((0.5,)),)},
        {"weight": (Conditional((2.0,)),), "density": (Conditional((0.5,)),)},
    ]


# What a setting says.


def said(text: str, name: str, tensor: str, t: float, one: int | None = 0, group: int = 0) -> Any:
    """A parameter of one input, or of the merged tensor where `one` is None."""
    recipe = read(text)
    part = recipe.groups()[group]
    levels = part.outer if one is None else (part.inputs[one].parameters, *part.outer)
    return value(recipe.method.parameters[name], name, levels, tensor, t)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_a_gradient_is_interpolated_over_the_layers(t: float) -> None:
    attention, mlp = [0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0]
    stops = np.linspace(0, 1, 5)

    assert said(SLERP, "t", "layers.3.self_attn.q_proj.weight", t, None) == pytest.approx(
        np.interp(t, stops, attention)
    )
    assert said(SLERP, "t", "layers.3.mlp.up_proj.weight", t, None) == pytest.approx(np.interp(t, stops, mlp))
    assert said(SLERP, "t", "model.norm.weight", t, None) == 0.5


@given(gradient=st.lists(st.floats(-10, 10), min_size=1, max_size=9), t=st.floats(0, 1))
def test_interpolation_is_numpys(gradient: list[float], t: float) -> None:
    settings = {"x": (Conditional(tuple(gradient)),)}

    expected = np.interp(t * (len(gradient) - 1), np.arange(len(gradient)), gradient)
    assert value(Parameter(), "x", [settings], "any", t) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("t", "expected"), [(0.0, True), (0.4, True), (0.5, False), (0.99, False), (1.0, True)])
def test_of_flags_and_choices_the_last_one_begun_is_taken(t: float, expected: bool) -> None:
    assert said(two(more="parameters: {normalize: [true, false, true]}"), "normalize", "w", t, None) is expected
    for kind, values in [("choice", ("a", "b", "c")), ("path", ("a", "b", "c"))]:
        settings = {"x": (Conditional(values),)}
        parameter = Parameter(kind, choices=values)  # type: ignore[arg-type]
        assert value(parameter, "x", [settings], "w", t) == values[int(t * 2)]


def test_the_first_conditional_that_matches_decides() -> None:
    text = two(first="{weight: [{filter: mlp, value: 2}, {filter: 'mlp.up', value: 3}, {filter: '*', value: 4}]}")

    assert said(text, "weight", "layers.0.mlp.up.weight", 0) == 2
    assert said(text, "weight", "layers.0.attn.weight", 0) == 4
    assert said(two(first="{weight: {value: 5}}"), "weight", "w", 0) == 5
    assert said(two(first="{weight: {filter: w, value: [1, 3]}}"), "weight", "w", 0.5) == 2


def test_a_level_without_a_match_leaves_it_to_the_next() -> None:
    text = two(first="{weight: {filter: mlp, value: 2}}", more="parameters: {weight: {filter: attn, value: 3}}")

    assert said(text, "weight", "mlp", 0) == 2
    assert said(text, "weight", "attn", 0) == 3
    assert said(two("ties", "base_model: C"), "density", "w", 0) == 1.0


@pytest.mark.parametrize(
    ("name", "one", "group", "expected"),
    [
        ("weight", 1, 0, 0.7),  # the source's own, above the module's
        ("weight", 1, 1, 0.5),  # the module's, above the recipe's
        ("weight", 0, 2, 0.1),  # the recipe's
        ("lambda", None, 0, 2),  # the slice's, above the recipe's
        ("lambda", None, 1, 0.9),
    ],
)
def test_the_nearest_level_decides(name: str, one: int | None, group: int, expected: float) -> None:
    assert said(MODULES, name, "w", 0, one, group) == expected


def test_what_must_be_given_may_be_given_to_each_slice() -> None:
    t = SLERP[SLERP.index("parameters:") : SLERP.index("dtype:")]
    text = SLERP.replace(t, "").replace("  - sources:", "  - parameters: {t: [0.1, 0.3]}\n    sources:")

    assert said(text, "t", "w", 0.5, None) == pytest.approx(0.2)


def test_a_model_has_no_say_in_what_is_one_for_all() -> None:
    text = two("ties", "base_model: C", first="{weight: 1, lambda: 5}")

    assert said(text, "lambda", "w", 0, None) == 1.0
    assert read(text).notes() == ("lambda has no effect on a model alone: give it to the recipe, a module or a slice",)


def test_yaml_strings_and_numbers_for_switches_count_as_what_they_mean() -> None:
    assert isinstance(yaml.safe_load("1e-2"), str)
    assert said(BREADCRUMBS, "gamma", "w", 0, 1) == 0.01
    assert said(KARCHER, "tol", "w", 0, None) == 1e-6
    assert said(KARCHER, "max_iter", "w", 0, None) == 20
    assert said(EVOLVED, "normalize", "w", 0, None) is False


def test_a_parameter_that_must_be_given_and_is_not_names_itself_the_tensor_and_the_model() -> None:
    settings = {"weight": (Conditional((1.0,), "mlp"),)}

    with pytest.raises(MergeError, match=r"^no weight for attn of org/a: give one without a filter$"):
        value(Parameter(per_model=True), "weight", [settings], "attn", 0, "org/a")
    with pytest.raises(MergeError, match=r"^no t for attn: "):
        value(Parameter(), "t", [], "attn", 0)


def test_whole_numbers_that_interpolate_to_fractions_are_refused() -> None:
    settings = {"max_iter": (Conditional((5, 10)),)}

    assert value(Parameter("integer", 10), "max_iter", [settings], "w", 1) == 10
    with pytest.raises(MergeError, match=r"max_iter for w: 7\.5 is no whole number"):
        value(Parameter("integer", 10), "max_iter", [settings], "w", 0.5)


def test_a_default_is_given_as_it_is() -> None:
    assert said(FRANKENMERGE, "scale", "w", 0, 0, 0) is None


# What has no effect is said.


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        (LINEAR, ()),
        (SLERP, ()),
        (DARE_TIES, ("int8_mask has no effect here: masks are not kept in memory",)),
        (UNION, ("weight has no effect on the base 'ReadyArt/The-Omega-Directive-M-24B-v1.1'",)),
        (two(first="{weight: 1, density: 2}", more="parameters: {density: 9}"), ("density has no effect on linear",)),
        (two(more="base_model: C"), ("linear does not merge the base_model 'C': list it to have it merged",)),
        (
            FRANKENMERGE.replace("  - sources:", "  - residual_weight: 0.5\n    sources:"),
            ("residual_weight has no effect here, nor in mergekit",),
        ),
    ],
)
def test_what_has_no_effect_is_noted_once(text: str, notes: tuple[str, ...]) -> None:
    assert read(text).notes() == notes


# What is refused.


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (two(more="dtyp: float32"), "dtyp: unknown key (did you mean 'dtype'?); known here: models, slices, "),
        (two().replace("model: A", "modle: A"), "models.0.modle: unknown key (did you mean 'model'?)"),
        (two().replace("parameters: {weight: 1}", "weight: 1"), "models.0.weight: unknown key (it belongs under par"),
        (
            SLERP.replace("layer_range", "layers_range"),
            "slices.0.sources.0.layers_range: unknown key (did you mean 'la",
        ),
        (SLERP.replace("sources", "source"), "slices.0.source: unknown key (did you mean 'sources'?)"),
        (MODULES.replace("models:", "model:"), "modules.vision_tower.model: unknown key (did you mean 'models'?)"),
        (UNION.replace("pad_to", "pad"), "tokenizer.pad_multiple_of: unknown key (did you mean 'pad_to_multiple_of'?)"),
        (UNION.replace("force", "forced"), "tokenizer.tokens.<|im_start|>.forced: unknown key (did you mean 'force'?)"),
        (
            UNION.replace("token_id", "token_ids"),
            "tokenizer.tokens.<|im_end|>.source.token_ids: unknown key (did you m",
        ),
        (
            two().replace("model: A", "model: {model: A, loras: B}"),
            "models.0.model.loras: unknown key (did you mean 'lora'",
        ),
        (SLERP.replace("filter: mlp", "fliter: mlp"), "parameters.t.1.fliter: unknown key (did you mean 'filter'?)"),
        (two(more="tensors: [{filtr: x, source: A}]"), "tensors.0.filtr: unknown key (did you mean 'filter'?)"),
    ],
)
def test_a_misspelt_key_is_refused_with_its_place_and_the_nearest(text: str, sentence: str) -> None:
    assert any(line.startswith(sentence) for line in mistakes(text))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (two("linaer"), "merge_method: no method 'linaer' (did you mean 'linear'?); there are: linear, passthrough, "),
        (
            two(more="parameters: {normalise: true}"),
            "parameters.normalise: linear has no such parameter (did you mean ",
        ),
        (two(first="{wieght: 1}"), "models.0.parameters.wieght: linear has no such parameter (did you mean 'weight'?)"),
        (two(first="{weight: much}"), "models.0.parameters.weight: 'much' is no number"),
        (two(first="{weight: .nan}"), "models.0.parameters.weight: nan is no number"),
        (two(first="{weight: }"), "models.0.parameters.weight: None is no number"),
        (two(first="{weight: []}"), "models.0.parameters.weight: an empty gradient says nothing: give it a value"),
        (two(first="{weight: [1, x]}"), "models.0.parameters.weight.1: 'x' is no number"),
        (two(first="[1]"), "models.0.parameters: give a mapping of parameters to their values"),
        (two(more="parameters: {normalize: maybe}"), "parameters.normalize: 'maybe' is neither true nor false"),
        (two(more="parameters: {normalize: 2}"), "parameters.normalize: 2 is neither true nor false"),
        (TIES.replace("0.33", "1.33"), "models.2.parameters.density: 1.33 is out of range: at least 0 and at most 1"),
        (
            TIES.replace("0.7, 0.1", "7, 0.1"),
            "models.0.parameters.density.1: 7 is out of range: at least 0 and at most",
        ),
        (DELLA.replace("0.1}", "1}"), "models.0.parameters.epsilon: 1 is out of range: at least 0 and below 1"),
        (
            DELLA.replace("rescale: false", "rescale: l2"),
            "parameters.rescale: 'l2' is none of true, false, 'l1', 'dens",
        ),
        (KARCHER.replace("20", "2.5"), "parameters.max_iter: 2.5 is no whole number"),
        (SLERP.replace("0.3, 0]", "no, 0]"), "parameters.t.1.value.3: False is no number"),
        (SLERP.replace("value: 0.5", "filter: x"), "parameters.t.2: value is missing"),
        (SLERP.replace("filter: mlp", "filter: 3"), "parameters.t.1.filter: 3 is no part of a tensor's name"),
        (
            SLERP.replace("value: [1, 0.5, 0.7, 0.3, 0]", "value: []"),
            "parameters.t.1.value: an empty gradient says not",
        ),
        (SLERP.replace("- value: 0.5", "- 0.5"), "parameters.t.2: beside a value with a filter, write `value: 0.5`"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_place_and_the_reason(text: str, sentence: str) -> None:
    (line,) = mistakes(text)

    assert line.startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (two("slerp", "parameters: {t: 1}"), "models: slerp needs a base_model"),
        (
            two("slerp", "parameters: {t: 1}\nbase_model: C"),
            "models: slerp merges exactly 1 model beside the base, not 2",
        ),
        (two("slerp", "base_model: A"), "models: slerp needs t, and no level gives it"),
        (two("passthrough"), "models: passthrough merges exactly 1 model, not 2"),
        (two("model_stock", "base_model: B"), "models: model_stock merges at least 2 models beside the base, not 1"),
        (two("nuslerp", "base_model: B"), "models: nuslerp merges exactly 2 models beside the base, not 1"),
        (two().replace("model: B", "model: A"), "models: 'A' is listed 2 times"),
        (two(first="{}"), "models.0: linear needs weight for 'A', and no level gives it"),
        (
            "merge_method: ties\nbase_model: A\nmodels: [{model: A}]\nparameters: {weight: 1}",
            "models: ties merges at least 1 model beside the base, not 0",
        ),
        (
            SLERP.replace("base_model: O", "base_model: o"),
            "slices.0: the base 'openPipe/mistral-ft-optimized-1218' is not",
        ),
        (
            MODULES.replace("{weight: 0.1, ", "{"),
            "modules.vision_tower.models.0: task_arithmetic needs weight for 'org/v",
        ),
        (
            MODULES.replace("{weight: 0.5}", "{}").replace("{weight: 0.1, ", "{"),
            "modules.text_decoder.slices.1.sources.1: task_arithmetic needs weight for 'org/vlm-math', and no level gi",
        ),
        (SLERP.replace("[0, 32]", "[0, 31]", 1), "slices.0: the sources have 31, 32 layers: give equally many of each"),
        (
            FRANKENMERGE.replace("[0, 24]", "[24, 24]"),
            "slices.0.sources.0.layer_range: [24, 24] holds no layer: the sec",
        ),
        (FRANKENMERGE.replace("[0, 24]", "[-1, 24]"), "slices.0.sources.0.layer_range.0: Input should be greater than"),
        (
            FRANKENMERGE.replace("[0, 24]", "[0, 1.5]"),
            "slices.0.sources.0.layer_range.1: Input should be a valid intege",
        ),
        (FRANKENMERGE.replace("[0, 24]", "12"), "slices.0.sources.0.layer_range: give a list"),
        ("merge_method: passthrough\nslices: [{sources: []}]", "slices.0: passthrough merges exactly 1 model, not 0"),
        ("merge_method: linear\nmodels: []", "give one of models, slices, modules, not none"),
        (
            two(more="slices: [{sources: [{model: A, layer_range: [0, 1]}]}]"),
            "give one of models, slices, modules, not m",
        ),
        ("merge_method: linear\nmodules: {text: {}}", "modules.text: give either slices or models"),
        ("merge_method: linear\nmodels: {model: A}", "models: give a list"),
        ("merge_method: linear\nmodels: [A]", "models.0: give a mapping with the keys model, parameters"),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "models.0.model: is missing"),
        ("merge_method: linear\nmodels: [{model: ''}]", "models.0.model: String should have at least 1 character"),
        ("models: [{model: A}]", "merge_method: is missing"),
    ],
)
def test_inputs_that_the_method_cannot_merge_are_refused(text: str, sentence: str) -> None:
    assert any(line.startswith(sentence) for line in mistakes(text))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("dtype: float64", "dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        ("out_dtype: bf16", "out_dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        ("seed: -1", "seed: Input should be greater than or equal to 0"),
        ("seed: true", "seed: Input should be a valid integer"),
        ("align: 1", "align: Input should be a valid boolean"),
        ("tokenizer: {source: union}\ntokenizer_source: union", "give either tokenizer or tokenizer_source"),
        (
            "tokenizer: {pad_to_multiple_of: 0}",
            "tokenizer.pad_to_multiple_of: Input should be greater than or equal to 1",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: zro}}}}",
            "tokenizer.tokens.x.source.kind: Input should be 'model', ",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: zero, model: A}}}}",
            "tokenizer.tokens.x.source: zero takes neither a ",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: A}}}}",
            "tokenizer.tokens.x.source: model_token t",
        ),
        ("tokenizer: {tokens: {x: {source: {model: A, token: y}}}}", "tokenizer.tokens.x.source.kind: is missing"),
        (
            "tokenizer: {tokens: {x: {source: C}}}",
            "tokenizer.tokens.x.source: 'C' is no model of this merge: name one of",
        ),
        ("tensors: [{filter: x, source: C}]", "tensors.0.source: 'C' is no model of this merge: name one of A, B"),
        ("tensors: [{filter: '', source: A}]", "tensors.0.filter: String should have at least 1 character"),
        ("parameters: {weight: 1}\nparameters: {}", "parameters: given 2 times"),
        ("1: x", "1: Keys should be strings"),
    ],
)
def test_a_wrong_choice_is_refused(more: str, sentence: str) -> None:
    (line,) = mistakes(two(more=more))

    assert line.startswith(sentence)


def test_a_key_given_twice_is_refused_at_its_place() -> None:
    assert mistakes(two(first="{weight: 1, weight: 2}")) == ["models.0.parameters.weight: given 2 times"]


def test_all_mistakes_are_told_at_once() -> None:
    lines = mistakes("""
merge_method: ties
base_model: C
dtyp: float32
seed: 1
seed: -2
models:
  - {model: A, parameters: {density: 3}}
  - {model: B, parameters: {weight: 1, desnity: 1}, wieght: 2}
parameters: {normalize: maybe}
tokenizer: {source: union}
tokenizer_source: union
""")

    assert [line.split(": ")[0] for line in lines] == [
        "seed",
        "give either tokenizer or tokenizer_source",
        "models.0.parameters.density",
        "models.1.parameters.desnity",
        "models.1.wieght",
        "parameters.normalize",
        "seed",
        "dtyp",
    ]


def test_a_mistake_in_one_key_does_not_hide_how_others_go_together() -> None:
    lines = mistakes(two("slerp", "base_model: C\nseed: x\ntensors: [{filter: x, source: D}]"))

    assert [line.split(": ")[0] for line in lines] == ["seed", "models", "models", "tensors.0.source"]


def test_a_mistake_makes_no_further_ones() -> None:
    assert len(mistakes(two(more="tensors: [{filter: x, source: B}]").replace("model: B", "modle: B"))) == 2
    assert len(mistakes(two("tise", "base_model: C"))) == 1
    assert len(mistakes(two("slerp", "base_model: A\nparameters: {t: x}"))) == 1


# Files.


def test_a_file_is_read_with_its_folder_and_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yml").write_text(LINEAR, "utf-8")
    monkeypatch.chdir(tmp_path)

    recipe = load_recipe(Path("r.yml"))

    assert (recipe.text, recipe.folder) == (LINEAR, tmp_path.resolve())


def test_every_line_of_a_refusal_bears_the_files_path(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(two("slerp", "base_model: C"), "utf-8")

    with pytest.raises(MergeError) as caught:
        load_recipe(tmp_path / "r.yml")

    assert all(line.startswith(f"{tmp_path / 'r.yml'}: models: ") for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"models: [", "is not YAML: while parsing"),
        (b"\xff\xfe\x00", "is not YAML: 'utf-8' codec"),
        (b"a: \x07", "is not YAML: unacceptable character"),
        (b"a: 2024-99-99", "is not YAML: month must be in"),
        (b"!!python/object:os.system {}", "is not YAML: could not determine a constructor"),
        (b"&a [*a]", "is no recipe: it must be a mapping"),
        (b"[" * 990 + b"]" * 990, "is no"),
        (b"", "is no recipe: it must be a mapping"),
        (b"- a", "is no recipe: it must be a mapping"),
        (b"merge_method: linear\n---\nmerge_method: ties\n", "holds 2 YAML documents: give each recipe its own file"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "r.yml").write_bytes(content)

    with pytest.raises(MergeError) as caught:
        load_recipe(tmp_path / "r.yml")

    assert str(caught.value).startswith(f"{tmp_path / 'r.yml'} {sentence}")


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"no recipe .*/r\.yml: No such file or directory"):
        load_recipe(tmp_path / "r.yml")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read(LINEAR).seed = 1  # type: ignore[misc]


# References.


def among(*paths: str) -> Callable[[str], bool]:
    return lambda path: path in paths


@pytest.mark.parametrize(
    ("text", "existing", "expected"),
    [
        ("org/a", (), Reference("org/a")),
        ("org/a@v1", (), Reference("org/a", "v1")),
        ("org/a+org/l", (), Reference("org/a", None, "org/l")),
        ("org/a@v1+org/l@v2", (), Reference("org/a", "v1", "org/l", "v2")),
        ("org/a+org/l@v2", (), Reference("org/a", None, "org/l", "v2")),
        ("a+b+c", (), Reference("a", None, "b+c")),
        ("a@b@c", (), Reference("a", "b@c")),
        ("./a+b@c", ("./a+b@c", "./a"), Reference("./a+b@c")),
        ("./a+b", ("./a+b",), Reference("./a+b")),
        ("./a+b+l", ("./a+b",), Reference("./a+b", None, "l")),
        ("./a+b+l", ("./a", "./a+b"), Reference("./a+b", None, "l")),
        ("./a+b@v", ("./a+b",), Reference("./a+b", "v")),
        ("./a@b+l", ("./a@b",), Reference("./a@b", None, "l")),
        ("org/a+./l+m", ("./l+m",), Reference("org/a", None, "./l+m")),
        ("org/a@v1+./l@m", ("./l@m",), Reference("org/a", "v1", "./l@m")),
        ("org/a+", (), Reference("org/a+")),
        ("@a", (), Reference("@a")),
    ],
)
def test_a_reference_is_divided_where_its_parts_exist(
    text: str, existing: tuple[str, ...], expected: Reference
) -> None:
    assert Reference.parse(text, among(*existing)) == expected


def test_a_relative_path_counts_from_the_recipes_folder_then_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipes / "both", here / "both", here / "here+only", recipes / "lora"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)

    assert resolve("both", recipes) == Reference(str(recipes / "both"))
    assert resolve("here+only+./lora", recipes) == Reference(str(here / "here+only"), None, str(recipes / "lora"))
    assert resolve("org/name@v1", recipes) == Reference("org/name", "v1")
    assert resolve(str(here / "both"), recipes) == Reference(str(here / "both"))
