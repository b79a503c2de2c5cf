"""The code in the mini CrystalChat's folder: a small GPT with tensor names and scales of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class CrystalConfig(PretrainedConfig):
    model_type = "mini_crystal"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    def __init__(
        self,
        vocab_size: int = 192,
        n_embd: int = 16,
        n_layer: int = 2,
        n_head: int = 2,
        n_inner: int = 40,
        n_positions: int = 256,
        rotary_dim: int = 4,
        layer_norm_epsilon: float = 1e-5,
        mup_embeddings_scale: float = 14.6,
        mup_output_alpha: float = 2.22,
        mup_width_scale: float = 0.0625,
        **others: Any,
    ) -> None:
        self.vocab_size, self.n_embd, self.n_layer, self.n_head = vocab_size, n_embd, n_layer, n_head
        self.n_inner, self.n_positions, self.rotary_dim = n_inner, n_positions, rotary_dim
        self.layer_norm_epsilon = layer_norm_epsilon
        self.mup_embeddings_scale, self.mup_output_alpha = mup_embeddings_scale, mup_output_alpha
        self.mup_width_scale = mup_width_scale
        super().__init__(**others)


class Attention(nn.Module):
    def __init__(self, config: CrystalConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.rotary = layer, config.n_head, config.rotary_dim
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (each.view(batch, length, self.heads, -1).transpose(1, 2) for each in self.c_attn(x).chunk(3, dim=-1))
        q, k = self.turned(q, places), self.turned(k, places)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        # By the width of a head, not its root: one of muP's scales.
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / q.shape[-1])
        return self.c_proj(found.transpose(1, 2).reshape(batch, length, width))

    def turned(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Rotary positions on the first dimensions alone."""
        rates = 10000.0 ** (-torch.arange(0, self.rotary, 2, device=x.device) / self.rotary)
        angles = (places[:, None, :, None] * rates).repeat(1, 1, 1, 2)
        first, second = x[..., : self.rotary // 2], x[..., self.rotary // 2 : self.rotary]
        crossed = torch.cat([-second, first], dim=-1)
        turned = x[..., : self.rotary] * angles.cos().to(x.dtype) + crossed * angles.sin().to(x.dtype)
        return torch.cat([turned, x[..., self.rotary :]], dim=-1)


class Mlp(nn.Module):
    def __init__(self, config: CrystalConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_fc2 = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(nn.functional.silu(self.c_fc2(x)) * self.c_fc(x))


class Block(nn.Module):
    def __init__(self, config: CrystalConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = Mlp(config)

    def forward(self, x: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), places, mask, cache)
        return x + self.mlp(self.ln_2(x))


class CrystalTransformer(nn.Module):
    def __init__(self, config: CrystalConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class CrystalForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = CrystalConfig
    base_model_prefix = "transformer"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: CrystalConfig) -> None:
        super().__init__(config)
        self.transformer = CrystalTransformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,  # the cache, to transformers before 5.24
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        seen, length = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        everything = torch.arange(seen + length, device=input_ids.device)
        if position_ids is None:
            position_ids = everything[None, seen:].expand(len(input_ids), -1)
        mask = (everything[None] <= everything[seen:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        # A padded row sees itself: none would be NaN.
        mask = mask | (everything[None] == everything[seen:, None])[None, None]
        x = self.transformer.wte(input_ids) * self.config.mup_embeddings_scale
        for block in self.transformer.h:
            x = block(x, position_ids, mask, cache)
        x = self.transformer.ln_f(x)
        x = x[:, -logits_to_keep:] if logits_to_keep else x
        logits = self.lm_head(x) * (self.config.mup_output_alpha * self.config.mup_width_scale)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
