"""The command line's choices: what they become, and what is refused before anything is loaded."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from service import settings as choices
from service.__main__ import engine_of
from service.engines.base import Engine, EngineError, NotReadyError, Sampling
from service.engines.echo import EchoEngine
from service.engines.later import LaterEngine
from service.engines.remote import RemoteEngine, RemoteError
from service.settings import Kind, Settings, SettingsError

ROOT = Path(__file__).parents[2]
EXPERTS = ("math", "code", "story")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env=os.environ | environment
    )


def test_experts_may_be_elsewhere() -> None:
    found = choices.remotes(["code=http://a:8000#big", "math=http://b:1/v1"], EXPERTS)
    assert {name: (remote.root, remote.model) for name, remote in found.items()} == {
        "code": ("http://a:8000", "big"),
        "math": ("http://b:1", None),
    }


def test_the_key_of_a_server_is_in_the_environment_and_its_window_may_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = choices.remotes(
        ["code=http://a:1", "math=http://b:1"], EXPERTS, keys=["code=THEIR_KEY"], windows=["code=4096"]
    )
    assert (found["code"].api_key, found["code"].window) == ("THEIR_KEY", 4096)
    assert (found["math"].api_key, found["math"].window) == (None, None)
    monkeypatch.setenv("THEIR_KEY", "secret")
    assert found["code"].headers() == {"authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("keys", "windows", "message"),
    [
        (["math=KEY"], [], "--expert-key 'math=KEY' is of no expert that --expert names"),
        (["code"], [], "--expert-key 'code' says nothing of code"),
        ([], ["code=many"], "--expert-window says 'many' of code"),
        ([], ["code=0"], "--expert-window says '0' of code"),
    ],
)
def test_what_is_said_of_a_server_has_to_fit(keys: list[str], windows: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        choices.remotes(["code=http://a:1"], EXPERTS, keys=keys, windows=windows)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["law=http://a:1"], "names 'law', and .* are: math, code, story"),
        (["code=http://a:1", "code=http://b:1"], "code twice"),
        (["http://a:1"], "write NAME=URL"),
    ],
)
def test_experts_that_cannot_be_elsewhere_are_refused(said: list[str], message: str) -> None:
    with pytest.raises((SettingsError, RemoteError), match=message):
        choices.remotes(said, EXPERTS)


def test_fewer_bits_are_for_all_or_for_one() -> None:
    assert choices.kinds([], EXPERTS) == {}
    assert choices.kinds(["int8", "code=bnb-nf4"], EXPERTS) == {
        "math": Kind.int8,
        "code": Kind.bnb_nf4,
        "story": Kind.int8,
    }


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["int3"], "no kind of int8, int4, bnb-int8, bnb-nf4"),
        (["law=int8"], "names 'law'"),
        (["int8", "int4"], "says int8 and int4"),
    ],
)
def test_bits_that_cannot_be_are_refused(said: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        choices.kinds(said, EXPERTS)


def test_the_weights_of_an_expert_that_is_elsewhere_are_not_loaded(bundle: Any) -> None:
    async def engines() -> tuple[Engine, Engine, Engine]:
        some = choices.remotes(["code=http://a:1"], EXPERTS)
        everyone = choices.remotes([f"{name}=http://a:1" for name in EXPERTS], EXPERTS)
        return tuple(engine_of(Settings(Path(), remotes=each), bundle) for each in ({}, some, everyone))  # type: ignore[return-value]

    none, some, everyone = asyncio.run(engines())
    assert isinstance(none, LaterEngine)
    assert isinstance(everyone, RemoteEngine)
    assert [status.detail == "importing torch" for status in some.status().values()] == [True, False, True]


def test_every_option_is_in_the_help_with_its_variable() -> None:
    told = run("--help", COLUMNS="300").stdout
    for name in Settings.__dataclass_fields__:
        option = {"remotes": "expert", "kinds": "quantise"}.get(name, name)
        assert f"--{option.replace('_', '-')}" in told
        if option != "ask":
            assert f"MODELGLUE_{option.upper()}" in told


def test_the_environment_says_what_the_command_does_not(folder: Path) -> None:
    assert "no manifest.json in nowhere" in run(MODELGLUE_BUNDLE="nowhere").stderr
    refused = run("--bundle", str(folder), MODELGLUE_EXPERT="code=http://a:1 law=http://b:1")
    assert "--expert names 'law'" in refused.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "which bundle?"),
        (["--api-keys", "nowhere"], "the keys in nowhere cannot be read"),
        (["--route-log", "nowhere/log"], "the route log nowhere/log cannot be written"),
        (["--quantise", "int3"], "--quantise 'int3'"),
    ],
)
def test_a_mistake_is_a_sentence(folder: Path, options: list[str], said: str) -> None:
    ran = run(*(["--bundle", str(folder), "--port", "0"] if options else []), *options)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"error: {said}")
    assert ran.stderr.count("\n") == 1


def test_a_key_is_made_by_command() -> None:
    key, line = run("key", "ann", "--per-minute", "60").stdout.splitlines()
    assert key.startswith("key (shown this once): mg-")
    assert line.split()[-3:][1:] == ["60", "-"]
    assert key.split()[-1] not in line


class Made(EchoEngine):
    """Remembers that it was ended."""

    closed = False

    async def aclose(self) -> None:
        self.closed = True


def test_an_engine_that_takes_long_to_make_is_loading_meanwhile() -> None:
    go, made = threading.Event(), Made(EXPERTS)

    def make() -> Engine:
        go.wait(60)
        return made

    async def story() -> None:
        engine = LaterEngine(EXPERTS, make)
        await engine.start()
        assert [status.state for status in engine.status().values()] == ["loading"] * 3
        assert not any(load.resident for load in engine.load().values())
        with pytest.raises(NotReadyError):
            engine.prepare({"code": 1.0}, "one", Sampling())
        go.set()
        await loaded(engine)
        job = engine.prepare({"code": 1.0}, "one two", Sampling())
        assert [piece.text async for piece in engine.generate(job)] == ["one", " two"]
        await engine.aclose()
        assert made.closed

    asyncio.run(story())


def test_an_engine_that_cannot_be_made_fails_its_experts() -> None:
    def make() -> Engine:
        raise EngineError("no such device: choose another with --device")

    async def story() -> None:
        engine = LaterEngine(EXPERTS, make)
        await engine.start()
        await loaded(engine)
        assert "no such device" in engine.status()["code"].detail
        with pytest.raises(EngineError, match="no such device"):
            engine.about("code")
        await engine.aclose()

    asyncio.run(story())


async def loaded(engine: Engine) -> None:
    async with asyncio.timeout(60):
        while engine.status()["code"].state == "loading":  # noqa: ASYNC110 - an engine has no event for it
            await asyncio.sleep(0.01)


def test_the_command_line_is_read_without_torch() -> None:
    code = "import sys, service.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
