"""Runs a model over a trie of tokens: packed into one row, each token sees those it follows and computes once.

A batch of rows would repeat the prefix they share, in keys and values if not in work, and pad to the longest; a row
that holds them all does neither. What is not a token's own past is hidden from it by a 4-D mask.
Array names: N nodes of the trie, Q tokens that a forward reads, K of which keys and values are held, W whose logits are
wanted, V vocabulary, R rows, M scored tokens.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from builder.proxy.requests import Likelihood
from builder.proxy.scorer.encoding import Row, Tokens
from builder.proxy.scorer.trie import Trie, plant

CHUNK = {"cpu": 256, "cuda": 2048}
"""How many tokens a forward reads: more hide more of each other's work, fewer keep the machine less busy."""
HEAD = 256
"""Of so many tokens are the logits turned into float32 at a time."""
NOBODY = -1
Mask = NDArray[np.bool_]


class Held:
    """The model, and the keys and values of the tokens it has read and may still need.

    A key is a node of the trie, or (in generation) a new token of an owner. A query sees the nodes above its own, and
    its owner's tokens.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._device = model, model.device
        self._cache_name = cache_name(model)
        self._sparse = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache = DynamicCache()
        self.nodes_K = self.ends_K = self.owners_K = np.empty(0, np.int64)

    @torch.inference_mode()
    def read(
        self, tokens_Q: Tokens, depths_Q: Tokens, nodes_Q: Tokens, ends_Q: Tokens, owners_Q: Tokens, wanted_W: Tokens
    ) -> Tensor:
        """Read tokens, hold them, and give the logits after those wanted, [W, V]."""
        self.nodes_K = np.concatenate([self.nodes_K, nodes_Q])
        self.ends_K = np.concatenate([self.ends_K, ends_Q])
        self.owners_K = np.concatenate([self.owners_K, owners_Q])
        wanted = self._tensor(wanted_W)
        options: dict[str, Any] = {"logits_to_keep": wanted} if self._sparse else {}
        logits: Tensor = self._model(
            input_ids=self._tensor(tokens_Q)[None],
            position_ids=self._tensor(depths_Q)[None],
            attention_mask=self._mask(nodes_Q, owners_Q),
            use_cache=True,
            **{self._cache_name: self._cache},
            **options,
        ).logits[0]
        return logits if self._sparse else logits[wanted]

    @torch.inference_mode()
    def keep(self, kept_K: Mask) -> None:
        """Forget the other keys and values."""
        if kept_K.all():
            return
        index = self._tensor(np.flatnonzero(kept_K))
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)
        self.nodes_K, self.ends_K, self.owners_K = (
            values_K[kept_K] for values_K in (self.nodes_K, self.ends_K, self.owners_K)
        )

    def _mask(self, nodes_Q: Tokens, owners_Q: Tokens) -> Tensor:
        nodes_Q1, owners_Q1 = self._tensor(nodes_Q)[:, None], self._tensor(owners_Q)[:, None]
        nodes_K, ends_K, owners_K = (self._tensor(each) for each in (self.nodes_K, self.ends_K, self.owners_K))
        above_QK = (nodes_K <= nodes_Q1) & (nodes_Q1 < ends_K)
        own_QK = (owners_K == owners_Q1) & (owners_K != NOBODY)
        dtype = self._model.dtype
        mask_QK = torch.full(above_QK.shape, torch.finfo(dtype).min, dtype=dtype, device=self._device)
        return mask_QK.masked_fill_(above_QK | own_QK, 0)[None, None]

    def _tensor(self, values: Tokens) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def likelihoods(model: Any, rows: Sequence[Row], chunk: int | None = None) -> Iterator[tuple[int, Likelihood]]:
    """The likelihood of each row, by its index, as soon as it is known; every row has something to score."""
    trie = plant([row.tokens[:-1] for row in rows], [row.start - 1 for row in rows])
    scored_R = np.array([len(path) for path in trie.paths])
    # Each scored token, in the order in which the logits before it are computed.
    nodes_M = np.concatenate(trie.paths)
    order_M = np.argsort(nodes_M, kind="stable")
    nodes_M, rows_M = nodes_M[order_M], np.repeat(np.arange(len(rows)), scored_R)[order_M]
    targets_M = np.concatenate([row.tokens[row.start :] for row in rows])[order_M]
    nats_R, greedy_R = np.zeros(len(rows)), np.ones(len(rows), bool)
    held, step, ready = Held(model), chunk or chunk_of(model), 0
    for first in range(0, len(trie), step):
        last = min(first + step, len(trie))
        now = slice(*np.searchsorted(nodes_M, [first, last]))
        wanted_W, found_M = np.unique(nodes_M[now], return_inverse=True)
        logits_WV = read_nodes(held, trie, first, last, wanted_W)
        nats_M, greedy_M = scores(logits_WV, found_M, targets_M[now])
        np.add.at(nats_R, rows_M[now], nats_M)
        np.logical_and.at(greedy_R, rows_M[now], greedy_M)
        while ready < len(rows) and trie.paths[row := trie.order[ready]][-1] < last:
            yield row, Likelihood(float(nats_R[row]), int(scored_R[row]), bool(greedy_R[row]))
            ready += 1
        # What is still needed is above the next node: one path.
        held.keep(held.ends_K > last)


def read_nodes(held: Held, trie: Trie, first: int, last: int, wanted_W: Tokens) -> Tensor:
    """Read these nodes of a trie whose earlier ones were read; the logits after those wanted, [W, V]."""
    nodes_Q, nobody_Q = np.arange(first, last), np.full(last - first, NOBODY)
    return held.read(
        trie.tokens_N[nodes_Q], trie.depths_N[nodes_Q], nodes_Q, trie.ends_N[nodes_Q], nobody_Q, wanted_W - first
    )


@torch.inference_mode()
def scores(logits_WV: Tensor, found_M: Tokens, targets_M: Tokens) -> tuple[NDArray[np.float64], Mask]:
    """The log-likelihood of each target after its logits, in nats, and whether greedy decoding writes it."""
    nats_M, greedy_M = np.zeros(len(targets_M)), np.zeros(len(targets_M), bool)
    for first in range(0, len(logits_WV), HEAD):
        piece_WV = logits_WV[first : first + HEAD].float()
        here_M = (first <= found_M) & (found_M < first + HEAD)
        found = torch.from_numpy(found_M[here_M] - first).to(piece_WV.device)
        targets = torch.from_numpy(targets_M[here_M]).to(piece_WV.device)
        nats = piece_WV[found, targets] - piece_WV.logsumexp(1)[found]
        nats_M[here_M] = nats.double().cpu().numpy()
        greedy_M[here_M] = (piece_WV.argmax(1)[found] == targets).cpu().numpy()
    return nats_M, greedy_M


def chunk_of(model: Any) -> int:
    """How many tokens a forward should read on the model's device."""
    return CHUNK.get(model.device.type, CHUNK["cuda"])


def cache_name(model: Any) -> str:
    """What a model calls its cache: transformers before 5.24, and code written for it, `past_key_values`."""
    forwards = (vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))
    return "cache" if any("cache" in inspect.signature(each).parameters for each in forwards) else "past_key_values"


def fits(model: Any) -> int:
    """How long a path may be for the model to see all of it in a row packed by us; 0 where it cannot be packed."""
    if getattr(model.config, "_attn_implementation", None) not in {"sdpa", "eager"}:
        return 0
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return 0
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # These stretch every token's position by the longest row.
    if any(each.get("rope_type") in {"dynamic", "longrope"} for each in (rope, *_dicts(rope))):
        return 0
    layers = DynamicCache(config=model.config).layers
    if not all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in layers):
        return 0
    windows = [layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    longest = min(windows, default=sys.maxsize)
    return longest if _agrees(model) else 0


def _dicts(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for value in values.values() if isinstance(value, dict)]


@torch.inference_mode()
def _agrees(model: Any) -> bool:
    """Whether the model, packed, computes what it does alone: code of its own may take the mask for something else."""
    stem, size = np.arange(3, 12), min(model.config.get_text_config().vocab_size, 1000)
    rows = [np.concatenate([stem, end]) % size for end in (np.arange(5), np.arange(20, 31), np.arange(20, 24))]
    trie = plant(rows, [len(row) - 1 for row in rows])
    leaves = np.concatenate(trie.paths)
    order = np.argsort(leaves)
    try:
        held = Held(model)
        read_nodes(held, trie, 0, 5, np.array([4]))
        packed_WV = read_nodes(held, trie, 5, len(trie), leaves[order]).float()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    plain = [model(torch.from_numpy(tokens[None]).to(model.device)).logits[0] for tokens in [*rows, trie.tokens_N]]
    alone_WV = torch.stack([plain[i][-1] for i in order]).float()
    blind_WV = plain[-1][torch.from_numpy(leaves[order])].float()  # where every token saw all before it
    # In bfloat16 rounding alone moved the logits of real models by up to a fifth of that.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.4
    return bool((packed_WV - alone_WV).norm() <= tolerance * (blind_WV - alone_WV).norm())
