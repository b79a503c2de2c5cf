"""Similarity of weights: the paper's formula, over attention and MLP matrices alone, every checkpoint read once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_models import random_tensors, write_model

from builder.checkpoints import Array, Checkpoint
from builder.similarity import column_cosines, similarity

MATRICES = {
    "attention": ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
    "mlp": ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"),
}
MATRICES["all"] = MATRICES["attention"] + MATRICES["mlp"]


def reference(a: dict[str, Array], b: dict[str, Array], names: tuple[str, ...]) -> float:
    """sim(a, b) as PAPER.md 3 writes it: float64, one column at a time."""
    means = []
    for name in names:
        cosines = []
        for j in range(a[name].shape[1]):
            x, y = a[name][:, j].astype(np.float64), b[name][:, j].astype(np.float64)
            cosines.append(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
        means.append(np.mean(cosines))
    return float(np.mean(means))


class Counted(Checkpoint):
    """A checkpoint that counts how often each tensor is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> Array:
        self.reads[name] += 1
        return super().read(name)


@pytest.fixture
def kin() -> list[dict[str, Array]]:
    """Three models: unrelated, and one close to the first."""
    first, second = random_tensors(1), random_tensors(2)
    close = {name: values + 0.2 * second[name] for name, values in first.items()}
    return [first, second, close]


def test_similarity_is_the_papers_mean_of_column_cosines(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    found = similarity([write_model(tmp_path / str(i), tensors) for i, tensors in enumerate(kin)])

    assert set(found) == set(MATRICES)
    for kind, names in MATRICES.items():
        expected = [[reference(a, b, names) for b in kin] for a in kin]
        np.testing.assert_allclose(found[kind], expected, atol=1e-7)
        assert np.array_equal(found[kind], found[kind].T)
    assert found["all"][0, 2] > 0.95 > 0.5 > abs(found["all"][0, 1])


def test_every_matrix_is_read_once_and_nothing_else_is(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    models = [Counted(write_model(tmp_path / str(i), tensors).folder) for i, tensors in enumerate(kin)]
    heard: list[int] = []
    similarity(models, heard.append)

    assert all(model.reads == Counter(MATRICES["all"]) for model in models)
    assert sum(heard) == sum(model.tensors[name].bytes for model in models for name in MATRICES["all"])


def test_a_zero_column_counts_as_no_likeness() -> None:
    a = np.array([[1, 0], [1, 0]], np.float32)
    b = np.array([[1, 1], [1, 1]], np.float32)

    np.testing.assert_allclose(column_cosines([a, b]), [[0.5, 0.5], [0.5, 1.0]])


def test_many_large_values_do_not_push_a_cosine_past_one() -> None:
    big = np.full((300_000, 1), 1.1, np.float32)

    np.testing.assert_allclose(column_cosines([big, 3 * big]), np.ones((2, 2)), atol=1e-9)


def test_likeness_does_not_depend_on_the_order(tmp_path: Path, kin: list[dict[str, Array]]) -> None:
    models = [write_model(tmp_path / str(i), tensors) for i, tensors in enumerate(kin)]
    order = [2, 0, 1]

    forward, turned = similarity(models)["all"], similarity([models[i] for i in order])["all"]

    assert np.array_equal(turned, forward[np.ix_(order, order)])
