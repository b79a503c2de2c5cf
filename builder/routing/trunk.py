"""The first layers of a decoder as a folder of features: what a shared trunk makes of a prompt, exported once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builder import checkpoints, files
from builder.checkpoints import Array, Checkpoint, Tensor
from builder.errors import BuildError
from builder.merge.folder import TOKENIZER

TOKENS = 512
"""Tokens of a prompt that count, from its start."""
EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head."
LAYER = re.compile(r"model\.layers\.(\d+)\.")
DTYPES = {"F16": "float16", "BF16": "bfloat16"}


def export(model: Path, layers: int, out: Path) -> None:
    """Write the first `layers` layers of `model` to the new folder `out`, in sentence-transformers' layout.

    The feature is the mean of the hidden states after these layers, each divided by its root mean square: the final
    norm is kept and its weights are ones. Without that the first token, an attention sink many times as long as the
    others and the same for every text, would outweigh a prompt (docs/mixing.md); so it counts as one token among T.
    No special tokens are added: so says sentence_bert_config.json to routers/encoder.py and to sentence-transformers.

    bfloat16 stays, all else becomes float16. Any decoder whose tensors are model.embed_tokens, model.layers and
    model.norm can be cut. `out` appears whole or not at all. Raises BuildError, CheckpointError.
    """
    checkpoint = Checkpoint(model)
    config = _config(checkpoint, layers)
    layout = _layout(checkpoint, layers)
    config["dtype"] = DTYPES[layout[_base(EMBEDDINGS)].dtype]
    if out.exists():
        raise BuildError(f"{out} is there already: remove it, or choose another folder")
    tokenizer = [model / name for name in TOKENIZER if (model / name).exists() and not name.startswith("chat_template")]
    if not tokenizer:
        raise BuildError(f"{model} has no tokenizer, so its trunk could read no prompt")
    longest = min(TOKENS, int(config.get("max_position_embeddings") or TOKENS))
    with files.whole(out) as folder:
        checkpoints.write(folder, layout, _tensors(checkpoint, layout))
        for path in tokenizer:
            files.copy(path, folder / path.name)
        _write_json(folder / "config.json", config)
        _describe(folder, config["hidden_size"], longest)


def _config(checkpoint: Checkpoint, layers: int) -> dict[str, Any]:
    """The model's config.json without head and with fewer layers; lists with an entry a layer are cut."""
    whole = checkpoint.config
    depth = whole.get("num_hidden_layers")
    if not isinstance(depth, int) or not isinstance(whole.get("hidden_size"), int):
        raise BuildError(f"{checkpoint.folder}/config.json has no num_hidden_layers and hidden_size: is it a decoder?")
    if not 1 <= layers <= depth:
        raise BuildError(f"{checkpoint.folder} has {depth} layers: a trunk has 1 to {depth} of them, not {layers}")
    config = {
        key: said[:layers] if isinstance(said, list) and len(said) == depth and not _by_chance(key) else said
        for key, said in whole.items()
        if key not in ("_name_or_path", "torch_dtype", "auto_map")
    }
    architectures = [str(name).replace("ForCausalLM", "Model") for name in whole.get("architectures") or ()]
    return config | {"num_hidden_layers": layers, "architectures": architectures}


def _by_chance(key: str) -> bool:
    """Whether a list may be as long as the model is deep, and says nothing of layers."""
    return key == "architectures" or key.endswith(("_token_id", "_token_ids"))


def _layout(checkpoint: Checkpoint, layers: int) -> dict[str, Tensor]:
    """The tensors to write, by their names in a model without head."""
    for name in (EMBEDDINGS, NORM):
        if name not in checkpoint.tensors:
            raise BuildError(f"{checkpoint.folder} has no {name}: only decoders laid out as Llama is can be cut")
    layout, seen = {}, set()
    for name, tensor in checkpoint.tensors.items():
        layer = LAYER.match(name)
        if layer:
            seen.add(int(layer[1]))
        elif name.startswith(HEAD):
            continue
        elif not name.startswith(("model.embed_tokens.", "model.norm.")):
            raise BuildError(f"{checkpoint.folder} has {name}, which is no layer, embedding or norm: it cannot be cut")
        if not layer or int(layer[1]) < layers:
            layout[_base(name)] = Tensor("BF16" if tensor.dtype == "BF16" else "F16", tensor.shape)
    if lost := sorted(set(range(layers)) - seen):
        raise BuildError(f"{checkpoint.folder} has no layer {lost[0]}, which its config.json counts: fetch it again")
    return layout


def _tensors(checkpoint: Checkpoint, layout: Mapping[str, Tensor]) -> Iterator[tuple[str, Array]]:
    for name, tensor in layout.items():
        if name.startswith(_base("model.norm.")):
            yield name, np.full(tensor.shape, name.endswith(".weight"), np.float32)  # a bias becomes zeros
        else:
            yield name, checkpoint.read(f"model.{name}")


def _base(name: str) -> str:
    return name.removeprefix("model.")


def _describe(folder: Path, width: int, longest: int) -> None:
    """The files that make it a folder of sentence-transformers'."""
    package = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{package}.Pooling"},
    ]
    _write_json(folder / "modules.json", modules)
    processing = {"text": {"add_special_tokens": False}}
    reading = {"max_seq_length": longest, "do_lower_case": False, "processing_kwargs": processing}
    _write_json(folder / "sentence_bert_config.json", reading)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    _write_json(folder / "1_Pooling" / "config.json", pooling)


def _write_json(path: Path, said: Any) -> None:
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", "utf-8")
