"""Random experts of several architectures, each with a vocabulary of its own kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import CORPUS, SHAPE, save_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

MARKS = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [*CORPUS, "Once upon a time there was a little owl, and she was not afraid.", "Tom buys 3 boxes of 12 pencils."]


def save_all(folder: Path) -> dict[str, Path]:
    """An expert of each kind, by name."""
    shape = SHAPE | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    # More rows than tokens, as the real ones have.
    kinds: dict[str, tuple[PreTrainedTokenizerFast, Any]] = {
        "mistral": (pieces(500, TEXTS), MistralConfig(**shape, vocab_size=500, sliding_window=24)),
        "qwen2": (byte_level(320, TEXTS), Qwen2Config(**shape, vocab_size=352)),
        "qwen3": (byte_level(340, TEXTS[2:]), Qwen3Config(**shape, vocab_size=384, head_dim=16)),
        "gemma3": (pieces(420, TEXTS[2:]), Gemma3TextConfig(**shape, vocab_size=448, head_dim=16, sliding_window=24)),
    }
    found = {"llama": save_llama(folder / "llama", seed=5)}
    for seed, (name, (tokenizer, config)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # else biases are zero and norms one, and nobody would miss them
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found[name] = folder / name
    return found


def byte_level(size: int, texts: list[str]) -> PreTrainedTokenizerFast:
    """As Qwen's: bytes, and words of them; nothing before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    return _trained(tokenizer, trainer, texts)


def pieces(size: int, texts: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2's, Mistral's and Gemma's: pieces of text whose spaces are marked, single bytes else; a mark first."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=MARKS + BYTES, show_progress=False)
    trained = _trained(tokenizer, trainer, texts)
    trained.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return trained


def _trained(tokenizer: Tokenizer, trainer: Any, texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
