"""Token sequences as one trie: a token that several share after the same tokens is one node, to be computed once.

Nodes are numbered in the order of a walk that finishes a branch before the next, so that the nodes below one are a
range, and a node sees another exactly if it lies in that one's range. Array names: N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builder.proxy.scorer.encoding import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """The nodes, and where every sequence lies.

    ends_N: the first node that is not below each; a node counts as below itself.
    order: the sequences, by their index, in the order of their last nodes.
    paths: of every sequence the nodes from a position on that was asked for.
    """

    tokens_N: Tokens
    depths_N: Tokens
    ends_N: Tokens
    order: tuple[int, ...]
    paths: tuple[Tokens, ...]

    def __len__(self) -> int:
        return len(self.tokens_N)


def plant(sequences: Sequence[Tokens], starts: Sequence[int]) -> Trie:
    """The trie of the sequences; their nodes from `starts` on are told."""
    # Of the same tokens in another order comes the same trie: what is computed does not depend on who asked first.
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())
    shared = _shared([sequences[i] for i in order])
    count = sum(len(sequences[i]) - common for i, common in zip(order, shared, strict=True))
    tokens_N, depths_N = np.empty(count, np.int64), np.empty(count, np.int64)
    ends_N = np.full(count, count)
    paths: list[Tokens] = [np.empty(0, np.int64)] * len(sequences)
    path, grown = np.empty(0, np.int64), 0
    for i, common in zip(order, shared, strict=True):
        ends_N[path[common:]] = grown
        new = np.arange(grown, grown + len(sequences[i]) - common)
        tokens_N[new], depths_N[new] = sequences[i][common:], np.arange(common, len(sequences[i]))
        path, grown = np.concatenate([path[:common], new]), grown + len(new)
        paths[i] = path[starts[i] :].copy()
    return Trie(tokens_N, depths_N, ends_N, tuple(order), tuple(paths))


def _shared(ordered: Sequence[Tokens]) -> list[int]:
    """How many first tokens each has in common with the one before it: of those before it, none has more."""
    shared = []
    before: NDArray[np.int64] = np.empty(0, np.int64)
    for tokens in ordered:
        width = min(len(before), len(tokens))
        differ = np.flatnonzero(before[:width] != tokens[:width])
        shared.append(int(differ[0]) if len(differ) else width)
        before = tokens
    return shared
