"""Merges: the mean, rounded once, in a folder that loads; what cannot be merged is refused before weights are read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from small_models import random_tensors, write_model

from builder.checkpoints import Array, Checkpoint
from builder.errors import CheckpointError, MergeError
from builder.merge import METHODS, stream
from builder.merge.stream import Merge

WEIGHTS = (0.2, 0.5, 0.3)


class Unreadable(Checkpoint):
    """A checkpoint whose headers may be looked at, and nothing else."""

    def read(self, name: str) -> Array:
        raise AssertionError(f"{name} was read")


def merge(models: Sequence[Checkpoint], weights: Sequence[float], method: str = "linear") -> Merge:
    names = [f"m{i}" for i in range(len(models))]
    return Merge(method, dict(zip(names, models, strict=True)), dict(zip(names, weights, strict=True)))


def bits(folder: Path) -> dict[str, Array]:
    """What is stored, by bit pattern: equality without a tolerance."""
    import torch

    return {name: values.view(torch.int16).numpy() for name, values in load_file(folder / "model.safetensors").items()}


def bf16_bits(values: np.ndarray) -> Array:
    import torch

    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()


def bf16_models(tmp_path: Path, count: int, rows: Sequence[int] = (10, 10, 10)) -> list[Checkpoint]:
    return [write_model(tmp_path / f"m{i}", random_tensors(i, rows[i]), "BF16") for i in range(count)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", [WEIGHTS, (2.0, 5.0, 3.0), (1.0, 1.0, 1.0)])
def test_a_merge_of_a_model_with_itself_is_that_model(tmp_path: Path, method: str, weights: Sequence[float]) -> None:
    model = write_model(tmp_path / "m", random_tensors(1), "BF16")

    stream.write(merge([model] * 3, weights, method), tmp_path / "out")

    for name, stored in bits(tmp_path / "out").items():
        assert np.array_equal(stored, bits(tmp_path / "m")[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_members_does_not_matter(tmp_path: Path, method: str) -> None:
    models = bf16_models(tmp_path, 3)
    values = []
    for order in itertools.permutations(range(3)):
        tensors = dict(stream.tensors(merge([models[i] for i in order], [WEIGHTS[i] for i in order], method)))
        values.append(np.concatenate([tensors[name].ravel() for name in sorted(tensors)]))

    for other in values[1:]:
        np.testing.assert_allclose(other, values[0], rtol=1e-6, atol=1e-6)


def test_linear_is_the_exact_mean_rounded_once(tmp_path: Path) -> None:
    models = bf16_models(tmp_path, 2)
    # Halves and quarters of bf16 numbers of one magnitude are exact in fp32, so every bit must be right.
    stream.write(merge(models, (0.25, 0.75)), tmp_path / "out")

    for name, stored in bits(tmp_path / "out").items():
        exact = 0.25 * models[0].read(name).astype(np.float64) + 0.75 * models[1].read(name)
        assert np.array_equal(stored, bf16_bits(exact)), name


def test_linear_of_any_weights_is_within_half_a_bf16_step_of_float64(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    name = "model.layers.0.mlp.up_proj.weight"
    models = [write_model(tmp_path / f"m{i}", {name: rng.normal(size=(400, 250))}, "BF16") for i in range(3)]
    stream.write(merge(models, WEIGHTS), tmp_path / "out")

    exact = sum(w * model.read(name).astype(np.float64) for w, model in zip(WEIGHTS, models, strict=True))
    half_step = 2.0 ** (np.frexp(exact)[1] - 9)
    # 1e-6: fp32 sums of numbers around 1; a second rounding to bf16 would be off by 1e-3.
    assert (np.abs(Checkpoint(tmp_path / "out").read(name) - exact) <= half_step + 1e-6).all()


def test_weights_are_shares(tmp_path: Path) -> None:
    models = bf16_models(tmp_path, 2)
    stream.write(merge(models, (0.25, 0.75)), tmp_path / "shares")
    stream.write(merge(models, (1, 3)), tmp_path / "ratio")

    assert (tmp_path / "shares/model.safetensors").read_bytes() == (tmp_path / "ratio/model.safetensors").read_bytes()


def test_rows_that_only_some_members_have_are_merged_over_those(tmp_path: Path) -> None:
    models = bf16_models(tmp_path, 3, rows=(12, 10, 14))
    merged = dict(stream.tensors(merge(models, WEIGHTS)))

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        first, second, third = (model.read(name).astype(np.float64) for model in models)
        assert merged[name].shape == (12, 8)
        np.testing.assert_allclose(merged[name][:10], 0.2 * first[:10] + 0.5 * second + 0.3 * third[:10], atol=1e-6)
        np.testing.assert_allclose(merged[name][10:], 0.4 * first[10:] + 0.6 * third[10:12], atol=1e-6)


def test_rows_that_nobody_has_a_say_in_are_the_first_members(tmp_path: Path) -> None:
    models = bf16_models(tmp_path, 2, rows=(12, 10))
    merged = dict(stream.tensors(merge(models, (0.0, 1.0))))

    np.testing.assert_array_equal(merged["lm_head.weight"][10:], models[0].read("lm_head.weight")[10:])
    np.testing.assert_array_equal(merged["lm_head.weight"][:10], models[1].read("lm_head.weight"))


def unreadable(folder: Path, tensors: dict[str, Array], **config: object) -> Checkpoint:
    return Unreadable(write_model(folder, tensors, config=config).folder)


def test_a_tensor_that_a_member_lacks_is_named_before_a_weight_is_read(tmp_path: Path) -> None:
    lacking = random_tensors(2)
    del lacking["model.norm.weight"]
    models = [unreadable(tmp_path / "first", random_tensors(1)), unreadable(tmp_path / "second", lacking)]

    for pair in (models, models[::-1]):
        with pytest.raises(MergeError, match=r"model\.norm\.weight is not in every member"):
            stream.write(merge(pair, (1, 1)), tmp_path / "out")


def test_a_shape_that_differs_is_named_before_a_weight_is_read(tmp_path: Path) -> None:
    other = {**random_tensors(2), "model.layers.0.mlp.gate_proj.weight": np.ones((16, 8), np.float32)}
    models = [unreadable(tmp_path / "first", random_tensors(1)), unreadable(tmp_path / "second", other)]

    with pytest.raises(MergeError, match=r"gate_proj\.weight is \(16, 8\) in m1 and \(12, 8\) in first"):
        stream.write(merge(models, (1, 1)), tmp_path / "out")


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_weights_without_a_sum_are_refused_before_a_weight_is_read(tmp_path: Path, weights: tuple[float, ...]) -> None:
    models = [unreadable(tmp_path / str(i), random_tensors(i)) for i in range(2)]

    with pytest.raises(MergeError, match="the weights of m0, m1 sum to zero"):
        stream.write(merge(models, weights), tmp_path / "out")


def test_equal_shapes_with_another_rotary_base_are_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    models = [
        unreadable(tmp_path / "codellama", random_tensors(1), rope_theta=1e6),
        unreadable(tmp_path / "llemma", random_tensors(2), rope_theta=1e4),
    ]

    with pytest.raises(MergeError, match=r"m1 has the tensors of codellama, and in its config\.json another .*rotary"):
        stream.write(merge(models, (1, 1)), tmp_path / "out")


def test_a_merge_that_dies_leaves_no_folder(tmp_path: Path) -> None:
    class Dying(Checkpoint):
        def read(self, name: str) -> Array:
            if name == "model.norm.weight":
                raise KeyboardInterrupt
            return super().read(name)

    good = write_model(tmp_path / "good", random_tensors(1))
    dying = Dying(write_model(tmp_path / "dying", random_tensors(2)).folder)

    with pytest.raises(KeyboardInterrupt):
        stream.write(merge([good, dying], (1, 1)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dying", "good"]


def test_what_a_killed_merge_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/model.safetensors").write_bytes(b"half")
    stream.write(merge(bf16_models(tmp_path, 2), (1, 1)), tmp_path / "out")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "out.partial").exists()


def test_a_member_with_nan_stops_the_merge(tmp_path: Path) -> None:
    models = bf16_models(tmp_path, 1)
    tensors = random_tensors(2)
    file = write_model(tmp_path / "nan", tensors).files[0]
    # The last four bytes of the file are the last weight of the head.
    file.write_bytes(file.read_bytes()[:-4] + np.array([np.nan], np.float32).tobytes())

    with pytest.raises(CheckpointError, match=r"nan: lm_head\.weight holds NaN or inf"):
        stream.write(merge([*models, Checkpoint(tmp_path / "nan")], (1, 1)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_overflows_its_dtype_stops(tmp_path: Path) -> None:
    name = "model.norm.weight"
    small = write_model(tmp_path / "f16", {name: np.ones(4, np.float32)}, "F16")
    large = write_model(tmp_path / "f32", {name: np.full(4, 1e6, np.float32)}, "F32")

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight would hold NaN or inf in F16"):
        stream.write(merge([small, large], (1, 1)), tmp_path / "out")


def test_a_merge_loads_in_transformers_with_the_first_members_tokenizer(
    tmp_path: Path, micro_zoo: dict[str, Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    members = {name: Checkpoint(micro_zoo[name]) for name in ("math", "code")}
    stream.write(Merge("linear", members, {"math": 0.5, "code": 0.5}), tmp_path / "out")

    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    for name, values in model.state_dict().items():
        if name in members["math"].tensors:
            mean = (members["math"].read(name) + members["code"].read(name)) / 2
            assert torch.equal(values, torch.from_numpy(mean).bfloat16().float()), name
    assert not any(found.values())
    text = "Question: Ann has 12 apples."
    own, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", micro_zoo["math"]))
    assert own(text).input_ids == theirs(text).input_ids
    assert own.chat_template == theirs.chat_template
    assert torch.isfinite(model(input_ids=torch.tensor([own(text).input_ids])).logits).all()
