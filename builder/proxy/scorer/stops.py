"""Where a greedy answer ends, and what of it is told, as lm_eval's `hf` model has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from builder.proxy.scorer.encoding import Prompt

LOOKBACK = 2
"""So many tokens more than a stop string has are looked at: in an answer it may be split in another way."""


class Stops:
    """Ends the answers of one model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        stated = model.generation_config.eos_token_id
        ids = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
        self._eos = frozenset(id_ for id_ in ids if id_ is not None)
        self._widths: dict[str, int] = {}

    def met(self, prompt: Prompt, tokens: Sequence[int]) -> bool:
        """Whether the answer to a prompt has come to its end."""
        if len(tokens) >= prompt.max_tokens or tokens[-1] in self._eos:
            return True
        return any(stop in self._tokenizer.decode(tokens[-self._width(stop) :]) for stop in prompt.until)

    def text(self, prompt: Prompt, tokens: Sequence[int]) -> str:
        """The answer up to the first stop string, without special tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in prompt.until:
            text = text.split(stop)[0]
        return text

    def _width(self, stop: str) -> int:
        if stop not in self._widths:
            self._widths[stop] = len(self._tokenizer.encode(stop, add_special_tokens=False)) + LOOKBACK
        return self._widths[stop]
