"""Scores a causal LM on items by log-likelihood; the model's weights can be rewritten in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from builder.checkpoints import Array
from builder.errors import CheckpointError
from builder.proxy.items import Item

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Score:
    """How a model did on one item.

    accuracy: 1.0 where the right choice has the highest summed log-likelihood, else 0.0.
    log_likelihood: mean over the right choice's tokens, in nats: minus the log of its perplexity.
    """

    accuracy: float
    log_likelihood: float


@dataclass(frozen=True, slots=True)
class _Row:
    """One choice as tokens; those from `start` on are scored."""

    item: int
    choice: int
    ids: list[int]
    start: int


class Scorer:
    """A model folder, loaded in `dtype`, ready to score."""

    def __init__(self, folder: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> None:
        logging.disable_progress_bar()  # our own bars tell more
        options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or fast_dtype(), **options)
        except (OSError, ValueError, RuntimeError) as exc:
            raise CheckpointError(f"{folder} cannot be loaded: {exc}") from exc
        self._model: Any = model.to(self._device).eval()

    def rewrite(self, tensors: Iterator[tuple[str, Array]]) -> None:
        """Put other weights of the same architecture in place, each rounded once to the model's dtype."""
        state = self._model.state_dict()
        written = set()
        for name, values in tensors:
            if name not in state:
                raise CheckpointError(
                    f"{name} has no place in {type(self._model).__name__}: it cannot be scored in memory"
                )
            state[name].copy_(torch.from_numpy(values))
            written.add(state[name].data_ptr())
        left = [name for name, value in state.items() if value.data_ptr() not in written]
        if left:
            raise CheckpointError(f"{left[0]} was not among the weights: the model would keep another's")

    def score(self, items: Sequence[Item], done: Callable[[int], None] = lambda _: None) -> list[Score]:
        """One score an item, in order; `done` hears how many rows each batch held."""
        rows = [row for i, item in enumerate(items) for row in self._rows(i, item)]
        sums: dict[tuple[int, int], float] = {}
        for batch in _batches(rows):
            for row, total in zip(batch, self._log_likelihoods(batch), strict=True):
                sums[row.item, row.choice] = total
            done(len(batch))
        lengths = {(row.item, row.choice): len(row.ids) - row.start for row in rows}
        return [
            _score(item, [sums[i, c] for c in range(len(item.choices))], lengths[i, item.label])
            for i, item in enumerate(items)
        ]

    def _rows(self, i: int, item: Item) -> list[_Row]:
        prompt = self._tokenizer(item.prompt).input_ids if item.prompt else []
        rows = []
        for c, choice in enumerate(item.choices):
            ids = self._tokenizer(item.prompt + choice).input_ids
            # A token may span the border; what both have in common is the prompt. At least one token must come before.
            shared = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False))
            )
            rows.append(_Row(i, c, ids, max(shared, 1)))
        return rows

    @torch.inference_mode()
    def _log_likelihoods(self, batch: Sequence[_Row]) -> list[float]:
        """Summed log-likelihood of each row's scored tokens; rows are padded on the right, where nothing attends."""
        width = max(len(row.ids) for row in batch)
        first = min(row.start for row in batch) - 1
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch], device=self._device)
        mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch], device=self._device)
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=width - first).logits
        totals = []
        for row, row_logits in zip(batch, logits, strict=True):
            targets = torch.tensor(row.ids[row.start :], device=self._device)
            picked = row_logits[row.start - 1 - first : len(row.ids) - 1 - first].float()
            chosen = picked.gather(1, targets[:, None]).squeeze(1)
            totals.append(float((chosen - picked.logsumexp(dim=1)).double().sum()))
        return totals


def fast_dtype() -> torch.dtype:
    """bfloat16 where the device multiplies it, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if native else torch.float32


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows of similar length together, so that little is padding; longest first."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score(item: Item, sums: Sequence[float], tokens: int) -> Score:
    best = max(range(len(sums)), key=lambda c: sums[c])
    return Score(float(best == item.label), sums[item.label] / tokens)
