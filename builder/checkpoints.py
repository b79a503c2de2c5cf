"""The only file that opens weights: lazy, sharded, .safetensors and .bin; and writes them, header first.

A tensor is read as float32 and written rounded once. bfloat16 has no numpy type: its bits are the upper half of
a float32's.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from builder import kernels
from builder.errors import CheckpointError

Array = NDArray[np.float32]
STORAGE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 10**8
"""The format's own limit."""
WRITE_BEHIND = 1 << 16
"""Smaller pieces are not worth a system call of their own."""
_SYNC_FILE_RANGE, _START_WRITING = getattr(ctypes.CDLL(None), "sync_file_range", None), 2  # Linux has it
IGNORED = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints hold and every model computes for itself."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.elements * STORAGE[self.dtype].itemsize


class Checkpoint:
    """A model folder whose tensors are read one at a time. Raises CheckpointError for what it cannot read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self._readers = [_Pickle(file) if file.suffix == ".bin" else Safetensors(file) for file in self.files]
        stored = {name for reader in self._readers for name in reader.tensors}
        lost = [name for name in _promised(self.files) if name not in stored and not name.endswith(IGNORED)]
        if lost:
            raise CheckpointError(f"{folder} lacks {lost[0]}, which its index names: fetch the model again")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_config(self.folder)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, in the files' order, from the headers."""
        return {
            name: tensor
            for reader in self._readers
            for name, tensor in reader.tensors.items()
            if not name.endswith(IGNORED)
        }

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def read(self, name: str) -> Array:
        """A tensor as float32; a copy of its own. Raises CheckpointError for one with NaN or inf."""
        return read(self._reader(name), name, self.folder)

    def stored(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored, flat: float32, float16, or uint16 for the bits of bfloat16."""
        return self._reader(name).stored(name)

    def fetch(self, name: str) -> None:
        """Let the system read a tensor ahead, if it can."""
        self._reader(name).fetch(name)

    def _reader(self, name: str) -> Safetensors | _Pickle:
        for reader in self._readers:
            if name in reader.tensors:
                return reader
        raise CheckpointError(f"{self.folder} has no tensor {name}")

    @cached_property
    def sha256(self) -> str:
        """Digest of the weight files' names and bytes: what results about this model are keyed by."""
        return self.sha256_of({path: sha256(path) for path in self.files})

    def sha256_of(self, hashes: Mapping[Path, str]) -> str:
        """The same from digests of the files that are known already."""
        total = hashlib.sha256()
        for path in self.files:
            total.update(f"{path.name} {hashes[path]}\n".encode())
        return total.hexdigest()


def stamp(path: Path) -> dict[str, Any]:
    """What changes when somebody writes a file."""
    facts = path.stat()
    return {"file": str(path.resolve()), "size": facts.st_size, "time": facts.st_mtime_ns}


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(reader: Safetensors | _Pickle, name: str, where: Path) -> Array:
    """A tensor as float32; a copy of its own. Raises CheckpointError for one with NaN or inf."""
    stored = reader.stored(name)
    values, finite = kernels.load(stored)
    if not finite:
        raise CheckpointError(f"{where}: {name} holds NaN or inf: fetch the model again, or leave it out")
    return (values.copy() if values is stored else values).reshape(reader.tensors[name].shape)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises CheckpointError."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{folder} has no readable config.json: is it a model folder?") from exc
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}/config.json is no table of settings: is it a model folder?")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: safetensors if there are any, else .bin. Raises CheckpointError."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            names = sorted(set(_weight_map(index).values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise CheckpointError(f"{folder} lacks {', '.join(missing)}: fetch the model again")
            return [folder / name for name in names]
        if (folder / f"{stem}{suffix}").exists():
            return [folder / f"{stem}{suffix}"]
    raise CheckpointError(f"{folder} has no model.safetensors and no pytorch_model.bin: is it a model folder?")


def _promised(files: Sequence[Path]) -> list[str]:
    """The tensors that the files' index names; none without an index."""
    stem = "pytorch_model" if files[0].suffix == ".bin" else "model"
    index = files[0].with_name(f"{stem}{files[0].suffix}.index.json")
    return list(_weight_map(index)) if index.exists() else []


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(f"{index} is not an index of weights: fetch the model again") from exc


class Writer:
    """The weight files of a model folder: headers first, then tensors in any order, from any thread.

    Files get their mode from the umask, their space at once, and are synced by `close`. Raises OSError for a full disk.
    """

    def __init__(self, folder: Path, layout: Mapping[str, Tensor], shard_bytes: int | None = None) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        shards = _shards(layout, shard_bytes or SHARD_BYTES)
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        else:
            index = {
                "metadata": {"total_size": sum(tensor.bytes for tensor in layout.values())},
                "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        try:
            for name, shard in zip(names, shards, strict=True):
                self._open(folder / name, {tensor: layout[tensor] for tensor in shard})
        except BaseException:
            self.abandon()
            raise

    def _open(self, path: Path, layout: Mapping[str, Tensor]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._descriptors.append(descriptor)
        header = _header(layout)
        place = len(header)
        for name, tensor in layout.items():
            self._places[name] = (descriptor, place)
            place += tensor.bytes
        os.posix_fallocate(descriptor, 0, place)
        _write_all(descriptor, memoryview(header), 0)

    def put(self, name: str, start: int, stored: NDArray[Any]) -> None:
        """Write elements of a tensor from `start` on, in its own dtype."""
        descriptor, place = self._places[name]
        place += start * stored.itemsize
        _write_all(descriptor, stored.reshape(-1).view(np.uint8).data, place)
        if _SYNC_FILE_RANGE and stored.nbytes >= WRITE_BEHIND:
            # The disk starts now, and nobody waits for it: `close` finds little left to do.
            _SYNC_FILE_RANGE(descriptor, ctypes.c_int64(place), ctypes.c_int64(stored.nbytes), _START_WRITING)

    def close(self) -> None:
        """Sync and close the files."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def write(folder: Path, layout: Mapping[str, Tensor], tensors: Iterator[tuple[str, Array]]) -> None:
    """Write `tensors` into the folder as safetensors, one shard or several with an index.

    What is in memory is one tensor. The set of `tensors` must be the layout's. Raises CheckpointError for a value that
    is NaN or inf, or that its dtype would make so.
    """
    writer = Writer(folder, layout)
    try:
        for name, values in tensors:
            if values.shape != layout[name].shape:
                raise AssertionError(f"{name} {values.shape} came where {layout[name].shape} was due")
            writer.put(name, 0, stored(name, np.ascontiguousarray(values, np.float32), layout[name].dtype))
        writer.close()
    finally:
        writer.abandon()


def stored(name: str, values: Array, dtype: str) -> NDArray[Any]:
    """The values in a dtype, flat. Raises CheckpointError for a value that is NaN or inf there."""
    found, finite = kernels.store(values.reshape(-1), dtype)
    if not finite:
        raise CheckpointError(f"{name} would hold NaN or inf in {dtype}: look at its sources")
    return found


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


class _Entry(BaseModel):
    """A tensor in a safetensors header."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_HEADER = TypeAdapter(dict[str, _Entry | dict[str, str]])


class Safetensors:
    """One .safetensors file: an 8-byte length, a JSON header, the bytes (huggingface/safetensors, README)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated or no safetensors file: fetch it again")
            try:
                header = _HEADER.validate_json(file.read(length))
            except ValidationError as exc:
                raise CheckpointError(f"{path} has a header that is not a safetensors header: fetch it again") from exc
        place = 0
        entries = [(name, entry) for name, entry in header.items() if isinstance(entry, _Entry)]
        for name, entry in sorted(entries, key=lambda item: item[1].data_offsets):
            if entry.dtype not in STORAGE:
                raise CheckpointError(
                    f"{path}: {name} is {entry.dtype}; "
                    f"only {', '.join(STORAGE)} can be merged: use the unquantised model"
                )
            tensor = Tensor(entry.dtype, entry.shape)
            if entry.data_offsets != (place, place + tensor.bytes):
                raise CheckpointError(f"{path}: the header contradicts itself at {name}: fetch it again")
            self.tensors[name] = tensor
            self._offsets[name] = 8 + length + place
            place += tensor.bytes
            if 8 + length + place > size:
                raise CheckpointError(f"{path} is truncated at {name} ({size} bytes): fetch it again")
        if 8 + length + place < size:
            raise CheckpointError(f"{path} is longer than its header says: fetch it again")

    @cached_property
    def _map(self) -> mmap.mmap:
        with self._path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def stored(self, name: str) -> NDArray[Any]:
        """The tensor as it is stored, flat, read when it is looked at."""
        tensor = self.tensors[name]
        count = math.prod(tensor.shape)
        if not count:
            return np.zeros(0, STORAGE[tensor.dtype])
        return np.frombuffer(self._map, STORAGE[tensor.dtype], count, self._offsets[name])

    def read(self, name: str) -> Array:
        """A tensor as float32; a copy of its own. Raises CheckpointError for one with NaN or inf."""
        return read(self, name, self._path)

    def fetch(self, name: str) -> None:
        """Let the system read the tensor ahead."""
        start = self._offsets[name] // mmap.PAGESIZE * mmap.PAGESIZE
        stop = self._offsets[name] + self.tensors[name].bytes
        if stop > start:
            self._map.madvise(mmap.MADV_WILLNEED, start, stop - start)


class _Pickle:
    """One pytorch_model*.bin, read with weights_only: a pickle that wants to run code is refused."""

    def __init__(self, path: Path) -> None:
        import torch

        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as exc:
            # torch raises RuntimeError, UnpicklingError, EOFError and others for damaged or unsafe files alike.
            raise CheckpointError(
                f"{path} cannot be read as plain weights ({type(exc).__name__}): {_first(exc)}"
            ) from exc
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{path} is no plain table of tensors: is it a model's pytorch_model.bin?")
        self._state = {str(name): value for name, value in state.items() if not str(name).endswith(IGNORED)}
        for name, value in self._state.items():
            if value.dtype not in names:
                raise CheckpointError(f"{path}: {name} is {value.dtype}: use the unquantised model")
        self.tensors = {name: Tensor(names[value.dtype], tuple(value.shape)) for name, value in self._state.items()}

    def stored(self, name: str) -> NDArray[Any]:
        """The tensor as it is stored, flat."""
        import torch

        values = self._state[name].detach().contiguous().reshape(-1)
        found: NDArray[Any] = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
        return found

    def fetch(self, name: str) -> None:
        """Nothing: the system reads it when it is looked at."""


def _shards(layout: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in layout.items():
        if shards[-1] and tensor.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.bytes
    return shards


def _header(layout: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in layout.items():
        end = offset + tensor.bytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _first(exc: Exception) -> str:
    return str(exc).strip().split("\n")[0]
