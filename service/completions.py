"""The story of a request: one route a prompt, the experts' answers up to a stop string. No HTTP here."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar

from routers.prompt import PromptRouter
from service.decisions import Decision, Request, aside, attempts, decide
from service.engines.base import BusyError, Engine, EngineError, Finish, Job, Piece, Prompt, Tokens, Usage
from service.metrics import Metrics
from service.sessions import Sessions
from service.stops import until

AHEAD: Final = 4
"""Pieces of each answer that may wait for a reader."""

LONG: Final = 8192
"""Characters of a prompt that take milliseconds to become tokens."""

T = TypeVar("T")


class Answer:
    """One answer under way, and how many tokens it has cost so far. To be closed.

    began, first_at, last_at: when it was, and its first and its latest piece came, by time.perf_counter. finish: why it
    ended; `abort` where nobody waited for that, `error` where it broke.
    """

    def __init__(self, job: Job, pieces: AsyncGenerator[Piece, None]) -> None:
        self.job = job
        self.tokens = 0
        self.usage = Usage(len(job.tokens))
        self.began = time.perf_counter()
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.finish: Finish | Literal["abort", "error"] = "abort"
        self._pieces = pieces
        self.first = asyncio.create_task(self._begin())

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All pieces, the last with a finish; their texts may be empty while a stop string is pending."""
        try:
            yield self._counted(await self.first)
            async for piece in self._pieces:
                yield self._counted(piece)
        except Exception:
            self.finish = "error"
            raise

    async def whole(self) -> Piece:
        """The answer as one piece."""
        pieces = [piece async for piece in self.pieces()]
        scored = tuple(each for piece in pieces for each in piece.scored)
        text = "".join(piece.text for piece in pieces)
        return Piece(text, self.tokens, pieces[-1].finish, scored, pieces[0].prompt, self.usage)

    async def aclose(self) -> None:
        """End the engine's work, if there is any left."""
        self.first.cancel()
        await asyncio.gather(self.first, return_exceptions=True)
        await self._pieces.aclose()

    async def _begin(self) -> Piece:
        piece = await anext(self._pieces)
        self.first_at = time.perf_counter()
        return piece

    def _counted(self, piece: Piece) -> Piece:
        self.last_at = time.perf_counter()
        self.finish = piece.finish or self.finish
        self.tokens += piece.tokens
        self.usage = piece.usage or self.usage
        return piece


@dataclass(frozen=True, slots=True)
class Part:
    """What one prompt of a request came to. echoed: text that goes before each answer."""

    request: Request
    decision: Decision
    answers: tuple[Answer, ...]
    echoed: str

    async def aclose(self) -> None:
        """End all its work."""
        for answer in self.answers:
            await answer.aclose()


@dataclass(frozen=True, slots=True)
class Completion:
    """A request under way: the engine has taken all of it. Choices are counted through its parts. To be closed."""

    parts: tuple[Part, ...]

    @property
    def usage(self) -> Usage:
        """Tokens of the prompts, each counted once."""
        counts = [part.answers[0].usage for part in self.parts]
        return Usage(sum(count.prompt for count in counts), sum(count.cached for count in counts))

    @property
    def tokens(self) -> int:
        """Tokens generated so far, those of answers that `best_of` drops with them."""
        return sum(answer.tokens for answer in self._answers)

    async def whole(self) -> list[Piece]:
        """Every choice as one piece."""
        pieces = iter(await _all([answer.whole() for answer in self._answers]))
        chosen: list[Piece] = []
        for part in self.parts:
            answers = [next(pieces) for _ in part.answers]
            # Stable: the earlier of two that are equally likely.
            best = sorted(answers, key=_likelihood, reverse=True) if part.request.best_of > part.request.n else answers
            chosen += best[: part.request.n]
        return chosen

    async def pieces(self, idle: float = math.inf) -> AsyncGenerator[list[tuple[int, Piece]], None]:
        """Every choice's pieces, with its number, all at once that are there; none whenever `idle` seconds pass."""
        queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(AHEAD * len(self._answers))
        pumps = [asyncio.create_task(_pump(i, answer, queue)) for i, answer in enumerate(self._answers)]
        try:
            left = len(pumps)
            while left:
                try:
                    async with asyncio.timeout(None if math.isinf(idle) else idle):
                        came = [await queue.get()]
                except TimeoutError:
                    yield []
                    continue
                while not queue.empty():
                    came.append(queue.get_nowait())
                good = [(index, piece) for index, piece in came if isinstance(piece, Piece)]
                left -= sum(piece.finish is not None for _, piece in good)
                if good:
                    yield good
                for _, failure in came:
                    if isinstance(failure, Exception):
                        raise failure
        finally:
            await _ended(pumps)

    async def aclose(self) -> None:
        """End the engine's work, if there is any left."""
        for part in self.parts:
            await part.aclose()

    @property
    def _answers(self) -> list[Answer]:
        return [answer for part in self.parts for answer in part.answers]


async def start(
    requests: Sequence[Request],
    router: PromptRouter,
    engine: Engine,
    metrics: Metrics,
    sessions: Sessions,
    patience: float | None = None,
) -> Completion:
    """Route each prompt once, pin, and wait for all first pieces: whatever can be refused is refused here.

    After `patience` seconds it returns without them, and what fails then is raised with the pieces.
    """
    deadline = math.inf if patience is None else asyncio.get_running_loop().time() + patience
    starting: list[asyncio.Task[Part]] = []
    try:
        for request in requests:
            starting.append(asyncio.create_task(_start(request, router, engine, metrics, sessions, deadline)))
            await asyncio.sleep(0)  # others' turn
        return Completion(tuple(await asyncio.gather(*starting)))
    except BaseException:
        for part in await _ended(starting):
            if isinstance(part, Part):
                await part.aclose()
        raise


async def _start(
    request: Request,
    router: PromptRouter,
    engine: Engine,
    metrics: Metrics,
    sessions: Sessions,
    deadline: float,
) -> Part:
    """The first attempt that begins. What the engine refuses is refused; where it fails, the next expert is tried."""
    failures: list[EngineError] = []
    for decision in attempts(await aside(router, lambda: decide(request, router, engine, sessions))):
        try:
            job = await _prepare(request, decision, engine)
            echoed = _echoed(request, decision, engine)
            answers = tuple(_answer(each, request, engine, metrics) for each in _jobs(job, request))
            part = Part(request, decision, answers, echoed)
            await _begun(part, deadline)
        except BusyError:  # whoever is sent away to come again later would be answered by a worse expert
            raise
        except EngineError as exc:
            failures.append(exc)
            continue
        metrics.decided(decision.route, decision.seconds)
        if decision.session:
            sessions.answered(decision.session, decision.route.expert)
        return part
    raise failures[0]


async def _prepare(request: Request, decision: Decision, engine: Engine) -> Job:
    """The checked job; a long prompt is made tokens in a thread."""
    if _characters(request.prompt) < LONG:
        return engine.prepare(decision.experts, request.prompt, request.sampling)
    return await asyncio.to_thread(engine.prepare, decision.experts, request.prompt, request.sampling)


def _characters(prompt: Prompt) -> int:
    if isinstance(prompt, Tokens):
        return 0
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)


def _jobs(job: Job, request: Request) -> list[Job]:
    """One for each answer, each with a seed of its own."""
    seed = job.sampling.seed
    if seed is None:
        return [job] * request.best_of
    return [replace(job, sampling=replace(job.sampling, seed=seed + i)) for i in range(request.best_of)]


def _answer(job: Job, request: Request, engine: Engine, metrics: Metrics) -> Answer:
    pieces = engine.generate(job)
    if request.stop:
        pieces = until(request.stop, pieces, keep=request.keep_stop, after=job.sampling.min_tokens)
    return Answer(job, metrics.metered(job, pieces))


def _echoed(request: Request, decision: Decision, engine: Engine) -> str:
    if not request.echo:
        return ""
    assert isinstance(request.prompt, str | Tokens)
    prompt = request.prompt
    return prompt if isinstance(prompt, str) else engine.decode(decision.route.expert, prompt.ids)


async def _begun(part: Part, deadline: float) -> None:
    """Wait until every answer has begun, or for the deadline; on a failure, none of them goes on."""
    firsts = [answer.first for answer in part.answers]
    seconds = None if math.isinf(deadline) else deadline - asyncio.get_running_loop().time()
    try:
        done, _ = await asyncio.wait(firsts, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for first in done:
            first.result()
    except BaseException:
        await part.aclose()
        raise


def _likelihood(piece: Piece) -> float:
    """The mean log-probability of its tokens."""
    logprobs = [scored.logprob for scored in piece.scored if scored.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


async def _pump(index: int, answer: Answer, queue: asyncio.Queue[tuple[int, Piece | Exception]]) -> None:
    try:
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                await queue.put((index, piece))
    except Exception as exc:
        await queue.put((index, exc))


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all return; the first that fails ends the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _ended(tasks)


async def _ended(tasks: Iterable[asyncio.Task[T]]) -> list[T | BaseException]:
    """Cancel tasks and wait for their end: what each returned, or raised."""
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    return await asyncio.gather(*cancelled, return_exceptions=True)
