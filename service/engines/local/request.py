"""A request on its way through the engine: its text in every expert that answers, and the way back to its reader."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from service.engines.base import Failure, Finish, Job
from service.engines.local.forward import Segment
from service.engines.local.memory import Page, Shelf
from service.engines.local.ops import PAGE
from service.engines.local.sampler import Pick, Row


@dataclass(frozen=True, slots=True)
class Prompted:
    """The scores of a part of the prompt's tokens: each one's own log-probability, and the likeliest in its place."""

    scores: Sequence[Pick]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, if there was one to pick; with a finish it is the last, and with "stop" it is no text.

    cached: how many of the prompt's tokens were not computed anew. queued: seconds until the first was computed.
    """

    pick: Pick | None
    finish: Finish | None
    cached: int = 0
    queued: float = 0.0


News = Token | Prompted | Failure


@dataclass(eq=False, slots=True)
class Context:
    """A request's text in one expert. computed: of how many tokens the pages hold keys and values."""

    expert: str
    shelf: Shelf
    tokens: list[int]
    route: Any = None
    pages: list[Page] = field(default_factory=list)
    computed: int = 0
    logits_V: Tensor | None = None

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen."""
        return len(self.tokens) - self.computed

    def take_over(self, most: int | None = None) -> int:
        """Use the pages that are known of what comes next; of how many tokens they are.

        most: none beyond so many tokens of the text.
        """
        if self.computed % PAGE:
            return 0
        place = self.computed // PAGE
        end = None if most is None else most + 1  # a shelf never gives all
        found = self.shelf.begin(self.tokens[self.computed : end], self.pages[place - 1] if place else None)
        self.shelf.release(self.pages[place : place + len(found)])
        self.pages[place : place + len(found)] = found
        self.computed += len(found) * PAGE
        return len(found) * PAGE

    def make_room(self, count: int) -> bool:
        """Pages for `count` tokens more; False where there is no room for all of them."""
        while len(self.pages) * PAGE < self.computed + count:
            page = self.shelf.take()
            if page is None:
                return False
            self.pages.append(page)
        return True

    def segment(self, count: int, rows: int) -> Segment:
        """The next tokens as the model takes them."""
        tokens = self.tokens[self.computed : self.computed + count]
        return Segment(tokens, self.computed, [page.offset for page in self.pages], rows, self.route)

    def advance(self, count: int, *, learn: bool) -> None:
        """So many tokens are computed; pages that are full are known to others from now on."""
        first = self.computed // PAGE
        self.computed += count
        if learn:
            for place in range(first, self.computed // PAGE):
                parent = self.pages[place - 1] if place else None
                tokens = self.tokens[place * PAGE : (place + 1) * PAGE]
                self.pages[place] = self.shelf.learn(self.pages[place], parent, tokens)

    def leave(self) -> None:
        """Give all pages back."""
        self.shelf.release(self.pages)
        self.pages, self.computed, self.logits_V = [], 0, None


@dataclass(eq=False, slots=True)
class Request:
    """A job and its reader's inbox: tokens up to one with a finish, or a failure.

    told: how many of the prompt's tokens have had their scores told. cached: how many were known already. came: when it
    was submitted, by time.monotonic; queued: seconds from then until it was let in for the first time. preempted:
    whether it had to give way since.
    """

    job: Job
    row: Row
    inbox: asyncio.Queue[News] = field(default_factory=asyncio.Queue)
    contexts: list[Context] = field(default_factory=list)
    count: int = 0
    told: int = 0
    cached: int = 0
    came: float = 0.0
    queued: float = 0.0
    arrival: int = 0
    preempted: bool = False
    cancelled: bool = False
    over: bool = False

    @property
    def most(self) -> int:
        """Tokens that the answer may have."""
        return self.job.sampling.max_tokens or 0

    @property
    def scoring(self) -> bool:
        """Whether the scores of its prompt are wanted, and not all told."""
        return self.job.sampling.prompt_logprobs is not None and not self.count

    def take(self, pick: Pick) -> Token:
        """The next token of the answer; all contexts go on from it."""
        self.count += 1
        finish: Finish | None = None
        if pick.id in self.row.stops:
            finish = "stop"
        elif self.count >= self.most:
            finish = "length"
        for context in self.contexts:
            context.tokens.append(pick.id)
        self.over = finish is not None
        return Token(pick, finish, self.cached, self.queued)
