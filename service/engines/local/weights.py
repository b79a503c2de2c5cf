"""A checkpoint's tensors, mapped from their files; what several experts have in common is laid out once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from service.engines.base import EngineError
from service.engines.local.bits import Bits, BitsAndBytes
from service.engines.local.linear import Kind, Linear

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SAMPLE = 64
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file."""

    path: Path
    name: str
    tensor: Tensor


class Shared(Generic[T]):
    """What was made of tensors, found again by the same values in another file, as long as anybody has it."""

    def __init__(self) -> None:
        self._made: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._sources: dict[object, list[tuple[int, list[tuple[Path, str]]]]] = {}
        self._locks: dict[object, Lock] = {}
        self._numbers = count()

    def get(self, kind: object, sources: list[Stored], make: Callable[[], T]) -> T:
        """What `make` made of such tensors before, or makes now. kind: what else it depends on."""
        key = (kind, *(_sample(source.tensor) for source in sources))
        with self._locks.setdefault(key, Lock()):  # two loaders may come at once with the same
            known = [each for each in self._sources.get(key, ()) if each[0] in self._made]
            for number, others in known:
                found: T | None = self._made.get(number)
                if found is not None and all(map(_equal, others, sources)):
                    return found
            made, number = make(), next(self._numbers)
            self._made[number] = made
            # Where they lie, not what they are: that would be held twice.
            self._sources[key] = [*known, (number, [(source.path, source.name) for source in sources])]
            return made


class Weights:
    """The tensors of a folder's safetensors files. To be closed."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        kind: Kind | Bits | None,
        shared: Shared[Any],
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """progress: told the share of the bytes that was taken. Raises EngineError where a file lacks or is broken."""
        self.folder = folder
        self._dtype, self._device, self._kind, self._shared = dtype, device, kind, shared
        self._progress, self._taken, self._total = progress, 0, 0
        self._files = ExitStack()
        self._where = {name: (path, file) for path, file in self._open() for name in file.keys()}  # noqa: SIM118

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._where

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, in the engine's dtype, on its device. Raises EngineError."""
        stored = self._stored(name, shape)
        # A copy, where `to` makes none: what is mapped from a file goes with the file.
        made: Tensor = self._shared.get(None, [stored], lambda: self._stack([stored]))
        return made

    def linear(self, names: Sequence[str], rows: Sequence[int], columns: int, *, whole: bool = False) -> Linear:
        """A layer of weights [rows, columns], stacked; with their biases, if they have any. Raises EngineError.

        whole: it keeps its dtype, whatever the others do.
        """
        kind = None if whole else self._kind
        parts = [self._stored(f"{name}.weight", (own, columns)) for name, own in zip(names, rows, strict=True)]
        biases = [
            self._stored(f"{name}.bias", (own,))
            for name, own in zip(names, rows, strict=True)
            if self.has(f"{name}.bias")
        ]
        if biases and len(biases) < len(names):
            raise EngineError(f"{self.folder}: only some of {', '.join(names)} have a bias")

        def make() -> Linear:
            weight_NK, bias_N = self._stack(parts), self._stack(biases) if biases else None
            if kind == "bnb-int8" or kind == "bnb-nf4":
                return BitsAndBytes(weight_NK, bias_N, kind)
            return Linear.of(weight_NK, bias_N, kind=kind)

        made: Linear = self._shared.get((kind, self._dtype), [*parts, *biases], make)
        return made

    def _stack(self, parts: Sequence[Stored]) -> Tensor:
        return torch.cat([part.tensor.to(self._device, self._dtype) for part in parts])

    def _stored(self, name: str, shape: Sequence[int]) -> Stored:
        if name not in self._where:
            raise EngineError(f"no tensor {name} in {self.folder}: is the bundle complete?")
        try:
            path, file = self._where[name]
            stored: Tensor = file.get_tensor(name)
        except (SafetensorError, RuntimeError) as exc:
            raise EngineError(f"{name} in {self.folder} cannot be read: {exc}") from exc
        if tuple(stored.shape) != tuple(shape):
            raise EngineError(f"{name} in {self.folder} is {list(stored.shape)}, its config says {list(shape)}")
        self._taken += stored.nbytes
        self._progress(min(self._taken / self._total, 1.0))
        return Stored(path, name, stored)

    def _open(self) -> Iterator[tuple[Path, Any]]:
        names = [SINGLE]
        if (self.folder / INDEX).exists():
            index = json.loads((self.folder / INDEX).read_text("utf-8"))
            names = sorted(set(index["weight_map"].values()))
        for name in names:
            try:
                self._total += (self.folder / name).stat().st_size
                yield self.folder / name, self._files.enter_context(safe_open(self.folder / name, framework="pt"))
            except (OSError, SafetensorError) as exc:
                raise EngineError(f"{self.folder / name} cannot be read: {exc}") from exc


def parameters(folder: Path) -> int:
    """How many numbers a folder's weights are, from the files' headers; of other files, a guess by their size.

    Raises EngineError for a file that is broken.
    """
    found = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                found += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as exc:
            raise EngineError(f"{path} cannot be read: {exc}") from exc
    return found or sum(file.stat().st_size for file in folder.glob("*.bin")) // 2


def has_safetensors(folder: Path) -> bool:
    """Whether the weights of the folder are such files."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def _equal(where: tuple[Path, str], stored: Stored) -> bool:
    path, name = where
    try:
        with safe_open(path, framework="pt") as file:
            return torch.equal(file.get_tensor(name), stored.tensor)
    except (OSError, SafetensorError):  # it is no longer there
        return False


def _sample(tensor: Tensor) -> tuple[object, ...]:
    """A few values: tensors that differ mostly differ here."""
    flat = tensor.reshape(-1)
    stride = max(1, len(flat) // SAMPLE)
    return (tensor.dtype, tuple(tensor.shape), tuple(flat[::stride][:SAMPLE].float().tolist()))
