"""More experts than memory for their weights."""

from __future__ import annotations

import asyncio
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from tiny import ENDLESS, ENDLESS_KV_BYTES, ENDLESS_WINDOW, answer, greedy, read, save_llama, serving, text, until

from service.engines.base import EngineError, Job, Piece, Status, UnsupportedError
from service.engines.local import LocalEngine
from service.engines.local.expert import Expert, Loading
from service.engines.local.expert import read as read_expert
from service.engines.local.forward import Model
from service.engines.local.lane import Lane
from service.engines.local.memory import Memory
from service.engines.local.ops import Shape
from service.engines.local.request import News, Request, Token
from service.engines.local.residence import Residence
from service.engines.local.sampler import Row
from service.engines.local.worker import Delivery, Worker

NAMES = ("a", "b", "c")
SMALL = Shape(1, 1, 1, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_llama(tmp_path_factory.mktemp(name), seed=seed, max_position_embeddings=ENDLESS_WINDOW)
        for seed, name in enumerate(NAMES)
    }


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def resident(engine: LocalEngine) -> set[str]:
    return {name for name, load in engine.load().items() if load.resident}


async def ask(engine: LocalEngine, name: str, tokens: int = 8) -> str:
    return await answer(engine, "the owl", greedy(tokens), name)


def serving_two(folders: dict[str, Path], **options: Any) -> Any:
    return serving(folders, memory_bytes=int(2.5 * size(folders["a"])), kv_bytes=ENDLESS_KV_BYTES, **options)


def write_endlessly(engine: LocalEngine, name: str) -> AsyncGenerator[Piece, None]:
    return engine.generate(engine.prepare({name: 1.0}, "the owl", ENDLESS))


async def begin_to_wait(engine: LocalEngine, name: str) -> asyncio.Task[str]:
    """A request for an expert that is not in memory."""
    waiting = asyncio.create_task(ask(engine, name))
    await until(lambda: engine.load()[name].waiting == 1)
    return waiting


def test_all_answer_and_the_longest_unused_makes_way(folders: dict[str, Path]) -> None:
    async def run() -> None:
        async with serving(folders) as engine:
            await until(lambda: len(resident(engine)) == 3)
            roomy = [await ask(engine, name) for name in NAMES]
        async with serving_two(folders) as engine:
            await until(lambda: len(resident(engine)) == 2)
            assert engine.status() == {
                "a": Status("ready"),
                "b": Status("ready"),
                "c": Status("ready", "not in memory"),
            }
            assert [await ask(engine, name) for name in NAMES] == roomy
            assert resident(engine) == {"b", "c"}
            await ask(engine, "b")
            await ask(engine, "a")
            assert resident(engine) == {"a", "b"}
            together = await asyncio.gather(*(ask(engine, name) for name in NAMES * 4))
            assert together == roomy * 4

    asyncio.run(run())


def test_an_expert_that_writes_is_not_dropped(folders: dict[str, Path]) -> None:
    async def run() -> None:
        async with serving_two(folders, patience=60.0) as engine:
            await until(lambda: len(resident(engine)) == 2)
            writing = [write_endlessly(engine, name) for name in "ab"]
            for each in writing:
                await anext(each)
            waiting = await begin_to_wait(engine, "c")
            await asyncio.gather(ask(engine, "a"), ask(engine, "b"))  # at every step of theirs, c may come in
            assert resident(engine) == {"a", "b"}
            await writing[1].aclose()
            assert await waiting
            assert resident(engine) == {"a", "c"}
            written = engine.load()["a"].kv
            await until(lambda: engine.load()["a"].kv > written)
            await writing[0].aclose()

    asyncio.run(run())


def test_a_stream_of_requests_for_others_keeps_nobody_out(folders: dict[str, Path]) -> None:
    async def run() -> None:
        async with serving_two(folders, patience=0.05) as engine:
            await until(lambda: len(resident(engine)) == 2)
            over, counts = False, Counter[str]()

            async def keep_asking(name: str) -> None:
                """The next one comes when the one before is half written: there is always one."""
                last = asyncio.create_task(ask(engine, name, 100))
                while not over:
                    last, before = asyncio.create_task(ask(engine, name, 200)), last
                    await before
                    counts[name] += 1
                await last

            async def all_are_answered() -> None:
                before = counts.copy()
                await until(lambda: all(counts[name] > before[name] + 1 for name in "ab"))

            streams = [asyncio.create_task(keep_asking(name)) for name in "ab"]
            await all_are_answered()
            for _ in range(3):
                await ask(engine, "c")
            await all_are_answered()
            over = True
            await asyncio.gather(*streams)

    asyncio.run(run())


def test_who_gives_up_waiting_closes_nobody(folders: dict[str, Path]) -> None:
    async def run() -> None:
        async with serving_two(folders, patience=0.0) as engine:
            await until(lambda: len(resident(engine)) == 2)
            writing = [write_endlessly(engine, name) for name in "ab"]
            for each in writing:
                await anext(each)
            waiting = await begin_to_wait(engine, "c")
            # One of the two lets nobody in any more: it makes room for c.
            await until(lambda: any(lane.closing for lane in engine._worker._lanes.values()))
            shut_out = asyncio.gather(ask(engine, "a"), ask(engine, "b"))
            await until(lambda: engine.load()["a"].waiting + engine.load()["b"].waiting == 1)
            waiting.cancel()
            assert await shut_out
            assert resident(engine) == {"a", "b"}
            for each in writing:
                await each.aclose()

    asyncio.run(run())


def test_an_expert_larger_than_the_budget_says_so_and_the_others_serve(folders: dict[str, Path]) -> None:
    async def run() -> None:
        async with serving(folders, memory_bytes=1000) as engine:
            for status in engine.status().values():
                assert status.state == "failed"
                assert "memory budget is 0.00 GB" in status.detail

    asyncio.run(run())


def test_a_mixture_has_all_its_experts_in_memory_or_is_refused(folders: dict[str, Path]) -> None:
    async def run() -> None:
        async with serving_two(folders) as engine:
            await until(lambda: len(resident(engine)) == 2)
            mixed = engine.prepare({"a": 0.5, "c": 0.5}, "the owl", greedy(8))
            assert (await read(engine.generate(mixed)))[-1].finish
            assert resident(engine) == {"a", "c"}
            with pytest.raises(UnsupportedError, match="a, b, c do not fit into the memory budget together"):
                engine.prepare(dict.fromkeys(NAMES, 1 / 3), "the owl", greedy(8))

    asyncio.run(run())


def test_an_expert_that_cannot_come_back_fails_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    async def run() -> None:
        gone = shutil.copytree(folders["c"], tmp_path / "gone")
        async with serving_two(folders | {"c": gone}) as engine:
            await until(lambda: len(resident(engine)) == 2)
            (gone / "model.safetensors").write_bytes(b"")
            with pytest.raises(EngineError, match=r"c failed: .*model\.safetensors cannot be read"):
                await ask(engine, "c")
            assert engine.status()["c"].state == "failed"
            assert await ask(engine, "a")

    asyncio.run(run())


def test_a_mixture_fails_with_whichever_of_its_experts_and_holds_nobody_up(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    async def run() -> None:
        gone = shutil.copytree(folders["c"], tmp_path / "gone")
        async with serving_two(folders | {"c": gone}) as engine:
            await until(lambda: len(resident(engine)) == 2)
            (gone / "model.safetensors").write_bytes(b"")
            mixed = read(engine.generate(engine.prepare({"a": 0.5, "c": 0.5}, "the owl", greedy(8))))
            failure, found = await asyncio.gather(mixed, ask(engine, "a"), return_exceptions=True)
            assert isinstance(failure, EngineError)
            assert str(failure).startswith("c failed: ")
            assert isinstance(found, str)

    asyncio.run(run())


def test_a_stream_of_requests_for_others_keeps_no_mixture_out(folders: dict[str, Path]) -> None:
    async def run() -> None:
        async with serving_two(folders, patience=0.05, most=2) as engine:
            await until(lambda: len(resident(engine)) == 2)
            over = False

            async def keep_asking(name: str) -> None:
                while not over:
                    await ask(engine, name, 20)

            streams = [asyncio.create_task(keep_asking(name)) for name in "aaabbbccc"]
            for pair in ("ac", "bc", "ab", "ca"):
                job = engine.prepare(dict.fromkeys(pair, 0.5), "the owl", greedy(8))
                assert text(await asyncio.wait_for(read(engine.generate(job)), 10))
            over = True
            await asyncio.gather(*streams)

    asyncio.run(run())


class Kept(Expert):
    """Its weights come when they are let."""

    gate: ClassVar[threading.Event]

    def load(self, progress: Any = None) -> Model:
        self.gate.wait()
        return super().load()


@dataclass
class Readers:
    """What a worker's requests have got so far; `wait` until all of them have an end."""

    ends: dict[Request, News] = field(default_factory=dict)
    came: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, deliveries: list[Delivery]) -> None:
        with self.came:
            self.ends |= {
                request: news for request, news in deliveries if not isinstance(news, Token) or news.finish is not None
            }
            self.came.notify()

    def wait(self, *requests: Request) -> None:
        with self.came:
            assert self.came.wait_for(lambda: all(request in self.ends for request in requests), 20)


def request(*experts: str) -> Request:
    sampling = greedy(4)
    return Request(
        Job(dict.fromkeys(experts, 1 / len(experts)), (5, 6, 7), sampling), Row(sampling, (5, 6, 7), (), 300)
    )


class Counting(Worker):
    """Counts its rounds."""

    rounds = 0

    def _round(self, lanes: Sequence[Lane]) -> None:
        self.rounds += 1
        super()._round(lanes)


def test_who_waits_for_an_experts_weights_holds_up_nobody_and_keeps_nobody_busy(folders: dict[str, Path]) -> None:
    Kept.gate = threading.Event()
    how = Loading(torch.float32, torch.device("cpu"))
    experts = [read_expert(name, folders[name], how) for name in "ab"]
    late = Kept(*(getattr(experts[1], each.name) for each in fields(Expert)))
    memory = Memory(64, 8 * experts[0].shape.page, torch.float32, torch.device("cpu"))
    readers = Readers()
    worker = Counting(readers.deliver, most=4, chunk=64, threads=1)
    worker.start()
    try:
        worker.add(experts[0], memory)
        worker.add(late, memory)
        mixed, behind = request("a", "b"), request("a")
        worker.submit(mixed)
        worker.submit(behind)
        readers.wait(behind)
        rounds = worker.rounds
        time.sleep(0.2)
        assert worker.rounds == rounds
        assert mixed not in readers.ends
        Kept.gate.set()
        readers.wait(mixed)
        assert all(isinstance(end, Token) for end in readers.ends.values())
    finally:
        Kept.gate.set()
        worker.stop()
        worker.join(20)


@dataclass(eq=False)
class Weights:
    """An expert of so many bytes that fails to load so often."""

    name: str
    bytes: int = 1
    failures: int = 0
    loads: int = 0
    folder: Path = Path("somewhere")
    shape: Shape = SMALL

    def load(self, progress: Any) -> object:
        self.loads += 1
        progress(0.5)
        if self.loads <= self.failures:
            raise OSError("too many open files")
        return object()


class House:
    """A residence with lanes; `settle` for who waits, after so many loads have ended."""

    def __init__(self, limit: int | None = None, patience: float = 0.0, retry: float = 1000.0) -> None:
        self.woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.told: list[tuple[str, Status]] = []
        self.residence = Residence(
            limit, patience, lambda: self.woken.put(None), lambda *told: self.told.append(told), retry
        )
        self.memory = Memory(8, 8 * SMALL.page, torch.float32, torch.device("cpu"))
        self.lanes: dict[str, Lane] = {}

    def add(self, weights: Weights, *, resident: bool = False) -> Lane:
        """A lane, which runs a request if it is there."""
        lane = self.lanes[weights.name] = Lane(cast("Any", weights), self.memory)
        if resident:
            self.residence.begin(lane)
            self.settle(loads=1)
            self.run(lane, request(weights.name))
        return lane

    def run(self, lane: Lane, *requests: Request) -> None:
        lane.running = [(each, cast("Any", None)) for each in requests]

    def settle(self, *waiting: Request, loads: int = 0) -> list[tuple[Request, str, Exception]]:
        for _ in range(loads):
            self.woken.get(timeout=20)
        return self.residence.settle([(each, [self.lanes[name] for name in each.job.experts]) for each in waiting])

    def there(self) -> set[str]:
        return {name for name, lane in self.lanes.items() if lane.model is not None}

    def closing(self) -> set[str]:
        return {name for name, lane in self.lanes.items() if lane.closing}


@pytest.fixture
def houses() -> Iterator[Any]:
    """Makes houses, and closes them."""
    made: list[House] = []

    def make(**options: Any) -> House:
        made.append(House(**options))
        return made[-1]

    yield make
    for house in made:
        house.residence.close()


def test_what_did_not_load_is_not_tried_again_at_once_and_fails_who_asks(houses: Any) -> None:
    house = houses()
    house.add(Weights("a"), resident=True)
    broken = Weights("c", failures=1)
    house.add(broken)
    mixed, alone, other, later = request("a", "c"), request("c"), request("a"), request("c")
    assert house.settle(mixed, alone, other) == []
    lost = house.settle(mixed, alone, other, loads=1)
    assert [(who, expert, str(why)) for who, expert, why in lost] == [
        (mixed, "c", "too many open files"),
        (alone, "c", "too many open files"),
    ]
    assert [who for who, _, _ in house.settle(later)] == [later]
    assert broken.loads == 1
    assert house.told[-1][1].state == "failed"
    assert house.residence.due() == pytest.approx(1000, abs=60)


def test_what_did_not_load_for_a_request_is_ready_to_be_tried_again_after_a_pause(houses: Any) -> None:
    house = houses(retry=0.0)
    house.add(Weights("c", failures=1))
    assert house.settle(request("c")) == []
    assert len(house.settle(request("c"), loads=1)) == 1
    assert house.settle() == []
    assert house.told[-1] == ("c", Status("ready", "not in memory; when it was last loaded: too many open files"))
    assert house.residence.due() is None
    again = request("c")
    assert house.settle(again) == house.settle(again, loads=1) == []
    assert house.told[-1] == ("c", Status("ready"))
    assert house.there() == {"c"}


def test_an_expert_that_comes_for_a_request_is_ready_all_the_time(houses: Any) -> None:
    house = houses(limit=1)
    house.add(Weights("a"), resident=True)
    house.run(house.lanes["a"])
    house.residence.begin(house.add(Weights("b")))
    house.settle(request("b"))
    house.settle(loads=1)
    assert [status.state for name, status in house.told if name == "b"] == ["ready", "ready"]


def test_what_was_fetched_for_a_mixture_stays_until_it_is_let_in(houses: Any) -> None:
    house = houses(limit=2)
    a, b = (house.add(Weights(name), resident=True) for name in "ab")
    house.add(Weights("c"))
    mixed, later = request("a", "c"), request("b")
    house.settle(mixed)
    assert house.closing() == {"b"}
    house.run(b)
    house.settle(mixed)
    house.settle(mixed, later, loads=1)
    for _ in range(3):
        assert house.settle(mixed, later) == []
        assert house.there() == {"a", "c"}
        assert house.closing() == set()
    house.run(a, mixed)
    house.run(house.lanes["c"], mixed)
    house.settle(later)
    assert len(house.closing()) == 1


def test_room_that_is_made_for_who_waited_longest_is_not_taken_by_another(houses: Any) -> None:
    house = houses(limit=2)
    a = house.add(Weights("a"), resident=True)
    house.add(Weights("b"), resident=True)
    small = Weights("small")
    house.add(small)
    house.add(Weights("large", bytes=2))
    first, second = request("large"), request("small")
    house.settle(first, second)
    house.run(a)
    house.settle(first, second)
    assert house.there() == {"b"}
    assert house.closing() == {"b"}
    assert small.loads == 0
    house.run(house.lanes["b"])
    house.settle(first, second)
    house.settle(first, second, loads=1)
    assert house.there() == {"large"}


def test_patience_begins_anew_with_who_comes_after_one_who_left(houses: Any) -> None:
    house = houses(limit=1, patience=0.2)
    house.add(Weights("a"), resident=True)
    house.add(Weights("b"))
    left, came = request("b"), request("b")
    house.settle(left)
    house.settle()
    time.sleep(0.3)
    house.settle(came)
    assert house.closing() == set()
    time.sleep(0.3)
    house.settle(came)
    assert house.closing() == {"a"}


def test_nobody_stays_closed_for_who_has_left(houses: Any) -> None:
    house = houses(limit=1)
    house.add(Weights("a"), resident=True)
    house.add(Weights("b"))
    house.settle(request("b"))
    assert house.closing() == {"a"}
    house.settle(request("a"))
    assert house.closing() == set()
