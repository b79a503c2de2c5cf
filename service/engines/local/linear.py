"""Linear layers of a decoder over weights that are laid out once.

T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Kind = Literal["bf16", "fp32", "int8", "int4"]


class Linear:
    """x W^T + bias, rounded once."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self._weight_NK, self._bias_N = weight_NK, bias_N

    @staticmethod
    def of(weight_NK: Tensor, bias_N: Tensor | None = None, kind: Kind | None = None) -> Linear:
        """The layer of a weight, in its own dtype or quantised; the weight is not kept."""
        return Linear(weight_NK, bias_N)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, N] in the dtype of x, which is the weight's."""
        return F.linear(x_TK, self._weight_NK, self._bias_N)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, [..., K]: the embeddings of tokens where the head's weight is also theirs."""
        return F.embedding(ids, self._weight_NK)
