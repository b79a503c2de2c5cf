"""What fewer bits cost: a model's perplexity on a short text, beside that of the same model in its own dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engines.local.forward import Model, Segment
from service.engines.local.ops import PAGE

TEXT = """The harbour had been quiet since the storm. Mara tied the last of the boats to the pier, counted them twice,
and wrote the number into her book: seventeen, two fewer than in spring. "They will come back," said the old man
beside her, although nobody had asked him. She shut the book and looked at the clouds over the lighthouse, which moved
slowly east.

A train leaves at 9:40 and needs 2 hours and 35 minutes, so it arrives at 12:15. If it is late by a quarter of an hour,
passengers miss the connection at 12:25 and wait for the next one, 30 minutes later. Of 240 seats, 3 in 8 are taken:
90 people sit in it, and 150 seats are free.

def mean(values):
    if not values:
        raise ValueError("the mean of nothing is not defined")
    return sum(values) / len(values)

User: My bread does not rise. What do I do wrong?
Assistant: Most often the water was too hot, or the yeast too old. Try lukewarm water, give it a spoon of sugar, and
wait ten minutes: if it does not foam, buy new yeast. Let the dough rest in a warm place until it has doubled, about
an hour.
"""
MOST = 512


@dataclass(frozen=True, slots=True)
class Loss:
    """Perplexity in fewer bits and before; the share of places where the likeliest token is the same."""

    perplexity: float
    before: float
    same_choice: float
    tokens: int


def measure(model: Model, before: Model, tokens: Sequence[int], dtype: torch.dtype, device: torch.device) -> Loss:
    """Of both on the same tokens, which are those of TEXT in the expert's vocabulary."""
    first_SV, second_SV = (_logits(each, tokens[:MOST], dtype, device) for each in (model, before))
    same = (first_SV.argmax(-1) == second_SV.argmax(-1)).float().mean()
    return Loss(_perplexity(first_SV, tokens), _perplexity(second_SV, tokens), float(same), len(first_SV))


def _logits(model: Model, tokens: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    pages = -(-len(tokens) // PAGE)
    memory = torch.zeros(pages * model.shape.page, dtype=dtype, device=device)
    table = [place * model.shape.page for place in range(pages)]
    return model.forward([Segment(tokens, 0, table, len(tokens))], memory).float()


def _perplexity(logits_SV: Tensor, tokens: Sequence[int]) -> float:
    following = torch.tensor(tokens[1 : len(logits_SV)], device=logits_SV.device)
    return math.exp(float(torch.nn.functional.cross_entropy(logits_SV[:-1], following)))
