"""The rows that one expert decodes together, in one cache.

Array names: B rows, S positions, V vocabulary; the cache's keys and values are [B, heads, S, width].
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from composed import ComposedCache, ComposedConfig


def batchable(model: Any) -> bool:
    """Whether rows of different lengths may share a cache: full attention, and no position that asks its neighbours."""
    full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    rope = getattr(model.config, "rope_parameters", None) or {}
    # These stretch every row's positions by the longest row of the batch.
    stretched = rope.get("rope_type") in {"dynamic", "longrope"}
    return full and not stretched and "position_ids" in inspect.signature(model.forward).parameters


class Batch:
    """Rows padded on the left to the longest; without padding it runs exactly as transformers' generate does."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache_name = _cache_name(model)
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self._cache: Any = None
        self._lengths_B: list[int] = []

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> tuple[Tensor, Any]:
        """Run a prompt alone: the logits after it [V], and its cache, for `join`."""
        config = self._model.config
        cache = ComposedCache(config) if isinstance(config, ComposedConfig) else DynamicCache(config=config)
        prompt = torch.tensor([tokens], device=self._model.device)
        output = self._model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
        return output.logits[0, -1], cache

    @torch.inference_mode()
    def join(self, cache: Any, length: int) -> None:
        """Add a prompt of `length` tokens as the last row. Needs a `batchable` model, unless the batch is empty."""
        self._lengths_B.append(length)
        if len(self._lengths_B) == 1:
            self._cache = cache
            return
        longest = max(self._lengths_B)
        for ours, new in zip(self._cache.layers, cache.layers, strict=True):
            ours.keys = torch.cat([_padded(ours.keys, longest), _padded(new.keys, longest)])
            ours.values = torch.cat([_padded(ours.values, longest), _padded(new.values, longest)])
        if isinstance(cache, ComposedCache) and cache.routes is not None:
            self._cache.routes = torch.cat([self._cache.routes, cache.routes])

    @torch.inference_mode()
    def step(self, tokens_B: Sequence[int]) -> Tensor:
        """Give every row its next token; the logits after them [B, V]."""
        device = self._model.device
        options: dict[str, Any] = {self._cache_name: self._cache, "use_cache": True}
        longest = max(self._lengths_B)
        if min(self._lengths_B) < longest:
            positions_B1 = torch.tensor(self._lengths_B, device=device)[:, None]
            mask_BS = torch.arange(longest + 1, device=device) >= longest - positions_B1
            options |= {"attention_mask": mask_BS.long(), "position_ids": positions_B1}
        tokens_B1 = torch.tensor(tokens_B, device=device)[:, None]
        output = self._model(input_ids=tokens_B1, **options)
        self._lengths_B = [length + 1 for length in self._lengths_B]
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the padding that only the others needed."""
        if len(rows) == len(self._lengths_B):
            return
        if not rows:
            self.clear()
            return
        lengths = [self._lengths_B[row] for row in rows]
        unused = max(self._lengths_B) - max(lengths)
        self._cache.batch_select_indices(torch.tensor(rows, device=self._model.device))
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
        self._lengths_B = lengths


def _cache_name(model: Any) -> str:
    """What a model calls its cache: transformers before 5.24, and code written for it, `past_key_values`."""
    forwards = (vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))
    return "cache" if any("cache" in inspect.signature(each).parameters for each in forwards) else "past_key_values"


def _padded(states: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[2], 0))
