"""Several engines as one: each expert is asked of the engine that runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

from service.engines.base import About, Engine, Job, Load, Piece, Prompt, Sampling, Status, UnsupportedError


class SeveralEngines:
    """The engine of each expert, in the bundle's order; several experts may share one. Owns the engines."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._of = dict(engines)
        self._all = list({id(engine): engine for engine in engines.values()}.values())

    def status(self) -> dict[str, Status]:
        found = {name: status for engine in self._all for name, status in engine.status().items()}
        return {name: found[name] for name in self._of}

    def load(self) -> dict[str, Load]:
        found = {name: load for engine in self._all for name, load in engine.load().items()}
        return {name: found[name] for name in self._of}

    def about(self, expert: str) -> About:
        return self._of[expert].about(expert)

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        return self._engine(list(experts)).prepare(experts, prompt, sampling)

    def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        return self._of[job.expert].generate(job)

    def check_mix(self, experts: Sequence[str], sampling: Sampling) -> None:
        self._engine(experts).check_mix(experts, sampling)

    def encode(self, expert: str, prompt: Prompt) -> tuple[int, ...]:
        return self._of[expert].encode(expert, prompt)

    def decode(self, expert: str, ids: Sequence[int]) -> str:
        return self._of[expert].decode(expert, ids)

    async def start(self) -> None:
        """Start them all, or none: when one cannot, those that were started are closed."""
        for i, engine in enumerate(self._all):
            try:
                await engine.start()
            except BaseException:
                await asyncio.gather(*(started.aclose() for started in self._all[:i]), return_exceptions=True)
                raise

    async def aclose(self) -> None:
        """Close them all, whichever fails to; then raise the first failure."""
        failures = await asyncio.gather(*(engine.aclose() for engine in self._all), return_exceptions=True)
        for failure in failures:
            if failure is not None:
                raise failure

    def _engine(self, experts: Sequence[str]) -> Engine:
        """That of all these. Raises UnsupportedError where they have several."""
        first, *others = (self._of[name] for name in experts)
        if any(engine is not first for engine in others):
            raise UnsupportedError(f"{' and '.join(experts)} cannot be mixed: different engines run them", "k")
        return first
