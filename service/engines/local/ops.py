"""The decoder's arithmetic beside its linear layers: norms, rotary embedding, attention over paged memory.

T tokens, B rows of a decode step, H hidden, D head width, X all heads of q, k and v, P pages, S tokens of a context.
The key-value memory is one flat tensor. A page of it holds PAGE tokens of all layers, [layers, 2, kv heads, PAGE, D];
it is named by the offset of its first element. Values are those of transformers' Llama modules, with their roundings.

On the processor, in bf16 and fp32, kernels.c computes, with threads of its own. Torch does elsewhere, without a
compiler at install, and with MODELGLUE_KERNELS=torch. What C computes of a row depends neither on the other rows nor on
the number of threads.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib import machinery
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = 16
"""Tokens a page."""
WIDEST = 256
"""The most elements that a head has in the C kernels."""

_WIDE = {torch.bfloat16: 0, torch.float32: 1}
_TYPES = {"i": ctypes.c_int, "n": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
_SHORT = {"norm": "ipppfpnn", "place": "ipppppnnnnnppf", "silu_mul": "ippnn"}
_LONG = {"gather": "ippnnnnpp", "attend": "ipnppppnnnnnnnf", "product": "ippppppnnn", "set_threads": "i"}
"""Arguments of the C functions. Short ones keep the interpreter's lock, which costs more to get back than they take;
they never wait for a job of another thread's."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a decoder's attention looks like; width is a head's."""

    layers: int
    heads: int
    kv_heads: int
    width: int

    @property
    def page(self) -> int:
        """Elements a page."""
        return self.layers * 2 * self.kv_heads * PAGE * self.width


@cache
def library() -> Any:
    """The C functions, or None."""
    if os.environ.get("MODELGLUE_KERNELS") == "torch":
        return None
    paths = (Path(__file__).with_name(f"_kernels{suffix}") for suffix in machinery.EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    functions = ctypes.PyDLL(str(path))
    for name, codes in _SHORT.items():
        getattr(functions, name).argtypes = [_TYPES[code] for code in codes]
    unlocked = ctypes.CDLL(str(path))
    for name, codes in _LONG.items():
        function = getattr(unlocked, name)
        function.argtypes = [_TYPES[code] for code in codes]
        setattr(functions, name, function)
    return functions


def set_threads(count: int) -> None:
    """How many threads the C functions use, the caller's among them; one until then."""
    if functions := library():
        functions.set_threads(count)


def norm(hidden_TH: Tensor, weight_H: Tensor, eps: float, delta_TH: Tensor | None = None) -> Tensor:
    """RMSNorm in fp32, rounded, times the weight; a delta is first added to hidden, in place."""
    if functions := _library(hidden_TH):
        rows, width = hidden_TH.shape
        assert _alike(hidden_TH, weight_H, delta_TH)
        out_TH = torch.empty_like(hidden_TH)
        wide = _WIDE[hidden_TH.dtype]
        functions.norm(wide, _at(hidden_TH), _at(delta_TH), _at(weight_H), eps, _at(out_TH), rows, width)
        return out_TH
    if delta_TH is not None:
        hidden_TH += delta_TH
    return _rms(hidden_TH, weight_H, eps)


def place(
    qkv_TX: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    memory: Tensor,
    slots_T: Tensor,
    layer: int,
    shape: Shape,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Turn q and k by their positions, in place, and write k and v into the memory.

    cos and sin are in the dtype of qkv. A slot is the offset of the token's page plus its place in it, 0 to PAGE - 1,
    times the width. With norms, q and k go through them first, head by head.
    """
    if functions := _library(qkv_TX):
        assert _alike(qkv_TX, cos_TD, sin_TD, memory, q_norm_D, k_norm_D)
        assert slots_T.dtype == torch.int64
        sizes = (len(qkv_TX), shape.heads, shape.kv_heads, shape.width, layer)
        places = (_at(qkv_TX), _at(cos_TD), _at(sin_TD), _at(memory), _at(slots_T))
        functions.place(_WIDE[qkv_TX.dtype], *places, *sizes, _at(q_norm_D), _at(k_norm_D), eps)
        return
    heads_TGD = qkv_TX.view(len(qkv_TX), -1, shape.width)
    last = shape.heads + shape.kv_heads
    q_TGD, k_TGD, v_TGD = heads_TGD[:, : shape.heads], heads_TGD[:, shape.heads : last], heads_TGD[:, last:]
    for each_TGD, norm_D in ((q_TGD, q_norm_D), (k_TGD, k_norm_D)):
        normed_TGD = each_TGD if norm_D is None else _rms(each_TGD, norm_D, eps)
        left, right = normed_TGD.chunk(2, dim=-1)
        turned_TGD = torch.cat((-right, left), dim=-1) * sin_TD[:, None]
        each_TGD.copy_(normed_TGD * cos_TD[:, None] + turned_TGD)
    lanes_GD = _starts(layer, shape, memory)[:, None] + torch.arange(shape.width, device=memory.device)
    memory[slots_T[:, None, None] + lanes_GD] = torch.cat((k_TGD, v_TGD), dim=1)


def attends_in_c(memory: Tensor, shape: Shape) -> bool:
    """Whether attention is computed in C, where rows are cheap whosever they are."""
    return shape.width % 32 == 0 and shape.width <= WIDEST and _library(memory) is not None


def attend(
    qkv_BX: Tensor,
    memory: Tensor,
    tables_BP: Tensor,
    lengths_B: Tensor,
    layer: int,
    shape: Shape,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """What each row's new token, whose q begins its row of qkv, sees of its context, [B, heads * D].

    A row's context is the first `lengths` tokens of its pages, the new one among them; the rest of a table may be any
    valid offset. Of a window, the last so many tokens. Rows may be tokens of one sequence, with one expanded table: of
    C, a prompt then has the same bits whole, in parts and token by token, sooner than of torch's attention.
    """
    rows, pages = tables_BP.shape
    if attends_in_c(memory, shape):
        functions = library()
        assert _alike(qkv_BX, memory)
        assert tables_BP.dtype == lengths_B.dtype == torch.int64
        assert tables_BP.stride(1) == lengths_B.stride(0) == 1
        out_BX = qkv_BX.new_empty(rows, shape.heads * shape.width)
        places = (_at(qkv_BX), qkv_BX.shape[1], _at(memory), _at(tables_BP), _at(lengths_B), _at(out_BX))
        sizes = (rows, tables_BP.stride(0), shape.heads, shape.kv_heads, shape.width, layer, window or 0)
        if not functions.attend(_WIDE[qkv_BX.dtype], *places, *sizes, scale):
            raise MemoryError
        return out_BX
    where_BGP = tables_BP[:, None] + _starts(layer, shape, memory)[:, None]
    kv_BGSD = _pages(memory, where_BGP, shape).view(rows, 2, shape.kv_heads, pages * PAGE, shape.width)
    places_S = torch.arange(pages * PAGE, device=memory.device)
    seen_BS = places_S < lengths_B[:, None]
    if window is not None:
        seen_BS &= places_S >= lengths_B[:, None] - window
    # What is not seen may be anything, even NaN, which a mask of scores does not keep out.
    kv_BGSD = kv_BGSD.masked_fill(~seen_BS[:, None, None, :, None], 0)
    q_BGD = qkv_BX[:, : shape.heads * shape.width].view(rows, shape.heads, 1, shape.width)
    seen_BS = seen_BS[:, None, None]
    out = F.scaled_dot_product_attention(
        q_BGD, kv_BGSD[:, 0], kv_BGSD[:, 1], attn_mask=seen_BS, scale=scale, enable_gqa=True
    )
    return out.reshape(rows, -1)


def gather(memory: Tensor, table_P: Tensor, length: int, layer: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """k and v of a context's first `length` tokens, [kv heads, S, D] each, contiguous."""
    if functions := _library(memory):
        assert table_P.dtype == torch.int64
        keys = memory.new_empty(shape.kv_heads, length, shape.width)
        values = torch.empty_like(keys)
        sizes = (length, shape.kv_heads, shape.width, layer)
        functions.gather(_WIDE[memory.dtype], _at(memory), _at(table_P), *sizes, _at(keys), _at(values))
        return keys, values
    where_GP = table_P[: -(-length // PAGE)] + _starts(layer, shape, memory)[:, None]
    kv_GSD = _pages(memory, where_GP, shape).view(2, shape.kv_heads, -1, shape.width)[:, :, :length]
    return kv_GSD[0].contiguous(), kv_GSD[1].contiguous()


def silu_mul(gate_up_TX: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of each row, the first rounded before the second."""
    if functions := _library(gate_up_TX):
        rows, width = gate_up_TX.shape
        assert gate_up_TX.is_contiguous()
        out_TI = gate_up_TX.new_empty(rows, width // 2)
        functions.silu_mul(_WIDE[gate_up_TX.dtype], _at(gate_up_TX), _at(out_TI), rows, width // 2)
        return out_TI
    gate_TI, up_TI = gate_up_TX.chunk(2, dim=-1)
    return F.silu(gate_TI) * up_TI


def _library(tensor: Tensor) -> Any:
    return library() if tensor.device.type == "cpu" and tensor.dtype in _WIDE else None


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _alike(first: Tensor, *others: Tensor | None) -> bool:
    return first.is_contiguous() and all(
        each is None or (each.dtype == first.dtype and each.is_contiguous()) for each in others
    )


def _rms(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = values.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(values.dtype)


def _starts(layer: int, shape: Shape, memory: Tensor) -> Tensor:
    """Where in a page a layer's k heads and then its v heads begin, [2 * kv heads]."""
    count = 2 * shape.kv_heads
    return torch.arange(layer * count, (layer + 1) * count, device=memory.device) * (PAGE * shape.width)


def _pages(memory: Tensor, where: Tensor, shape: Shape) -> Tensor:
    """The PAGE * D elements that begin at each offset."""
    return memory.unfold(0, PAGE * shape.width, 1)[where]
