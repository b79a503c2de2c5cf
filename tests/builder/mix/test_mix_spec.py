"""Specs: mergekit-moe's files and ours; every mistake ends in a sentence with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.errors import MixError
from builder.mix.spec import Spec, load, parse

EXPERTS = [
    {"source_model": "org/math", "positive_prompts": ["sum"]},
    {"source_model": "org/code", "positive_prompts": ["loop"]},
]
BARE = [{"source_model": "org/math"}, {"source_model": "org/code"}]
MERGEKITS = """
base_model: mistralai/Mistral-7B-v0.1
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: org/math@main
    positive_prompts: ["sum"]
    negative_prompts: ["loop"]
  - source_model: {model: {path: org/code, revision: abc}}
    positive_prompts: ["loop"]
"""


def read(**said: Any) -> Spec:
    return parse(yaml.safe_dump({"experts": EXPERTS, **said}), "spec.yaml", Path())


def test_mergekits_files_have_mergekits_defaults() -> None:
    spec = parse(MERGEKITS, "spec.yaml", Path())

    assert (spec.level, spec.routing, spec.k, spec.source, spec.centred) == ("ffn", "token", 2, "prompts", False)
    assert spec.references() == ("mistralai/Mistral-7B-v0.1", "org/math@main", "org/code@abc")


def test_ours_have_the_papers() -> None:
    spec = read()

    assert (spec.mixture, spec.k, spec.source, spec.centred, spec.bias) == ("F-L-T", 1, "prompts", True, False)
    assert spec.references() == ("org/math", "org/code")


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("hidden", "prompts"),
        ("hidden_avg", "prompts"),
        ("cheap_embed", "prompts"),
        ("random", "random"),
        ("uniform_random", "random"),
    ],
)
def test_every_gate_mode_of_mergekits_is_known(mode: str, source: str) -> None:
    assert read(base_model="org/base", gate_mode=mode).source == source


@pytest.mark.parametrize(
    ("mixture", "level", "routing", "source"),
    [
        ("F-M-T", "ffn", "token", "mlp"),
        ("F-L-S", "ffn", "sample", "prompts"),
        ("B-M-S", "block", "sample", "mlp"),
        ("M-L-S", "model", "sample", "prompts"),
    ],
)
def test_a_mixtures_letters_say_level_gate_and_input(mixture: str, level: str, routing: str, source: str) -> None:
    spec = read(mixture=mixture)
    assert (spec.level, spec.routing, spec.source) == (level, routing, source)


@pytest.mark.parametrize(("said", "trunk"), [(0, 0), (False, 0), (3, 3), ("half", 16), (True, 16)])
def test_hybrid_layers_are_a_number_or_half(said: Any, trunk: int) -> None:
    assert read(mixture="B-L-S", hybrid_layers=said).trunk(32) == trunk


def test_experts_are_called_by_the_end_of_their_reference() -> None:
    listed = [{"source_model": f"{org}/math", "positive_prompts": [org]} for org in "ab"]
    named = [*listed, {"source_model": "c/code", "name": "coder", "positive_prompts": ["c"]}]
    assert read(experts=named).names == ("math", "math-2", "coder")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"mixtur": "F-L-T"}, "spec.yaml: mixtur: unknown key (did you mean 'mixture'?); known here: experts, "),
        (
            {"experts": [{**EXPERTS[0], "positive_prompt": ["x"]}, EXPERTS[1]]},
            "spec.yaml: experts.0.positive_prompt: unknown key (did you mean 'positive_prompts'?)",
        ),
        ({"experts": EXPERTS[:1]}, "spec.yaml: experts: a mixture needs two experts or more"),
        ({"experts": 3}, "spec.yaml: experts: give a list"),
        ({"experts": BARE}, "spec.yaml: experts.1.positive_prompts: is missing: the gate is made from them"),
        (
            {"experts": [EXPERTS[0], {**EXPERTS[0], "source_model": "b"}]},
            "spec.yaml: experts: all have the same prompts",
        ),
        ({"mixture": "M-L-T"}, "spec.yaml: mixture: Input should be 'F-L-T', 'F-M-T'"),
        ({"experts_per_token": 3}, "spec.yaml: experts_per_token: 3 of 2 experts cannot be chosen"),
        ({"experts_per_token": 0}, "spec.yaml: experts_per_token: Input should be greater than or equal to 1"),
        ({"hybrid_layers": -1}, "spec.yaml: hybrid_layers"),
        ({"gate": "mlp"}, "spec.yaml: gate: F-L-T has linear gates: mlp belongs to F-M-T"),
        ({"gate": "random", "mixture": "F-M-S"}, "spec.yaml: gate: F-M-S has MLP gates, which are trained"),
        ({"gate": "random", "gate_mode": "random"}, "spec.yaml: give either gate or gate_mode"),
        ({"gate_mode": "cheap_embed", "mixture": "B-L-S"}, "spec.yaml: gate_mode: cheap_embed is of F mixtures"),
        ({"gate": "random", "centre": True}, "spec.yaml: centre: random gates have none: leave it out"),
        ({"mixture": "M-M-S", "bias": True}, "spec.yaml: bias: an MLP gate has its own, trained: leave it out"),
        ({"layout": "standard", "mixture": "B-L-S"}, "spec.yaml: layout: no standard architecture is B-L-S"),
        (
            {"layout": "standard", "hybrid_layers": 2},
            "spec.yaml: layout: no standard architecture is F-L-T with hybrid",
        ),
        ({"architecture": "mixtral", "mixture": "M-L-S"}, "spec.yaml: architecture: it names a standard architecture"),
        (
            {"experts": [{**EXPERTS[0], "noise_scale": 0.1}, EXPERTS[1]]},
            "spec.yaml: experts.0.noise_scale: noise is not",
        ),
        (
            {"experts": [{**EXPERTS[0], "residual_scale": 0.1}, EXPERTS[1]], "mixture": "B-L-S"},
            "spec.yaml: experts.0.residual_scale: it scales the MLPs of F mixtures",
        ),
        ({"experts": [{**e, "name": "x"} for e in EXPERTS]}, "spec.yaml: experts: 2 experts are called 'x'"),
        ({"shared_experts": EXPERTS}, "spec.yaml: shared_experts: no architecture here has more than one"),
    ],
)
def test_a_mistake_is_told_with_its_place(said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MixError) as told:
        read(**said)
    assert any(line.startswith(sentence) for line in str(told.value).splitlines()), told.value


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(MixError) as told:
        read(experts_per_token=9, gate="mlp", layout="composed", architecture="mixtral")
    assert len(str(told.value).splitlines()) == 3


def test_a_key_that_is_given_twice_is_a_mistake() -> None:
    with pytest.raises(MixError, match=r"spec\.yaml: dtype: given 2 times"):
        parse(MERGEKITS + "dtype: float16\n", "spec.yaml", Path())


def test_a_file_that_is_not_there_or_no_yaml_is_told(tmp_path: Path) -> None:
    with pytest.raises(MixError, match=r"no spec .*: No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("experts: [", "utf-8")
    with pytest.raises(MixError, match=r"bad\.yaml is not YAML"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a", "utf-8")
    with pytest.raises(MixError, match=r"list\.yaml is no spec: it must be a mapping with experts"):
        load(tmp_path / "list.yaml")


def test_what_differs_from_mergekit_is_said() -> None:
    notes = "\n".join(parse(MERGEKITS, "spec.yaml", Path()).notes())
    assert "gate_mode hidden" in notes
    assert "negative prompts are the other experts' positive ones" in notes
