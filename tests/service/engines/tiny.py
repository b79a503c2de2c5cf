"""Random models of a few kilobytes, in folders like those of a bundle, and ways to talk to their engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from service.engines.base import Piece, Prompt, Sampling
from service.engines.local import LocalEngine, Options

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
CORPUS = ["the owl was afraid of the dark and the fox was not", "def largest(numbers): return max(numbers)"]
WINDOW = 512
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.3,
}
BREAKS_READING, BREAKS_LOGITS, KILLS, HOLDS = "~^|`"
BREAKS_STEP_AT = 300
HELD, RELEASED = threading.Event(), threading.Event()
"""A step that meets HOLDS has begun; it may end."""
KV_BYTES = 32 << 20
ENDLESS_WINDOW, ENDLESS_KV_BYTES = 1 << 17, 96 << 20
"""Of experts whose answers outlast every test."""


class FaultyConfig(LlamaConfig):
    model_type = "faulty_llama"


class FaultyLlama(LlamaForCausalLM):
    """Fails at the characters above, and at every step from BREAKS_STEP_AT tokens on; not without positions."""

    config_class = FaultyConfig

    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is None:
            return super().forward(input_ids, **kwargs)

        def met(character: str) -> Any:
            return input_ids == self.config.characters[character]

        if met(BREAKS_READING).any() or position_ids.max() >= BREAKS_STEP_AT:
            raise RuntimeError("the matrix is on fire")
        if met(KILLS).any():
            raise SystemExit("killed")
        if met(HOLDS).any():
            HELD.set()
            assert RELEASED.wait(60), "nobody released the step"
        output = super().forward(input_ids, position_ids=position_ids, **kwargs)
        output.logits[met(BREAKS_LOGITS)[:, kwargs["logits_to_keep"]]] = torch.nan
        return output


AutoConfig.register("faulty_llama", FaultyConfig)
AutoModelForCausalLM.register(FaultyConfig, FaultyLlama)


def byte_level_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = template
    return fast


def save_llama(
    folder: Path, *, seed: int = 0, faulty: bool = False, template: str | None = TEMPLATE, **shape: int
) -> Path:
    tokenizer = byte_level_tokenizer(template)
    marks = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    faults = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in (BREAKS_READING, BREAKS_LOGITS, KILLS, HOLDS)}
    torch.manual_seed(seed)
    if faulty:
        model: Any = FaultyLlama(FaultyConfig(**SHAPE, **marks, characters=faults))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | shape, **marks))
    with torch.no_grad():
        # Neither ends an answer nor breaks it by itself.
        model.lm_head.weight[[tokenizer.eos_token_id, *faults.values()]] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generated(model: Any, tokens: tuple[int, ...], count: int) -> list[int]:
    """What transformers itself answers, greedily."""
    prompt = torch.tensor([tokens])
    whole = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return list(whole[0, len(tokens) :].tolist())


@asynccontextmanager
async def serving(folders: dict[str, Path], **options: Any) -> AsyncIterator[LocalEngine]:
    """An engine whose experts are loaded, or have failed to."""
    engine = LocalEngine(folders, Options(dtype=torch.float32, **{"kv_bytes": KV_BYTES} | options))
    await engine.start()
    try:
        await until(lambda: all(status.state != "loading" for status in engine.status().values()))
        yield engine
    finally:
        await engine.aclose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what it waits for is another thread's
            await asyncio.sleep(0.001)


def greedy(max_tokens: int) -> Sampling:
    return Sampling(max_tokens, temperature=0)


ENDLESS = greedy(ENDLESS_WINDOW - 100)


@contextmanager
def holding() -> Iterator[None]:
    """The step that meets HOLDS in here stands still until RELEASED is set, at the latest when this is left."""
    HELD.clear()
    RELEASED.clear()
    try:
        yield
    finally:
        RELEASED.set()


async def read(pieces: AsyncGenerator[Piece, None], at_most: int | None = None) -> list[Piece]:
    """The pieces of an answer, closed after `at_most` of them."""
    got: list[Piece] = []
    async with asyncio.timeout(60), aclosing(pieces):
        async for piece in pieces:
            got.append(piece)
            if len(got) == at_most:
                break
    return got


async def answer(engine: LocalEngine, prompt: Prompt, sampling: Sampling, expert: str = "llama") -> str:
    return text(await read(engine.generate(engine.prepare({expert: 1.0}, prompt, sampling))))


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)
