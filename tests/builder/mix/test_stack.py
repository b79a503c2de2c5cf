"""Stacks: layer by layer their sources, as a recipe that `builder merge` runs too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixable
import pytest
import torch
import yaml
from safetensors.torch import load_file

from builder.errors import MergeError, MixError
from builder.merge import recipe, stream
from builder.merge.models import folder_of
from builder.merge.plan import Plan
from builder.merge.plan import plan as merge_plan
from builder.mix import spec as specs
from builder.mix import stack

Order = list[tuple[str, int]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return {"a": mixable.write(folder / "a", seed=1, num_hidden_layers=4), "b": mixable.write(folder / "b", seed=2)}


def planned(members: dict[str, Path], *names: str, **more: Any) -> Plan:
    listed = [{"source_model": str(members[name])} for name in names or members]
    text = yaml.safe_dump({"experts": listed, **more}, sort_keys=False)
    return stack.plan(specs.parse(text, "spec.yaml", Path()), lambda name: folder_of(Path(name)))


def layer(folder: Path, number: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{number}."
    stored = load_file(folder / "model.safetensors")
    return {name.removeprefix(prefix): values for name, values in stored.items() if name.startswith(prefix)}


SEQUENCE: Order = [*(("a", i) for i in range(4)), *(("b", i) for i in range(3))]
TURNS: Order = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3)]


@pytest.mark.parametrize(
    ("said", "order"),
    [
        ({}, SEQUENCE),
        ({"order": "interleave"}, TURNS),
        ({"drop": [1, 3]}, [("a", 0), ("a", 3), ("b", 0)]),
        ({"drop": [[3, 4], [0, 1]]}, [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2)]),
        ({"drop": [[2, 4], []], "order": "interleave"}, [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2)]),
    ],
)
def test_every_layer_is_its_sources(pair: dict[str, Path], tmp_path: Path, said: Any, order: Order) -> None:
    stream.write(planned(pair, stack=said), tmp_path / "out")

    for number, (name, source) in enumerate(order):
        mine, theirs = layer(tmp_path / "out", number), layer(pair[name], source)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[part], theirs[part]) for part in theirs)
    model = mixable.load(tmp_path / "out")
    assert model.config.num_hidden_layers == len(order)
    assert model.generate(mixable.tokens(rows=1), max_new_tokens=4, pad_token_id=0).shape[1] > 9


def test_what_is_outside_of_the_layers_is_averaged(pair: dict[str, Path], tmp_path: Path) -> None:
    stream.write(planned(pair, stack={}), tmp_path / "out")

    mine, a, b = (load_file(path / "model.safetensors") for path in (tmp_path / "out", pair["a"], pair["b"]))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(mine[name], (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)


def test_a_model_on_itself_keeps_what_is_outside(pair: dict[str, Path], tmp_path: Path) -> None:
    stream.write(planned(pair, "a", "a", stack={"drop": [[3, 4], [0, 1]]}), tmp_path / "out")

    mine, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(pair["a"] / "model.safetensors")
    assert torch.equal(mine["lm_head.weight"], own["lm_head.weight"])
    assert torch.equal(mine["model.layers.3.mlp.up_proj.weight"], own["model.layers.1.mlp.up_proj.weight"])
    assert mixable.load(tmp_path / "out").config.num_hidden_layers == 6


def test_lists_with_an_entry_a_layer_are_stacked_too(tmp_path: Path) -> None:
    kinds = {"a": ["full_attention", "sliding_attention", "full_attention"], "b": ["sliding_attention"] * 3}
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    members = {
        name: mixable.write(tmp_path / name, "qwen3", seed=i, layer_types=types, **sliding)
        for i, (name, types) in enumerate(kinds.items())
    }
    plan = planned(members, stack={"order": "interleave"})

    each = [kind for pair in zip(kinds["a"], kinds["b"], strict=True) for kind in pair]
    assert plan.config["layer_types"] == each
    assert plan.config["num_hidden_layers"] == 6


def test_the_recipe_of_a_stack_is_one_that_merges(pair: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(pair, stack={"order": "interleave"})
    said = recipe.parse(plan.recipe.text, "recipe.yaml", tmp_path)

    stream.write(plan, tmp_path / "mixed")
    stream.write(merge_plan(said, lambda name: folder_of(Path(name))), tmp_path / "merged")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mixed", "merged")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"stack": {"drop": [0, 5]}}, r"a has 4 layers: drop \[0, 5\] goes beyond them"),
        ({"stack": {"drop": [[0, 4], [0, 2]]}}, "1 layers would be left: drop fewer"),
        ({"stack": {"drop": [3, 1]}}, r"stack: drop \[3, 1\]: give the first layer to leave out"),
        (
            {"stack": {"drop": [[0, 1], [0, 1], [0, 1]]}},
            r"stack\.drop: give one range for all, or one for each of the 2",
        ),
        ({"stack": {}, "gate": "random"}, "gate: a stack has no gates"),
    ],
)
def test_what_cannot_be_stacked_is_told(pair: dict[str, Path], more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MixError, match=sentence):
        planned(pair, **more)


def test_models_of_different_widths_are_refused_by_the_merge(pair: dict[str, Path], tmp_path: Path) -> None:
    wide = mixable.write(tmp_path / "wide", intermediate_size=64)

    with pytest.raises(MergeError, match="they do not mix"):
        planned({"a": pair["a"], "wide": wide}, stack={})
