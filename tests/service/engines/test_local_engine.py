from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import (
    BREAKS_LOGITS,
    BREAKS_READING,
    BREAKS_STEP_AT,
    ENDLESS,
    ENDLESS_KV_BYTES,
    HELD,
    HOLDS,
    KILLS,
    KV_BYTES,
    WINDOW,
    answer,
    byte_level_tokenizer,
    generated,
    greedy,
    holding,
    read,
    save_llama,
    serving,
    text,
    until,
)
from transformers import LlamaForCausalLM

from service.engines.base import EngineError, Job, Message, NotReadyError, PromptError, Sampling, Status, Tokens
from service.engines.local import LocalEngine, Options
from service.engines.local.expert import Expert
from service.engines.local.expert import read as read_expert
from service.engines.local.request import Request
from service.engines.local.sampler import Row
from service.engines.local.worker import Worker

PROMPTS = ["the owl", "def largest(numbers): return", "a", "日本語 👍", "the fox was afraid of the dark and", "max"]
CHUNK_BYTES = 8 * 2 * 2 * 2 * 16 * 16 * 4
"""Eight pages: two layers, keys and values, two heads, sixteen tokens, sixteen wide, fp32."""


def expected(expert: Expert, reference: Any, prompt: str, count: int) -> str:
    tokens = tuple(expert.tokenizer(prompt)["input_ids"])
    return str(expert.tokenizer.decode(generated(reference, tokens, count), skip_special_tokens=True))


def traffic(engine: LocalEngine, name: str) -> tuple[int, int]:
    load = engine.load()[name]
    return load.running, load.waiting


def test_answers_are_generates_alone_and_together(llama: Path, expert: Expert, reference: Any) -> None:
    async def ask() -> tuple[list[str], list[str]]:
        async with serving({"llama": llama}, most=4) as engine:
            alone = [await answer(engine, prompt, greedy(24)) for prompt in PROMPTS]
            return alone, await asyncio.gather(*(answer(engine, prompt, greedy(24)) for prompt in PROMPTS))

    alone, together = asyncio.run(ask())
    assert alone == together == [expected(expert, reference, prompt, 24) for prompt in PROMPTS]


def test_every_token_is_counted_and_only_the_last_piece_has_a_finish(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}) as engine:
            pieces = await read(engine.generate(engine.prepare({"llama": 1.0}, "日本", greedy(30))))
            assert sum(piece.tokens for piece in pieces) == 30
            assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
            assert all(piece.text for piece in pieces[:-1])

    asyncio.run(ask())


@pytest.mark.parametrize("listed", [False, True])
def test_an_end_token_of_the_generation_config_stops_without_text(
    llama: Path, expert: Expert, reference: Any, tmp_path: Path, listed: bool
) -> None:
    tokens = tuple(expert.tokenizer("the owl")["input_ids"])
    whole = generated(reference, tokens, 10)
    end = next(place for place, token in enumerate(whole) if place > 2 and token not in whole[:place])
    folder = shutil.copytree(llama, tmp_path / "ends")
    stated = [299, whole[end]] if listed else whole[end]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))

    async def ask() -> None:
        async with serving({"llama": folder}) as engine:
            pieces = await read(engine.generate(engine.prepare({"llama": 1.0}, "the owl", greedy(10))))
            assert text(pieces) == expert.tokenizer.decode(whole[:end])
            assert (pieces[-1].finish, sum(piece.tokens for piece in pieces)) == ("stop", end + 1)

    asyncio.run(ask())


def test_no_tokens_asked_none_given(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}) as engine:
            [piece] = await read(engine.generate(engine.prepare({"llama": 1.0}, "the owl", greedy(0))))
            assert (piece.text, piece.tokens, piece.finish) == ("", 0, "length")

    asyncio.run(ask())


def test_same_seed_same_text_in_any_company(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}) as engine:
            seeded = Sampling(30, temperature=1.0, top_p=0.9, seed=5)
            alone = await answer(engine, "the owl", seeded)
            company = [answer(engine, prompt, Sampling(30, seed=9)) for prompt in PROMPTS]
            assert (await asyncio.gather(answer(engine, "the owl", seeded), *company))[0] == alone
            assert await answer(engine, "the owl", Sampling(30, temperature=1.0, top_p=0.9, seed=6)) != alone

    asyncio.run(ask())


def test_a_reader_who_leaves_frees_the_row(endless: Path) -> None:
    async def leave() -> None:
        async with serving({"endless": endless}, most=1, kv_bytes=ENDLESS_KV_BYTES) as engine:
            await read(engine.generate(engine.prepare({"endless": 1.0}, "the owl", ENDLESS)), at_most=2)
            await until(lambda: (*traffic(engine, "endless"), engine.load()["endless"].kv) == (0, 0, 0))
            assert await answer(engine, "the owl", greedy(3), "endless")

    asyncio.run(leave())


def test_who_waits_is_served_in_turn_or_leaves_at_once(endless: Path) -> None:
    async def wait() -> None:
        async with serving({"endless": endless}, most=1, kv_bytes=ENDLESS_KV_BYTES) as engine:
            running = engine.generate(engine.prepare({"endless": 1.0}, "the owl", ENDLESS))
            await anext(running)
            waiting = [asyncio.create_task(answer(engine, "a", greedy(3), "endless")) for _ in range(2)]
            await asyncio.sleep(0)
            assert traffic(engine, "endless") == (1, 2)
            waiting[0].cancel()
            await asyncio.sleep(0)
            assert traffic(engine, "endless") == (1, 1)
            await running.aclose()
            assert await asyncio.wait_for(waiting[1], 60)

    asyncio.run(wait())


def test_a_request_is_told_how_long_it_waited(endless: Path) -> None:
    async def wait() -> None:
        async with serving({"endless": endless}, most=1, kv_bytes=ENDLESS_KV_BYTES) as engine:
            running = engine.generate(engine.prepare({"endless": 1.0}, "the owl", ENDLESS))
            await anext(running)
            came = time.monotonic()
            waiting = asyncio.create_task(read(engine.generate(engine.prepare({"endless": 1.0}, "a", greedy(3)))))
            await until(lambda: traffic(engine, "endless") == (1, 1))
            begun = time.monotonic()
            await asyncio.sleep(0.05)
            waited = time.monotonic() - begun
            await running.aclose()
            usage = (await waiting)[-1].usage
            assert usage is not None
            assert usage.queued is not None
            assert waited <= usage.queued <= time.monotonic() - came

    asyncio.run(wait())


def test_too_long_a_prompt_is_refused_with_the_numbers(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}) as engine:
            assert engine.about("llama").window == WINDOW
            engine.prepare({"llama": 1.0}, "~" * 500, greedy(12))
            with pytest.raises(PromptError, match=r"500 tokens of prompt and 13 of answer .* window of 512"):
                engine.prepare({"llama": 1.0}, "~" * 500, greedy(13))

    asyncio.run(ask())


def test_a_token_that_the_weights_do_not_have_is_refused_in_any_prompt(tmp_path: Path) -> None:
    folders = {name: save_llama(tmp_path / name) for name in ("llama", "wide")}
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    more = tokenizer.convert_tokens_to_ids("<more>")
    wide = LlamaForCausalLM.from_pretrained(folders["wide"])
    wide.resize_token_embeddings(more + 1, mean_resizing=False)
    wide.save_pretrained(folders["wide"])
    for folder in folders.values():
        tokenizer.save_pretrained(folder)

    async def ask() -> None:
        async with serving(folders) as engine:
            for prompt in ("the <more>", (Message("user", "<more>"),), Tokens((5, more)), Tokens((-1, 5))):
                with pytest.raises(PromptError, match=f"is not one of llama's {more}: leave it out"):
                    engine.prepare({"llama": 1.0}, prompt, greedy(5))
            assert await answer(engine, "the <more>", greedy(5), "wide")
            assert await answer(engine, "the owl", greedy(5))

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("kv_bytes", "reason"),
    [
        (1 << 50, "1125899.91 GB of key-value memory cannot be allocated: give --kv-memory less"),
        (1 << 80, "give --kv-memory less"),
        (CHUNK_BYTES - 1, "less than a chunk of pages: give --kv-memory at least 0.001"),
        (0, "give --kv-memory at least"),
    ],
)
def test_key_value_memory_that_cannot_be_fails_every_expert(llama: Path, kv_bytes: int, reason: str) -> None:
    async def ask() -> None:
        async with serving({"llama": llama, "none": llama / "none", "other": llama}, kv_bytes=kv_bytes) as engine:
            status = engine.status()
            assert {each.state for each in status.values()} == {"failed"}
            assert "no config.json" in status["none"].detail
            with pytest.raises(EngineError, match=f"other cannot answer: .*{reason}"):
                engine.prepare({"other": 1.0}, "the owl", greedy(1))

    asyncio.run(ask())


def test_a_chunk_of_key_value_memory_is_enough(llama: Path) -> None:
    async def ask() -> None:
        async with serving({"llama": llama, "other": llama}, kv_bytes=CHUNK_BYTES) as engine:
            assert await answer(engine, "the owl", greedy(5)) == await answer(engine, "the owl", greedy(5), "other")

    asyncio.run(ask())


@pytest.mark.parametrize("kv_bytes", [None, CHUNK_BYTES])
def test_a_device_that_is_not_there_fails_every_expert(llama: Path, kv_bytes: int | None) -> None:
    async def ask() -> None:
        async with serving({"llama": llama}, kv_bytes=kv_bytes, device="cuda:99") as engine:
            status = engine.status()["llama"]
            assert status.state == "failed"
            assert status.detail.startswith("cuda:99 cannot be used (")
            assert status.detail.endswith("choose another --device")

    asyncio.run(ask())


def test_an_expert_that_cannot_load_says_why_and_the_others_serve(llama: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(llama, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    lost = shutil.copytree(llama, tmp_path / "lost")
    tensors = load_file(lost / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lost / "model.safetensors", {"format": "pt"})

    async def ask() -> None:
        folders = {"none": tmp_path / "none", "cut": cut, "lost": lost, "llama": llama}
        async with serving(folders) as engine:
            status = engine.status()
            assert list(status) == list(folders)
            assert [status[name].state for name in folders] == ["failed", "failed", "failed", "ready"]
            assert "no config.json" in status["none"].detail
            assert "model.safetensors cannot be read" in status["cut"].detail
            assert "model.norm.weight" in status["lost"].detail
            with pytest.raises(EngineError, match=r"none cannot answer: no config.json"):
                engine.prepare({"none": 1.0}, "the owl", greedy(1))
            assert await answer(engine, "the owl", greedy(5))

    asyncio.run(ask())


def test_nothing_is_answered_before_it_is_loaded(llama: Path) -> None:
    async def ask() -> None:
        engine = LocalEngine({"llama": llama}, Options(kv_bytes=KV_BYTES))
        assert engine.status() == {"llama": Status("loading")}
        with pytest.raises(NotReadyError, match="llama is still loading"):
            engine.prepare({"llama": 1.0}, "the owl", greedy(1))
        await engine.aclose()

    asyncio.run(ask())


def test_a_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    async def ask() -> None:
        async with serving({"base": save_llama(tmp_path, template=None)}) as engine:
            with pytest.raises(PromptError, match="base has no chat template"):
                engine.prepare({"base": 1.0}, (Message("user", "hi"),), greedy(1))

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [(BREAKS_READING, "on fire"), (BREAKS_LOGITS, "not finite"), ("x" * BREAKS_STEP_AT, "on fire")],
)
def test_a_failure_ends_its_own_requests_only(llama: Path, faulty: Path, prompt: str, reason: str) -> None:
    async def ask() -> None:
        async with serving({"llama": llama, "faulty": faulty}) as engine:
            other = asyncio.create_task(answer(engine, "the owl", greedy(200)))
            with pytest.raises(EngineError, match=f"faulty failed: .*{reason}"):
                await answer(engine, prompt, greedy(9), "faulty")
            assert engine.status()["faulty"] == Status("ready")
            assert await answer(engine, "the owl", greedy(5), "faulty")
            assert await other

    asyncio.run(ask())


def test_a_prompt_that_fails_leaves_its_neighbours_alone(faulty: Path) -> None:
    async def ask() -> None:
        async with serving({"faulty": faulty}) as engine:
            undisturbed = await answer(engine, "the owl", greedy(280), "faulty")
            neighbour = engine.generate(engine.prepare({"faulty": 1.0}, "the owl", greedy(280)))
            first = await anext(neighbour)
            for prompt in (BREAKS_READING, BREAKS_LOGITS):
                with pytest.raises(EngineError):
                    await answer(engine, prompt, greedy(9), "faulty")
            assert traffic(engine, "faulty")[0] == 1
            assert text([first, *await read(neighbour)]) == undisturbed

    asyncio.run(ask())


def test_a_dead_device_thread_is_an_error_for_all_and_never_a_hang(endless: Path, faulty: Path) -> None:
    async def ask() -> None:
        async with serving({"endless": endless, "faulty": faulty}, most=1, kv_bytes=ENDLESS_KV_BYTES) as engine:
            asked = [
                (BREAKS_READING, ENDLESS, "endless"),
                (KILLS, greedy(400), "faulty"),
                ("waits", greedy(400), "faulty"),
            ]
            ends = await asyncio.gather(*(answer(engine, *each) for each in asked), return_exceptions=True)
            assert all(isinstance(end, EngineError) and "device thread died" in str(end) for end in ends), ends
            with pytest.raises(EngineError, match="device thread died"):
                engine.prepare({"endless": 1.0}, "the owl", greedy(1))
            assert {status.state for status in engine.status().values()} == {"failed"}

    asyncio.run(ask())


def test_closing_ends_the_running_and_the_waiting_at_once(endless: Path) -> None:
    async def close() -> None:
        async with serving({"endless": endless}, most=2, kv_bytes=ENDLESS_KV_BYTES) as engine:
            asked = [asyncio.create_task(answer(engine, "the owl", ENDLESS, "endless")) for _ in range(4)]
            await until(lambda: traffic(engine, "endless") == (2, 2))
            await engine.aclose()
            ends = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(end, EngineError) and "closed" in str(end) for end in ends)
            with pytest.raises(EngineError, match="closed"):
                engine.prepare({"endless": 1.0}, "the owl", greedy(1))

    asyncio.run(close())


def test_closing_tells_the_readers_before_the_step_is_over(faulty: Path) -> None:
    async def close() -> None:
        async with serving({"faulty": faulty}) as engine:
            with holding():
                asked = asyncio.create_task(answer(engine, HOLDS, greedy(9), "faulty"))
                await until(HELD.is_set)
                closing = asyncio.create_task(engine.aclose())
                with pytest.raises(EngineError, match="closed"):
                    await asked
                assert not closing.done()
            await closing

    asyncio.run(close())


def test_the_event_loop_runs_on_while_an_expert_answers(faulty: Path) -> None:
    async def tick() -> None:
        async with serving({"faulty": faulty}) as engine:
            with holding():
                prompts = (HOLDS, "the owl")
                asked = asyncio.gather(*(answer(engine, prompt, greedy(20), "faulty") for prompt in prompts))
                await until(HELD.is_set)
                for _ in range(20):
                    await asyncio.sleep(0.001)
                assert not asked.done()
            assert all(await asked)

    asyncio.run(tick())


def test_start_returns_before_the_experts_are_loaded_and_the_event_loop_runs_on(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def held(*what: Any) -> Expert:
        begun.set()
        assert go.wait(60), "nobody let it load"
        return read_expert(*what)

    monkeypatch.setattr("service.engines.local.engine.read", held)

    async def start() -> None:
        engine = LocalEngine(dict.fromkeys("abcd", llama), Options(kv_bytes=KV_BYTES))
        await engine.start()
        await until(begun.is_set)
        assert {status.state for status in engine.status().values()} == {"loading"}
        go.set()
        await until(lambda: {status.state for status in engine.status().values()} == {"ready"})
        await engine.aclose()

    asyncio.run(start())


def test_a_worker_that_has_ended_takes_no_requests() -> None:
    worker = Worker(lambda _: None, most=1, chunk=16, threads=1)
    worker.stop()
    with pytest.raises(EngineError, match="closed"):
        worker.submit(Request(Job({"llama": 1.0}, (1,), greedy(1)), Row(greedy(1), (1,), (), 300)))
