"""Serves several experts in this process; everything here runs in the event loop, models run in the worker."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from service.engines.base import (
    About,
    BusyError,
    EngineError,
    Failure,
    Job,
    Load,
    NotReadyError,
    Piece,
    Prompt,
    PromptError,
    Sampling,
    Scored,
    Status,
    Tokens,
    UnsupportedError,
    Usage,
    fit,
)
from service.engines.local import room
from service.engines.local.bits import Bits
from service.engines.local.expert import Expert, Loading, best_dtype, config_of, read, shape_of
from service.engines.local.linear import Kind
from service.engines.local.memory import Memory
from service.engines.local.request import Prompted, Request, Token
from service.engines.local.residence import failed_to_load
from service.engines.local.sampler import Pick, Row
from service.engines.local.text import Detokenizer, encode
from service.engines.local.worker import Delivery, Worker

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that `aclose` waits for a step or a load that cannot be interrupted."""
PAGES_A_CHUNK = 8


@dataclass(frozen=True)
class Options:
    """How the engine runs.

    most: requests of an expert that run at a time; queue: those beside them that wait at most. chunk: tokens of
    prompts in a round, half of it while somebody writes. kv_bytes: of key-value memory, for all experts together; None
    is a share of what is free. dtype: bf16 where the machine computes in it, else fp32. kinds: of the linear layers of
    the experts that are named. memory_bytes: of all experts' weights, the others wait on disk; patience: seconds until
    who waits for that memory is let in. threads: `default_threads`.
    """

    most: int = 64
    queue: int = 256
    chunk: int = 256
    kv_bytes: int | None = None
    dtype: torch.dtype | None = None
    kinds: Mapping[str, Kind | Bits] = field(default_factory=dict)
    memory_bytes: int | None = None
    patience: float = 5.0
    threads: int | None = None
    device: str | None = None


class LocalEngine:
    """The experts in `folders`, in that order. Belongs to the event loop that `start` runs in."""

    def __init__(self, folders: Mapping[str, Path], options: Options = Options()) -> None:
        self._folders, self._options = dict(folders), options
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._how = Loading(options.dtype or best_dtype(device), device, options.kinds)
        self._status = dict.fromkeys(folders, Status("loading"))
        self._experts: dict[str, Expert] = {}
        self._open: set[Request] = set()
        self._places, self._waiting = dict.fromkeys(folders, 0), dict.fromkeys(folders, 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        threads = options.threads or default_threads()
        self._worker = Worker(
            self._deliver,
            self._tell,
            most=options.most,
            chunk=options.chunk,
            threads=threads,
            memory_bytes=options.memory_bytes,
            patience=options.patience,
        )
        self._loader = threading.Thread(target=self._load, name="loader", daemon=True)

    def status(self) -> dict[str, Status]:
        if self._worker.failure:
            return dict.fromkeys(self._folders, Status("failed", self._worker.failure))
        return dict(self._status)

    def load(self) -> dict[str, Load]:
        loads = self._worker.loads()
        return {
            name: replace(loads.get(name, Load()), running=self._places[name] - waiting, waiting=waiting)
            for name, waiting in self._waiting.items()
        }

    def about(self, expert: str) -> About:
        loaded = self._expert(expert)
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        return About(loaded.window, loaded.facts, {name: getattr(loaded.tokenizer, name) for name in names})

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        self.check_mix(list(experts), sampling)
        loaded = [self._expert(name) for name in experts]
        first = loaded[0]
        tokens = prompt.ids if isinstance(prompt, Tokens) else encode(first, prompt, within=first.window)
        if not tokens:
            raise PromptError("the prompt has no tokens")
        # Tokenizers may have more tokens than weights do.
        if beyond := [id_ for id_ in (max(tokens), min(tokens)) if not 0 <= id_ < first.vocabulary]:
            known = f"{first.name}'s {first.vocabulary}"
            raise PromptError(f"token {beyond[0]} of the prompt is not one of {known}: leave it out")
        window = min(expert.window for expert in loaded)
        sampling = fit(first.name, len(tokens), window, sampling)
        total = len(tokens) + (sampling.max_tokens or 0)
        if not self._worker.fits(experts, total):
            raise PromptError(f"{total} tokens are more than the key-value memory holds: ask for fewer")
        return Job(experts, tuple(tokens), sampling, prompt)

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Starts at the first piece asked for. The token that ends an answer counts, though it is no text."""
        expert, sampling = self._expert(job.expert), job.sampling
        if not sampling.max_tokens and sampling.prompt_logprobs is None:
            yield Piece("", 0, "length", usage=Usage(len(job.tokens)))
            return
        with self._place(job.expert) as begun:
            request = await self._request(job, expert)
            self._worker.submit(request)
            self._open.add(request)
            answer = _Answer(job, expert)
            try:
                while True:
                    news = await request.inbox.get()
                    begun()
                    if isinstance(news, Failure):
                        raise news
                    if piece := answer.add(news):
                        yield piece
                        if piece.finish:
                            return
            finally:
                self._open.discard(request)
                self._worker.cancel(request)

    def check_mix(self, experts: Sequence[str], sampling: Sampling) -> None:
        loaded = [self._expert(name) for name in experts]
        if len({(expert.alphabet.digest, expert.vocabulary) for expert in loaded}) > 1:
            raise UnsupportedError(f"{', '.join(experts)} have different vocabularies: they cannot be mixed", "k")
        if sum(expert.bytes for expert in loaded) > (self._options.memory_bytes or math.inf):
            raise UnsupportedError(f"{', '.join(experts)} do not fit into the memory budget together", "k")
        if len(loaded) > 1 and sampling.prompt_logprobs is not None:
            told = f"{', '.join(experts)} together score no prompts: leave echo or logprobs out, or ask for one of them"
            raise UnsupportedError(told, "echo")

    def encode(self, expert: str, prompt: Prompt) -> tuple[int, ...]:
        return prompt.ids if isinstance(prompt, Tokens) else encode(self._expert(expert), prompt)

    def decode(self, expert: str, ids: Sequence[int]) -> str:
        loaded = self._expert(expert)
        if not all(0 <= id_ < loaded.vocabulary for id_ in ids):
            raise PromptError(f"a token is not one of {expert}'s {loaded.vocabulary}")
        text: str = loaded.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

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

    @contextmanager
    def _place(self, expert: str) -> Iterator[Callable[[], None]]:
        """One of an expert's places, to run or to wait in; with what to call once it has begun. Raises BusyError."""
        if self._places[expert] >= self._options.most + self._options.queue:
            raise BusyError(f"{self._places[expert]} requests are running at {expert} or wait for it: come again later")
        waits = True

        def begun() -> None:
            nonlocal waits
            self._waiting[expert] -= waits
            waits = False

        self._places[expert] += 1
        self._waiting[expert] += 1
        try:
            yield begun
        finally:
            begun()
            self._places[expert] -= 1

    async def _request(self, job: Job, expert: Expert) -> Request:
        guide, matcher = job.sampling.guide, None
        if guide is not None:
            matcher = await asyncio.to_thread(expert.guides.matcher, guide)
        return Request(job, Row(job.sampling, job.tokens, expert.eos, expert.vocabulary, matcher))

    def _expert(self, name: str) -> Expert:
        status = self.status()[name]
        if status.state == "loading":
            raise NotReadyError(f"{name} is still loading")
        if status.state == "failed":
            raise EngineError(f"{name} cannot answer: {status.detail}")
        return self._experts[name]

    def _load(self) -> None:
        """In the loader's thread: one expert after another; one that fails leaves the others serving."""
        try:
            self._check_device()
            memory = self._memory()
        except Exception as exc:  # whatever it was, nobody may wait for ever
            for name, status in self._status.items():
                if status.state == "loading":
                    self._fail(name, exc)
            return
        for name, folder in self._folders.items():
            if self._worker.failure:
                return
            if self._status[name].state == "loading":
                try:
                    self._experts[name] = read(name, folder, self._how)
                except Exception as exc:  # transformers raises whatever it meets in the folder
                    self._fail(name, exc)
                else:
                    self._worker.add(self._experts[name], memory)

    def _check_device(self) -> None:
        """Raises EngineError where there is none."""
        try:
            torch.empty(0, device=self._how.device)
        except (AssertionError, RuntimeError) as exc:  # torch without CUDA, or a number that no device has
            reason = (str(exc).splitlines() or [repr(exc)])[0]
            raise EngineError(f"{self._how.device} cannot be used ({reason}): choose another --device") from exc

    def _memory(self) -> Memory:
        """For pages of every expert whose config can be read; the others have failed then. Raises EngineError."""
        pages = [1]
        for name, folder in self._folders.items():
            try:
                pages.append(shape_of(config_of(folder)).page)
            except Exception as exc:
                self._fail(name, exc)
        chunk = PAGES_A_CHUNK * max(pages)
        least, size = chunk * self._how.dtype.itemsize, self._options.kv_bytes
        if size is None:
            size = room.for_keys_and_values(self._how.device)
        if size < least:
            told = f"{size / 1e9:g} GB of key-value memory are less than a chunk of pages"
            raise EngineError(f"{told}: give --kv-memory at least {math.ceil(least / 1e6) / 1e3:g}")
        try:
            return Memory(size // least, chunk, self._how.dtype, self._how.device)
        except Exception as exc:  # RuntimeError, TypeError or OutOfMemoryError, by size and device
            raise EngineError(
                f"{size / 1e9:.2f} GB of key-value memory cannot be allocated: give --kv-memory less"
            ) from exc

    def _fail(self, name: str, exc: Exception) -> None:
        log.error("%s failed to load", name, exc_info=exc)
        self._status[name] = failed_to_load(self._folders[name], exc)

    def _tell(self, name: str, status: Status) -> None:
        """In a thread of the worker's."""
        self._status[name] = status

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """In the device thread: hand a step's tokens over to the loop."""
        if deliveries and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(_put, deliveries)


class _Answer:
    """Makes pieces of the news about one request."""

    def __init__(self, job: Job, expert: Expert) -> None:
        self._job, self._raw = job, expert.alphabet.raw
        self._text = Detokenizer(expert.tokenizer)
        self._count = 0
        self._scored: tuple[Scored, ...] = ()
        self._prompt: tuple[Scored, ...] = ()
        if job.sampling.prompt_logprobs is not None:
            self._prompt = (Scored(job.tokens[0], self._raw(job.tokens[0]), None),)

    def add(self, news: Token | Prompted) -> Piece | None:
        """The next piece, if there is text or an end to tell."""
        if isinstance(news, Prompted):
            self._prompt += tuple(self._score(pick) for pick in news.scores)
            return None
        text = ""
        if news.pick is not None:
            self._count += 1
            if self._job.sampling.logprobs is not None:
                self._scored += (self._score(news.pick),)
            text = "" if news.finish == "stop" else self._text.add(news.pick.id)
        if news.finish is None and not text:
            return None
        text += self._text.rest() if news.finish else ""
        usage = Usage(len(self._job.tokens), news.cached, news.queued)
        piece = Piece(text, self._count, news.finish, self._scored, self._prompt, usage)
        self._count, self._scored, self._prompt = 0, (), ()
        return piece

    def _score(self, pick: Pick) -> Scored:
        top = tuple(Scored(id_, self._raw(id_), logprob) for id_, logprob in pick.top)
        return Scored(pick.id, self._raw(pick.id), pick.logprob, top)


def default_threads() -> int:
    """OMP_NUM_THREADS; else all cores that this process may use but the event loop's."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdecimal() and int(stated) else max(1, room.cores() - 1)


def _put(deliveries: list[Delivery]) -> None:
    for request, news in deliveries:
        request.inbox.put_nowait(news)
