"""An engine that stands still where a test wants it to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing

from service.engines.base import Job, Piece
from service.engines.echo import EchoEngine


class Held(EchoEngine):
    """Gives the first `free` pieces of each answer at once, and each further one only when `gate` is released for it.

    Any thread may release it.
    """

    def __init__(self, experts: tuple[str, ...], free: int = 0) -> None:
        super().__init__(experts)
        self.gate = threading.Semaphore(0)
        self._free = free

    def let(self) -> bool:
        """Whether a piece may go."""
        return self.gate.acquire(blocking=False)

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        given = 0
        async with aclosing(super().generate(job)) as pieces:
            async for piece in pieces:
                if given >= self._free:
                    await self._hold()
                yield piece
                given += 1

    async def _hold(self) -> None:
        async with asyncio.timeout(120):  # longer than any test waits, so that it fails and does not hang
            while not self.let():  # noqa: ASYNC110 - another thread releases it
                await asyncio.sleep(0.001)
