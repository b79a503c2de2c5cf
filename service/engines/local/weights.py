"""A checkpoint's tensors, mapped from their files; what several experts have in common is laid out once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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


class Shared(Generic[T]):
    """What was made of tensors, found again by the same values in another file, as long as anybody has it."""

    def __init__(self) -> None:
        self._made: WeakValueDictionary[Any, Any] = WeakValueDictionary()
        self._sources: dict[Any, list[tuple[int, list[Tensor]]]] = {}
        self._lock = Lock()
        self._count = 0

    def get(self, kind: object, sources: list[Tensor], make: Callable[[], T]) -> T:
        """What `make` made of such tensors before, or makes now. kind: what else it depends on."""
        key = (kind, *(_sample(source) for source in sources))
        with self._lock:
            same = list(self._sources.get(key, ()))
        for number, known in same:
            found = self._made.get(number)
            if found is not None and all(map(torch.equal, known, sources)):
                return found  # type: ignore[no-any-return]
        made = make()
        with self._lock:
            self._count += 1
            self._made[self._count] = made
            alive = [each for each in self._sources.get(key, ()) if each[0] in self._made]
            self._sources[key] = [*alive, (self._count, sources)]
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
        self._where = {name: file for file in self._open() for name in file.keys()}  # noqa: SIM118 - it is no dict

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
        made: Tensor = self._shared.get(None, [stored], lambda: stored.to(self._device, self._dtype))
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

    def _stack(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.to(self._device, self._dtype) for part in parts])

    def _stored(self, name: str, shape: Sequence[int]) -> Tensor:
        if name not in self._where:
            raise EngineError(f"no tensor {name} in {self.folder}: is the bundle complete?")
        try:
            stored: Tensor = self._where[name].get_tensor(name)
        except (SafetensorError, RuntimeError) as exc:
            raise EngineError(f"{name} in {self.folder} cannot be read: {exc}") from exc
        if tuple(stored.shape) != tuple(shape):
            raise EngineError(f"{name} in {self.folder} is {list(stored.shape)}, its config says {list(shape)}")
        self._taken += stored.nbytes
        self._progress(min(self._taken / self._total, 1.0))
        return stored

    def _open(self) -> Iterator[Any]:
        names = [SINGLE]
        if (self.folder / INDEX).exists():
            index = json.loads((self.folder / INDEX).read_text("utf-8"))
            names = sorted(set(index["weight_map"].values()))
        for name in names:
            try:
                self._total += (self.folder / name).stat().st_size
                yield self._files.enter_context(safe_open(self.folder / name, framework="pt"))
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


def _sample(tensor: Tensor) -> tuple[object, ...]:
    """A few values: tensors that differ mostly differ here."""
    flat = tensor.reshape(-1)
    stride = max(1, len(flat) // SAMPLE)
    return (tensor.dtype, tuple(tensor.shape), tuple(flat[::stride][:SAMPLE].float().tolist()))
