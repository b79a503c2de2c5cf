from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import Run

from routers import bundle


def test_a_model_is_scored_as_json_with_intervals_and_samples(
    run: Run, micro_zoo: dict[str, Path], tmp_path: Path
) -> None:
    samples = tmp_path / "samples.jsonl"
    result = run(
        "eval", micro_zoo["math"], "--tasks", "tiny/math,tiny/code", "--limit", 8, "--json", "--samples", samples
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)["math"]
    assert found["tiny/math"]["samples"] == 8
    rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    own = [row["metrics"]["accuracy"] for row in rows if row["task"] == "tiny/math"]
    score = found["tiny/math"]["metrics"]["accuracy"]
    assert score["mean"] == pytest.approx(np.mean(own))
    assert score["low"] <= score["mean"] <= score["high"]
    nats = {task: facts["metrics"]["log_likelihood"]["mean"] for task, facts in found.items()}
    assert nats["tiny/math"] > nats["tiny/code"]


def test_a_bundle_is_scored_expert_by_expert_and_as_it_routes(run: Run, micro_bundle: Path) -> None:
    result = run("eval", micro_bundle, "--tasks", "tiny/math,tiny/story", "--limit", 6, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    names = bundle.read_manifest(micro_bundle).names
    assert list(found) == [*names, "(routed)"]
    for task in ("tiny/math", "tiny/story"):
        means = [found[name][task]["metrics"]["log_likelihood"]["mean"] for name in names]
        assert min(means) <= found["(routed)"][task]["metrics"]["log_likelihood"]["mean"] <= 0


def test_a_table_is_printed_for_people(run: Run, micro_zoo: dict[str, Path]) -> None:
    result = run("eval", micro_zoo["math"], "--tasks", "tiny/math", "--limit", 4)
    assert result.code == 0
    assert "accuracy" in result.out
    assert "log_likelihood" in result.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("{math}", "--tasks", "tiny/moth"), "nobody knows tiny/moth"),
        (("{math}/nowhere", "--tasks", "tiny/math"), "there is no such folder"),
        (("{tmp}", "--tasks", "tiny/math"), "no readable config.json|cannot be loaded|is it a model folder"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Run, micro_zoo: dict[str, Path], tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    import re

    (tmp_path / "empty").mkdir()
    result = run("eval", *(word.format(math=micro_zoo["math"], tmp=tmp_path / "empty") for word in words))
    assert result.code == 1
    assert re.search(sentence, result.err)
    assert "Traceback" not in result.err
