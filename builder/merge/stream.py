"""Runs a merge tensor by tensor: nothing is held but the tensor in flight, one copy a member."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builder import checkpoints, files
from builder.architecture import family_key, is_vocabulary
from builder.checkpoints import Array, Checkpoint, Tensor
from builder.errors import MergeError
from builder.merge import METHODS
from builder.merge.method import Method

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""What a model folder holds beside its weights and, for a custom architecture, its own code."""


@dataclass(frozen=True)
class Merge:
    """Members of one family and their weights; config, tokenizer and dtypes are the first member's."""

    method: str
    members: Mapping[str, Checkpoint]
    weights: Mapping[str, float]

    @property
    def first(self) -> Checkpoint:
        """The member whose config and tokenizer the merge keeps."""
        return next(iter(self.members.values()))

    def check(self) -> None:
        """Raises MergeError from the headers alone: weights that sum to zero, members of more than one family."""
        if not abs(sum(self.weights.values())) > 1e-8:
            raise MergeError(f"the weights of {', '.join(self.weights)} sum to zero: give them a positive sum")
        for name, member in self.members.items():
            differing = sorted(set(member.tensors) ^ set(self.first.tensors))
            if differing:
                raise MergeError(
                    f"{differing[0]} is not in every member ({name} differs from {self.first.folder.name})"
                )
            for tensor, other in self.first.tensors.items():
                shape = member.tensors[tensor].shape
                same = shape[1:] == other.shape[1:] if is_vocabulary(tensor) else shape == other.shape
                if not same:
                    raise MergeError(f"{tensor} is {shape} in {name} and {other.shape} in {self.first.folder.name}")
            if family_key(member) != family_key(self.first):
                raise MergeError(
                    f"{name} has the tensors of {self.first.folder.name}, and in its config.json another class, rotary "
                    "base, norm or number of heads: they do not mix"
                )


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that go with its weights, in a fixed order."""
    return [folder / name for name in COMPANIONS if (folder / name).exists()] + sorted(folder.glob("*.py"))


def tensors(merge: Merge) -> Iterator[tuple[str, Array]]:
    """The merged tensors, float32, in the first member's order."""
    method = METHODS[merge.method]
    weights = [merge.weights[name] for name in merge.members]
    for name, tensor in merge.first.tensors.items():
        values = [member.read(name) for member in merge.members.values()]
        if is_vocabulary(name) and len({len(value) for value in values}) > 1:
            yield name, _by_rows(method, values, weights, tensor)
        else:
            yield name, method(values, weights)


def write(merge: Merge, out: Path) -> None:
    """Write the merge as a model folder; the folder appears whole."""
    merge.check()
    with files.whole(out) as folder:
        checkpoints.write(folder, merge.first.tensors, tensors(merge))
        for path in companions(merge.first.folder):
            files.copy(path, folder / path.name)


def _by_rows(method: Method, values: list[Array], weights: list[float], tensor: Tensor) -> Array:
    """A vocabulary tensor whose members have different numbers of rows.

    The first member's rows are kept; each is merged over the members that have it, since tokens are added at the end.
    Where the weights of those sum to zero, the row is the first member's.
    """
    merged = np.empty(tensor.shape, np.float32)
    cuts = sorted({0, len(merged), *(min(len(value), len(merged)) for value in values)})
    for begin, end in itertools.pairwise(cuts):
        having = [i for i, value in enumerate(values) if len(value) >= end]
        if not abs(sum(weights[i] for i in having)) > 1e-8:
            merged[begin:end] = values[0][begin:end]
            continue
        merged[begin:end] = method([values[i][begin:end] for i in having], [weights[i] for i in having])
    return merged
