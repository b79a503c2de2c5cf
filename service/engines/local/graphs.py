"""Steps of one token a row as CUDA graphs: launched at once, not kernel by kernel.

A graph has one shape, so there is one for each bucket of rows and pages, recorded when it is first met. A smaller step
is padded: the rows beyond it write to the memory's last page, which is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.engines.local.forward import Step


class Inputs(NamedTuple):
    """What a step of B rows reads: token, position, slot, pages and length of each."""

    ids_B: Tensor
    positions_B: Tensor
    slots_B: Tensor
    tables_BP: Tensor
    lengths_B: Tensor


Compute = Callable[[Inputs], Tensor]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph: writes `logits` [B, V] from what is in `inputs`."""

    inputs: Inputs
    replay: Callable[[], None]
    logits_BV: Tensor


Record = Callable[[Compute, Inputs], Recorded]


class Graphs:
    """The graphs of one model over one memory."""

    def __init__(self, compute: Compute, spare: int, record: Record | None = None) -> None:
        """spare: offset of the page that is nobody's."""
        self._compute, self._spare, self._record = compute, spare, record or record_cuda
        self._graphs: dict[tuple[int, int], Recorded] = {}

    def run(self, step: Step) -> Tensor:
        """The logits [B, V] of a step whose segments have one token each, and want its logits."""
        count, pages = step.tables_BP.shape
        shape = (bucket(count), bucket(pages))
        inputs = self._padded(step, *shape)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._record(self._compute, inputs)
        for kept, new in zip(graph.inputs, inputs, strict=True):
            kept.copy_(new)
        graph.replay()
        return graph.logits_BV[:count].clone()

    def _padded(self, step: Step, rows: int, pages: int) -> Inputs:
        def padded(values_B: Tensor, filler: int) -> Tensor:
            return torch.nn.functional.pad(values_B, (0, rows - len(values_B)), value=filler)

        tables_BP = step.tables_BP
        missing = (0, pages - tables_BP.shape[1], 0, rows - len(tables_BP))
        return Inputs(
            padded(step.ids_T, 0),
            padded(step.positions_T, 0),
            padded(step.slots_T, self._spare),
            torch.nn.functional.pad(tables_BP, missing, value=self._spare),
            padded(step.lengths_B, 1),
        )


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def record_cuda(compute: Compute, inputs: Inputs) -> Recorded:
    """A CUDA graph; runs once before, for what is set up at first use."""
    kept = Inputs(*(each.clone() for each in inputs))
    aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        compute(kept)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_BV = compute(kept)
    return Recorded(kept, graph.replay, logits_BV)
