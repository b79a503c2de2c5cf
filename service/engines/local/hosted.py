"""Any other causal language model: transformers' modules, whose attention reads and writes our paged memory.

All tokens of a step are one long row for the modules; what belongs together is told by the step. Array names: T tokens,
G heads, D their width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache

from composed import ComposedCache, ComposedConfig
from service.engines.base import EngineError
from service.engines.local import ops
from service.engines.local.forward import Segment, Step, attend_span, attend_step
from service.engines.local.ops import Shape

ATTENTION = "modelglue_paged"


class Hosted:
    """A model of transformers that was loaded with `attn_implementation=ATTENTION`."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.shape = shape_of(config)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0]) if _has_head(model) else config.vocab_size
        self._model = model
        self._composed = isinstance(config, ComposedConfig)
        routed = self._composed and config.routing == "sample"
        rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
        # Its angles go by the longest sequence of a step.
        self._alone = rope.get("rope_type") == "longrope"
        self.portable = not routed and not self._alone
        self._cache_name = _cache_name(model)

    def route(self, tokens: Sequence[int]) -> Tensor | None:
        """The experts' weights [1, R, E] where a composed model is routed by prompts."""
        if not self._composed or self._model.config.routing != "sample":
            return None
        with _running(None):
            weights: Tensor = self._model.route(torch.tensor([tokens], device=self._model.device)).weights
        return weights

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], memory: Tensor) -> Tensor:
        """The logits [R, V] of the segments' wanted rows, in order."""
        if self._alone:
            return torch.cat([self._run([segment], memory) for segment in segments])
        if all(segment.route is None for segment in segments):
            return self._run(segments, memory)
        # Only what takes the same way can be one row.
        ways = [segment.route.flatten().tolist() for segment in segments]
        order = sorted(range(len(segments)), key=lambda i: ways[i])
        found: dict[int, Tensor] = {}
        for _, same in groupby(order, key=lambda i: ways[i]):
            own = sorted(same)
            logits_RV = self._run([segments[i] for i in own], memory)
            found |= zip(own, torch.split(logits_RV, [segments[i].rows for i in own]), strict=True)
        return torch.cat([found[i] for i in range(len(segments))])

    def _run(self, segments: Sequence[Segment], memory: Tensor) -> Tensor:
        step = Step(segments, self.shape.width, memory.device)
        cache: Any = _Pages(self._model.config, self.shape, step, memory)
        if self._composed:
            cache = _ComposedPages(self._model.config, cache, segments[0].route)
        inputs = {"input_ids": step.ids_T[None], "position_ids": step.positions_T[None]}
        with _running(cache):
            output = self._model(**inputs, **{self._cache_name: cache}, use_cache=True, logits_to_keep=step.rows_R)
        logits_RV: Tensor = output.logits[0]
        return logits_RV


def shape_of(config: Any) -> Shape:
    """What a token of a model with this config leaves in the memory."""
    if isinstance(config, ComposedConfig):
        inner = shape_of(config.inner)
        routed = config.inner.num_hidden_layers - config.trunk_layers
        return Shape(config.trunk_layers + routed * config.slots, inner.heads, inner.kv_heads, inner.width)
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return Shape(text.num_hidden_layers, heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads)


def is_hosted(model: type[Any]) -> bool:
    """Whether a class of transformers lets its attention be exchanged, and takes positions."""
    exchangeable = bool(getattr(model, "_supports_attention_backend", False) or model.__name__ == "ComposedForCausalLM")
    return exchangeable and "position_ids" in inspect.signature(model.forward).parameters


class _Pages(Cache):  # type: ignore[misc]  # transformers is untyped here
    """The memory as the cache that attention modules write to, just before they ask for attention."""

    def __init__(self, config: Any, shape: Shape, step: Step, memory: Tensor) -> None:
        super().__init__(layers=[])
        self.shape, self.step, self.memory = shape, step, memory
        self.layer = 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values [1, G, T, D] of one layer."""
        shape, device = self.shape, self.memory.device
        if tuple(keys.shape[1::2]) != (shape.kv_heads, shape.width) or keys.shape != values.shape:
            raise EngineError(f"layer {layer_idx} has keys of shape {tuple(keys.shape)}, its config says otherwise")
        self.layer = layer_idx
        states_TGD = torch.cat((keys[0], values[0])).transpose(0, 1)
        first = layer_idx * 2 * shape.kv_heads
        lanes_G = torch.arange(first, first + 2 * shape.kv_heads, device=device) * ops.PAGE * shape.width
        lanes_GD = lanes_G[:, None] + torch.arange(shape.width, device=device)
        self.memory[self.step.slots_T[:, None, None] + lanes_GD] = states_TGD
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """None that a module would have to count on: positions are given."""
        return 0

    def attend(self, q_THD: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """Attention [T, H, D] over each token's own sequence."""
        how: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
        q_TX = q_THD.reshape(len(q_THD), -1)
        return attend_step(q_TX, self.step, self.memory, self.layer, self.shape, **how).view(q_THD.shape)


class _ComposedPages(ComposedCache):
    """The same for a composed model, which wants a cache that knows its routes."""

    def __init__(self, config: ComposedConfig, pages: _Pages, route: Tensor | None) -> None:
        super().__init__(config)
        self.pages, self.routes = pages, route

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As the pages do."""
        return self.pages.update(keys, values, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As the pages do."""
        return 0


_CACHE: ContextVar[Any] = ContextVar("cache")


class _running:
    """The cache that attention finds while the modules run; None: a row is a whole text, of which nothing is kept."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache.pages if isinstance(cache, _ComposedPages) else cache

    def __enter__(self) -> None:
        self._token = _CACHE.set(self._cache)

    def __exit__(self, *_: object) -> None:
        _CACHE.reset(self._token)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [1, H, T, D] to [1, T, H, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_THD, cache = query[0].transpose(0, 1), _CACHE.get()
    if cache is not None:
        return cache.attend(q_THD, scale, sliding_window, softcap)[None], None
    return attend_span(q_THD, key[0], value[0], scale=scale, window=sliding_window, softcap=softcap)[None], None


def _has_head(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and hasattr(head, "weight")


def _cache_name(model: Any) -> str:
    """What a model calls its cache: transformers before 5.24, and code written for it, `past_key_values`."""
    forwards: Iterator[Any] = (vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))
    return "cache" if any("cache" in inspect.signature(each).parameters for each in forwards) else "past_key_values"


AttentionInterface.register(ATTENTION, _attention)
