from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from builder.errors import BuildError
from builder.progress import Quiet
from builder.routing import edit
from routers import bundle


def test_a_newcomer_that_is_dropped_again_leaves_the_router_as_it_was(
    micro_bundle: Path, micro_zoo: dict[str, Path], tmp_path: Path
) -> None:
    newcomer = tmp_path / "newcomer"
    shutil.copytree(micro_zoo["base"], newcomer)
    more, less = tmp_path / "more", tmp_path / "less"
    edit.add(
        micro_bundle, newcomer, more, name="newcomer", prompts=["anything"], cache=tmp_path / "cache", progress=Quiet()
    )
    names = bundle.read_manifest(micro_bundle).names
    assert bundle.read_manifest(more).names == (*names, "newcomer")
    assert {*bundle.verify(more), bundle.MANIFEST} == {
        str(file.relative_to(more)) for file in more.rglob("*") if file.is_file()
    }
    before, after = bundle.read(micro_bundle).routing, bundle.read(more).routing
    assert [{name: row.scores[name] for name in names} for row in after] == [row.scores for row in before]
    assert np.isfinite([row.scores["newcomer"] for row in after]).all()
    edit.drop(more, "newcomer", less)
    for name in (bundle.ROUTING, bundle.ROUTER):
        assert (less / name).read_bytes() == (micro_bundle / name).read_bytes()


def test_what_cannot_be_added_or_dropped_is_a_sentence(micro_bundle: Path, tmp_path: Path) -> None:
    name = bundle.read_manifest(micro_bundle).names[0]
    with pytest.raises(BuildError, match="has an expert"):
        edit.add(micro_bundle, tmp_path, tmp_path / "x", name=name, cache=tmp_path, progress=Quiet())
    with pytest.raises(BuildError, match="no expert 'nobody'"):
        edit.drop(micro_bundle, "nobody", tmp_path / "x")
    with pytest.raises(BuildError, match="exists"):
        edit.drop(micro_bundle, name, tmp_path)
    assert not (tmp_path / "x").exists()


def test_the_report_counts_every_expert(micro_bundle: Path) -> None:
    found = edit.worth(micro_bundle)
    assert {each.expert for each in found.worth} == set(bundle.read_manifest(micro_bundle).names)
    assert sum(each.share for each in found.worth) == pytest.approx(1)
    assert found.gain > 0


def test_the_command_line_tells_the_route_that_the_bundle_takes(micro_bundle: Path, tmp_path: Path) -> None:
    prompt = "def add(x, y):\n    return x + y"
    command = (sys.executable, "-m", "builder", "route", str(micro_bundle), prompt, "--detail", "full")
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    route = bundle.read(micro_bundle).router.route(prompt)
    assert (told["expert"], told["confidence"]) == (route.expert, route.confidence)
    assert [each["expected_quality"] for each in told["experts"]] == [each.quality for each in route.ranking]
    assert told["counterfactuals"][0]["expert"] == route.ranking[1].expert
