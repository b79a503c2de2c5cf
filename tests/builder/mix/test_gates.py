"""Gates: when they are nearly parallel, features under padding, and training on the marginal likelihood."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mixable
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import logsumexp

from builder.errors import MixError
from builder.journal import Journal
from builder.mix import features, gates, train
from builder.mix.layouts import Look
from builder.mix.train import Text
from builder.mix.write import write
from builder.progress import Quiet


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return mixable.experts(tmp_path_factory.mktemp("llamas"))


# How parallel they are


def test_the_condition_is_that_of_the_gates_made_one_long() -> None:
    rows = np.random.default_rng(0).normal(size=(4, 9))

    longer = rows * np.array([[1.0], [5.0], [0.1], [2.0]])
    expected = np.linalg.cond(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    assert gates.condition(longer, free=False) == pytest.approx(expected)


def test_gates_that_are_each_others_negatives_are_not_parallel_for_that() -> None:
    means = np.eye(3, 8)
    rows = np.stack([means[e] - np.delete(means, e, 0).mean(0) for e in range(3)])

    assert gates.condition(rows, free=False) > 1e6
    assert gates.condition(rows, free=True) == pytest.approx(1)


def test_equal_gates_have_no_condition() -> None:
    assert gates.condition(np.ones((3, 5)), free=True) == math.inf


def test_nearly_parallel_gates_are_told_with_the_worst_place(members: dict[str, Path], tmp_path: Path) -> None:
    prompts = {
        "math": ["sum count solve number plus minus three seven once"],
        "code": ["sum count solve number plus minus three seven upon"],
        "story": ["fox lake forest king"],
    }
    listed = [{"source_model": str(path), "positive_prompts": prompts[name]} for name, path in members.items()]
    plan = mixable.planned({}, experts=listed, mixture="B-L-S", centre=False)
    written = write(plan, tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    numbers = {}
    for i in range(mixable.LAYERS):
        values = np.linalg.svd(stored[f"model.layers.{i}.gate.weight"].numpy().astype(float), compute_uv=False)
        numbers[f"model.layers.{i}"] = values[0] / values[1]
    over = [number for number in numbers.values() if number > 5]
    worst = max(numbers, key=lambda name: numbers[name])
    assert over
    assert written.warnings == (
        f"the gates are nearly parallel in {len(over)} of 3 places, the most in {worst}, with a condition number of "
        f"{max(over):.3g}: some experts will hardly be chosen; give prompts that differ more",
    )
    assert written.warnings[0] in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_gates_of_prompts_that_differ_are_not_told(members: dict[str, Path], tmp_path: Path) -> None:
    assert write(mixable.planned(members, mixture="M-L-S"), tmp_path / "out").warnings == ()


def test_prompts_that_leave_no_direction_are_refused(members: dict[str, Path], tmp_path: Path) -> None:
    prompts = {"math": ["sum"], "code": ["sum"], "story": ["fox"]}
    listed = [
        {"source_model": str(path), "positive_prompts": prompts[name], "negative_prompts": ["sum"]}
        for name, path in members.items()
    ]
    with pytest.raises(MixError, match=r"the prompts of .*math leave its gate no direction"):
        write(mixable.planned({}, experts=listed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# What they see


def test_a_text_is_seen_alike_alone_and_among_others(members: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = mixable.planned(members).shared
    looks = [Look(), Look(0), Look(2), Look(1, mlp=True)]
    texts = ["sum", "once upon a time the fox", "python code loop", "sum"]
    together = features.pooled(shared, texts, looks)
    monkeypatch.setattr(features, "BATCH_TOKENS", 1)
    alone = features.pooled(shared, texts, looks)

    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.means_NH, b.means_NH, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a.first_H, b.first_H, rtol=1e-4, atol=1e-5)


def test_layers_beyond_the_last_look_are_not_read(members: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = features._Weights.of

    def of(self: Any, module: str) -> Any:
        read.append(module)
        return original(self, module)

    monkeypatch.setattr(features._Weights, "of", of)
    features.pooled(mixable.planned(members).shared, ["sum", "fox"], [Look(1)])
    assert read == ["model.embed_tokens", "model.layers.0"]


# Training


def test_a_trained_gate_finds_the_better_expert_of_new_texts() -> None:
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(3, 20))
    kinds = rng.integers(0, 3, 120)
    vectors = centres[kinds] + 0.3 * rng.normal(size=(120, 20)) + 100
    scores = np.where(np.arange(3) == kinds[:, None], -10.0, -14.0)
    gate = train.fit(vectors[:60], scores[:60], width=16, seed=0)

    assert (gate.logits(vectors[60:]).argmax(1) == kinds[60:]).mean() > 0.95
    log_shares = torch.from_numpy(gate.logits(vectors[60:])).log_softmax(1).numpy()
    # A gate that knows nothing loses log 3 nats of the best expert's.
    assert logsumexp(log_shares + scores[60:], axis=1).mean() > -10 - 0.5


def test_a_direction_that_is_taken_off_has_no_say() -> None:
    rng = np.random.default_rng(3)
    vectors, off = rng.normal(size=(40, 8)), rng.normal(size=8)
    gate = train.fit(vectors, rng.normal(size=(40, 2)), width=4, seed=0, off=[off])

    np.testing.assert_allclose(gate.logits(vectors + 1e3 * off), gate.logits(vectors), atol=1e-6)


def test_mlp_gates_are_trained_and_written(members: dict[str, Path], tmp_path: Path) -> None:
    texts = [Text(text=text) for prompts in mixable.PROMPTS.values() for text in prompts]
    plan = mixable.planned(members, mixture="B-M-S", gate_width=8)
    write(plan, tmp_path / "out", texts=texts)

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.gate.up.weight"].shape == (8, mixable.HIDDEN)
    import composed

    model, facts = composed.ComposedForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(facts.values())
    assert model.config.gate_width == 8


def test_likelihoods_are_the_experts_own_and_computed_once(members: dict[str, Path], tmp_path: Path) -> None:
    plan = mixable.planned(members, mixture="M-M-S")
    texts = [Text(prompt="sum three", completion=" plus seven"), Text(prompt="once", completion=" upon a time")]
    with Journal(tmp_path / "journal.sqlite") as journal:
        first = train.likelihoods(plan, texts, journal, Quiet())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builder.proxy.scorer.Scorer", None)  # nobody can score again
            assert np.array_equal(train.likelihoods(plan, texts, journal, Quiet()), first)

    expected = np.zeros((2, 3))
    for column, path in enumerate(members.values()):
        model = mixable.load(path)
        for row, text in enumerate(texts):
            ids = torch.tensor([[mixable.WORDS.index(word) for word in (text.prompt + text.completion).split()]])
            start = len(text.prompt.split())
            likely = mixable.logits(model, ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            expected[row, column] = float(likely[start - 1 :].sum())
    np.testing.assert_allclose(first, expected, rtol=0.05, atol=0.3)  # the scorer may run in bfloat16


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"text": "a", "prompt": "b", "completion": "c"}, "line 2: give either text, or prompt and completion"),
        ({"prompt": "b"}, "line 2: give either text, or prompt and completion"),
        ({"txt": "b"}, "line 2: Extra inputs are not permitted"),
    ],
)
def test_training_texts_are_read_strictly(tmp_path: Path, line: dict[str, str], sentence: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(line) + "\n", "utf-8")

    with pytest.raises(MixError, match=sentence):
        train.read(path)


def test_training_without_any_text_is_refused(members: dict[str, Path], tmp_path: Path) -> None:
    listed = [{"source_model": str(path)} for path in members.values()]
    with pytest.raises(MixError, match="give the experts positive_prompts, or --data"):
        write(mixable.planned({}, experts=listed, mixture="M-M-S"), tmp_path / "out")
