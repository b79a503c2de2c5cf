"""The story of a request, without HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from itertools import groupby
from typing import ClassVar, Self

import pytest
from held import Held

from routers.base import Router, Vector
from routers.policy import Limits
from routers.prompt import PromptRouter
from service.completions import LONG, Completion, start
from service.decisions import Request
from service.engines.base import (
    BusyError,
    EngineError,
    Job,
    Message,
    Piece,
    Prompt,
    PromptError,
    Sampling,
    UnsupportedError,
    Usage,
)
from service.engines.echo import EchoEngine
from service.metrics import Metrics
from service.sessions import Sessions, named


class CountingRouter:
    """Counts how often the router behind it is asked."""

    kind: ClassVar[str] = "counting"

    def __init__(self, router: Router) -> None:
        self.estimates = 0
        self.experts = router.experts
        self.arrays = router.arrays
        self._router = router

    def estimate(self, vector_D: Vector) -> Vector:
        self.estimates += 1
        return self._router.estimate(vector_D)

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Mapping[str, Vector]) -> Self:
        raise NotImplementedError


class Recording(EchoEngine):
    """Keeps its jobs; the experts of `failing` raise it when asked, those of `dying` before their first piece."""

    def __init__(self, experts: tuple[str, ...], *, mixes: bool = True) -> None:
        super().__init__(experts, mixes=mixes)
        self.jobs: list[Job] = []
        self.failing: dict[str, Exception] = {}
        self.dying: dict[str, Exception] = {}

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        for expert in experts:
            if expert in self.failing:
                raise self.failing[expert]
        return super().prepare(experts, prompt, sampling)

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        self.jobs.append(job)
        if job.expert in self.dying:
            raise self.dying[job.expert]
        async for piece in super().generate(job):
            yield piece


def test_the_engine_is_done_when_the_stop_string_is_found_not_when_the_reader_returns(router: PromptRouter) -> None:
    engine = EchoEngine(router.experts)

    async def read() -> None:
        completion = await begin(Request("one two three", Sampling(3), stop=("two",)), router, engine)
        async for piece in completion.parts[0].answers[0].pieces():
            assert engine.running == (0 if piece.finish else 1)

    asyncio.run(read())


def test_an_answer_closed_before_it_is_read_ends_the_engines_work(router: PromptRouter) -> None:
    engine = EchoEngine(router.experts)

    async def leave() -> None:
        completion = await begin(Request("one two three", Sampling(3), n=2, best_of=2), router, engine)
        assert engine.running == 2
        await completion.aclose()
        assert engine.running == 0

    asyncio.run(leave())


def test_a_reader_who_leaves_the_pieces_of_several_answers_ends_them_all(router: PromptRouter) -> None:
    engine = EchoEngine(router.experts, delay=0.01)

    async def leave() -> None:
        completion = await begin(Request("one two three", Sampling(3), n=3, best_of=3), router, engine)
        pieces = completion.pieces()
        await anext(pieces)
        assert engine.running == 3
        await pieces.aclose()
        await completion.aclose()
        assert (engine.running, engine.finished) == (0, 3)

    asyncio.run(leave())


def test_a_prompt_over_the_window_is_refused_before_the_first_piece(router: PromptRouter) -> None:
    with pytest.raises(PromptError, match="window of 4"):
        asyncio.run(begin(Request("one two three", Sampling(2)), router, EchoEngine(router.experts, window=4)))


def test_one_refused_prompt_of_several_ends_the_work_on_the_others(router: PromptRouter) -> None:
    engine = EchoEngine(router.experts, window=4, delay=0.01)

    async def refused() -> None:
        requests = [Request("one", Sampling(1)), Request("one two three", Sampling(2)), Request("two", Sampling(1))]
        with pytest.raises(PromptError):
            await start(requests, router, engine, Metrics(router.experts), Sessions())
        assert engine.running == 0

    asyncio.run(refused())


def test_a_prompt_that_fails_late_ends_the_answers_that_have_begun(router: PromptRouter) -> None:
    class LateDeath(EchoEngine):
        async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
            if len(job.tokens) == 2:
                await asyncio.sleep(0.05)
                raise EngineError(f"{job.expert} died")
            async with aclosing(super().generate(job)) as pieces:
                async for piece in pieces:
                    yield piece

    engine = LateDeath(router.experts)

    async def failed() -> None:
        requests = [Request("one two three", Sampling(3)), Request("one two", Sampling(2), "code")]
        with pytest.raises(EngineError):
            await start(requests, router, engine, Metrics(router.experts), Sessions())
        assert (engine.running, engine.finished) == (0, 1)

    asyncio.run(failed())


def test_an_answer_without_a_limit_may_fill_the_window(router: PromptRouter) -> None:
    async def answer(window: int) -> tuple[str, int, str | None]:
        completion = await begin(Request("one two three four"), router, EchoEngine(router.experts, window))
        (piece,) = await completion.whole()
        return piece.text, piece.tokens, piece.finish

    assert asyncio.run(answer(7)) == ("one two three", 3, "length")
    assert asyncio.run(answer(8)) == ("one two three four", 4, "stop")


def test_a_route_is_made_once(router: PromptRouter) -> None:
    counting = CountingRouter(router.router)
    engine = EchoEngine(router.experts)
    begun = begin(Request("python loop", Sampling(2), n=3, best_of=3), replace(router, router=counting), engine)
    assert (experts(asyncio.run(begun)), counting.estimates) == (["code"], 1)


def test_several_experts_answer_as_one_with_the_routes_weights(router: PromptRouter) -> None:
    engine = Recording(router.experts)
    completion = asyncio.run(whole(Request("python loop add", Sampling(2), limits=Limits(k=2)), router, engine))
    route = completion.parts[0].decision.route
    assert engine.jobs[0].experts == {ranked.expert: ranked.weight for ranked in route.ranking[:2]}
    assert sum(engine.jobs[0].experts.values()) == pytest.approx(1)


def test_experts_that_cannot_be_mixed_are_refused_unless_the_best_alone_will_do(router: PromptRouter) -> None:
    engine = Recording(router.experts, mixes=False)
    request = Request("python loop", Sampling(2), limits=Limits(k=2))
    with pytest.raises(UnsupportedError, match="cannot be mixed") as caught:
        asyncio.run(begin(request, router, engine))
    assert caught.value.param == "k"
    completion = asyncio.run(whole(replace(request, mixture="best"), router, engine))
    assert (engine.jobs[0].experts, completion.parts[0].decision.experts) == ({"code": 1.0}, {"code": 1.0})


def test_a_bundle_that_mixes_experts_which_cannot_be_answers_with_the_best(router: PromptRouter) -> None:
    engine = Recording(router.experts, mixes=False)
    mixing = replace(router, policy=replace(router.policy, k=2))
    asyncio.run(whole(Request("python loop", Sampling(2)), mixing, engine))
    assert engine.jobs[0].experts == {"code": 1.0}


@pytest.mark.parametrize("when", ["failing", "dying"])
def test_an_expert_that_cannot_begin_is_passed_by(router: PromptRouter, when: str) -> None:
    engine = Recording(router.experts)
    getattr(engine, when)["code"] = EngineError("code died")
    completion = asyncio.run(whole(Request("python loop", Sampling(2)), router, engine))
    route, expected = completion.parts[0].decision.route, router.route("python loop").ranking
    assert (route.expert, route.reason) == (expected[1].expert, "fallback")
    assert [ranked.expert for ranked in route.ranking] == [expected[i].expert for i in (1, 0, 2)]
    assert engine.running == 0


@pytest.mark.parametrize("when", ["failing", "dying"])
def test_an_expert_that_is_busy_is_not_passed_by_for_a_worse_one(router: PromptRouter, when: str) -> None:
    engine = Recording(router.experts)
    getattr(engine, when)["code"] = BusyError("code is full")
    with pytest.raises(BusyError):
        asyncio.run(begin(Request("python loop", Sampling(2)), router, engine))
    assert [job.expert for job in engine.jobs] == ([] if when == "failing" else ["code"])
    assert engine.running == 0


def test_all_experts_failing_is_the_first_ones_failure(router: PromptRouter) -> None:
    engine = Recording(router.experts)
    engine.failing = {name: EngineError(f"{name} died") for name in router.experts}
    with pytest.raises(EngineError, match="code died"):
        asyncio.run(begin(Request("python loop", Sampling(2)), router, engine))


def test_a_pinned_expert_that_fails_is_not_passed_by(router: PromptRouter) -> None:
    engine = Recording(router.experts)
    engine.dying["code"] = EngineError("code died")
    with pytest.raises(EngineError):
        asyncio.run(begin(Request("python loop", Sampling(2), "code"), router, engine))


def test_what_an_expert_refuses_no_other_is_asked(router: PromptRouter) -> None:
    engine = Recording(router.experts)
    engine.failing["code"] = PromptError("too long")
    with pytest.raises(PromptError):
        asyncio.run(begin(Request("python loop", Sampling(2)), router, engine))
    assert engine.jobs == []


def test_a_mixture_that_fails_leaves_each_of_the_others_alone(router: PromptRouter) -> None:
    engine = Recording(router.experts)
    engine.failing["code"] = EngineError("code died")
    completion = asyncio.run(whole(Request("python loop", Sampling(2), limits=Limits(k=2)), router, engine))
    second = router.route("python loop").ranking[1].expert
    assert completion.parts[0].decision.experts == {second: 1.0}


def test_a_mixture_that_fails_as_such_leaves_its_first_expert_alone(router: PromptRouter) -> None:
    class Unmixed(EchoEngine):
        def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
            if len(experts) > 1:
                raise EngineError("no memory for two")
            return super().prepare(experts, prompt, sampling)

    completion = asyncio.run(
        whole(Request("python loop", Sampling(2), limits=Limits(k=2)), router, Unmixed(router.experts))
    )
    decision = completion.parts[0].decision
    assert (decision.experts, decision.route.reason) == ({"code": 1.0}, "fallback")


def test_each_of_several_answers_has_a_seed_of_its_own_and_the_same_again(router: PromptRouter) -> None:
    async def texts(seed: int) -> list[str]:
        request = Request("one two three", Sampling(1, seed=seed), n=3, best_of=3)
        return [piece.text for piece in await (await begin(request, router, EchoEngine(router.experts))).whole()]

    assert asyncio.run(texts(0)) == ["one", " two", " three"]
    assert asyncio.run(texts(1)) == [" two", " three", "one"]


def test_the_likeliest_of_several_answers_are_given_and_all_are_counted(router: PromptRouter) -> None:
    async def best(n: int) -> tuple[list[str], list[float], int]:
        request = Request("one two three four", Sampling(1, seed=0, logprobs=0), n=n, best_of=4)
        completion = await begin(request, router, EchoEngine(router.experts))
        pieces = await completion.whole()
        return [piece.text for piece in pieces], [piece.scored[0].logprob or 0 for piece in pieces], completion.tokens

    all_, scores, _ = asyncio.run(best(4))
    expected = [text for _, text in sorted(zip(scores, all_, strict=True), reverse=True)]
    texts, _, tokens = asyncio.run(best(2))
    assert (texts, tokens) == (expected[:2], 4)


def test_a_slow_answer_is_waited_for_no_longer_than_patience(router: PromptRouter) -> None:
    engine = Held(router.experts)

    async def silences() -> list[bool]:
        requests = [Request("one two", Sampling(2))]
        completion = await start(requests, router, engine, Metrics(router.experts), Sessions(), patience=0.01)
        found: list[bool] = []
        async for came in completion.pieces(idle=0.1):
            found.append(not came)
            if found[-3:] == [True] * 3 and found[-4:] != [True] * 4:
                engine.gate.release()
        return found

    # A silence may last a little longer on a busy machine.
    told = [(silent, len(list(those))) for silent, those in groupby(asyncio.run(silences()))]
    assert [(silent, min(count, 3)) for silent, count in told] == [(True, 3), (False, 1)] * 2


def test_pieces_that_wait_for_their_reader_come_at_once(router: PromptRouter) -> None:
    engine = Held(router.experts)

    async def read() -> list[list[str]]:
        completion = await start(
            [Request("one two three four", Sampling(4))],
            router,
            engine,
            Metrics(router.experts),
            Sessions(),
            patience=0.01,
        )
        engine.gate.release()
        found = [await anext(pieces := completion.pieces())]
        engine.gate.release(3)
        async with asyncio.timeout(60):
            while not engine.finished:  # noqa: ASYNC110 - it has no event for it
                await asyncio.sleep(0.001)
        return [[piece.text for _, piece in came] for came in [*found, *[came async for came in pieces]]]

    assert asyncio.run(read()) == [["one"], [" two", " three", " four"]]


def test_many_prompts_leave_the_loop_to_others_between_them(router: PromptRouter) -> None:
    async def turns() -> int:
        count = 0

        async def others() -> None:
            nonlocal count
            while True:
                count += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        requests = [Request("one two", Sampling(1))] * 50
        engine = Held(router.experts)
        completion = await start(requests, router, engine, Metrics(router.experts), Sessions(), patience=0.0)
        begun = count
        task.cancel()
        await completion.aclose()
        return begun

    assert asyncio.run(turns()) >= 50


@pytest.mark.parametrize(("length", "aside"), [(LONG - 1, False), (LONG, True)])
def test_a_long_prompt_is_made_tokens_in_a_thread(router: PromptRouter, length: int, aside: bool) -> None:
    class Threaded(EchoEngine):
        thread: threading.Thread | None = None

        def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
            self.thread = threading.current_thread()
            return super().prepare(experts, prompt, sampling)

    for prompt in ("x" * length, (Message("user", "x" * length),)):
        engine = Threaded(router.experts)
        asyncio.run(whole(Request(prompt, Sampling(1)), router, engine))
        assert (engine.thread is not threading.main_thread()) == aside


def test_a_network_embeds_in_a_thread(router: PromptRouter) -> None:
    class Network:
        """Features that are no table."""

        kind = "network"
        dimension = router.features.dimension
        without_each, arrays = router.features.without_each, router.features.arrays
        threads: ClassVar[list[threading.Thread]] = []

        def vector(self, text: str) -> Vector:
            self.threads.append(threading.current_thread())
            return router.features.vector(text)

    slow = replace(router, features=Network())
    completion = asyncio.run(whole(Request("python loop", Sampling(1)), slow, EchoEngine(router.experts)))
    assert experts(completion) == ["code"]
    assert threading.main_thread() not in Network.threads


def test_what_was_cached_is_told_of_answers_that_a_stop_string_ends(router: PromptRouter) -> None:
    class Cached(EchoEngine):
        async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
            async with aclosing(super().generate(job)) as pieces:
                async for piece in pieces:
                    yield replace(piece, usage=Usage(len(job.tokens), cached=2))

    completion = asyncio.run(
        whole(Request("one two three", Sampling(3), stop=("two",)), router, Cached(router.experts))
    )
    assert completion.usage == Usage(3, cached=2)


def test_who_answers_a_session_is_remembered(router: PromptRouter) -> None:
    sessions, engine = Sessions(), Recording(router.experts)
    engine.dying["code"] = EngineError("code died")

    async def answer() -> str:
        request = Request("python loop", Sampling(1), session="mine")
        async_ = await start([request], router, engine, Metrics(router.experts), sessions)
        await async_.aclose()
        return async_.parts[0].decision.route.expert

    assert asyncio.run(answer()) == sessions.last(named(None, "mine")) != "code"


def experts(completion: Completion) -> list[str]:
    return [part.decision.route.expert for part in completion.parts]


async def begin(request: Request, router: PromptRouter, engine: EchoEngine) -> Completion:
    return await start([request], router, engine, Metrics(router.experts), Sessions())


async def whole(request: Request, router: PromptRouter, engine: EchoEngine) -> Completion:
    completion = await begin(request, router, engine)
    await completion.whole()
    return completion
