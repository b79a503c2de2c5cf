"""Any other causal language model: transformers' modules, whose attention reads and writes our paged memory.

All tokens of a step are one long row for the modules; what belongs together is told by the step. Array names: T tokens,
G heads, D their width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, PretrainedConfig

from composed import ComposedCache, ComposedConfig
from service.engines.base import EngineError
from service.engines.local import forward, ops
from service.engines.local.forward import Segment, Step, attend_span, attend_step
from service.engines.local.ops import PAGE, Shape

ATTENTION = "modelglue_paged"
NEUTRAL = ("cache_position", "output_router_logits", "position_ids", "use_cache")
"""What modules hand on to attention that changes nothing in it."""
TRIED = 40
"""Of how many tokens a text is by which a model is tried; so many more than a layer's window, if that is narrow."""
NARROW = 128
"""Tokens of a window beyond which a model is tried. Of a wider one it is only seen whether it is the config's."""
NEAR = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.2}
"""How far logits may be from others of the same model, in parts of their spread.

In bf16 rounding makes a twentieth in SmolLM2-135M and a tenth in 48 layers of mixed experts; one layer's attention left
out makes a fifth to a third, and a window that is not the model's a third to three times the spread.
"""
PICKING = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
"""What configs call how many experts a token is sent to."""
PICKED = 2.5
"""How many times as far logits may be off then: rounding may send a token to others."""


class Hosted:
    """A model of transformers that was loaded with `attn_implementation=ATTENTION`."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.shape = shape_of(config)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0]) if _has_head(model) else config.vocab_size
        self._model = model
        self._windows, self._longest = windows_of(config), longest_of(config)
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

    @torch.inference_mode()
    def check(self, tokens: Sequence[int], dtype: torch.dtype) -> None:
        """A text's beginning and end, cut and put together, against the modules' own attention over each as a whole.

        Raises EngineError where logits differ by more than rounding, or modules ask for what our attention has not.
        """
        narrow = [window for window in self._windows if window is not None and window <= NARROW]
        length = min(TRIED + max(narrow, default=0), self._longest)
        texts = [tokens[-length * 2 // 3 :], tokens[:length]]
        routes = [self.route(text) for text in texts]
        expected = [self._own(text, route) for text, route in zip(texts, routes, strict=True)]
        pages = range(0, -(-length // PAGE) * self.shape.page, self.shape.page)
        tables = [list(pages), [pages.stop + offset for offset in pages]]
        # What is read and was never written is no number, nor is anything that comes of it.
        memory = torch.full((2 * pages.stop,), torch.nan, dtype=dtype, device=self._model.device)
        cuts = [(0, count // 2, count - 1, count) for count in map(len, texts)]
        for part in range(3):
            spans = [slice(*each[part : part + 2]) for each in cuts]
            segments = [
                Segment(text[span], span.start, table, span.stop - span.start, route)
                for text, span, table, route in zip(texts, spans, tables, routes, strict=True)
            ]
            wanted_RV = torch.cat([logits_TV[span] for logits_TV, span in zip(expected, spans, strict=True)])
            off = _distance(self.forward(segments, memory), wanted_RV)
            if not off <= near(self._model.config, dtype):
                raise EngineError(f"its logits are off by {off:.2g} of their spread")

    def _own(self, text: Sequence[int], route: Tensor | None) -> Tensor:
        """The logits [T, V] of a whole text by the modules' own attention."""
        options = {} if route is None else {"routes": route}
        with _eager(self._model):
            output = self._model(torch.tensor([text], device=self._model.device), use_cache=False, **options)
        logits_TV: Tensor = output.logits[0]
        return logits_TV

    def _run(self, segments: Sequence[Segment], memory: Tensor) -> Tensor:
        step = Step(segments, self.shape.width, memory.device)
        cache: Any = _Pages(self.shape, self._windows, self._longest, step, memory)
        if self._composed:
            cache = _ComposedPages(self._model.config, cache, segments[0].route)
        inputs = {"input_ids": step.ids_T[None], "position_ids": step.positions_T[None]}
        with _running(cache):
            output = self._model(**inputs, **{self._cache_name: cache}, use_cache=True, logits_to_keep=step.rows_R)
        logits_RV: Tensor = output.logits[0]
        return logits_RV


def near(config: Any, dtype: torch.dtype) -> float:
    """How far a model's logits in this dtype may be off for their rounding."""
    text = config.get_text_config(decoder=True)
    picks = dtype != torch.float32 and any(getattr(text, name, None) for name in PICKING)
    return NEAR[dtype] * (PICKED if picks else 1)


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


def windows_of(config: Any) -> list[int | None]:
    """How many tokens each layer in the memory sees, None for all. Raises EngineError for another kind of layer."""
    if isinstance(config, ComposedConfig):
        trunk, slots = config.trunk_layers, config.slots
        inner = enumerate(windows_of(config.inner))
        return [window for layer, window in inner for _ in range(1 if layer < trunk else slots)]
    return forward.windows_of(config.get_text_config(decoder=True))


def longest_of(config: Any) -> int:
    """The most tokens of a text."""
    return int(config.get_text_config(decoder=True).max_position_embeddings)


def admit(model: type[Any], config: Any) -> None:
    """Raises EngineError where a class of transformers, or what a config makes of it, cannot run over the memory."""
    exchangeable = getattr(model, "_supports_attention_backend", False) or model.__name__ == "ComposedForCausalLM"
    if not exchangeable or "position_ids" not in inspect.signature(model.forward).parameters:
        raise EngineError("its class does not provide for it")
    if len(windows_of(config)) != shape_of(config).layers:
        raise EngineError("its config tells of other layers than it has")


class _Pages(Cache):  # type: ignore[misc]  # transformers is untyped here
    """The memory as the cache that attention modules write to, just before they ask for attention."""

    def __init__(self, shape: Shape, windows: Sequence[int | None], longest: int, step: Step, memory: Tensor) -> None:
        super().__init__(layers=[])
        self.shape, self.windows, self.longest, self.step, self.memory = shape, windows, longest, step, memory
        self.last: tuple[int, Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values [1, G, T, D] of one layer."""
        shape, device = self.shape, self.memory.device
        if tuple(keys.shape[1::2]) != (shape.kv_heads, shape.width) or keys.shape != values.shape:
            raise EngineError(f"layer {layer_idx} has keys of shape {tuple(keys.shape)}, its config says otherwise")
        if layer_idx >= shape.layers:
            raise EngineError(f"it keeps layer {layer_idx}, its config says that there are {shape.layers}")
        self.last = layer_idx, keys, values
        states_TGD = torch.cat((keys[0], values[0])).transpose(0, 1)
        first = layer_idx * 2 * shape.kv_heads
        lanes_G = torch.arange(first, first + 2 * shape.kv_heads, device=device) * ops.PAGE * shape.width
        lanes_GD = lanes_G[:, None] + torch.arange(shape.width, device=device)
        self.memory[self.step.slots_T[:, None, None] + lanes_GD] = states_TGD
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """None that a module would have to count on: positions are given."""
        return 0

    def attend(self, q_THD: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Tensor:
        """Attention [T, H, D] over each token's own sequence.

        Raises EngineError where it would be to something else than the memory has, or than the config says.
        """
        if self.last is None or key is not self.last[1] or value is not self.last[2]:
            raise EngineError("it attends to other keys and values than those that a layer has just kept")
        layer, self.last = self.last[0], None
        said, asked = self.windows[layer], how["window"]
        if said != asked and min(said or self.longest, asked or self.longest) < self.longest:
            raise EngineError(f"layer {layer} sees {asked or 'all'} tokens, its config says {said or 'all'}")
        q_TX = q_THD.reshape(len(q_THD), -1)
        return attend_step(q_TX, self.step, self.memory, layer, self.shape, **how).view(q_THD.shape)


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
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [1, H, T, D] to [1, T, H, D]. Raises EngineError for what it has not."""
    asked = {name for name, each in others.items() if name not in NEUTRAL and (torch.is_tensor(each) or each)}
    asked |= {"attention_mask"} if attention_mask is not None else set()
    asked |= {"is_causal"} if is_causal is False else set()
    if asked:
        raise EngineError(f"{type(module).__name__} asks for attention with {', '.join(sorted(asked))}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how: dict[str, Any] = {"scale": scale, "window": sliding_window, "softcap": softcap, "sinks_H": s_aux}
    q_THD, cache = query[0].transpose(0, 1), _CACHE.get()
    if cache is not None:
        return cache.attend(q_THD, key, value, how)[None], None
    return attend_span(q_THD, key[0], value[0], **how)[None], None


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The modules compute attention themselves."""
    found = [getattr(part, "config", None) for part in model.modules()]
    configs = list({id(config): config for config in found if isinstance(config, PretrainedConfig)}.values())
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def _distance(found_RV: Tensor, expected_RV: Tensor) -> float:
    """How far logits are from those that are expected, in parts of their spread; the mean of the rows."""
    off_R = (found_RV.float() - expected_RV.float()).square().mean(-1).sqrt()
    return float((off_R / expected_RV.float().std(-1)).mean())


def _has_head(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and hasattr(head, "weight")


def _cache_name(model: Any) -> str:
    """What a model calls its cache: transformers before 5.24, and code written for it, `past_key_values`."""
    forwards: Iterator[Any] = (vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))
    return "cache" if any("cache" in inspect.signature(each).parameters for each in forwards) else "past_key_values"


AttentionInterface.register(ATTENTION, _attention)
