"""Scores rows and writes answers with any causal model, however it attends: in padded batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from builder.proxy.requests import Likelihood
from builder.proxy.scorer.encoding import Prompt, Row
from builder.proxy.scorer.packed import scores
from builder.proxy.scorer.stops import Stops

BATCH_TOKENS = 2048


def likelihoods(model: Any, rows: Sequence[Row]) -> Iterator[tuple[int, Likelihood]]:
    """The likelihood of each row, by its index, as soon as it is known; every row has something to score."""
    for batch in _batches(rows, _groups(rows)):
        first = min(rows[i].start for group in batch for i in group) - 1
        logits_BSV = _logits(model, [rows[group[0]] for group in batch], first)
        for group, logits_SV in zip(batch, logits_BSV, strict=True):
            for i in group:
                yield i, _likelihood(rows[i], logits_SV[rows[i].start - 1 - first :])


def answers(model: Any, stops: Stops, prompts: Sequence[Prompt], rows: int = 1) -> Iterator[tuple[int, list[int]]]:
    """The tokens that transformers' own greedy generation writes, by the prompt's index, so many rows at a time."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), i))
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        yield from zip(batch, _written(model, stops, [prompts[i] for i in batch]), strict=True)


@torch.inference_mode()
def _written(model: Any, stops: Stops, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The answers to prompts, padded on the left; each ends by itself, the batch with its last."""
    width = max(len(prompt.tokens) for prompt in prompts)
    ids_BS, mask_BS = (torch.zeros((len(prompts), width), dtype=torch.long) for _ in range(2))
    for prompt, ids_S, mask_S in zip(prompts, ids_BS, mask_BS, strict=True):
        ids_S[width - len(prompt.tokens) :] = torch.from_numpy(prompt.tokens)
        mask_S[width - len(prompt.tokens) :] = 1
    ended: dict[int, list[int]] = {}

    def met(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        for row, tokens in enumerate(ids[:, width:].tolist()):
            if row not in ended and stops.met(prompts[row], tokens):
                ended[row] = tokens
        return torch.tensor([row in ended for row in range(len(prompts))], device=ids.device)

    model.generate(
        ids_BS.to(model.device),
        attention_mask=mask_BS.to(model.device),
        max_new_tokens=max(prompt.max_tokens for prompt in prompts),
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([met]),
        pad_token_id=0,
    )
    return [ended[row] for row in range(len(prompts))]


def _groups(rows: Sequence[Row]) -> list[list[int]]:
    """Rows that one forward tells: the inputs of the others begin those of the first. Longest first."""
    keys = [row.tokens[:-1].astype(">u4").tobytes() for row in rows]
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: keys[i], reverse=True):
        if groups and keys[groups[-1][0]].startswith(keys[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return sorted(groups, key=lambda group: -len(keys[group[0]]))


def _batches(rows: Sequence[Row], groups: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Groups of similar length together, so that little is padding."""
    batch: list[list[int]] = []
    for group in groups:
        if batch and (len(batch) + 1) * len(rows[batch[0][0]].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


@torch.inference_mode()
def _logits(model: Any, rows: Sequence[Row], first: int) -> Tensor:
    """The logits after every token from `first` on; rows are padded on the right, where nothing attends."""
    lengths = [len(row.tokens) - 1 for row in rows]
    ids_BS = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
    for row, length, ids_S in zip(rows, lengths, ids_BS, strict=True):
        ids_S[:length] = torch.from_numpy(row.tokens[:-1])
    mask_BS = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids_BS.to(model.device), "attention_mask": mask_BS.to(model.device)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept_BSV: Tensor = model(**inputs, use_cache=False, logits_to_keep=max(lengths) - first).logits
        return kept_BSV
    all_BSV: Tensor = model(**inputs, use_cache=False).logits
    return all_BSV[:, first:]


def _likelihood(row: Row, logits_SV: Tensor) -> Likelihood:
    targets_M = row.tokens[row.start :]
    nats_M, greedy_M = scores(logits_SV[: len(targets_M)], torch.arange(len(targets_M)).numpy(), targets_M)
    return Likelihood(float(nats_M.sum()), len(targets_M), bool(greedy_M.all()))
