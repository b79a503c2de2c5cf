"""bitsandbytes' layers: weights of 8 or 4 bits, on the processor and on CUDA."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from service.engines.base import EngineError
from service.engines.local.linear import Linear

Bits = Literal["bnb-int8", "bnb-nf4"]
BLOCK = 64
"""Weights that share a scale in NF4."""


class BitsAndBytes(Linear):
    """x W^T + bias by bitsandbytes: LLM.int8() (arXiv 2208.07339), or NF4 (arXiv 2305.14314)."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, kind: Bits) -> None:
        """Raises EngineError where the package is not there."""
        try:
            from bitsandbytes import nn
        except ImportError as exc:
            raise EngineError(f"{kind} needs bitsandbytes: pip install 'modelglue[bits]'") from exc
        (outputs, inputs), biased = weight_NK.shape, bias_N is not None
        layer: Any
        if kind == "bnb-int8":
            layer = nn.Linear8bitLt(inputs, outputs, bias=biased, has_fp16_weights=False)
            layer.weight = nn.Int8Params(weight_NK, requires_grad=False, has_fp16_weights=False)
        elif inputs % BLOCK:
            raise EngineError(f"a weight with {inputs} inputs cannot be {kind}: it takes multiples of {BLOCK}")
        else:
            layer = nn.Linear4bit(inputs, outputs, biased, compute_dtype=weight_NK.dtype, quant_type="nf4")
            layer.weight = nn.Params4bit(weight_NK, requires_grad=False, quant_type="nf4")
        if bias_N is not None:
            layer.bias = torch.nn.Parameter(bias_N, requires_grad=False)
        self._layer = layer.to(weight_NK.device)

    def __call__(self, x_TK: Tensor) -> Tensor:
        out_TN: Tensor = self._layer(x_TK)
        return out_TN.to(x_TK.dtype)

    def rows(self, ids_T: Tensor) -> Tensor:
        raise NotImplementedError("heads and embeddings keep their dtype")
