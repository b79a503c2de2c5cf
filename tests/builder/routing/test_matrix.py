from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.errors import BuildError
from builder.routing.matrix import read


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_scores_may_be_an_object_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.write(lines({"task": "t", "query": "q", "level": 3, "scores": {"a": 1, "b": 0.5}}))
    found = read(file)
    assert (found.prompts, found.tasks, found.experts) == (("q",), ("t",), ("a", "b"))
    assert found.scores_NE.tolist() == [[1.0, 0.5]]


def test_scores_may_be_fields_with_numbers_and_truth_values(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        lines({"subject": "s", "prompt": "p", "x": True, "y": False, "note": "n"}, {"prompt": "r", "x": 0, "y": 1})
    )
    found = read(tmp_path / "m.jsonl")
    assert (found.experts, found.tasks) == (("x", "y"), ("s", "all"))
    assert np.array_equal(found.scores_NE, [[1, 0], [0, 1]])
    assert found.only(["y"]).scores_NE.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("{", "is not JSON lines"),
        ("[1]\n", ":1 is not a JSON object"),
        (lines({"a": 1}), "none of the fields prompt, query"),
        (lines({"prompt": "p"}), "has no scores"),
        (lines({"prompt": "p", "a": 1}, {"prompt": "p"}), ":2 has no number for each of a"),
        (lines({"prompt": "p", "a": 1}, {"prompt": 3, "a": 1}), ":2 has no text in 'prompt'"),
        (lines({"prompt": "p", "a": float("nan")}), ":1 has a score that is NaN"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(BuildError, match=sentence):
        read(tmp_path / "m.jsonl")


def test_an_expert_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(lines({"prompt": "p", "a": 1}))
    with pytest.raises(BuildError, match="no expert 'z' in the matrix; there are: a"):
        read(tmp_path / "m.jsonl").only(["z"])
