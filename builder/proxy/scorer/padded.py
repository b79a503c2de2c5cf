"""Scores rows and writes answers with any causal model, however it attends: in padded batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from builder.proxy.requests import Likelihood
from builder.proxy.scorer.encoding import Prompt, Row, Tokens
from builder.proxy.scorer.packed import scores
from builder.proxy.scorer.stops import Stops

BATCH_TOKENS = 2048


def likelihoods(model: Any, rows: Sequence[Row]) -> Iterator[tuple[int, Likelihood]]:
    """The likelihood of each row, by its index, as soon as it is known; every row has something to score."""
    for batch in _batches(rows, _groups(rows, routed=_routed(model))):
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


def _routed(model: Any) -> bool:
    """Whether which tokens are the prompt decides what the model says: a composed one's that routes by prompts."""
    return getattr(model.config, "routing", None) == "sample"


def _groups(rows: Sequence[Row], *, routed: bool = False) -> list[list[int]]:
    """Rows that one forward tells: the inputs of the others begin those of the first. Longest first.

    routed: their prompts are the same too.
    """
    keys = [row.tokens[:-1].astype(">u4").tobytes() for row in rows]
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: keys[i], reverse=True):
        first = rows[groups[-1][0]] if groups else None
        if first and keys[groups[-1][0]].startswith(keys[i]) and not (routed and first.start != rows[i].start):
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
    inputs = _padded([row.tokens[:-1] for row in rows], model.device)
    if _routed(model):
        # A text that follows nothing is routed by all of itself.
        prompts = [row.tokens[: row.start if row.start > 1 else -1] for row in rows]
        inputs["routes"] = model.route(**_padded(prompts, model.device)).weights
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = inputs["input_ids"].shape[1] - first
        kept_BSV: Tensor = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return kept_BSV
    all_BSV: Tensor = model(**inputs, use_cache=False).logits
    return all_BSV[:, first:]


def _padded(texts: Sequence[Tokens], device: torch.device) -> dict[str, Tensor]:
    """A batch of tokens, padded on the right, and which of them are none."""
    lengths = [len(text) for text in texts]
    ids_BS = torch.zeros((len(texts), max(lengths)), dtype=torch.long)
    for text, ids_S in zip(texts, ids_BS, strict=True):
        ids_S[: len(text)] = torch.from_numpy(text)
    mask_BS = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids_BS.to(device), "attention_mask": mask_BS.to(device)}


def _likelihood(row: Row, logits_SV: Tensor) -> Likelihood:
    targets_M = row.tokens[row.start :]
    nats_M, greedy_M = scores(logits_SV[: len(targets_M)], torch.arange(len(targets_M)).numpy(), targets_M)
    return Likelihood(float(nats_M.sum()), len(targets_M), bool(greedy_M.all()))
