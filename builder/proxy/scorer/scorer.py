"""Answers requests with a causal LM; the model's weights can be rewritten in place between two calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import composed  # noqa: F401 - transformers then loads such checkpoints without running code of theirs
from builder.errors import CheckpointError
from builder.proxy.requests import Answer, Choices, Generation, Likelihood, Request, Rolling
from builder.proxy.scorer import greedy, packed, padded
from builder.proxy.scorer.encoding import Encoder, Row
from builder.proxy.scorer.stops import Stops

DEFAULT_LENGTH = 2048
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
"""What configurations call the longest input."""
NOTHING = Likelihood(0.0, 0, True)
"""The likelihood of no tokens."""


class Scorer:
    """A model folder, loaded in `dtype` on `device`, ready to answer; its tokenizer may be another folder's.

    Nothing that depends on the weights is kept from one call to the next.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        tokenizer: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        logging.disable_progress_bar()  # our own bars tell more
        options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer or folder, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or fast_dtype(), **options)
        except (OSError, ValueError, RuntimeError) as exc:
            raise CheckpointError(f"{folder} cannot be loaded: {exc}") from exc
        self._model: Any = model.to(self._device).eval()
        self._encoder = Encoder(self._tokenizer, self.max_length)
        self._limit: int | None = None  # how long a path may be to be packed, once that is known

    @property
    def model(self) -> Any:
        """The torch module; its weights may be rewritten between two calls."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def max_length(self) -> int:
        """How many tokens the model reads at most."""
        config = self._model.config.get_text_config()
        stated = [getattr(config, name, None) for name in LENGTHS]
        limit = self._tokenizer.model_max_length
        # A tokenizer without a limit states an enormous number.
        return next((int(each) for each in stated if each), int(limit) if limit < 1e9 else DEFAULT_LENGTH)

    def answer(self, requests: Sequence[Request], done: Callable[[int], None] = lambda _: None) -> list[Answer]:
        """An answer a request, in order; `done` hears how many more requests are finished."""
        answers: dict[int, Answer] = {}
        for i, answer in self._likelihoods([(i, r) for i, r in enumerate(requests) if not isinstance(r, Generation)]):
            answers[i] = answer
            done(1)
        for i, text in self._texts([(i, r) for i, r in enumerate(requests) if isinstance(r, Generation)]):
            answers[i] = text
            done(1)
        return [answers[i] for i in range(len(requests))]

    def _likelihoods(self, requests: Sequence[tuple[int, Choices | Rolling]]) -> Iterator[tuple[int, Answer]]:
        """The answers to all but generations, by their index, as soon as their last row is known."""
        rows = self._encoder.rows([request for _, request in requests])
        parts = [[NOTHING] * len(each) for each in rows]
        places = [
            (n, p, row) for n, each in enumerate(rows) for p, row in enumerate(each) if row.start < len(row.tokens)
        ]
        left = Counter(n for n, _, _ in places)
        yield from ((i, _whole(request, parts[n])) for n, (i, request) in enumerate(requests) if not left[n])
        for place, likelihood in self._rows([row for _, _, row in places]):
            n, p, _ = places[place]
            parts[n][p] = likelihood
            left[n] -= 1
            if not left[n]:
                i, request = requests[n]
                yield i, _whole(request, parts[n])

    def _rows(self, rows: Sequence[Row]) -> Iterator[tuple[int, Likelihood]]:
        if not rows:
            return iter(())
        if self._packs(len(row.tokens) for row in rows):
            return packed.likelihoods(self._model, rows)
        return padded.likelihoods(self._model, rows)

    def _texts(self, requests: Sequence[tuple[int, Generation]]) -> Iterator[tuple[int, str]]:
        """The generated texts, by their request's index, as soon as each has come to its end."""
        prompts = self._encoder.prompts([request for _, request in requests])
        if not prompts:
            return
        stops = Stops(self._model, self._tokenizer)
        packs = self._packs(len(prompt.tokens) + prompt.max_tokens for prompt in prompts)
        if packs and greedy.worthwhile(self._model, prompts):
            written = greedy.answers(self._model, stops, prompts)
        else:
            written = padded.answers(self._model, stops, prompts, greedy.rows(self._model) if packs else 1)
        for n, tokens in written:
            yield requests[n][0], stops.text(prompts[n], tokens)

    def _packs(self, lengths: Iterable[int]) -> bool:
        """Whether so long paths can be packed: the model is tried on first use."""
        longest = max(lengths, default=0)
        if self._limit is None:
            self._limit = packed.fits(self._model)
        return longest <= self._limit


def fast_dtype() -> torch.dtype:
    """bfloat16 where the device multiplies it, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if native else torch.float32


def _whole(request: Choices | Rolling, parts: Sequence[Likelihood]) -> Answer:
    """The answer to a request from those of its rows: a rolling text's windows add up."""
    if isinstance(request, Choices):
        return tuple(parts)
    nats, tokens = sum(part.nats for part in parts), sum(part.tokens for part in parts)
    return Likelihood(nats, tokens, all(part.greedy for part in parts))
