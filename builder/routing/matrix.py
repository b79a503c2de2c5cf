"""A score matrix: prompts, and what every expert scored on each; from JSONL of whatever field names.

N prompts, E experts.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.errors import BuildError

PROMPTS = ("prompt", "query", "question", "text", "instruction")
TASKS = ("task", "task_name", "subject", "category", "dataset")


@dataclass(frozen=True)
class Matrix:
    """Prompts in order, the task of each, and the scores [N, E] of the experts."""

    prompts: tuple[str, ...]
    tasks: tuple[str, ...]
    experts: tuple[str, ...]
    scores_NE: NDArray[np.float64]

    def only(self, experts: Sequence[str]) -> Matrix:
        """The same prompts under some of the experts. Raises BuildError for one that is not there."""
        for name in experts:
            if name not in self.experts:
                raise BuildError(f"no expert {name!r} in the matrix; there are: {', '.join(self.experts)}")
        columns = [self.experts.index(name) for name in experts]
        return Matrix(self.prompts, self.tasks, tuple(experts), self.scores_NE[:, columns])


def read(path: Path, *, prompt: str | None = None, task: str | None = None) -> Matrix:
    """The matrix in a file of JSON lines, plain or .gz.

    A line has a prompt, perhaps a task, and scores: an object `scores`, or else every field that is a number or a truth
    value in all lines. prompt, task: the fields' names where they are none of the usual ones. Raises BuildError that
    names the line.
    """
    lines = list(rows(path))
    if not lines:
        raise BuildError(f"{path} is empty: one JSON object a line, with a prompt and scores")
    first = lines[0]
    prompt_field = prompt or next((name for name in PROMPTS if name in first), None)
    task_field = task or next((name for name in TASKS if name in first), None)
    if prompt_field is None:
        raise BuildError(f"{path} has none of the fields {', '.join(PROMPTS)}: name it with --prompt-field")
    experts = _experts(first, path)
    prompts, tasks, scores = [], [], []
    for number, line in enumerate(lines, start=1):
        found = line.get("scores", line)
        text = line.get(prompt_field)
        if not isinstance(text, str):
            raise BuildError(f"{path}:{number} has no text in {prompt_field!r}")
        try:
            scores.append([float(found[name]) for name in experts])
        except (KeyError, TypeError, ValueError) as exc:
            raise BuildError(f"{path}:{number} has no number for each of {', '.join(experts)}") from exc
        prompts.append(text)
        tasks.append(str(line.get(task_field, "all")) if task_field else "all")
    matrix_NE = np.array(scores)
    if not np.isfinite(matrix_NE).all():
        row = int(np.argwhere(~np.isfinite(matrix_NE))[0][0])
        raise BuildError(f"{path}:{row + 1} has a score that is NaN or inf")
    return Matrix(tuple(prompts), tuple(tasks), experts, matrix_NE)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, plain or .gz. Raises BuildError that names the line."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise BuildError(f"{path}:{number} is not a JSON object")
                yield row
        except (ValueError, gzip.BadGzipFile) as exc:
            raise BuildError(f"{path} is not JSON lines: {exc}") from exc


def _experts(first: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    if isinstance(first.get("scores"), Mapping):
        found = tuple(first["scores"])
    else:
        found = tuple(name for name, value in first.items() if isinstance(value, bool | int | float))
    if not found:
        raise BuildError(f"{path} has no scores: an object `scores`, or a field with a number for each expert")
    return found
