"""Experts at other servers: every request is passed on, and its answer passed through as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

import httpx

from service.engines.base import (
    About,
    Job,
    Load,
    Piece,
    Prompt,
    Sampling,
    Status,
    Tokens,
    UnsupportedError,
    Usage,
    WindowError,
    fit,
)
from service.engines.remote.address import Remote
from service.engines.remote.answer import Reading
from service.engines.remote.call import call, check
from service.engines.remote.server import Patience, Server


class RemoteEngine:
    """The experts at their servers, in that order. Raises RemoteError when a key is missing.

    Belongs to the event loop that `start` runs in. A server that is down fails its expert alone, until it is back.
    """

    def __init__(self, experts: Mapping[str, Remote], patience: Patience | None = None) -> None:
        patience = patience or Patience()
        # One more than the streams of each, to look at its health.
        connections = len(experts) * (patience.connections + 1)
        self._client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            timeout=httpx.Timeout(None, connect=patience.connect),  # the servers' waits are timed where they wait
            headers={"accept-encoding": "identity", "user-agent": "modelglue"},
        )
        self._servers = {name: Server(name, remote, self._client, patience) for name, remote in experts.items()}
        self._usage = dict.fromkeys(experts, Usage(0))
        self._watches: list[asyncio.Task[None]] = []

    def status(self) -> dict[str, Status]:
        return {name: server.status() for name, server in self._servers.items()}

    def load(self) -> dict[str, Load]:
        """`waiting` is for a first byte; memory, and who gives way for it, is the servers' affair."""
        return {
            name: Load(
                server.running,
                server.waiting,
                queries=self._usage[name].prompt,
                hits=self._usage[name].cached,
                resident=server.status().state == "ready",
            )
            for name, server in self._servers.items()
        }

    def about(self, expert: str) -> About:
        served = self._servers[expert].served()
        return About(served.window, {"engine": served.kind or "remote", "served_model": served.model})

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        """A text's tokens, and a chat's, are the server's to count; max_tokens of the whole window is what is left."""
        expert = next(iter(experts))
        self.check_mix(list(experts), sampling)
        server = self._servers[expert]
        served = server.served()
        check(expert, served, prompt, sampling)
        if isinstance(prompt, Tokens):
            return Job(experts, prompt.ids, fit(expert, len(prompt.ids), served.window, sampling), prompt)
        wanted = served.window if sampling.max_tokens is None else sampling.max_tokens
        if sampling.max_tokens is not None and wanted >= served.window:
            raise WindowError(f"{wanted} tokens of answer leave no room in {expert}'s window of {served.window}")
        return Job(experts, (), replace(sampling, max_tokens=wanted), prompt)

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Starts at the first piece asked for; closing it closes the server's stream.

        The last piece comes after the stream's end: who reads no further leaves a connection that can be used again,
        and a breaker that knows of the success. Raises a Failure, BusyError among them.
        """
        server = self._servers[job.expert]
        path, body = call(job, server.served())
        server.make_room()  # out of the attempt, for it says nothing of the server
        reading = Reading(job)
        try:
            with server.breaker.attempt():
                async with aclosing(server.events(path, body)) as events:
                    async for event in events:
                        if piece := reading.take(event):
                            yield piece
                last = reading.end()
        finally:
            if reading.heard:
                self._count(job.expert, reading.usage)
        yield last

    def check_mix(self, experts: Sequence[str], sampling: Sampling) -> None:
        if len(experts) > 1:
            raise UnsupportedError(f"{' and '.join(experts)} cannot be mixed: other servers run them", "k")

    def encode(self, expert: str, prompt: Prompt) -> tuple[int, ...]:
        """Raises UnsupportedError for what is not tokens already."""
        if isinstance(prompt, Tokens):
            return prompt.ids
        raise UnsupportedError(f"only {expert}'s server has its tokenizer: ask it there", "model")

    def decode(self, expert: str, ids: Sequence[int]) -> str:
        """Raises UnsupportedError: asking the server would take a wait, which there is none for here."""
        raise UnsupportedError(
            f"only {expert}'s server has its tokenizer, so its tokens have no text here: send text, or tokens to a "
            f"model by name and without echo",
            "prompt",
        )

    async def start(self) -> None:
        self._watches = [asyncio.create_task(server.watch()) for server in self._servers.values()]

    async def aclose(self) -> None:
        """Readers get an EngineError at once."""
        for server in self._servers.values():
            server.close()
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await self._client.aclose()

    def _count(self, expert: str, usage: Usage) -> None:
        before = self._usage[expert]
        self._usage[expert] = Usage(before.prompt + usage.prompt, before.cached + usage.cached)
