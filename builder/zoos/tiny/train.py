"""Trains a tiny Llama and its branches in seconds to a minute; the same seed gives the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from builder import files
from builder.zoos.tiny import corpus

EOS = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Size:
    """Shape and steps; the base stays short of its floor, so that branches have something to gain."""

    hidden: int = 128
    layers: int = 4
    vocabulary: int = 1000
    base_steps: int = 120
    branch_steps: int = 100
    rows: int = 16
    window: int = 64
    lr: float = 2e-3


MICRO = Size(hidden=64, layers=2, vocabulary=400, base_steps=60, branch_steps=40, rows=8, window=48, lr=4e-3)
"""What test fixtures use."""


def train(domain: str, out: Path, *, base: Path | None, size: Size, seed: int, done: Callable[[], None]) -> None:
    """Write the model of a domain as a folder: from scratch for the base, else a branch of the folder `base`.

    `done` hears every step.
    """
    logging.disable_progress_bar()  # our own bars tell more
    torch.manual_seed(seed)
    if base is None:
        tokenizer, model, steps = _tokenizer(size, seed), LlamaForCausalLM(_config(size)), size.base_steps
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        model, steps = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), size.branch_steps
    _fit(model, _tokens(domain, tokenizer, steps, size, seed), size.lr, done)
    with files.whole(out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _fit(model: LlamaForCausalLM, batches: torch.Tensor, lr: float, done: Callable[[], None]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        done()


def _tokens(domain: str, tokenizer: PreTrainedTokenizerFast, steps: int, size: Size, seed: int) -> torch.Tensor:
    """Batches [steps, rows, window] of texts packed end to end."""
    need = steps * size.rows * size.window
    texts = corpus.lines(domain, need // 8, seed)
    ids = tokenizer(EOS.join(texts)).input_ids
    return torch.tensor(ids[:need]).view(steps, size.rows, size.window)


def _tokenizer(size: Size, seed: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.lines("base", 2000, seed), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, chat_template=TEMPLATE)


def _config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 3,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
