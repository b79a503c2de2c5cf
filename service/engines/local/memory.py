"""Key-value memory: one budget for all experts, lent in chunks, used in pages, kept as long as it can be.

A page that is full is known by its tokens and the page before it, so a prompt that begins like another one takes over
its pages. A page that nobody uses stays until its room is needed, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from service.engines.local.ops import PAGE


@dataclass(eq=False, slots=True)
class Page:
    """offset: its first element in the memory. key: its parent's serial number and its tokens, once it is full."""

    offset: int
    chunk: int
    serial: int
    users: int = 0
    key: tuple[int, tuple[int, ...]] | None = None


class Memory:
    """A flat tensor of `chunks` times `chunk` elements. Untouched ones cost nothing: the system has not given them."""

    def __init__(self, chunks: int, chunk: int, dtype: torch.dtype, device: torch.device) -> None:
        self.chunks, self.chunk = chunks, chunk
        # One chunk more, in which nobody's pages lie: the last of it is for rows that only fill up a shape (graphs.py).
        self.data = torch.empty((chunks + 1) * chunk, dtype=dtype, device=device)
        self._free = list(reversed(range(chunks)))
        self._shelves: list[Shelf] = []

    def shelf(self, page: int) -> Shelf:
        """Pages of `page` elements each, out of this memory."""
        shelf = Shelf(self, page)
        self._shelves.append(shelf)
        return shelf

    def free(self) -> int | None:
        """A chunk that nobody has."""
        return self._free.pop() if self._free else None

    def clear(self) -> None:
        """Forget all that nobody uses."""
        while (chunk := self.reclaim()) is not None:
            self._free.append(chunk)

    def reclaim(self) -> int | None:
        """The chunk that has been without a page in use for the longest time, whoever had it."""
        idle = [(age, shelf, chunk) for shelf in self._shelves for age, chunk in shelf.idle_chunks()]
        if not idle:
            return None
        _, shelf, chunk = min(idle, key=lambda each: each[0])
        shelf.drop(chunk)
        return chunk


@dataclass(eq=False, slots=True)
class _Chunk:
    pages: list[Page]
    users: int = 0
    used: int = 0


_clock = count(1)
_serials = count(1)


@dataclass(eq=False)
class Shelf:
    """One expert's pages. Sequences hold pages; what they hold stays."""

    memory: Memory
    page: int
    in_use: int = 0
    _chunks: dict[int, _Chunk] = field(default_factory=dict)
    _free: list[Page] = field(default_factory=list)
    _known: dict[tuple[int, tuple[int, ...]], Page] = field(default_factory=dict)
    _idle: OrderedDict[Page, None] = field(default_factory=OrderedDict)

    @property
    def per_chunk(self) -> int:
        """Pages of a chunk."""
        return self.memory.chunk // self.page

    def chunks_for(self, tokens: int) -> int:
        """How many chunks so many tokens of one sequence need at least."""
        return -(-tokens // (self.per_chunk * PAGE))

    def begin(self, tokens: Sequence[int], after: Page | None = None) -> list[Page]:
        """The pages that hold the longest known beginning of these tokens, but never all of them; taken.

        after: the page of what comes before them.
        """
        found: list[Page] = []
        parent = after.serial if after else 0
        for start in range(0, len(tokens) - PAGE, PAGE):
            page = self._known.get((parent, tuple(tokens[start : start + PAGE])))
            if page is None:
                break
            found.append(page)
            parent = page.serial
        for page in found:
            self._hold(page)
        return found

    def take(self) -> Page | None:
        """A page to write into, taken; None where no room is left."""
        if not self._free and not self._make_room():
            return None
        page = self._free.pop()
        page.serial, page.key = next(_serials), None
        self._hold(page)
        return page

    def learn(self, page: Page, parent: Page | None, tokens: Sequence[int]) -> Page:
        """Know a page by its tokens from now on. Of two with the same tokens the first stays, taken for the other."""
        key = (parent.serial if parent else 0, tuple(tokens))
        known = self._known.setdefault(key, page)
        if known is page:
            page.key = key
        else:  # the pages after it are found by the one that is known
            self._hold(known)
            self.release([page])
        return known

    def release(self, pages: Sequence[Page]) -> None:
        """Give pages back; the last of a text become old before the first."""
        for page in reversed(pages):
            page.users -= 1
            if page.users:
                continue
            self.in_use -= 1
            chunk = self._chunks[page.chunk]
            chunk.users -= 1
            chunk.used = next(_clock)
            if page.key is None:
                self._free.append(page)
            else:
                self._idle[page] = None

    def idle_chunks(self) -> list[tuple[int, int]]:
        """Chunks without a page in use, each after the time when it last had one."""
        return [(chunk.used, number) for number, chunk in self._chunks.items() if not chunk.users]

    def drop(self, number: int) -> None:
        """Forget a chunk and all that its pages hold."""
        for page in self._chunks.pop(number).pages:
            if page in self._idle:
                del self._idle[page]
                self._forget(page)
            self._free.remove(page)

    def _make_room(self) -> bool:
        if (number := self.memory.free()) is not None:
            self._open(number)
        elif self._idle:
            oldest, _ = self._idle.popitem(last=False)
            self._forget(oldest)
        elif (number := self.memory.reclaim()) is not None:
            self._open(number)
        else:
            return False
        return True

    def _open(self, number: int) -> None:
        first = number * self.memory.chunk
        pages = [Page(first + place * self.page, number, next(_serials)) for place in range(self.per_chunk)]
        self._chunks[number] = _Chunk(pages)
        self._free += reversed(pages)

    def _hold(self, page: Page) -> None:
        if not page.users:
            self._idle.pop(page, None)
            self.in_use += 1
            self._chunks[page.chunk].users += 1
        page.users += 1

    def _forget(self, page: Page) -> None:
        assert page.key is not None
        del self._known[page.key]
        page.key = None
        self._free.append(page)
