"""kernels.py's inner loops on torch tensors, for a GPU; the same bits, for every step is an IEEE operation of its own.

Each thread has a stream of its own, so reads, copies and arithmetic of different tensors overlap; bytes travel through
two pinned buffers a thread, one being filled while the other is under way.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from builder.errors import MergeError
from builder.kernels import BINS, BLOCK, LANES
from builder.merge.inputs import Arrays

Tensor = torch.Tensor

_TORCH = {np.dtype(np.uint16): torch.bfloat16, np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32}
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_GOLDEN, _MIX_1, _MIX_2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_LOW = 0xFFFFFFFF


class TorchArrays(Arrays):
    """The inner loops on a torch device. Raises MergeError for one that is not there."""

    xp = torch

    def __init__(self, device: str) -> None:
        try:
            self._device = torch.device(device)
            torch.zeros(1, device=self._device)
        except (RuntimeError, AssertionError) as exc:
            reason = str(exc).splitlines()[0]
            raise MergeError(f"--device {device} cannot be used ({reason}): use --device cpu") from exc
        self._local = threading.local()

    def load(self, stored: NDArray[Any]) -> tuple[Tensor, bool]:
        dtype = _TORCH[stored.dtype]
        values = self._upload(stored).view(dtype).to(torch.float32)
        return values, bool(torch.isfinite(values).all())

    def store(self, values: Tensor, dtype: str) -> tuple[NDArray[Any], bool]:
        stored = values.to(_STORED[dtype])
        finite = bool(torch.isfinite(stored).all())
        return self.host(stored.view(torch.uint16) if dtype == "BF16" else stored), finite

    def host(self, values: Tensor) -> NDArray[Any]:
        found: NDArray[Any] = values.cpu().numpy()
        return found

    def device(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def doubles(self, values: Tensor) -> Tensor:
        return values.double()

    def singles(self, values: Tensor) -> Tensor:
        return values.float()

    def combine(self, arrays: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
        total = arrays[0] * _single(factors[0])
        for array, factor in zip(arrays[1:], factors[1:], strict=True):
            total = total + array * _single(factor)
        return total

    def combine_stored(self, stored: Sequence[NDArray[Any]], factors: Sequence[float]) -> tuple[Tensor, bool]:
        loaded = [self.load(each) for each in stored]
        return self.combine([values for values, _ in loaded], factors), all(finite for _, finite in loaded)

    def dots(self, a: Tensor, b: Tensor) -> NDArray[np.float64]:
        return self.host(_fold(a.double() * b.double()))

    def row_dots(self, a: Tensor, b: Tensor, rows: int) -> NDArray[np.float64]:
        return self.host(_row_sums((a.double() * b.double()).reshape(rows, -1)))

    def magnitudes(self, a: Tensor, rows: int | None = None) -> NDArray[np.float64]:
        values = a.abs().double()
        return self.host(_fold(values) if rows is None else _row_sums(values.reshape(rows, -1)))

    def count(self, values: Tensor, magnitude: bool, within: int | None, counts: NDArray[np.int64]) -> None:
        keys = _keys(values, magnitude)
        halves = keys >> 16 if within is None else keys[keys >> 16 == within] & 0xFFFF
        counts[0] += self.host(torch.bincount(halves, minlength=BINS))

    def top(self, values: Tensor, magnitude: bool, cut: int, room: int) -> tuple[Tensor, int]:
        keys = _keys(values, magnitude)
        equal = keys == cut
        return (keys > cut) | (equal & (equal.cumsum(0) <= room)), int(equal.sum())

    def packed(self, mask: Tensor) -> Tensor:
        return mask

    def unpacked(self, bits: Tensor, size: int) -> Tensor:
        return bits

    def masked(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, torch.zeros((), device=values.device))

    def bernoulli(self, key: int, start: int, size: int, p: float) -> Tensor:
        return self._random(key, start, size) < int(p * 2.0**32)

    def bernoulli_by_rank(self, key: int, start: int, ranks: Tensor, low: float, step: float) -> Tensor:
        return self._random(key, start, ranks.numel()) < (low + ranks.double() * step) * 2.0**32

    def ranks(self, values: Tensor, rows: int, columns: int) -> Tensor:
        keys = _keys(values, magnitude=True).reshape(rows, columns).flip(1)
        order = columns - 1 - torch.argsort(keys, dim=1, stable=True)
        places = torch.arange(columns, dtype=torch.int32, device=values.device).expand(rows, columns)
        out = torch.empty((rows, columns), dtype=torch.int32, device=values.device)
        return out.scatter_(1, order, places).reshape(-1)

    def consensus(
        self, deltas: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float], normalize: bool
    ) -> Tensor:
        zero = torch.zeros((), device=deltas[0].device)
        elected = torch.where(self.combine(deltas, votes) >= 0, zero + 1, zero - 1)
        total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for delta, weight, vote in zip(deltas, weights, votes, strict=True):
            agrees = delta * _single(vote) * elected > 0
            total = total + torch.where(agrees, delta * _single(weight), zero)
            divisor = divisor + torch.where(agrees, zero + _single(weight), zero)
        nothing = np.float32(0)
        for weight in weights:
            nothing = nothing + abs(np.float32(weight))
        nothing = nothing * np.float32(1e-6)
        return total / torch.where(divisor.abs() <= float(nothing), zero + 1, divisor) if normalize else total

    def _random(self, key: int, start: int, size: int) -> Tensor:
        """kernels.random, in int64 for want of uint32."""
        first = start // 2
        z = torch.arange(first + 1, (start + size + 1) // 2 + 1, device=self._device) * _GOLDEN + _signed(key)
        z = (z ^ _shifted(z, 30)) * _MIX_1
        z = (z ^ _shifted(z, 27)) * _MIX_2
        z = z ^ _shifted(z, 31)
        return torch.stack([z & _LOW, _shifted(z, 32)], dim=1).reshape(-1)[start - 2 * first :][:size]

    def _upload(self, stored: NDArray[Any]) -> Tensor:
        """The bytes on the device."""
        data = stored.view(np.uint8)
        if self._device.type != "cuda":
            return torch.tensor(data)
        if not hasattr(self._local, "buffers"):
            self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            torch.cuda.set_stream(self._local.stream)
            self._local.buffers, self._local.turn = [None, None], 0
        turn = self._local.turn = 1 - self._local.turn
        if (entry := self._local.buffers[turn]) is not None:
            entry[1].synchronize()  # until what it holds has arrived
        if entry is None or entry[0].numel() < data.size:
            entry = self._local.buffers[turn] = (
                torch.empty(data.size, dtype=torch.uint8, pin_memory=True),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
        buffer, arrived = entry
        np.copyto(buffer.numpy()[: data.size], data)
        values: Tensor = buffer[: data.size].to(self._device, non_blocking=True)
        arrived.record(self._local.stream)
        return values


def _single(value: float) -> float:
    return float(np.float32(value))


def _signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


def _shifted(z: Tensor, places: int) -> Tensor:
    """A logical shift to the right: torch's keeps the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _keys(values: Tensor, magnitude: bool) -> Tensor:
    """kernels.keys, in int64 for want of uint32."""
    bits = values.view(torch.int32).long() & _LOW
    if magnitude:
        return (bits & 0x7FFFFFFF) | 0x80000000
    return torch.where(bits >= 0x80000000, bits ^ _LOW, bits | 0x80000000)


def _fold(products: Tensor) -> Tensor:
    """kernels.fold: every addition is elementwise, so the device cannot choose an order."""
    whole = products.numel() // BLOCK * BLOCK
    sums = _folded(products[:whole].reshape(-1, BLOCK))
    return torch.cat([sums, _folded(products[None, whole:])]) if whole < products.numel() else sums


def _row_sums(rows: Tensor) -> Tensor:
    sums = rows.new_zeros(len(rows))
    for start in range(0, rows.shape[1], BLOCK):
        sums = sums + _folded(rows[:, start : start + BLOCK])
    return sums


def _folded(rows: Tensor) -> Tensor:
    count, width = rows.shape
    lanes = rows.new_zeros((count, min(LANES, 1 << max(width - 1, 0).bit_length())))
    for start in range(0, width, LANES):
        part = rows[:, start : start + LANES]
        lanes[:, : part.shape[1]] += part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
