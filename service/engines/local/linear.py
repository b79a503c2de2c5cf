"""Linear layers of a decoder, over weights that are held once, in their own dtype or in fewer bits.

T tokens, K inputs, N outputs, G groups of GROUP inputs that share a scale, P panels of PANEL outputs. Where kernels.c
computes (ops.py says where), weights lie in panels, and a row's result has the same bits whatever the other rows, their
number and the threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from service.engines.base import EngineError
from service.engines.local.ops import library

Kind = Literal["int8", "int4"]
"""int8: a scale for each output. int4: a scale and a base for each GROUP inputs of an output, 5 bits a weight."""
GROUP = 32
PANEL = 32

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a group's range that int4 tries to spread its levels over."""


class Linear(ABC):
    """x W^T + bias, summed in fp32 and rounded once."""

    @staticmethod
    def of(weight_NK: Tensor, bias_N: Tensor | None = None, kind: Kind | None = None) -> Linear:
        """The layer of a weight, which it may keep; None is the weight's own dtype. Raises EngineError."""
        # Panels lie in pairs of inputs.
        panels = weight_NK.device.type == "cpu" and library() is not None and weight_NK.shape[1] % 2 == 0
        if kind is not None:
            levels = _LEVELS[kind](weight_NK)
            return Panels(_panels(levels), weight_NK.shape, bias_N) if panels else Quantised(levels, bias_N)
        if panels and weight_NK.dtype in _CODES:
            return Panels(_panels(Levels(weight_NK)), weight_NK.shape, bias_N)
        return Plain(weight_NK, bias_N)

    @abstractmethod
    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, N] in the dtype of x: the weight's, or any where that is quantised."""

    @abstractmethod
    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the weight, [T, K], bf16 of a quantised one: embeddings, where the head's weight is also theirs."""


@dataclass(frozen=True, slots=True)
class Levels:
    """A weight as levels * scales + bases.

    levels: the weight itself; int8 with scales fp32 [N]; uint8 0 to 15 with scales and bases bf16 [N, G].
    """

    levels_NK: Tensor
    scales: Tensor | None = None
    bases_NG: Tensor | None = None

    def restored(self) -> Tensor:
        """The weight; bf16 where it was quantised."""
        if self.scales is None:
            return self.levels_NK
        if self.bases_NG is None:
            return (self.levels_NK * self.scales[:, None]).bfloat16()
        levels_NGI = self.levels_NK.view(len(self.levels_NK), -1, GROUP).float()
        restored_NGI = levels_NGI * self.scales[:, :, None] + self.bases_NG[:, :, None]
        return restored_NGI.flatten(1).bfloat16()

    def of(self, ids_T: Tensor) -> Levels:
        """Of some rows."""
        parts = (None if part is None else part[ids_T] for part in (self.scales, self.bases_NG))
        return Levels(self.levels_NK[ids_T], *parts)


def _int8(weight_NK: Tensor) -> Levels:
    wide_NK = weight_NK.float()
    scales_N = wide_NK.abs().amax(1).clamp(min=1e-30) / 127
    return Levels((wide_NK / scales_N[:, None]).round().to(torch.int8), scales_N)


def _int4(weight_NK: Tensor) -> Levels:
    """Of the ranges tried, each group has the one of least squared error."""
    if weight_NK.shape[1] % GROUP:
        raise EngineError(f"a weight with {weight_NK.shape[1]} inputs cannot be int4: it takes multiples of {GROUP}")
    wide_NGI = weight_NK.float().reshape(len(weight_NK), -1, GROUP)
    low_NG, high_NG = wide_NGI.aminmax(dim=2)
    middle_NG, range_NG = (low_NG + high_NG) / 2, (high_NG - low_NG).clamp(min=1e-30)
    least_NG = torch.full_like(low_NG, torch.inf)
    levels_NGI = torch.empty_like(wide_NGI, dtype=torch.uint8)
    scales_NG, bases_NG = (torch.empty_like(low_NG, dtype=torch.bfloat16) for _ in range(2))
    for part in _SHRINK:
        scale_NG, base_NG = (range_NG * part / 15).bfloat16(), (middle_NG - range_NG * part / 2).bfloat16()
        tried_NGI = ((wide_NGI - base_NG[:, :, None]) / scale_NG[:, :, None]).round_().clamp_(0, 15)
        loss_NG = (tried_NGI * scale_NG[:, :, None] + base_NG[:, :, None] - wide_NGI).pow_(2).sum(2)
        better_NG = loss_NG < least_NG
        least_NG = torch.minimum(loss_NG, least_NG)
        levels_NGI[better_NG] = tried_NGI[better_NG].to(torch.uint8)
        scales_NG[better_NG], bases_NG[better_NG] = scale_NG[better_NG], base_NG[better_NG]
    return Levels(levels_NGI.flatten(1), scales_NG, bases_NG)


_LEVELS = {"int8": _int8, "int4": _int4}


class Plain(Linear):
    """As torch computes it."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self._weight_NK, self._bias_N = weight_NK, bias_N

    def __call__(self, x_TK: Tensor) -> Tensor:
        return F.linear(x_TK, self._weight_NK, self._bias_N)

    def rows(self, ids_T: Tensor) -> Tensor:
        return self._weight_NK[ids_T]


class Quantised(Linear):
    """Restored before each use: less memory, not less time."""

    def __init__(self, levels: Levels, bias_N: Tensor | None) -> None:
        self._levels, self._bias_N = levels, bias_N

    def __call__(self, x_TK: Tensor) -> Tensor:
        return F.linear(x_TK, self._levels.restored().to(x_TK.dtype), self._bias_N)

    def rows(self, ids_T: Tensor) -> Tensor:
        return self._levels.of(ids_T).restored()


@dataclass(frozen=True, slots=True)
class Laid:
    """A weight as `product` of kernels.c reads it; groups are pairs of scale and base."""

    panels: Tensor
    scales_N: Tensor | None
    groups_PGO: Tensor | None


def _panels(levels: Levels) -> Laid:
    """fp32 [P, K, PANEL]; bf16 and int8 [P, K / 2, PANEL, 2]; int4 as kernels.c says."""
    padded_NK = _padded(levels.levels_NK)
    count = len(padded_NK) // PANEL
    if padded_NK.dtype == torch.float32:
        return Laid(padded_NK.view(count, PANEL, -1).transpose(1, 2).contiguous(), None, None)
    if levels.scales is None or levels.bases_NG is None:
        pairs = padded_NK.view(count, PANEL, -1, 2)
        return Laid(pairs.transpose(1, 2).contiguous(), levels.scales, None)
    halves = padded_NK.view(count, 2, 2, 8, -1, 2).permute(0, 4, 1, 3, 5, 2).contiguous()
    groups = torch.stack((_padded(levels.scales), _padded(levels.bases_NG)), dim=2).view(count, PANEL, -1, 2)
    return Laid(halves[..., 0] | halves[..., 1] << 4, None, groups.transpose(1, 2).contiguous())


def _padded(rows: Tensor) -> Tensor:
    missing = -len(rows) % PANEL
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()


class Panels(Linear):
    """As kernels.c computes it."""

    def __init__(self, laid: Laid, shape: torch.Size, bias_N: Tensor | None) -> None:
        self._laid = laid
        self._outputs, self._inputs = shape
        self._bias_N = None if bias_N is None else bias_N.float().contiguous()
        self._code = _CODES[laid.panels.dtype]
        self._dtype = torch.float32 if self._code == 0 else torch.bfloat16
        parts = (laid.panels, laid.groups_PGO, laid.scales_N, self._bias_N)
        self._places = tuple(None if part is None else part.data_ptr() for part in parts)
        self._product = library().product

    def __call__(self, x_TK: Tensor) -> Tensor:
        if x_TK.dtype != self._dtype:
            assert self._code > 1, "x has another dtype than the weight"
            return self(x_TK.to(self._dtype)).to(x_TK.dtype)
        count, width = x_TK.shape
        assert width == self._inputs
        assert x_TK.is_contiguous()
        out_TN = x_TK.new_empty(count, self._outputs)
        self._product(self._code, x_TK.data_ptr(), *self._places, out_TN.data_ptr(), count, self._inputs, self._outputs)
        return out_TN

    def rows(self, ids_T: Tensor) -> Tensor:
        laid, panel_T, place_T = self._laid, ids_T // PANEL, ids_T % PANEL
        if laid.panels.dtype == torch.float32:
            return laid.panels[panel_T, :, place_T]
        if laid.groups_PGO is None:
            scales_T = None if laid.scales_N is None else laid.scales_N[ids_T]
            return Levels(laid.panels[panel_T, :, place_T].flatten(1), scales_T).restored()
        bytes_TK = laid.panels[panel_T, :, place_T // 16, place_T % 8].flatten(1)
        levels_TK = (bytes_TK >> (place_T // 8 % 2 * 4)[:, None].to(torch.uint8)) & 15
        scales_TG, bases_TG = laid.groups_PGO[panel_T, :, place_T].unbind(2)
        return Levels(levels_TK, scales_TG, bases_TG).restored()
