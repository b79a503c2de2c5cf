"""`builder cluster` as a user meets it: table, JSON, drawing, and one sentence for what cannot be."""

from __future__ import annotations

import json
import os
import shutil
import socket
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import mini_which16
import numpy as np
import pytest
from command_line import Run, sockets_are_closed
from mini_which16 import CLUSTERS, FAMILIES, WHICH12

SVG = "{http://www.w3.org/2000/svg}"


def zoo_of(file: Path, names: tuple[str, ...], models: Path, base: str = 'base = "llama2", ') -> Path:
    """A zoo whose task nobody can score and whose router's model is nowhere."""
    entries = "\n".join(f'  {{ id = "{name}", source = "{models / name}", {base}subject = "x" }},' for name in names)
    file.write_text(
        f"""
name = "small"
models = [
{entries}
]
bases = [{{ id = "llama2", source = "{models / "llama2"}" }}, {{ id = "nowhere", source = "/nowhere" }}]
subjects = {{ x = ["x"] }}
proxy = {{ tasks = ["tinyMMLU"] }}
router = {{ features = "nowhere" }}
""",
        "utf-8",
    )
    return file


@pytest.fixture
def small(mini_which16_zoo: Path, tmp_path: Path) -> Path:
    return zoo_of(tmp_path / "small.toml", ("synthia", "goat", "llemma"), mini_which16_zoo.parent)


def test_the_table_tells_families_likenesses_and_clusters(
    run: Run, mini_which16_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", sockets_are_closed)
    result = run("cluster", "--zoo", mini_which16_zoo)

    assert result.code == 0, result.err
    lines = result.out.splitlines()
    for family in FAMILIES:
        assert any(line.endswith(f": {len(family)} model{'s' * (len(family) > 1)}") for line in lines)
    assert "4 clusters at 0.95, components, by weights:" in lines
    assert lines[-4:] == [f"  {i}: {', '.join(group)}" for i, group in enumerate(CLUSTERS, 1)]
    rows = {words[2]: words for line in lines if len(words := line.split()) > 3 and words[1].isdigit()}
    assert {name: rows[name][0] for name in rows} == {n: str(i) for i, g in enumerate(CLUSTERS, 1) for n in g}
    assert rows["synthia"][3] == "1.00000"
    assert rows["synthia"][4] == rows["evolcodealpaca"][3]


def test_json_holds_all_there_is(run: Run, mini_which16_zoo: Path) -> None:
    facts = json.loads(run("cluster", "--zoo", mini_which16_zoo, "--json").out)

    assert (facts["zoo"], facts["on"], facts["threshold"], facts["linkage"]) == (
        ("mini-which16", "weights", 0.95, "components")
    )
    assert [tuple(group) for group in facts["clusters"]] == list(CLUSTERS)
    assert [tuple(family["models"]) for family in facts["families"]] == list(FAMILIES)
    assert set(facts["weights"]) == set(mini_which16.KINDS) - {"llama2", "codellama", "llemma-base", "crystal"}
    for family in facts["families"]:
        size = (len(family["models"]),) * 2
        assert {part: np.array(rows).shape for part, rows in family["similarity"].items()} == dict.fromkeys(
            ("all", "attention", "mlp"), size
        )
        assert np.array(family["dots"]).shape == size
        assert family["base"] is None


def test_the_command_line_wins_over_the_zoo(run: Run, small: Path) -> None:
    loose = json.loads(run("cluster", "--zoo", small, "--threshold", "0.5", "--linkage", "complete", "--json").out)

    assert (loose["threshold"], loose["linkage"]) == (0.5, "complete")
    assert loose["clusters"] == [["synthia", "goat", "llemma"]]
    assert json.loads(run("cluster", "--zoo", small, "--json").out)["clusters"] == [["synthia", "goat"], ["llemma"]]


def test_deltas_bring_the_base(run: Run, mini_which16_zoo: Path, tmp_path: Path) -> None:
    small = zoo_of(tmp_path / "small.toml", ("synthia", "goat"), mini_which16_zoo.parent)
    facts = json.loads(run("cluster", "--zoo", small, "--on", "deltas", "--json").out)

    assert (facts["on"], facts["families"][0]["base"]) == ("deltas", "llama2")
    assert set(facts["weights"]) == {"llama2", "synthia", "goat"}
    assert facts["families"][0]["similarity"]["all"][0][1] < 0.5
    assert facts["clusters"] == [["synthia"], ["goat"]]


def test_the_drawing_shows_every_model_pair_and_cluster(run: Run, mini_which16_zoo: Path, tmp_path: Path) -> None:
    plot = tmp_path / "zoo.svg"
    assert run("cluster", "--zoo", mini_which16_zoo, "--plot", plot).code == 0
    text = plot.read_text("utf-8")
    root = ET.fromstring(text)

    assert root.tag == f"{SVG}svg"
    told = [each.text or "" for each in root.iter(f"{SVG}text")]
    for name in (name for family in FAMILIES for name in family):
        assert name in told
    assert sum(1 for _ in root.iter(f"{SVG}title")) == sum(len(family) ** 2 for family in FAMILIES)
    outlines = [each for each in root.iter(f"{SVG}rect") if each.get("class") == "s-mark"]
    assert len(outlines) == len(CLUSTERS)
    for word in ("<script", "href=", "url(", "@import", "https:"):
        assert word not in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--threshold", "0"], "--threshold 0: give a similarity above 0, and 1 at most"),
        (["--threshold", "2"], "--threshold 2: give a similarity above 0, and 1 at most"),
        (["--threshold", "nan"], "--threshold nan: give a similarity above 0, and 1 at most"),
        (["--linkage", "average"], "--linkage average: how models are linked is components or complete"),
        (["--on", "biases"], "--on biases: compare weights or deltas"),
        (["--plot", "zoo.png"], "--plot zoo.png: the drawing is SVG, so give a name that ends in .svg"),
        (["--plot", "nowhere/zoo.svg"], "--plot nowhere/zoo.svg: there is no folder nowhere"),
        (["--models-dir", "nowhere"], "there is no folder nowhere: give the one that holds your models"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_any_work(
    run: Run, small: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    result = run("cluster", "--zoo", small, *words)

    assert (result.code, result.out, result.err) == (1, "", f"error: {sentence}\n")
    assert not (tmp_path / "cache" / "journal.sqlite").exists()


def test_deltas_without_a_base_are_one_sentence(run: Run, mini_which16_zoo: Path, tmp_path: Path) -> None:
    small = zoo_of(tmp_path / "small.toml", ("synthia", "goat"), mini_which16_zoo.parent, base="")
    result = run("cluster", "--zoo", small, "--on", "deltas")

    sentence = "deltas are from a base, and synthia names none: add `base`, or use --on weights"
    assert (result.code, result.err) == (1, f"error: {sentence}\n")


def cut(folder: Path) -> str:
    """Half a shard."""
    file = folder / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return f"{file} is truncated at"


def garbage(folder: Path) -> str:
    """A header that is none."""
    file = folder / "model-00001-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"\xff" * 40 + data[48:])
    return f"{file} has a header that is not a safetensors header"


def not_a_number(folder: Path) -> str:
    """A value that no weight is."""
    file = folder / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.endswith("proj.weight"))
    at = 8 + length + header[name]["data_offsets"][0]
    data[at : at + 2] = b"\xff\x7f"
    file.write_bytes(data)
    return f"{folder}: {name} holds NaN or inf"


def lost(folder: Path) -> str:
    """A shard that did not come."""
    (folder / "model-00003-of-00003.safetensors").unlink()
    return f"{folder} lacks model-00003-of-00003.safetensors"


@pytest.mark.parametrize("damage", [cut, garbage, not_a_number, lost])
def test_a_damaged_checkpoint_is_named(
    run: Run, mini_which16_zoo: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    for name in ("openhermes", *WHICH12[:2]):
        shutil.copytree(mini_which16_zoo.parent / name, tmp_path / "models" / name, dirs_exist_ok=True)
    told = damage(tmp_path / "models" / "openhermes")
    result = run("cluster", "--zoo", zoo_of(tmp_path / "small.toml", WHICH12[:3], tmp_path / "models"))

    assert (result.code, result.out) == (1, "")
    assert told in result.err
    assert "Traceback" not in result.err
