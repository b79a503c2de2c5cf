"""More experts than memory for their weights."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from tiny import ENDLESS, ENDLESS_KV_BYTES, ENDLESS_WINDOW, answer, greedy, read, save_llama, serving, until

from service.engines.base import EngineError, Piece, Status, UnsupportedError
from service.engines.local import LocalEngine

NAMES = ("a", "b", "c")


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
