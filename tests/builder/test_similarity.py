"""Similarity of weights: the paper's formula over attention and MLP matrices, every checkpoint read once."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_models import CONFIG, random_tensors, reference_model, write_model

from builder import similarity as module
from builder.checkpoints import Array, Checkpoint
from builder.errors import CheckpointError
from builder.similarity import Similarity, all_pairs, compare, similarity

Tensors = Mapping[str, Array]

MATRICES = {
    "attention": ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
    "mlp": ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"),
}
MATRICES["all"] = MATRICES["attention"] + MATRICES["mlp"]
QUERY, OUT = MATRICES["attention"]


def reference(a: Tensors, b: Tensors, names: Sequence[str]) -> float:
    """sim(a, b) as PAPER.md 3 writes it: float64, one column at a time; what is zero in both is not there."""
    means = []
    for name in names:
        cosines = []
        for j in range(a[name].shape[1]):
            x, y = a[name][:, j].astype(np.float64), b[name][:, j].astype(np.float64)
            if x.any() or y.any():
                norms = np.linalg.norm(x) * np.linalg.norm(y)
                cosines.append(x @ y / norms if norms else 0.0)
        if cosines:
            means.append(np.mean(cosines))
    return float(np.mean(means)) if means else 1.0


def expected(models: Sequence[Tensors], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[reference(a, b, names) for b in models] for a in models])


def dots(models: Sequence[Tensors], names: Sequence[str]) -> NDArray[np.float64]:
    vectors = [np.concatenate([model[name].ravel().astype(np.float64) for name in names]) for model in models]
    return np.array([[x @ y for y in vectors] for x in vectors])


def less(a: Tensors, b: Tensors) -> dict[str, Array]:
    return {name: a[name] - b[name] for name in a}


def written(folder: Path, models: Sequence[Tensors], **options: Any) -> list[Checkpoint]:
    return [write_model(folder / f"m{i}", tensors, **options) for i, tensors in enumerate(models)]


def assert_is(found: Similarity, models: Sequence[Tensors]) -> None:
    """The reference's numbers, symmetric in every bit."""
    assert set(found.parts) == set(MATRICES)
    for kind, names in MATRICES.items():
        np.testing.assert_allclose(found.parts[kind], expected(models, names), rtol=0, atol=1e-14)
        assert np.array_equal(found.parts[kind], found.parts[kind].T)
    np.testing.assert_allclose(found.dots, dots(models, MATRICES["all"]), rtol=1e-13, atol=1e-11)
    assert np.array_equal(found.dots, found.dots.T)


class Counted(Checkpoint):
    """A checkpoint that counts how often each tensor is opened."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: Counter[str] = Counter()

    def stored(self, name: str) -> NDArray[Any]:
        self.reads[name] += 1
        return super().stored(name)


@pytest.fixture
def kin() -> list[dict[str, Array]]:
    """Three models: unrelated, and one close to the first."""
    first, second = random_tensors(1), random_tensors(2)
    close = {name: values + 0.2 * second[name] for name, values in first.items()}
    return [first, second, close]


def test_similarity_is_the_papers_mean_of_column_cosines(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    found = similarity(written(tmp_path, kin))

    assert_is(found, kin)
    assert found.parts["all"][0, 2] > 0.95 > 0.5 > abs(found.parts["all"][0, 1])
    assert np.array_equal(np.diag(found.parts["all"]), np.ones(3))


def test_deltas_are_compared_without_their_base(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    base = random_tensors(9)

    found = similarity(written(tmp_path, kin), write_model(tmp_path / "base", base))

    assert_is(found, [less(model, base) for model in kin])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_what_is_compared_is_what_is_stored(tmp_path: Path, kin: list[dict[str, Array]], dtype: str) -> None:
    models = written(tmp_path, kin, dtype=dtype)

    assert_is(similarity(models), [{name: model.read(name) for name in model.tensors} for model in models])


def test_pickles_and_safetensors_are_compared_alike(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    models = written(tmp_path, kin)
    torch.save({name: torch.from_numpy(values) for name, values in kin[1].items()}, tmp_path / "pytorch_model.bin")

    found = similarity([models[0], Checkpoint(tmp_path), models[2]])

    assert np.array_equal(found.parts["all"], similarity(models).parts["all"])


def test_large_matrices_are_compared_piece_by_piece(
    tmp_path: Path, kin: list[dict[str, Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, base = written(tmp_path, kin), write_model(tmp_path / "base", random_tensors(9))
    whole = similarity(models, base)
    monkeypatch.setattr(module, "PIECE", 40)
    monkeypatch.setattr(module, "ROWS", 3)

    assert_same(similarity(models, base), whole)


def assert_same(found: Similarity, other: Similarity) -> None:
    assert list(found.parts) == list(other.parts)
    for kind, matrix in found.parts.items():
        assert matrix.tobytes() == other.parts[kind].tobytes()
    assert found.dots.tobytes() == other.dots.tobytes()


def test_memory_holds_pieces_and_sums_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {QUERY: np.ones((8192, 64), np.float32), OUT: np.ones((64, 64), np.float32)}
    models = written(tmp_path, [tensors, tensors], dtype="BF16")
    monkeypatch.setattr(module, "PIECE", 4096)
    similarity(models, threads=1)  # what is imported and opened once
    tracemalloc.start()
    similarity(models, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 200_000 < models[0].bytes / 5


def test_neither_order_nor_threads_change_a_bit(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    models = written(tmp_path, kin)
    forward = similarity(models, threads=1)

    for order in itertools.permutations(range(3)):
        turned, places = similarity([models[i] for i in order], threads=2), np.ix_(order, order)
        assert_same(turned, Similarity({k: m[places] for k, m in forward.parts.items()}, forward.dots[places]))


def test_every_matrix_is_read_once_and_nothing_else_is(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    models = [Counted(model.folder) for model in written(tmp_path, [*kin, random_tensors(9)])]
    heard: list[int] = []
    similarity(models[:3], models[3], heard.append)

    assert all(model.reads == Counter(MATRICES["all"]) for model in models)
    assert sum(heard) == sum(model.tensors[name].bytes for model in models for name in MATRICES["all"])


def test_a_pair_alone_gives_what_it_gives_among_others(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    models = [Counted(model.folder) for model in written(tmp_path, kin)]
    pairs = all_pairs(3)
    among = dict(zip(pairs, compare(models, pairs), strict=True))
    untouched = models[0].reads.copy()

    assert compare(models, [(2, 1)]) == [among[1, 2]]
    assert models[0].reads == untouched


# Zeros


def zeros_but(columns: Sequence[int], seed: int) -> Array:
    values = np.zeros((8, 8), np.float32)
    values[:, list(columns)] = np.random.default_rng(seed).standard_normal((8, len(columns)))
    return values


def test_columns_that_are_zero_in_both_are_left_out(tmp_path: Path) -> None:
    models = [
        {QUERY: zeros_but([1, 2], 1), OUT: zeros_but([], 1)},
        {QUERY: zeros_but([2, 3], 2), OUT: zeros_but([], 2)},
    ]
    x, y = models[0][QUERY][:, 2].astype(float), models[1][QUERY][:, 2].astype(float)

    found = similarity(written(tmp_path, models)).parts["attention"]

    # Of columns 1, 2 and 3 one is in both; the other matrix has nothing to say.
    assert found[0, 1] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y) / 3, abs=1e-15)
    assert found[0, 0] == 1


def test_models_that_are_their_base_are_alike(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    models = written(tmp_path, [kin[0], kin[0], kin[1]])

    found = similarity(models, models[0])

    assert found.parts["all"].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert found.dots[:2].tolist() == np.zeros((2, 3)).tolist()


def test_deltas_in_one_part_alone_are_judged_by_it(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    base = random_tensors(9)
    tuned = [{**base, QUERY: base[QUERY] + change} for change in (zeros_but([0, 1], 3), zeros_but([0, 1], 4))]

    found = similarity(written(tmp_path, tuned), write_model(tmp_path / "base", base))

    assert_is(found, [less(model, base) for model in tuned])
    assert found.parts["mlp"][0, 1] == 1
    assert found.parts["all"][0, 1] == found.parts["attention"][0, 1] < 1


def test_a_matrix_without_rows_is_no_matrix(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    empty = {"model.layers.1.mlp.up_proj.weight": np.zeros((0, 8), np.float32)}
    empty["model.layers.1.mlp.down_proj.weight"] = np.zeros((8, 0), np.float32)

    assert_same(
        similarity(written(tmp_path / "with", [{**model, **empty} for model in kin])),
        similarity(written(tmp_path / "without", kin)),
    )


# Precision


def test_many_large_values_do_not_push_a_cosine_past_one(tmp_path: Path) -> None:
    big = np.full((300_000, 1), 1.1, np.float32)

    found = similarity(written(tmp_path, [{QUERY: big}, {QUERY: 3 * big}]))

    np.testing.assert_allclose(found.parts["all"], np.ones((2, 2)), rtol=0, atol=1e-11)
    assert found.parts["all"].max() <= 1


@pytest.mark.parametrize("scale", [1e-38, 3e38])
def test_the_smallest_and_largest_numbers_are_compared(tmp_path: Path, scale: float) -> None:
    rng = np.random.default_rng(4)
    models = [{QUERY: (rng.uniform(-1, 1, (64, 3)) * scale).astype(np.float32)} for _ in range(2)]

    found = similarity(written(tmp_path, models))

    scaled: list[Any] = [{QUERY: model[QUERY].astype(float) / scale} for model in models]
    np.testing.assert_allclose(found.parts["all"], expected(scaled, [QUERY]), rtol=0, atol=1e-14)


def test_models_that_differ_in_the_last_bit_are_less_than_one(tmp_path: Path) -> None:
    values = np.random.default_rng(4).standard_normal((64, 4)).astype(np.float32)
    models = written(tmp_path, [{QUERY: values}, {QUERY: np.nextafter(values, np.float32(9))}, {QUERY: values.copy()}])

    found = similarity(models).parts["all"]

    assert 1 - 1e-12 < found[0, 1] < 1
    assert found[0, 2] == 1


# Names and damage


def test_a_model_whose_names_say_nothing_is_compared_as_a_whole(tmp_path: Path) -> None:
    models = [
        {
            "wte.weight": random_tensors(i)[QUERY],
            "blocks.0.mix": random_tensors(i + 1)[QUERY],
            "blocks.0.grow": random_tensors(i + 2)[OUT],
            "blocks.0.norm.scale": random_tensors(i + 3)[OUT],
            "blocks.0.shift": random_tensors(i + 4)["model.norm.weight"],
        }
        for i in (0, 10)
    ]

    found = similarity(written(tmp_path, models))

    assert list(found.parts) == ["all"]
    np.testing.assert_allclose(found.parts["all"], expected(models, ["blocks.0.mix", "blocks.0.grow"]), atol=1e-14)


def test_models_without_any_matrix_are_alike(tmp_path: Path) -> None:
    found = similarity(written(tmp_path, [{"norm.weight": np.ones(3, np.float32)}] * 2))

    assert found.parts["all"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_value_that_is_no_number_names_model_and_tensor(
    tmp_path: Path, kin: list[dict[str, Array]], value: float, threads: int
) -> None:
    models = written(tmp_path, kin)
    kin[1][OUT][7, 7] = value
    reference_model(tmp_path / "m1", kin[1])
    models[1] = Checkpoint(tmp_path / "m1")

    with pytest.raises(CheckpointError, match=r"m1: model\.layers\.0\.self_attn\.o_proj\.weight holds NaN or inf"):
        similarity(models, threads=threads)


def test_a_delta_beyond_float32_names_model_and_tensor(tmp_path: Path) -> None:
    huge = [{QUERY: np.full((2, 2), sign * 3e38, np.float32)} for sign in (1, -1)]
    models = written(tmp_path, huge)

    with pytest.raises(CheckpointError, match=r"m1: .*q_proj\.weight is too far from its base"):
        similarity(models[1:], models[0])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_no_bits_crash_the_comparison(tmp_path: Path, dtype: str) -> None:
    """Ten thousand patterns and more: a number is compared, and what is none is named."""
    rng = np.random.default_rng(6)
    width = 4 if dtype == "F32" else 2
    refused = 0
    for seed in range(170):
        tensors = {QUERY: rng.integers(0, 256, 64 * width, np.uint8), OUT: rng.integers(0, 256, 2 * width, np.uint8)}
        shapes = {QUERY: (8, 8), OUT: (1, 2)}
        folders = [raw_model(tmp_path / f"{seed}-{i}", dtype, tensors, shapes) for i in range(2)]
        values = [interpret(each, dtype) for each in tensors.values()]
        finite = all(np.isfinite(each).all() for each in values)
        models = [Checkpoint(folder) for folder in folders]
        if finite:
            assert similarity(models, threads=1).parts["all"].tolist() == [[1, 1], [1, 1]]
        else:
            refused += 1
            with pytest.raises(CheckpointError, match="holds NaN or inf"):
                similarity(models, threads=1)
    assert 0 < refused < 170


def raw_model(folder: Path, dtype: str, tensors: Mapping[str, NDArray[np.uint8]], shapes: Mapping[str, Any]) -> Path:
    """A model whose tensors are these bytes."""
    header: dict[str, Any] = {}
    place = 0
    for name, data in tensors.items():
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [place, place + data.size]}
        place += data.size
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    data = b"".join(each.tobytes() for each in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def interpret(data: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float32 if dtype == "F32" else np.float16)
