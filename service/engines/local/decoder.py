"""The Llama family (Llama, CodeLlama, Mistral, Qwen2, Qwen3) by our own forward: fused projections, paged attention.

Array names: T tokens, R rows, H hidden, X fused projections, D width of a head, W positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from service.engines.local import ops
from service.engines.local.forward import Segment, Step, attend_step, windows_of
from service.engines.local.graphs import Graphs, Inputs
from service.engines.local.linear import Linear
from service.engines.local.ops import Shape
from service.engines.local.weights import Weights

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
Attend = Callable[[int, int | None, Tensor], Tensor]
"""Layer, its window, and its fused projections [T, X] after `place`: what the heads see [T, heads * width]."""
STRETCHED = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles depend on the longest sequence around."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one; window: how many tokens it sees, None for all."""

    before_H: Tensor
    qkv: Linear
    out: Linear
    after_H: Tensor
    gate_up: Linear
    down: Linear
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    window: int | None


def is_ours(config: Any) -> bool:
    """Whether a model with this config is computed here."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") not in STRETCHED
        and getattr(config, "quantization_config", None) is None
    )


def shape_of(config: Any) -> Shape:
    """What a token of such a model leaves in the memory."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, width)


class Decoder:
    """A model of the family; its logits are those of transformers' class on the same weights."""

    portable = True

    def __init__(self, config: Any, weights: Weights) -> None:
        """Raises EngineError where tensors lack or have another shape than the config says."""
        self.shape, self.vocabulary = shape_of(config), config.vocab_size
        self._eps, self._scale = config.rms_norm_eps, self.shape.width**-0.5
        self._layers = [_layer(config, self.shape, number, weights) for number in range(config.num_hidden_layers)]
        self._final_H = weights.tensor("model.norm.weight", config.hidden_size)
        tied = config.tie_word_embeddings or not weights.has("lm_head.weight")
        head = "model.embed_tokens" if tied else "lm_head"
        # Of all layers, fewer bits cost the most here.
        self._head = weights.linear([head], [config.vocab_size], config.hidden_size, whole=True)
        sizes = (config.vocab_size, config.hidden_size)
        self._embeddings_VH = None if tied else weights.tensor("model.embed_tokens.weight", *sizes)
        rotary = LlamaRotaryEmbedding(config=config).to(self._final_H.device)
        positions_1W = torch.arange(config.max_position_embeddings, device=self._final_H.device)[None]
        self._cos_WD, self._sin_WD = (angles[0] for angles in rotary(self._final_H[None], positions_1W))

        self._recorded: tuple[int, Graphs] | None = None

    def route(self, tokens: Sequence[int]) -> None:
        """Nothing: every prompt takes the same way."""

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], memory: Tensor) -> Tensor:
        """The logits [R, V] of the segments' wanted rows, in order."""
        step = Step(segments, self.shape.width, memory.device)
        if memory.device.type == "cuda" and step.is_plain:
            return self._graphs(memory).run(step)

        def attend(number: int, window: int | None, qkv_TX: Tensor) -> Tensor:
            return attend_step(qkv_TX, step, memory, number, self.shape, scale=self._scale, window=window)

        hidden_TH, delta_TH = self._layers_over(step.ids_T, step.positions_T, step.slots_T, memory, attend)
        rows_R = step.rows_R
        return self._head(ops.norm(hidden_TH[rows_R], self._final_H, self._eps, delta_TH[rows_R]))

    def compute(self, memory: Tensor, inputs: Inputs) -> Tensor:
        """The logits [B, V] of a step of one token a row: work for the device alone, so that it can be recorded."""
        ids_B, positions_B, slots_B, tables_BP, lengths_B = inputs

        def attend(number: int, window: int | None, qkv_BX: Tensor) -> Tensor:
            return ops.attend(qkv_BX, memory, tables_BP, lengths_B, number, self.shape, self._scale, window)

        hidden_BH, delta_BH = self._layers_over(ids_B, positions_B, slots_B, memory, attend)
        return self._head(ops.norm(hidden_BH, self._final_H, self._eps, delta_BH))

    def _layers_over(
        self, ids_T: Tensor, positions_T: Tensor, slots_T: Tensor, memory: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """The hidden states after all layers, and what is still to be added to them [T, H]."""
        hidden_TH = self._embed(ids_T)
        cos_TD, sin_TD = self._cos_WD[positions_T], self._sin_WD[positions_T]
        delta_TH: Tensor | None = None
        for number, layer in enumerate(self._layers):
            qkv_TX = layer.qkv(ops.norm(hidden_TH, layer.before_H, self._eps, delta_TH))
            norms = (layer.q_norm_D, layer.k_norm_D, self._eps)
            ops.place(qkv_TX, cos_TD, sin_TD, memory, slots_T, number, self.shape, *norms)
            delta_TH = layer.out(attend(number, layer.window, qkv_TX))
            delta_TH = layer.down(ops.silu_mul(layer.gate_up(ops.norm(hidden_TH, layer.after_H, self._eps, delta_TH))))
        assert delta_TH is not None
        return hidden_TH, delta_TH

    def _graphs(self, memory: Tensor) -> Graphs:
        if self._recorded is None or self._recorded[0] != memory.data_ptr():
            spare = len(memory) - self.shape.page
            self._recorded = (memory.data_ptr(), Graphs(partial(self.compute, memory), spare))
        return self._recorded[1]

    def _embed(self, ids_T: Tensor) -> Tensor:
        return self._head.rows(ids_T) if self._embeddings_VH is None else self._embeddings_VH[ids_T]


def _layer(config: Any, shape: Shape, number: int, weights: Weights) -> Layer:
    inside, hidden, wide = f"model.layers.{number}", config.hidden_size, config.intermediate_size
    own, kept = shape.heads * shape.width, shape.kv_heads * shape.width
    attention = f"{inside}.self_attn"

    def head_norm(name: str) -> Tensor | None:
        return weights.tensor(f"{attention}.{name}_norm.weight", shape.width) if config.model_type == "qwen3" else None

    return Layer(
        weights.tensor(f"{inside}.input_layernorm.weight", hidden),
        weights.linear([f"{attention}.{name}_proj" for name in "qkv"], [own, kept, kept], hidden),
        weights.linear([f"{attention}.o_proj"], [hidden], own),
        weights.tensor(f"{inside}.post_attention_layernorm.weight", hidden),
        weights.linear([f"{inside}.mlp.gate_proj", f"{inside}.mlp.up_proj"], [wide, wide], hidden),
        weights.linear([f"{inside}.mlp.down_proj"], [hidden], wide),
        head_norm("q"),
        head_norm("k"),
        windows_of(config)[number],
    )
