from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from service.engines.base import About, Engine, Job, Load, Prompt, Sampling, Status, UnsupportedError
from service.engines.echo import EchoEngine
from service.engines.several import SeveralEngines


class Named(EchoEngine):
    """Says who it is wherever it can, and remembers whether it runs."""

    def __init__(self, name: str, *experts: str, fails: bool = False) -> None:
        super().__init__(experts)
        self.name = name
        self.calls: list[str] = []
        self._fails = fails

    def status(self) -> dict[str, Status]:
        return dict.fromkeys(super().status(), Status("ready", self.name))

    def load(self) -> dict[str, Load]:
        return dict.fromkeys(super().load(), Load(running=len(self.name)))

    def about(self, expert: str) -> About:
        return About(len(self.name), {"engine": self.name, "expert": expert})

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        self.calls.append("+".join(experts))
        return super().prepare(experts, prompt, sampling)

    async def start(self) -> None:
        if self._fails:
            raise RuntimeError(f"{self.name} cannot start")
        self.calls.append("start")

    async def aclose(self) -> None:
        self.calls.append("aclose")
        if self._fails:
            raise RuntimeError(f"{self.name} cannot close")


@pytest.fixture
def near() -> Named:
    return Named("near", "fox", "owl")


@pytest.fixture
def far() -> Named:
    return Named("distant", "cat")


@pytest.fixture
def both(near: Named, far: Named) -> Engine:
    return SeveralEngines({"owl": near, "cat": far, "fox": near})


def test_every_experts_state_and_load_are_its_engines_in_the_bundles_order(both: Engine) -> None:
    assert [(name, status.detail) for name, status in both.status().items()] == [
        ("owl", "near"),
        ("cat", "distant"),
        ("fox", "near"),
    ]
    assert [(name, load.running) for name, load in both.load().items()] == [("owl", 4), ("cat", 7), ("fox", 4)]


def test_each_request_goes_to_the_engine_of_its_expert(both: Engine, near: Named, far: Named) -> None:
    async def ask(expert: str) -> str:
        return "".join([piece.text async for piece in both.generate(both.prepare({expert: 1.0}, "a b", Sampling(8)))])

    assert asyncio.run(ask("cat")) == "a b"
    assert (near.calls, far.calls, near.finished, far.finished) == ([], ["cat"], 0, 1)
    assert both.about("cat") == About(7, {"engine": "distant", "expert": "cat"})
    assert both.about("fox").facts["engine"] == "near"
    assert both.decode("cat", far.prepare({"cat": 1.0}, "x", Sampling(1)).tokens) == "x"


def test_experts_of_one_engine_are_mixed_there(both: Engine, near: Named) -> None:
    mixture = {"owl": 0.5, "fox": 0.5}
    assert both.prepare(mixture, "a", Sampling(1)).experts == mixture
    assert near.calls == ["owl+fox"]


def test_experts_of_different_engines_are_not_mixed(both: Engine, near: Named, far: Named) -> None:
    with pytest.raises(UnsupportedError, match="owl and cat cannot be mixed") as refused:
        both.prepare({"owl": 0.5, "cat": 0.5}, "a", Sampling(1))
    assert refused.value.param == "k"
    assert (near.calls, far.calls) == ([], [])


def test_an_engine_of_several_experts_starts_and_ends_once(both: Engine, near: Named, far: Named) -> None:
    asyncio.run(both.start())
    asyncio.run(both.aclose())
    assert near.calls == far.calls == ["start", "aclose"]


def test_when_one_cannot_start_those_before_it_are_closed(near: Named, far: Named) -> None:
    broken = Named("broken", "dog", fails=True)
    with pytest.raises(RuntimeError, match="broken cannot start"):
        asyncio.run(SeveralEngines({"owl": near, "dog": broken, "cat": far}).start())
    assert (near.calls, broken.calls, far.calls) == (["start", "aclose"], [], [])


def test_one_that_cannot_close_keeps_no_other_from_closing(near: Named, far: Named) -> None:
    broken = Named("broken", "dog", fails=True)
    with pytest.raises(RuntimeError, match="broken cannot close"):
        asyncio.run(SeveralEngines({"dog": broken, "owl": near, "cat": far}).aclose())
    assert near.calls == far.calls == ["aclose"]
