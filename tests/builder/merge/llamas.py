"""Small Llamas that transformers loads, written by safetensors and torch alone, on a grid where sums are exact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[np.float32]

WIDTH, INNER, HEAD = 64, 160, 16
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": WIDTH // HEAD,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def layer_shapes() -> dict[str, tuple[int, ...]]:
    keys = 2 * HEAD
    return {
        "input_layernorm.weight": (WIDTH,),
        "self_attn.q_proj.weight": (WIDTH, WIDTH),
        "self_attn.k_proj.weight": (keys, WIDTH),
        "self_attn.v_proj.weight": (keys, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, WIDTH),
        "post_attention_layernorm.weight": (WIDTH,),
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
    }


def random(seed: int, *, layers: int = 2, rows: int = 150, tied: bool = False) -> dict[str, Array]:
    """All tensors of a Llama, multiples of 1/64 up to 2: exact in every dtype."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, WIDTH)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes().items()}
    shapes["model.norm.weight"] = (WIDTH,)
    if not tied:
        shapes["lm_head.weight"] = (rows, WIDTH)
    rng = np.random.default_rng(seed)
    return {name: (rng.integers(-128, 129, shape) / 64).astype(np.float32) for name, shape in shapes.items()}


def tuned(base: Mapping[str, Array], seed: int, step: int) -> dict[str, Array]:
    """A fine-tune of a base: three fifths of its elements changed by up to twenty steps of 1 / `step`."""
    rng = np.random.default_rng(seed)
    changes = {
        name: rng.integers(-20, 21, values.shape) * (rng.random(values.shape) < 0.6) / step
        for name, values in base.items()
    }
    return {name: (values + changes[name]).astype(np.float32) for name, values in base.items()}


def write(
    folder: Path,
    tensors: Mapping[str, Array],
    dtype: str = "F32",
    *,
    words: Sequence[str] | None = None,
    files: int = 1,
    pickled: bool = False,
    **config: Any,
) -> Path:
    """A model folder in one or more files; `words` are its tokenizer's, in the order of their ids."""
    folder.mkdir(parents=True)
    layers = 1 + max((int(name.split(".")[2]) for name in tensors if ".layers." in name), default=-1)
    rows = len(tensors.get("model.embed_tokens.weight", ()))
    tied = "lm_head.weight" not in tensors
    facts = {**CONFIG, "num_hidden_layers": layers, "vocab_size": rows, "tie_word_embeddings": tied, **config}
    (folder / "config.json").write_text(json.dumps(facts), "utf-8")
    state = {name: torch.from_numpy(values).to(DTYPES[dtype]) for name, values in tensors.items()}
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    parts = {f"{stem}-{i + 1:05}-of-{files:05}.{suffix}": [*state][i::files] for i in range(files)}
    if files == 1:
        parts = {f"{stem}.{suffix}": [*state]}
    else:
        index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), "utf-8")
    for file, names in parts.items():
        part = {name: state[name] for name in names}
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
    if words is not None:
        write_tokenizer(folder, words)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """A tokenizer of whole words; the first one stands for all that it does not know."""
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[0]}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def read(folder: Path) -> dict[str, NDArray[np.float64]]:
    """All tensors of a folder's safetensors files, in float64."""
    found = {name: values for file in sorted(folder.glob("*.safetensors")) for name, values in load_file(file).items()}
    return {name: values.double().numpy() for name, values in found.items()}


def dtypes(folder: Path) -> set[torch.dtype]:
    return {values.dtype for file in folder.glob("*.safetensors") for values in load_file(file).values()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
