from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builder.checkpoints import Checkpoint
from builder.errors import CheckpointError
from builder.merge import simple, stream
from builder.proxy import scorer, tasks
from builder.proxy.items import Item
from builder.proxy.scorer import Scorer

ITEMS = [item for name in ("tiny/math", "tiny/code", "tiny/story") for item in tasks.load(name, "proxy", 5, 1)]


def reference(folder: Path, item: Item) -> list[tuple[float, int]]:
    """Summed log-likelihood and tokens of each choice, one row at a time, no padding, in float64."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    model.to(torch.float64)
    sums = []
    for choice in item.choices:
        ids = tokenizer(item.prompt + choice, return_tensors="pt").input_ids
        prompt = tokenizer(item.prompt).input_ids
        start = next(i for i, (a, b) in enumerate(zip([*prompt, -1], ids[0].tolist(), strict=False)) if a != b)
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        scored = range(start, ids.shape[1])
        sums.append((sum(float(logprobs[i - 1, ids[0, i]]) for i in scored), len(scored)))
    return sums


def test_scores_equal_those_of_one_unpadded_row_at_a_time(micro_zoo: dict[str, Path]) -> None:
    scores = Scorer(micro_zoo["math"], dtype=torch.float32).score(ITEMS)
    for item, score in zip(ITEMS, scores, strict=True):
        expected = reference(micro_zoo["math"], item)
        total, tokens = expected[item.label]
        assert score.accuracy == float(np.argmax([own for own, _ in expected]) == item.label)
        assert score.log_likelihood == pytest.approx(total / tokens, rel=1e-4)


def test_the_batch_does_not_change_a_score(micro_zoo: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scorer(micro_zoo["story"], dtype=torch.float32)
    together = [score.log_likelihood for score in model.score(ITEMS)]
    monkeypatch.setattr(scorer, "BATCH_TOKENS", 1)
    assert [score.log_likelihood for score in model.score(ITEMS)] == pytest.approx(together, abs=1e-5)


def test_progress_counts_every_row(micro_zoo: dict[str, Path]) -> None:
    done: list[int] = []
    Scorer(micro_zoo["story"]).score(ITEMS, done.append)
    assert sum(done) == sum(len(item.choices) for item in ITEMS)


def test_a_token_that_spans_prompt_and_choice_is_scored(micro_zoo: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro_zoo["base"])
    assert len(tokenizer("Quest").input_ids) + len(tokenizer("ion").input_ids) > len(tokenizer("Question").input_ids)
    item = Item("User: Quest", ("ion", "xyz"), 0)
    score = Scorer(micro_zoo["math"], dtype=torch.float32).score([item])[0]
    total, tokens = reference(micro_zoo["math"], item)[0]
    assert score.log_likelihood == pytest.approx(total / tokens, rel=1e-4)


def test_rewritten_weights_score_as_the_written_merge(micro_zoo: dict[str, Path], tmp_path: Path) -> None:
    plan = simple.of_members("linear", {"math": 0.5, "code": 0.5}, micro_zoo)
    stream.write(plan, tmp_path / "merged")
    live = Scorer(micro_zoo["math"], dtype=torch.bfloat16)
    live.rewrite(stream.tensors(plan))
    assert live.score(ITEMS) == Scorer(tmp_path / "merged", dtype=torch.bfloat16).score(ITEMS)
    assert live.score(ITEMS) != Scorer(micro_zoo["math"], dtype=torch.bfloat16).score(ITEMS)


def test_a_rewrite_that_misses_a_tensor_or_brings_another_is_refused(micro_zoo: dict[str, Path]) -> None:
    live = Scorer(micro_zoo["math"])
    checkpoint = Checkpoint(micro_zoo["code"])
    whole = [(name, checkpoint.read(name)) for name in checkpoint.tensors]
    with pytest.raises(CheckpointError, match="was not among the weights"):
        live.rewrite(iter(whole[:-1]))
    with pytest.raises(CheckpointError, match="stranger has no place in LlamaForCausalLM"):
        live.rewrite(iter([*whole, ("stranger", np.zeros(1, np.float32))]))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Scorer(tmp_path)
