"""GGUF files: dequantised once into a plain model folder that transformers loads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from small_gguf import HEADS, HIDDEN, write_gguf

from builder import gguf
from builder.checkpoints import Array, Checkpoint
from builder.errors import SourceError


def halves(values: Array) -> Array:
    """GGUF interleaves the two halves of each head's rotary rows; transformers keeps them apart."""
    return values.reshape(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN).swapaxes(1, 2).reshape(HIDDEN, HIDDEN)


def bf16(values: Array) -> Array:
    import torch

    return torch.from_numpy(values).bfloat16().float().numpy()


def test_a_gguf_file_becomes_a_model_that_transformers_loads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = write_gguf(tmp_path / "model.gguf")
    gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
    converted = Checkpoint(tmp_path / "out")

    assert {tensor.dtype for tensor in converted.tensors.values()} == {"BF16"}
    assert np.array_equal(converted.read("lm_head.weight"), bf16(tensors["output.weight"]))
    assert np.array_equal(converted.read("model.layers.0.mlp.gate_proj.weight"), bf16(tensors["blk.0.ffn_gate.weight"]))
    assert np.array_equal(
        converted.read("model.layers.0.self_attn.q_proj.weight"), bf16(halves(tensors["blk.0.attn_q.weight"]))
    )
    assert "quantization_config" not in converted.config
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.01, 0.1, 0.5, 0.999])
def test_a_truncated_gguf_file_is_refused_and_leaves_no_folder(tmp_path: Path, kept: float) -> None:
    write_gguf(tmp_path / "model.gguf")
    os.truncate(tmp_path / "model.gguf", int(kept * (tmp_path / "model.gguf").stat().st_size))

    with pytest.raises(SourceError, match=r"model\.gguf is no GGUF file that transformers reads"):
        gguf.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
