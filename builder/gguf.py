"""A GGUF file becomes a plain model folder: dequantised once, bf16 safetensors, its tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

from builder import checkpoints, files
from builder.checkpoints import Tensor
from builder.errors import SourceError


def convert(file: Path, out: Path) -> None:
    """Write the model of a GGUF file. Raises SourceError for one that transformers cannot read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.disable_progress_bar()  # our own bars tell more
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as exc:
        # transformers' reader raises struct.error, IndexError, ValueError and others for damaged files alike.
        raise SourceError(f"{file} is no GGUF file that transformers reads: {exc}") from exc
    # The config remembers the GGUF quantisation, which save_pretrained and other readers would refuse.
    facts = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config = type(model.config)(**{**facts, "dtype": "bfloat16", "architectures": [type(model).__name__]})
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    layout = {name: Tensor("BF16", tuple(value.shape)) for name, value in state.items()}
    with files.whole(out) as folder:
        checkpoints.write(folder, layout, ((name, value.numpy()) for name, value in state.items()))
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
