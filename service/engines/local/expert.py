"""From an expert's folder to what can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import composed  # noqa: F401 - transformers then loads such checkpoints without running code of theirs
from service.engines.base import EngineError


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """A model in memory, its tokenizer, how many tokens it can hold and which of them end an answer."""

    name: str
    model: Any
    tokenizer: Any
    window: int
    eos: frozenset[int]


def load(name: str, folder: Path, dtype: torch.dtype, device: torch.device) -> Expert:
    """Load the expert in `folder`. Raises EngineError, or what transformers raises, where it is not whole."""
    if not (folder / "config.json").is_file():
        raise EngineError(f"no config.json in {folder}: is the bundle complete?")
    disable_progress_bar()  # a log is no terminal
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    # transformers fills such tensors with random numbers and only warns.
    if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise EngineError(f"{len(lost)} tensors are missing in {folder} or have another shape, first {lost[0]}")
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window is None:
        raise EngineError(f"no max_position_embeddings in {folder / 'config.json'}: the window is unknown")
    return Expert(name, model.eval().to(device), tokenizer, window, _eos(model, tokenizer))


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it natively, else fp32."""
    return torch.bfloat16 if device.type == "cuda" or _native_bf16() else torch.float32


def _native_bf16() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in processor or "amx_bf16" in processor


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    stated = model.generation_config.eos_token_id
    ids = stated if isinstance(stated, list) else [stated]
    # Chat models often name the end of a turn in the tokenizer alone.
    return frozenset(id_ for id_ in [*ids, tokenizer.eos_token_id] if id_ is not None)
