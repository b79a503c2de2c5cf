"""One expert's requests: who runs, and which of their tokens come next. Knows no threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from service.engines.local.expert import Expert
from service.engines.local.forward import Model
from service.engines.local.memory import Memory, Shelf
from service.engines.local.request import Context, Request


@dataclass(frozen=True, slots=True)
class Part:
    """What one step does for a context: `count` tokens from `start` on, and the logits of the last `rows` of them."""

    request: Request
    context: Context
    start: int
    count: int
    rows: int


@dataclass(eq=False)
class Lane:
    """An expert with its pages and the requests that it runs.

    model: None while its weights are not in memory. closing: it lets nobody in any more, for others wait for memory.
    """

    expert: Expert
    memory: Memory
    model: Model | None = None
    closing: bool = False
    evictions: int = 0
    shelf: Shelf = field(init=False)
    running: list[tuple[Request, Context]] = field(default_factory=list)
    queries: int = 0
    hits: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.shelf = self.memory.shelf(self.expert.shape.page)

    @property
    def open(self) -> bool:
        """Whether it lets requests in."""
        return self.model is not None and not self.closing

    @property
    def busy(self) -> bool:
        """Whether any of its requests has tokens that it could compute."""
        return any(context.pending for _, context in self.running)

    def enter(self, request: Request, context: Context) -> None:
        """Run a request from now on."""
        self.running.append((request, context))
        if not request.preempted:
            self.queries += len(context.tokens)
        self._found(request, context, context.computed)

    def parts(self, budget: int) -> list[Part]:
        """The next step: one token of each that writes its answer, and of prompts up to `budget`, the oldest first.

        What others have computed of a prompt in the meantime is taken over.
        """
        ready = [(request, context) for request, context in self.running if context.pending]
        singles = [_part(request, context, 1) for request, context in ready if context.pending == 1]
        longer = []
        for request, context in ready:
            if context.pending > 1 and budget > 0:
                if not request.scoring:
                    self._found(request, context, context.take_over())
                longer.append(_part(request, context, min(context.pending, budget)))
                budget -= longer[-1].count
        return sorted([*singles, *longer], key=lambda part: part.count > 1)

    def run(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Tensor]]:
        """Compute them; each with the logits [rows, V] that it wanted."""
        model = self.model
        assert model is not None
        segments = [part.context.segment(part.count, part.rows) for part in parts]
        logits_RV = model.forward(segments, self.memory.data)
        first = 0
        for part in parts:
            part.context.advance(part.count, learn=model.portable)
            yield part, logits_RV[first : first + part.rows]
            first += part.rows

    def forget(self, request: Request) -> None:
        """Run a request no more."""
        self.running = [each for each in self.running if each[0] is not request]

    def _found(self, request: Request, context: Context, tokens: int) -> None:
        if request.preempted:  # it may have computed them itself
            return
        self.hits += tokens
        if context is request.contexts[0]:
            request.cached += tokens


def _part(request: Request, context: Context, count: int) -> Part:
    rows = count if request.scoring else int(count == context.pending)
    return Part(request, context, context.computed, count, rows)
