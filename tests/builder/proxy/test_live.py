from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from builder.candidate import Candidate, Kin, whole
from builder.checkpoints import Checkpoint
from builder.errors import MergeError
from builder.merge import stream
from builder.proxy.bench import Bench, Place
from builder.proxy.live import Live
from builder.proxy.task import Spec

NAMES = ("math", "code", "story")
SPECS = [Spec("tiny/math", "proxy", 6, 42), Spec("tiny/code", "proxy", 6, 42)]
OPTIONS: list[tuple[str, dict[str, dict[str, object]], dict[str, object]]] = [
    ("linear", {"weight": {"math": 0.2, "code": 0.5, "story": 0.3}}, {}),
    ("linear", {"weight": {"math": [0.1, 0.9, 0.2], "code": [0.5, 0.1, 0.3], "story": [0.4, 0.2, 0.9]}}, {}),
    ("task_arithmetic", {"weight": {"math": 0.7, "code": 0.2, "story": 0.4}}, {"normalize": False}),
    ("ties", {"weight": dict.fromkeys(NAMES, 0.5), "density": dict.fromkeys(NAMES, 0.4)}, {"normalize": True}),
    ("dare_ties", {"weight": dict.fromkeys(NAMES, 0.5), "density": dict.fromkeys(NAMES, 0.4)}, {}),
]


@pytest.fixture
def kin(micro_zoo: Mapping[str, Path]) -> Kin:
    return Kin.of({name: Checkpoint(micro_zoo[name]) for name in NAMES}, "base", Checkpoint(micro_zoo["base"]))


def merge(kin: Kin, option: int) -> Candidate:
    method, per_model, shared = OPTIONS[option]
    return kin.merge(method, dict.fromkeys(NAMES, 1 / 3), per_model, shared, seed=3)  # type: ignore[arg-type]


def live_of(candidate: Candidate, folders: Mapping[str, Path]) -> Live:
    return Live(candidate.plan(folders), folders[candidate.members[0]])


def test_the_live_model_holds_the_bits_that_would_be_written_whatever_it_held_before(
    kin: Kin, micro_zoo: Mapping[str, Path], tmp_path: Path
) -> None:
    candidates = [merge(kin, option) for option in range(len(OPTIONS))]
    live: Live | None = None
    for number in (0, 1, 4, 2, 3, 1, 0):  # each after another one
        plan = candidates[number].plan(micro_zoo)
        if live is None or not live.fits(plan, micro_zoo["math"]):
            live = live_of(candidates[number], micro_zoo)
        live.become(plan)
        written = tmp_path / f"{number}"
        if not written.exists():
            stream.write(plan, written)
        expected = AutoModelForCausalLM.from_pretrained(written, dtype=live.scorer.model.dtype).state_dict()
        state = live.scorer.model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), OPTIONS[number]


def test_only_what_changed_is_rewritten(kin: Kin, micro_zoo: Mapping[str, Path]) -> None:
    first = kin.linear({"math": 0.5, "code": 0.5})
    plan = first.plan(micro_zoo)
    live = live_of(first, micro_zoo)
    assert live.become(plan) == len(plan.outputs)
    assert live.become(plan) == 0
    groups = {"weight": {"math": [0.5, 0.9, 0.5], "code": [0.5, 0.1, 0.5]}}
    changed = kin.merge("linear", first.weights, groups, {})
    upper = [output for output in plan.outputs if f"{kin.stack}.{kin.layers - 1}." in output.name]
    assert live.become(changed.plan(micro_zoo)) == len(upper) * (kin.layers - kin.layers // 2)


def test_a_rewrite_that_fails_leaves_nothing_that_is_believed(kin: Kin, micro_zoo: Mapping[str, Path]) -> None:
    candidate = kin.linear({"math": 0.5, "code": 0.5})
    plan = candidate.plan(micro_zoo)
    live = live_of(candidate, micro_zoo)
    live.become(plan)
    huge = kin.merge("linear", candidate.weights, {"weight": {"math": 3e38, "code": 3e38}}, {"normalize": False})
    with pytest.raises(MergeError, match="would hold NaN or inf"):
        live.become(huge.plan(micro_zoo))
    expected = live_of(candidate, micro_zoo)
    expected.become(plan)
    live.become(plan)
    state, clean = live.scorer.model.state_dict(), expected.scorer.model.state_dict()
    assert all(torch.equal(state[name], clean[name]) for name in clean)


def places(folders: Mapping[str, Path]) -> dict[str, Place]:
    return {name: Place(folder) for name, folder in folders.items()}


def test_a_merge_scores_in_memory_as_it_does_from_disk(kin: Kin, micro_zoo: Mapping[str, Path], tmp_path: Path) -> None:
    bench = Bench(places(micro_zoo))
    for option in (3, 0):
        candidate = merge(kin, option)
        found = bench.score(candidate, SPECS)
        stream.write(candidate.plan(micro_zoo), tmp_path / f"{option}")
        again = Bench({"written": Place(tmp_path / f"{option}")}).score(whole("written"), SPECS)
        assert found.metrics == again.metrics


def test_a_tasks_scores_do_not_depend_on_what_else_is_asked(micro_zoo: Mapping[str, Path]) -> None:
    bench = Bench(places(micro_zoo))
    together = bench.score(whole("math"), SPECS).metrics
    alone = [bench.score(whole("math"), [spec]).metrics for spec in SPECS]
    assert together == alone[0] | alone[1]


def test_a_lone_model_is_scored_as_it_is(micro_zoo: Mapping[str, Path]) -> None:
    bench = Bench(places(micro_zoo))
    own = bench.score(whole("math"), SPECS).metrics
    assert bench.score(whole("code"), SPECS).metrics != own
    assert bench.score(whole("math"), SPECS).metrics == own
