"""`builder merge` as a user meets it: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamas
import numpy as np
import pytest
import yaml
from command_line import Run, sockets_are_closed
from fake_hub import COMMIT, FakeHub

from builder.merge.command import size

SIZE = sum(x.size for x in llamas.random(0).values())
COUNT = len(llamas.random(0))
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "empty_hub" not in request.fixturenames:
        monkeypatch.setattr(socket.socket, "connect", sockets_are_closed)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a base and two fine-tunes of it."""
    base = llamas.random(0)
    for i, name in enumerate(("base", "a", "b")):
        llamas.write(tmp_path / "models" / name, llamas.tuned(base, i, 64) if i else base)
    return tmp_path / "models"


@pytest.fixture
def recipe(models: Path) -> Write:
    """Writes a recipe beside the models: linear of a and b, with what is given changed."""

    def write(**more: Any) -> Path:
        listed = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
        file = models / "recipe.yaml"
        file.write_text(yaml.safe_dump({"merge_method": "linear", "models": listed, **more}, sort_keys=False), "utf-8")
        return file

    return write


def dare(seed: int | None = None) -> dict[str, Any]:
    listed = [{"model": "a", "parameters": {"weight": 1, "density": 0.5}}]
    said = {"merge_method": "dare_linear", "base_model": "base", "models": listed}
    return said if seed is None else {**said, "seed": seed}


# What it does


def test_a_merge_says_what_it_wrote(run: Run, recipe: Write, tmp_path: Path) -> None:
    result = run("merge", recipe(), tmp_path / "out")

    assert (result.code, result.err) == (0, "")
    said = rf"{tmp_path}/out is written: {COUNT} tensors, 0.00 GB read, 0.00 GB written in \d+\.\d s by \d+ threads\n"
    assert re.fullmatch(said, result.out)
    merged = llamas.read(tmp_path / "out")
    a, b = (llamas.read(tmp_path / "models" / name) for name in "ab")
    assert all(np.array_equal(merged[name], (a[name] + b[name]) / 2) for name in merged)


def test_a_merge_tells_programs_in_json(run: Run, recipe: Write, tmp_path: Path) -> None:
    result = run("merge", recipe(parameters={"int8_mask": True}), tmp_path / "out", "--json", "--threads", "1")

    facts = json.loads(result.out)
    assert facts.pop("seconds") > 0
    assert facts == {
        "out": str(tmp_path / "out"),
        "tensors": COUNT,
        "read": 8 * SIZE,
        "written": 4 * SIZE,
        "threads": 1,
        "notes": ["int8_mask has no effect here: masks are not kept in memory"],
    }


def test_models_are_found_beside_the_recipe_wherever_one_stands(
    run: Run, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe()
    monkeypatch.chdir("/")

    assert run("merge", file, tmp_path / "out").code == 0


def test_models_of_the_current_directory_are_found_too(
    run: Run, recipe: Write, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe().read_text("utf-8"), "utf-8")
    monkeypatch.chdir(models)

    assert run("merge", tmp_path / "recipe.yaml", tmp_path / "out").code == 0


def test_hub_ids_are_looked_for_in_the_folder_of_models(run: Run, recipe: Write, models: Path, tmp_path: Path) -> None:
    (models / "a").rename(models / "org--a")
    listed = [{"model": name, "parameters": {"weight": 1}} for name in ("org/a", "org/b")]

    assert run("merge", recipe(models=listed), tmp_path / "out", "--models-dir", models).code == 0


def test_hub_models_are_fetched_at_their_revisions_once(
    run: Run, recipe: Write, models: Path, tmp_path: Path, empty_hub: FakeHub
) -> None:
    for name in "ab":
        empty_hub.repos[f"org/{name}"] = llamas.contents(models / name)
    listed = [{"model": f"org/{name}@{COMMIT}", "parameters": {"weight": 0.5}} for name in "ab"]
    file = recipe(models=listed)

    assert run("merge", file, tmp_path / "out").code == 0
    assert sorted(empty_hub.downloaded()) == ["config.json", "config.json", "model.safetensors", "model.safetensors"]
    assert run("merge", file, tmp_path / "again").code == 0
    assert len(empty_hub.downloaded()) == 4
    assert run("merge", recipe(), tmp_path / "here").code == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again", "here")]
    assert weights[0] == weights[1] == weights[2]
    assert f"| org/a@{COMMIT} | model.safetensors |" in (tmp_path / "out/README.md").read_text("utf-8")


def test_threads_are_as_many_as_asked_for(run: Run, recipe: Write, tmp_path: Path) -> None:
    assert run("merge", recipe(), tmp_path / "out", "--threads", 3).out.endswith("by 3 threads\n")


def test_a_shard_is_as_large_as_asked_for_at_most(run: Run, recipe: Write, tmp_path: Path) -> None:
    assert run("merge", recipe(), tmp_path / "out", "--shard-size", "100KB").code == 0

    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 100_000 + 5_000 for path in files)


def test_memory_decides_how_many_threads_run(run: Run, recipe: Write, tmp_path: Path) -> None:
    result = run("merge", recipe(), tmp_path / "out", "--threads", 64, "--max-memory", "320MB")
    assert result.code == 0, result.err
    (threads,) = re.findall(r"by (\d+) threads?\n", result.out)
    assert int(threads) < 64
    result = run("merge", recipe(), tmp_path / "other", "--max-memory", "10MB")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(r"error: one thread needs 0\.3\d GB, more than --max-memory: raise it\n", result.err)


def test_a_folder_is_replaced_only_when_asked_for(run: Run, recipe: Write, tmp_path: Path) -> None:
    run("merge", recipe(), tmp_path / "out")
    (tmp_path / "out/old.txt").write_text("old", "utf-8")

    result = run("merge", recipe(), tmp_path / "out")
    assert result.code == 1
    assert result.err == f"error: {tmp_path}/out exists: choose another folder, or replace it with --overwrite\n"
    assert run("merge", recipe(), tmp_path / "out", "--overwrite").code == 0
    assert not (tmp_path / "out/old.txt").exists()


def test_a_seed_on_the_command_line_goes_before_the_recipes(run: Run, recipe: Write, tmp_path: Path) -> None:
    for out, seed, more in (("a", None, []), ("b", 3, []), ("c", 3, ["--seed", 0]), ("d", None, ["--seed", 3])):
        assert run("merge", recipe(**dare(seed)), tmp_path / out, *more).code == 0

    a, b, c, d = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abcd")
    assert a == c != b == d
    assert "Seed 3;" in (tmp_path / "d/README.md").read_text("utf-8")


def test_notes_go_to_stderr(run: Run, recipe: Write, tmp_path: Path) -> None:
    result = run("merge", recipe(parameters={"int8_mask": True, "density": 0.5}), tmp_path / "out")

    assert result.code == 0
    assert result.err.splitlines() == [
        "note: int8_mask has no effect here: masks are not kept in memory",
        "note: density has no effect on linear",
    ]
    assert "note:" not in result.out


def test_models_that_differ_are_merged_when_that_is_allowed(
    run: Run, recipe: Write, models: Path, tmp_path: Path
) -> None:
    config = json.loads((models / "b/config.json").read_text("utf-8"))
    (models / "b/config.json").write_text(json.dumps({**config, "rope_theta": 1e6}), "utf-8")

    refused = run("merge", recipe(), tmp_path / "out")
    assert refused.code == 1
    assert "a and b differ in rope: " in refused.err
    assert "--allow-mismatch rope merges them all the same" in refused.err
    allowed = run("merge", recipe(), tmp_path / "out", "--allow-mismatch", "rope", "--allow-mismatch", "norm")
    assert allowed.code == 0
    assert allowed.err.startswith("note: a and b differ in rope: ")


def test_statistics_are_measured_and_merged_by(
    run: Run, recipe: Write, micro_zoo: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "Ann has 12 apples."}\n{"text": "Once upon a time"}\n', "utf-8")
    listed = []
    for name in ("math", "story"):
        words = ("--data", tmp_path / "texts.jsonl", "--kind", "regmean", "--filter", "mlp.up")
        result = run("stats", micro_zoo[name], "--out", tmp_path / f"{name}.stats", *words)
        assert (result.code, result.out) == (
            0,
            f"{tmp_path}/{name}.stats is written: regmean statistics of 2 tensors on 2 texts\n",
        )
        listed.append({"model": str(micro_zoo[name]), "parameters": {"statistics": str(tmp_path / f"{name}.stats")}})

    assert run("merge", recipe(merge_method="regmean", models=listed), tmp_path / "out").code == 0
    assert f"| {tmp_path}/math.stats | math.stats |" in (tmp_path / "out/README.md").read_text("utf-8")


# Plans


def test_a_plan_is_printed_and_nothing_is_written(run: Run, recipe: Write, models: Path, tmp_path: Path) -> None:
    listed = [{"model": "a", "parameters": {"weight": [0.25, 0.75]}}]
    file = recipe(
        merge_method="task_arithmetic", base_model="base", models=listed, parameters={"t": 1}, dtype="bfloat16"
    )

    result = run("merge", file, "--plan")

    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    for name in llamas.random(0):
        assert sum(name in line for line in lines) == 1, name
    (line,) = (line for line in lines if "model.layers.1.mlp.down_proj.weight" in line)
    for words in ("64", "160", "bfloat16", "task_arithmetic", "weight [0.75]", "normalize False", "lambda 1"):
        assert words in line
    assert "note: t has no effect on task_arithmetic" in lines
    assert lines[-1] == f"{COUNT} tensors; 0.00 GB to read, 0.00 GB to write"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_a_plan_is_written_as_json(run: Run, recipe: Write, tmp_path: Path) -> None:
    result = run("merge", recipe(**dare()), tmp_path / "out", "--plan", "--json")

    facts = json.loads(result.out)
    assert facts.keys() == {"outputs", "read", "written", "notes"}
    assert (facts["read"], facts["written"], facts["notes"]) == (8 * SIZE, 4 * SIZE, [])
    assert len(facts["outputs"]) == COUNT
    assert next(each for each in facts["outputs"] if "0.input_layernorm" in each["tensor"]) == {
        "tensor": "model.layers.0.input_layernorm.weight",
        "shape": [64],
        "dtype": "float32",
        "method": "dare_linear",
        "inputs": [{"model": "a", "tensor": "model.layers.0.input_layernorm.weight"}],
        "base": {"model": "base", "tensor": "model.layers.0.input_layernorm.weight"},
        "parameters": {"weight": [1.0], "density": [0.5], "normalize": False, "rescale": True, "lambda": 1.0},
    }
    assert not (tmp_path / "out").exists()


# How it fails


def test_a_merge_without_a_folder_is_refused(run: Run, recipe: Write) -> None:
    result = run("merge", recipe())

    assert (result.code, result.out) == (1, "")
    assert result.err == "error: give the folder to write: builder merge RECIPE.yaml OUT, or --plan to look first\n"


def test_all_mistakes_of_a_recipe_are_told_at_once(run: Run, recipe: Write, tmp_path: Path) -> None:
    file = recipe(merge_metod="x", dtype="float8", parameters={"wieght": 1})

    result = run("merge", file, tmp_path / "out")

    assert result.code == 1
    assert result.err.startswith("error: ")
    for words in ("did you mean 'merge_method'", "dtype: ", "did you mean 'weight'"):
        assert words in result.err
    assert len(result.err.splitlines()) == 3


def test_a_recipe_that_is_not_there_is_a_sentence(run: Run, tmp_path: Path) -> None:
    result = run("merge", tmp_path / "no.yaml", tmp_path / "out")

    assert result.err == f"error: no recipe {tmp_path}/no.yaml: No such file or directory\n"


def test_all_missing_models_are_told_at_once_without_the_network(run: Run, recipe: Write, tmp_path: Path) -> None:
    names = ["./nowhere", str(tmp_path / "lost"), "a", "gone", "b+./no/lora/here"]
    listed = [{"model": name, "parameters": {"weight": 1}} for name in names]

    result = run("merge", recipe(models=listed), tmp_path / "out")

    assert result.code == 1
    head, *lines = result.err.splitlines()
    assert head == "error: these models are not here and cannot be had:"
    lost = ["./nowhere", "./no/lora/here", "gone", f"{tmp_path}/lost"]
    assert sorted(lines) == sorted(f"  {name}: there is no such folder" for name in lost)
    assert not (tmp_path / "out.partial").exists()


def test_models_that_the_hub_does_not_have_are_told_with_those_that_are_not_here(
    run: Run, recipe: Write, tmp_path: Path, empty_hub: FakeHub
) -> None:
    empty_hub.repos["org/secret"], empty_hub.gated = {}, {"org/secret"}
    listed = [{"model": name, "parameters": {"weight": 1}} for name in ("org/none", "./lost", "org/secret", "a")]

    result = run("merge", recipe(models=listed), tmp_path / "out")

    assert result.code == 1
    for name, reason in (
        ("org/none", "not on the hub"),
        ("org/secret", "gated; accept its terms"),
        ("./lost", "there is no such folder"),
    ):
        assert f"  {name}: {reason}" in result.err
    assert len(result.err.splitlines()) == 4
    assert empty_hub.downloaded() == []


@pytest.mark.parametrize("said", ["5XB", "", "-1GB", "0", "0.0GB", "GB", "1e3", "5 G B", "nan", "0.5B"])
@pytest.mark.parametrize("option", ["--shard-size", "--max-memory"])
def test_what_is_no_size_is_refused_before_anything_else(run: Run, tmp_path: Path, option: str, said: str) -> None:
    result = run("merge", tmp_path / "no.yaml", tmp_path / "out", option, said)

    assert (result.code, result.out) == (1, "")
    assert result.err == f"error: {option} {said}: give a size such as 5GB, 500MB or 2GiB\n"


@pytest.mark.parametrize(
    ("said", "expected"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), (" 7 ", 7), ("12B", 12)],
)
def test_sizes_are_read(said: str, expected: int) -> None:
    assert size(said, "--x") == expected


@pytest.mark.parametrize("words", [["--threads", "0"], ["--seed", "-1"], ["--threads", "many"], ["--devise", "cpu"]])
def test_options_out_of_range_are_refused(run: Run, recipe: Write, tmp_path: Path, words: list[str]) -> None:
    result = run("merge", recipe(), tmp_path / "out", *words)

    assert result.code == 2
    assert words[0] in result.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_mismatch_is_refused(run: Run, recipe: Write, tmp_path: Path) -> None:
    result = run("merge", recipe(), tmp_path / "out", "--allow-mismatch", "everything")

    assert result.code == 1
    assert result.err == (
        "error: --allow-mismatch everything: what may differ is one of class, rope, norm, heads, activation\n"
    )


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(run: Run, recipe: Write, tmp_path: Path, device: str) -> None:
    result = run("merge", recipe(), tmp_path / "out", "--device", device)

    assert result.code == 1
    assert result.err.startswith(f"error: --device {device} cannot be used (")
    assert result.err.endswith("): use --device cpu\n")
    assert not (tmp_path / "out.partial").exists()


def test_a_model_with_nan_is_a_sentence_and_leaves_nothing(
    run: Run, recipe: Write, models: Path, tmp_path: Path
) -> None:
    broken = llamas.random(3)
    broken["lm_head.weight"][-1, -1] = np.nan
    llamas.write(models / "c", broken)
    listed = [{"model": name, "parameters": {"weight": 1}} for name in "ac"]

    result = run("merge", recipe(models=listed), tmp_path / "out")

    assert (result.code, result.out) == (1, "")
    sentence = "lm_head.weight holds NaN or inf: fetch the model again, or leave it out"
    assert result.err == f"error: {models}/c: {sentence}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "models"]


# What it imports

IMPORTS = """
import json, sys
sys.argv = ["builder", "merge", *sys.argv[1:]]
from builder.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def test_a_merge_of_folders_imports_nothing_large(recipe: Write, tmp_path: Path) -> None:
    words = [recipe(), tmp_path / "out", "--cache", tmp_path / "cache"]

    done = subprocess.run([sys.executable, "-c", IMPORTS, *words], capture_output=True, text=True, check=True)

    *_, written, modules = done.stdout.splitlines()
    assert "is written" in written
    imported = set(json.loads(modules))
    assert "numpy" in imported
    assert not imported & {"torch", "transformers", "peft", "scipy", "huggingface_hub", "optuna", "pandas"}
