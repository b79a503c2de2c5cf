"""Serves several experts in this process; everything here runs in the event loop, models run in the worker."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from service.engines.base import (
    About,
    EngineError,
    Job,
    Load,
    NotReadyError,
    Piece,
    Prompt,
    Sampling,
    Status,
    Tokens,
    Usage,
    fit,
)
from service.engines.local.expert import Expert, best_dtype, load
from service.engines.local.lane import Delivery, Request
from service.engines.local.text import Detokenizer, encode
from service.engines.local.worker import Traffic, Worker

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that `aclose` waits for a step or a load that cannot be interrupted."""


class LocalEngine:
    """The experts in `folders`, in that order, up to `max_batch` requests of an expert at a time, the rest in a queue.

    Belongs to the event loop that `start` runs in. dtype: bf16 where the machine computes in it, else fp32; threads:
    `default_threads`.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        max_batch: int = 16,
        dtype: torch.dtype | None = None,
        threads: int | None = None,
    ) -> None:
        self._folders = dict(folders)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = dtype or best_dtype(self._device)
        self._status = dict.fromkeys(folders, Status("loading"))
        self._experts: dict[str, Expert] = {}
        self._open: set[Request] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = Worker(self._deliver, max_batch, threads or default_threads())
        self._loader = threading.Thread(target=self._load, name="loader", daemon=True)

    def status(self) -> dict[str, Status]:
        if self._worker.failure:
            return dict.fromkeys(self._folders, Status("failed", self._worker.failure))
        return dict(self._status)

    def traffic(self, expert: str) -> Traffic:
        """How many of an expert's requests run and wait."""
        return self._worker.traffic(expert)

    def load(self) -> dict[str, Load]:
        return {name: Load(*self._worker.traffic(name)) for name in self._folders}

    def about(self, expert: str) -> About:
        return About(self._expert(expert).window)

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        expert = next(iter(experts))
        loaded = self._expert(expert)
        tokens = prompt.ids if isinstance(prompt, Tokens) else encode(loaded, prompt)
        return Job(experts, tokens, fit(expert, len(tokens), loaded.window, sampling), prompt)

    def decode(self, expert: str, ids: Sequence[int]) -> str:
        text: str = self._expert(expert).tokenizer.decode(list(ids))
        return text

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Starts at the first piece asked for. The token that ends an answer counts, though it is no text."""
        if not job.sampling.max_tokens:
            yield Piece("", 0, "length", usage=Usage(len(job.tokens)))
            return
        text = Detokenizer(self._expert(job.expert).tokenizer)
        request = Request(job)
        self._worker.submit(request)
        self._open.add(request)
        try:
            count = 0
            while True:
                token = await request.inbox.get()
                if isinstance(token, EngineError):
                    raise token
                count += 1
                piece = "" if token.finish == "stop" else text.add(token.id)
                if token.finish:
                    yield Piece(piece + text.rest(), count, token.finish, usage=Usage(len(job.tokens)))
                    return
                if piece:
                    yield Piece(piece, count)
                    count = 0
        finally:
            self._open.discard(request)
            self._worker.cancel(request)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker.start()
        self._loader.start()

    async def aclose(self) -> None:
        """Readers get an EngineError at once; then waits for the threads, for each at most PATIENCE."""
        self._worker.stop()
        for request in self._open:
            request.inbox.put_nowait(EngineError(self._worker.failure))
        await asyncio.to_thread(self._worker.join, PATIENCE)
        if self._loader.is_alive():
            await asyncio.to_thread(self._loader.join, PATIENCE)
        self._experts.clear()

    def _expert(self, name: str) -> Expert:
        status = self.status()[name]
        if status.state == "loading":
            raise NotReadyError(f"{name} is still loading")
        if status.state == "failed":
            raise EngineError(f"{name} cannot answer: {status.detail}")
        return self._experts[name]

    def _load(self) -> None:
        """In the loader's thread: one expert after another; one that fails leaves the others serving."""
        for name, folder in self._folders.items():
            if self._worker.failure:
                return
            try:
                expert = load(name, folder, self._dtype, self._device)
                self._worker.add(expert)
            except Exception as exc:  # transformers raises whatever it meets in the folder
                log.exception("%s failed to load", name)
                reason = str(exc) if isinstance(exc, EngineError) else f"{folder} does not load: {exc!r}"
                self._status[name] = Status("failed", reason)
            else:
                self._experts[name] = expert
                self._status[name] = Status("ready")

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """In the device thread: hand a step's tokens over to the loop."""
        if deliveries and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(_put, deliveries)


def default_threads() -> int:
    """OMP_NUM_THREADS, which a container sets to its share of the node; else all cores but the event loop's."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdecimal() and int(stated) else max(1, len(os.sched_getaffinity(0)) - 1)


def _put(deliveries: list[Delivery]) -> None:
    for request, token in deliveries:
        request.inbox.put_nowait(token)
