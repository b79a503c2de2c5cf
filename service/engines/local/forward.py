"""One step of one model: some tokens of some sequences in, logits out. What the scheduler asks of a model.

Array names: T tokens of all segments in a row, B segments, P pages, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from service.engines.base import EngineError
from service.engines.local import ops
from service.engines.local.ops import PAGE, Shape

FULL, SLIDING = "full_attention", "sliding_attention"
"""What a config calls the kinds of attention that are served."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence.

    start: how many came before; their keys and values, and those to come, are in the pages at `table`'s offsets. rows:
    of how many of its last tokens the logits are wanted. route: what `Model.route` said of the sequence's prompt.
    """

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    rows: int = 1
    route: Any = None

    @property
    def end(self) -> int:
        """How many tokens there are after it."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Step:
    """Segments side by side: those of one token first, then the longer ones."""

    segments: Sequence[Segment]
    width: int
    device: torch.device
    singles: int = field(init=False)

    def __post_init__(self) -> None:
        counts = [len(segment.tokens) for segment in self.segments]
        singles = next((i for i, count in enumerate(counts) if count > 1), len(counts))
        assert all(count > 1 for count in counts[singles:]), "segments of one token come first"
        object.__setattr__(self, "singles", singles)

    @property
    def is_plain(self) -> bool:
        """Whether every segment is one token whose logits are wanted."""
        return self.singles == len(self.segments) and all(segment.rows == 1 for segment in self.segments)

    @cached_property
    def ids_T(self) -> Tensor:
        """The tokens."""
        return self._tensor([token for segment in self.segments for token in segment.tokens])

    @cached_property
    def positions_T(self) -> Tensor:
        """Where in its sequence each is."""
        return self._tensor([place for segment in self.segments for place in range(segment.start, segment.end)])

    @cached_property
    def slots_T(self) -> Tensor:
        """Where in the memory each belongs: its page's offset and the width of the tokens before it there."""
        return self._tensor(
            [
                segment.table[place // PAGE] + place % PAGE * self.width
                for segment in self.segments
                for place in range(segment.start, segment.end)
            ]
        )

    @cached_property
    def tables_BP(self) -> Tensor:
        """The pages of the segments of one token."""
        tables = [segment.table for segment in self.segments[: self.singles]]
        most = max(len(table) for table in tables)
        return self._tensor([[*table, *[0] * (most - len(table))] for table in tables])

    @cached_property
    def lengths_B(self) -> Tensor:
        """How many tokens the segments of one token see."""
        return self._tensor([segment.end for segment in self.segments[: self.singles]])

    @cached_property
    def tables_TP(self) -> Tensor:
        """The pages of every token's sequence."""
        most = max(len(segment.table) for segment in self.segments)
        tables_BP = self._tensor([[*segment.table, *[0] * (most - len(segment.table))] for segment in self.segments])
        counts_B = self._tensor([len(segment.tokens) for segment in self.segments])
        return tables_BP.repeat_interleave(counts_B, 0)

    @cached_property
    def lengths_T(self) -> Tensor:
        """How many tokens every token sees."""
        return self.positions_T + 1

    @cached_property
    def rows_R(self) -> Tensor:
        """Whose logits are wanted."""
        rows: list[int] = []
        end = 0
        for segment in self.segments:
            end += len(segment.tokens)
            rows += range(end - segment.rows, end)
        return self._tensor(rows)

    @cached_property
    def spans(self) -> list[tuple[Segment, slice]]:
        """The longer segments, and which of the tokens are theirs."""
        found, at = [], self.singles
        for segment in self.segments[self.singles :]:
            found.append((segment, slice(at, at + len(segment.tokens))))
            at += len(segment.tokens)
        return found

    @cached_property
    def tables(self) -> list[Tensor]:
        """The pages of each of the longer segments."""
        return [self._tensor(segment.table) for segment, _ in self.spans]

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


class Model(Protocol):
    """A causal language model over paged key-value memory."""

    @property
    def shape(self) -> Shape:
        """What a page holds of a token."""
        ...

    @property
    def vocabulary(self) -> int:
        """V of the logits."""
        ...

    @property
    def portable(self) -> bool:
        """Whether keys and values depend on nothing but the tokens up to theirs, so that others may use them."""
        ...

    def forward(self, segments: Sequence[Segment], memory: Tensor) -> Tensor:
        """The logits [R, V] of the segments' wanted rows, in order; keys and values are written to their pages."""
        ...

    def route(self, tokens: Sequence[int]) -> Any:
        """What every segment of a sequence that begins with this prompt needs to know; None for most models."""
        ...


def windows_of(config: Any) -> list[int | None]:
    """How many tokens each layer of a text model sees, None for all. Raises EngineError for layers of other kinds."""
    kinds = getattr(config, "layer_types", None) or [SLIDING] * config.num_hidden_layers
    if others := sorted(set(kinds) - {FULL, SLIDING}):
        raise EngineError(f"it has layers of {', '.join(others)}")
    return [getattr(config, "sliding_window", None) if kind == SLIDING else None for kind in kinds]


def attend_step(
    q_TX: Tensor,
    step: Step,
    memory: Tensor,
    layer: int,
    shape: Shape,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """What each token of a step sees of its own sequence, [T, heads * D]; its q begins its row of q_TX.

    The step's keys and values are in the memory. softcap, sinks_H: see `_scored`.
    """
    plain, own = softcap is None and sinks_H is None, shape.heads * shape.width
    if plain and ops.attends_in_c(memory, shape):
        return ops.attend(q_TX, memory, step.tables_TP, step.lengths_T, layer, shape, scale, window)
    found, spans, tables = [], step.spans, step.tables
    if step.singles and plain:
        where = (step.tables_BP, step.lengths_B)
        found.append(ops.attend(q_TX[: step.singles], memory, *where, layer, shape, scale, window))
    elif step.singles:
        spans = [(segment, slice(i, i + 1)) for i, segment in enumerate(step.segments[: step.singles])] + spans
        tables = [*step.tables_BP, *tables]
    for (segment, span), table_P in zip(spans, tables, strict=True):
        k_HSD, v_HSD = ops.gather(memory, table_P, segment.end, layer, shape)
        q_THD = q_TX[span, :own].view(-1, shape.heads, shape.width)
        out_THD = attend_span(q_THD, k_HSD, v_HSD, scale=scale, window=window, softcap=softcap, sinks_H=sinks_H)
        found.append(out_THD.reshape(-1, own))
    return found[0] if len(found) == 1 else torch.cat(found)


def attend_span(
    q_THD: Tensor,
    k_HSD: Tensor,
    v_HSD: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention [T, H, D] of a sequence's last T tokens over all S of it; grouped queries have fewer keys' heads."""
    new, heads = q_THD.shape[:2]
    total, groups = k_HSD.shape[1], heads // k_HSD.shape[0]
    if groups > 1:
        k_HSD, v_HSD = k_HSD.repeat_interleave(groups, 0), v_HSD.repeat_interleave(groups, 0)
    q_HTD = q_THD.transpose(0, 1)
    if softcap is not None or sinks_H is not None:
        seen_TS = causal(new, total, window, q_THD.device)
        return _scored(q_HTD, k_HSD, v_HSD, seen_TS, scale, softcap, sinks_H).transpose(0, 1)
    whole = new == total and (window is None or window >= total)
    mask_TS = None if whole else causal(new, total, window, q_THD.device)
    out = torch.nn.functional.scaled_dot_product_attention(
        q_HTD[None], k_HSD[None], v_HSD[None], attn_mask=mask_TS, is_causal=whole, scale=scale
    )
    return out[0].transpose(0, 1)


def causal(new: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `total` tokens each of the last `new` sees [new, total]."""
    seen_TS = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    return seen_TS if window is None else seen_TS.triu(total - new - window + 1)


def _scored(
    q_HTD: Tensor,
    k_HSD: Tensor,
    v_HSD: Tensor,
    seen_TS: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention whose scores are changed first: s becomes softcap * tanh(s / softcap), as Gemma 2's.

    Beside them a head's sink takes part in the softmax and gives nothing, as gpt-oss's.
    """
    scores_HTS = (q_HTD @ k_HSD.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores_HTS = softcap * torch.tanh(scores_HTS / softcap)
    scores_HTS = scores_HTS.masked_fill(~seen_TS, float("-inf"))
    if sinks_H is not None:
        sinks_HT1 = sinks_H.float()[:, None, None].expand(-1, len(seen_TS), 1)
        scores_HTS = torch.cat((scores_HTS, sinks_HT1), dim=-1)
    weights_HTS = scores_HTS.softmax(-1)[..., : k_HSD.shape[1]].to(q_HTD.dtype)
    return weights_HTS @ v_HSD
