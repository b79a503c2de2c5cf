"""An engine that takes seconds to import: the service answers meanwhile, and says that it is loading."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from service.engines.base import (
    About,
    Engine,
    EngineError,
    Job,
    Load,
    NotReadyError,
    Piece,
    Prompt,
    Sampling,
    Status,
)

logger = logging.getLogger(__name__)


class LaterEngine:
    """The engine that `make` returns in a thread, once `start` was called; it is owned."""

    def __init__(self, experts: Sequence[str], make: Callable[[], Engine]) -> None:
        self._status = dict.fromkeys(experts, Status("loading", "importing torch"))
        self._make = make
        self._engine: Engine | None = None
        self._making: asyncio.Task[None] | None = None

    def status(self) -> dict[str, Status]:
        return self._engine.status() if self._engine else dict(self._status)

    def load(self) -> dict[str, Load]:
        return self._engine.load() if self._engine else dict.fromkeys(self._status, Load(resident=False))

    def about(self, expert: str) -> About:
        return self._made(expert).about(expert)

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        return self._made(next(iter(experts))).prepare(experts, prompt, sampling)

    def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        return self._made(job.expert).generate(job)

    def check_mix(self, experts: Sequence[str], sampling: Sampling) -> None:
        self._made(experts[0]).check_mix(experts, sampling)

    def encode(self, expert: str, prompt: Prompt) -> tuple[int, ...]:
        return self._made(expert).encode(expert, prompt)

    def decode(self, expert: str, ids: Sequence[int]) -> str:
        return self._made(expert).decode(expert, ids)

    async def start(self) -> None:
        self._making = asyncio.create_task(self._begin())

    async def aclose(self) -> None:
        """One that is being made is not waited for; a process that ends waits for its import all the same."""
        if self._making:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)
        if self._engine:
            await self._engine.aclose()

    async def _begin(self) -> None:
        try:
            engine = await asyncio.to_thread(self._make)
            await engine.start()
        except Exception as exc:  # whatever an import, or a device, comes up with
            logger.exception("the engine does not start")
            said = str(exc) if isinstance(exc, EngineError) else repr(exc)
            self._status = dict.fromkeys(self._status, Status("failed", f"the engine does not start: {said}"))
        else:
            self._engine = engine

    def _made(self, expert: str) -> Engine:
        if self._engine:
            return self._engine
        status = self._status[expert]
        kind = NotReadyError if status.state == "loading" else EngineError
        raise kind(f"{expert} cannot answer yet: {status.detail}")
