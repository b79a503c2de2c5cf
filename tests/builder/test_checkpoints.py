"""Weights in and out: the bits are torch's, and a damaged file is a sentence that names what is wrong."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import random_tensors, reference_model, write_model

from builder import checkpoints
from builder.checkpoints import Array, Checkpoint, Tensor
from builder.errors import CheckpointError

TOO_LARGE = {"F32": math.inf, "F16": 65520.0, "BF16": 2.0**128 - 2.0**119}
"""What rounds to inf: halfway past the largest number, and beyond."""
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def floats(count: int, below: float) -> Array:
    """Numbers of every magnitude up to `below`, denormals of every dtype and exact ties among them."""
    bits = np.random.default_rng(5).integers(0, 2**32, count, np.uint32)
    ties = (np.arange(0, 2**16, 7, dtype=np.uint32) << 16) | 0x8000
    edges = np.array([0.0, -0.0, 1e-45, 6e-8, 5.9604645e-08, 1.17549435e-38, 9.2e-41, 65504, 3.38e38], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32), edges])
    return values[np.abs(values) < below]


def store(folder: Path, values: Array, dtype: str) -> Path:
    """A folder with one tensor."""
    folder.mkdir(exist_ok=True)
    checkpoints.write(folder, {"x": Tensor(dtype, values.shape)}, iter([("x", values)]))
    return folder / "model.safetensors"


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_value_is_rounded_once_as_torch_rounds_it(tmp_path: Path, dtype: str) -> None:
    values = floats(200_000, TOO_LARGE[dtype])

    stored = load_file(store(tmp_path, values, dtype))["x"]

    assert stored.dtype == TORCH[dtype]
    assert torch.equal(stored, torch.from_numpy(values).to(TORCH[dtype]))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_value_is_read_exactly(tmp_path: Path, dtype: str, suffix: str) -> None:
    tensor = torch.from_numpy(floats(1000, TOO_LARGE[dtype])[:900]).to(TORCH[dtype]).reshape(30, 30)
    if suffix == ".bin":
        torch.save({"x": tensor}, tmp_path / "pytorch_model.bin")
    else:
        save_file({"x": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)

    assert checkpoint.tensors == {"x": Tensor(dtype, (30, 30))}
    assert torch.equal(torch.from_numpy(checkpoint.read("x")), tensor.float())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_number_too_large_for_its_dtype_is_refused_and_the_largest_is_kept(tmp_path: Path, dtype: str) -> None:
    too_large = np.float32(TOO_LARGE[dtype])
    just_not = np.nextafter(too_large, np.float32(0))

    assert torch.isfinite(load_file(store(tmp_path, np.array([-just_not, just_not]), dtype))["x"]).all()
    assert torch.isinf(torch.tensor(too_large).to(TORCH[dtype]))
    for value in (too_large, -too_large):
        with pytest.raises(CheckpointError, match=f"x would hold NaN or inf in {dtype}"):
            store(tmp_path, np.array([value]), dtype)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000])
def test_nan_and_inf_are_never_written(tmp_path: Path, dtype: str, bits: int) -> None:
    values = np.array([0, bits], np.uint32).view(np.float32)

    with pytest.raises(CheckpointError, match="x would hold NaN or inf"):
        store(tmp_path, values, dtype)


@pytest.mark.parametrize("values", [[1.0, float("nan")], [float("-inf"), 1.0]])
def test_nan_and_inf_are_never_read(tmp_path: Path, values: list[float]) -> None:
    reference_model(tmp_path, {"layer.weight": np.array(values, np.float32)})

    with pytest.raises(CheckpointError, match=r"layer\.weight holds NaN or inf"):
        Checkpoint(tmp_path).read("layer.weight")


def test_a_read_tensor_is_a_copy_of_its_own(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path, random_tensors(1))
    name = "model.norm.weight"
    before = checkpoint.read(name)
    checkpoint.read(name)[:] = 0

    assert np.array_equal(checkpoint.read(name), before)


def test_large_models_are_written_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 600)
    tensors = random_tensors(1)
    checkpoint = write_model(tmp_path, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))

    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())
    assert list(checkpoint.tensors) == list(tensors)
    for name, values in tensors.items():
        assert np.array_equal(load_file(tmp_path / index["weight_map"][name])[name].numpy(), values)
        assert np.array_equal(checkpoint.read(name), values)


def test_shards_of_pickles_are_read_by_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.nn.Parameter(torch.zeros(3))}, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    checkpoint = Checkpoint(tmp_path)

    assert [checkpoint.read(name).tolist() for name in checkpoint.tensors] == [[1, 1], [0, 0, 0]]


def test_safetensors_are_preferred_to_a_pickle_of_the_same_model(tmp_path: Path) -> None:
    write_model(tmp_path, random_tensors(1))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")

    assert [file.name for file in Checkpoint(tmp_path).files] == ["model.safetensors"]


def test_old_rotary_buffers_are_not_weights(tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    reference_model(tmp_path, {**random_tensors(1), buffer: np.ones(4, np.float32)})

    assert buffer not in Checkpoint(tmp_path).tensors


def test_written_files_get_their_mode_from_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        file = store(tmp_path, np.ones(3, np.float32), "BF16")
    finally:
        os.umask(before)

    assert file.stat().st_mode & 0o777 == 0o640


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"x": Malicious()}, tmp_path / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read as plain weights"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": {"x": torch.ones(2)}}, {"epoch": 3}])
def test_a_pickle_of_something_else_than_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no plain table of tensors"):
        Checkpoint(tmp_path)


def test_a_quantised_pickle_names_the_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "q.weight": torch.ones(2, dtype=torch.int8)}, tmp_path / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"q\.weight is torch\.int8"):
        Checkpoint(tmp_path)


def test_a_quantised_safetensors_names_the_tensor(tmp_path: Path) -> None:
    save_file({"q.weight": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.safetensors: q\.weight is F8_E4M3"):
        Checkpoint(tmp_path)


def test_a_truncated_shard_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    file = store(tmp_path, np.ones((4, 4), np.float32), "F32")
    os.truncate(file, file.stat().st_size - 1)

    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated at x"):
        Checkpoint(tmp_path)


def test_a_file_with_bytes_that_no_header_names_is_refused(tmp_path: Path) -> None:
    with store(tmp_path, np.ones(4, np.float32), "F32").open("ab") as file:
        file.write(b"\0")

    with pytest.raises(CheckpointError, match=r"model\.safetensors is longer than its header says"):
        Checkpoint(tmp_path)


GOOD_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"garbage",
        b"\xff\xfe\xfd\xfc",
        b"[" * 5000 + b"]" * 5000,
        [],
        {"x": None},
        {"x": {"dtype": "F32"}},
        {"x": {**GOOD_ENTRY, "shape": "2"}},
        {"x": {**GOOD_ENTRY, "shape": [-2]}},
        {"x": {**GOOD_ENTRY, "shape": [2.5]}},
        {"x": {**GOOD_ENTRY, "shape": [10**30]}},
        {"x": {**GOOD_ENTRY, "dtype": ["F32"]}},
        {"x": {**GOOD_ENTRY, "data_offsets": [0, 8, 16]}},
        {"x": {**GOOD_ENTRY, "data_offsets": [-8, 0]}},
        {"x": {**GOOD_ENTRY, "data_offsets": [4, 12]}},
        {"x": GOOD_ENTRY, "y": GOOD_ENTRY},
    ],
)
def test_a_header_that_is_none_names_the_file(tmp_path: Path, header: Any) -> None:
    raw_safetensors(tmp_path / "model.safetensors", header, bytes(8))

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 600)
    second = write_model(tmp_path, random_tensors(1)).files[1]
    second.unlink()

    with pytest.raises(CheckpointError, match=f"lacks {second.name}"):
        Checkpoint(tmp_path)


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 600)
    first, second = write_model(tmp_path, random_tensors(1)).files[:2]
    second.write_bytes(first.read_bytes())

    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\..*, which its index names"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is not an index"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]", "\x00"])
def test_a_folder_without_a_config_asks_whether_it_is_a_model(tmp_path: Path, text: str | None) -> None:
    checkpoint = write_model(tmp_path, random_tensors(1))
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match="is it a model folder"):
        checkpoint.config  # noqa: B018


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        Checkpoint(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor lm_tail\.weight"):
        write_model(tmp_path, random_tensors(1)).read("lm_tail.weight")


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    digests = [write_model(tmp_path / str(i), random_tensors(seed)).sha256 for i, seed in enumerate((1, 1, 2))]

    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def damaged(rng: random.Random, good: bytes) -> bytes:
    """Noise; noise behind a header of its length; or a good file with a few bytes changed, cut, or added."""
    kind = rng.randrange(3)
    noise = rng.randbytes(rng.randint(0, 300))
    if kind == 0:
        return noise
    if kind == 1:
        return len(noise).to_bytes(8, "little") + noise + rng.randbytes(rng.randint(0, 50))
    changed = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.choice(b'0123456789{}[]",:-ex\x00\xff')
    return bytes(changed[: rng.randint(1, len(changed) + 20)])


@pytest.mark.parametrize(("name", "count"), [("model.safetensors", 2000), ("pytorch_model.bin", 400)])
def test_no_bytes_crash_the_reader(tmp_path: Path, name: str, count: int) -> None:
    rng = random.Random(11)
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    good = (tmp_path / name).read_bytes()
    for path in tmp_path.iterdir():
        path.unlink()
    refused = 0
    for _ in range(count):
        (tmp_path / name).write_bytes(damaged(rng, good))
        try:
            checkpoint = Checkpoint(tmp_path)
            for tensor in checkpoint.tensors:
                checkpoint.read(tensor)
        except CheckpointError:
            refused += 1
    assert refused > count // 2


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_ten_thousand_random_bits_are_numbers_or_refused(tmp_path: Path, dtype: str, suffix: str) -> None:
    integers = torch.int32 if dtype == "F32" else torch.int16
    bound = torch.iinfo(integers)
    random_bits = torch.Generator().manual_seed(8)
    bits = torch.randint(bound.min, bound.max, (2500, 4), dtype=integers, generator=random_bits)
    tensors = {f"t{i}": row.clone().view(TORCH[dtype]) for i, row in enumerate(bits)}
    if suffix == ".bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    refused = 0
    for name, tensor in tensors.items():
        if tensor.isfinite().all():
            assert checkpoint.read(name).tobytes() == tensor.float().numpy().tobytes()
        else:
            refused += 1
            with pytest.raises(CheckpointError, match=f"{name} holds NaN or inf"):
                checkpoint.read(name)
    assert 0 < refused < len(tensors)
