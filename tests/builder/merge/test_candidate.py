"""Merges of members by weights: their mean, with the first member's config and words."""

from __future__ import annotations

import itertools
from pathlib import Path

import llamas
import numpy as np
import pytest
import torch

from builder.candidate import Kin
from builder.checkpoints import Checkpoint
from builder.errors import MergeError
from builder.merge import stream
from builder.merge.plan import Plan

WEIGHTS = (0.2, 0.5, 0.3)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = [["?", "the", "fox", "owl"], ["?", "owl", "the"], ["?", "fox", "a", "the", "owl"]]


def members(tmp_path: Path, *, words: bool = False) -> dict[str, Path]:
    """Three models by name; with `words` each knows its own, and has a row of padding too."""
    folders = {}
    for i, own in enumerate(WORDS):
        tensors = llamas.random(i, rows=len(own) + 1 if words else 150)
        folders[f"m{i}"] = llamas.write(tmp_path / f"m{i}", tensors, "BF16", words=own if words else None)
    return folders


def planned(weights: dict[str, float], folders: dict[str, Path]) -> Plan:
    """What a cluster of these members makes of the weights."""
    kin = Kin.of({name: Checkpoint(folders[name]) for name in weights}, None, None)
    return kin.linear(weights).plan(folders)


def merged(folders: dict[str, Path], *weights: float) -> dict[str, np.ndarray]:
    return dict(stream.tensors(planned(dict(zip(folders, weights, strict=False)), folders)))


def test_the_mean_of_members_is_rounded_once(tmp_path: Path) -> None:
    folders = members(tmp_path)

    stream.write(planned({"m0": 0.25, "m1": 0.75}, folders), tmp_path / "out")

    # Halves and quarters of such numbers are exact in fp32, so every bit must be right.
    first, second = llamas.random(0), llamas.random(1)
    for name, written in llamas.read(tmp_path / "out").items():
        exact = torch.from_numpy(0.25 * first[name] + 0.75 * second[name])
        assert np.array_equal(written, exact.bfloat16().double().numpy()), name
    assert llamas.dtypes(tmp_path / "out") == {torch.bfloat16}


def test_weights_are_shares(tmp_path: Path) -> None:
    folders = members(tmp_path)

    shares, ratio = merged(folders, 0.25, 0.75), merged(folders, 1, 3)

    assert all(np.array_equal(shares[name], ratio[name]) for name in shares)


def test_the_order_of_members_changes_only_rounding(tmp_path: Path) -> None:
    folders = members(tmp_path)
    found = []
    for order in itertools.permutations(range(3)):
        ordered = {f"m{i}": folders[f"m{i}"] for i in order}
        found.append(merged(ordered, *(WEIGHTS[i] for i in order)))

    for other in found[1:]:
        for name, values in found[0].items():
            np.testing.assert_allclose(other[name], values, rtol=1e-6, atol=1e-6)


def test_members_of_other_vocabularies_keep_the_first_ones_words(tmp_path: Path) -> None:
    folders = members(tmp_path, words=True)
    found = merged(folders, *WEIGHTS)

    for kind in (EMBEDDING, HEAD):
        rows = [dict(zip(own, llamas.random(i, rows=len(own) + 1)[kind], strict=False)) for i, own in enumerate(WORDS)]
        assert found[kind].shape == (len(WORDS[0]), llamas.WIDTH)
        for row, word in zip(found[kind], WORDS[0], strict=True):
            # Who does not know a word takes the mean of those that do.
            having = [(w, own[word]) for w, own in zip(WEIGHTS, rows, strict=True) if word in own]
            lacking = sum(w for w, own in zip(WEIGHTS, rows, strict=True) if word not in own)
            mean = np.mean([values for _, values in having], axis=0)
            want = sum(w * values for w, values in having) + lacking * mean
            np.testing.assert_allclose(row, want, atol=1e-6, err_msg=word)


def test_a_word_that_nobody_has_a_say_in_is_the_first_members(tmp_path: Path) -> None:
    folders = members(tmp_path, words=True)
    found = merged(folders, 0.0, 1.0)

    first, second = (llamas.random(i, rows=len(WORDS[i]) + 1)[HEAD] for i in range(2))
    assert np.array_equal(found[HEAD][WORDS[0].index("fox")], first[WORDS[0].index("fox")])
    assert np.array_equal(found[HEAD][WORDS[0].index("owl")], second[WORDS[1].index("owl")])


def test_vocabularies_that_differ_need_their_tokenizers(tmp_path: Path) -> None:
    folders = {}
    for i in range(2):
        folders[f"m{i}"] = llamas.write(tmp_path / f"m{i}", llamas.random(i, rows=9 + i))

    with pytest.raises(MergeError, match=r"m\d has no tokenizer \(tokenizer.json"):
        planned({"m0": 1, "m1": 1}, folders)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ((0.0, 0.0), "the weights sum to zero"),
        ((1.0, -1.0), "the weights sum to zero"),
        ((float("nan"), 1.0), "nan is no number"),
        ((float("inf"), 1.0), "inf is no number"),
    ],
)
def test_weights_without_a_sum_are_refused(tmp_path: Path, weights: tuple[float, float], sentence: str) -> None:
    folders = members(tmp_path)

    with pytest.raises(MergeError, match=sentence):
        planned(dict(zip(folders, weights, strict=False)), folders)


def test_a_merge_of_trained_members_loads_with_the_first_ones_tokenizer(
    tmp_path: Path, micro_zoo: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stream.write(planned({"math": 0.5, "code": 0.5}, micro_zoo), tmp_path / "out")

    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(found.values())
    both = [Checkpoint(micro_zoo[name]) for name in ("math", "code")]
    for name in both[0].tensors:
        mean = (both[0].read(name) + both[1].read(name)) / 2
        assert torch.equal(model.state_dict()[name], torch.from_numpy(mean).bfloat16().float()), name
    text = "Question: Ann has 12 apples."
    own, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", micro_zoo["math"]))
    assert own(text).input_ids == theirs(text).input_ids
    assert own.chat_template == theirs.chat_template
    assert torch.isfinite(model(input_ids=torch.tensor([own(text).input_ids])).logits).all()
