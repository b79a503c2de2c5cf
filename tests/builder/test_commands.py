"""The command line as a user meets it: what it prints, and how it fails."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import Run, sockets_are_closed

from routers import bundle


@pytest.fixture(scope="module")
def small_bundle(micro_zoo: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from builder import pipeline
    from builder.config import load_zoo
    from builder.progress import Quiet
    from builder.sources import Store

    folder = tmp_path_factory.mktemp("commands")
    file = micro_zoo["math"].parent / "pair.toml"
    file.write_text(PAIR, "utf-8")
    zoo = load_zoo(str(file))
    pipeline.build(zoo, folder / "bundle", Store(zoo, folder / "cache"), Quiet())
    return folder / "bundle"


PAIR = """
name = "pair"
experts = 2
models = [{ id = "math", source = "./math", subject = "math" }, { id = "code", source = "./code", subject = "code" }]
subjects = { math = ["Question: Ann has 12 apples. How many now?"], code = ["def add(x, y):\\n    return x + y"] }
proxy = { tasks = ["tiny/math", "tiny/code"], metric = "log_likelihood", limit = 8 }
router = { features = "math" }
"""


def test_the_plan_of_the_papers_zoo_needs_no_network(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", sockets_are_closed)
    result = run("build", "--zoo", "which16", "--plan")
    assert result.code == 0
    for words in ("migtissera/Synthia-7B-v1.2", "LLM360/CrystalChat", "fetch 16 models", "at most", "13.48", "GB"):
        assert words in result.out


def test_the_papers_zoo_without_its_weights_stops_with_what_is_missing_and_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("zoo", "fetch", "which2")
    assert result.code == 1
    for words in ("meta-llama/Llama-2-7b-chat-hf", "lmsys/vicuna-7b-v1.5", "HF_TOKEN", "--models-dir"):
        assert words in result.err
    assert "Traceback" not in result.err


def test_a_build_of_the_papers_zoo_stops_before_any_work_with_all_that_it_lacks(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(socket.socket, "connect", sockets_are_closed)
    result = run("build", "--zoo", "which16", "--out", tmp_path / "bundle")
    assert result.code == 1
    assert sum(line.startswith("  ") for line in result.err.splitlines()) == 16
    for words in ("meta-llama/Llama-2-7b-chat-hf", "gated", "HF_TOKEN", "--models-dir"):
        assert words in result.err
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "bundle.partial").exists()


def test_a_misspelt_zoo_is_answered_with_the_nearest(run: Run) -> None:
    result = run("build", "--zoo", "wich16")
    assert (result.code, result.out) == (1, "")
    assert "error: no zoo 'wich16' (did you mean 'which16'?)" in result.err


def test_zoos_are_listed_and_shown(run: Run) -> None:
    listed = run("zoo", "list").out
    assert all(name in listed for name in ("demo", "tiny", "which2", "which4-chat", "which16"))
    shown = run("zoo", "show", "which4").out
    assert "meta-math/MetaMath-7B-V1.0" in shown


def test_verify_says_how_many_files_are_as_built(run: Run, small_bundle: Path) -> None:
    count = sum(1 for _ in bundle.verify(small_bundle))
    assert f"{count} files, all as they were built" in run("verify", small_bundle).out


def test_route_prints_the_decision_that_the_bundle_takes(run: Run, small_bundle: Path) -> None:
    prompt = "Question: Eve has 9 pens and gets 3 more. How many now?"
    decision = json.loads(run("route", small_bundle, prompt).out)
    route = bundle.read(small_bundle).router.route(prompt)
    assert decision["expert"] == route.expert
    assert [r["score"] for r in decision["experts"]] == [r.score for r in route.ranking]


def test_a_k_beyond_the_experts_is_one_sentence(run: Run, small_bundle: Path) -> None:
    result = run("route", small_bundle, "hello", "--k", "9")
    assert (result.code, result.err) == (1, "error: k must be between 1 and 2, the number of experts; got 9\n")


@pytest.mark.parametrize("words", [["verify"], ["report"], ["route"]])
def test_a_folder_that_is_no_bundle_is_one_sentence(run: Run, words: Sequence[str], tmp_path: Path) -> None:
    result = run(*words, tmp_path, *(["hello"] if words == ["route"] else []))
    assert result.code == 1
    assert result.err.startswith(f"error: no manifest.json in {tmp_path}")


def test_the_report_is_one_page_that_asks_for_nothing(run: Run, small_bundle: Path, tmp_path: Path) -> None:
    assert run("report", small_bundle, "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    for word in ("<script", "src=", "href=", "url(", "@import", "http:", "https:"):
        assert word not in page
    manifest = bundle.read_manifest(small_bundle)
    assert all(name in page for name in manifest.names)
    assert "Which models are alike" in page


def test_text_of_a_zoo_is_escaped_in_the_report(small_bundle: Path, tmp_path: Path) -> None:
    import shutil

    from builder.report import render

    path = tmp_path / "copy"
    shutil.copytree(small_bundle, path)
    record = json.loads((path / bundle.RECORD).read_text("utf-8"))
    record["routing"][0]["prompt"] = "<b>bold</b>"
    (path / bundle.RECORD).write_text(json.dumps(record), "utf-8")
    page = render(path)
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold</b>" not in page


def test_a_report_that_cannot_be_written_is_one_sentence(run: Run, small_bundle: Path, tmp_path: Path) -> None:
    result = run("report", small_bundle, "--out", tmp_path / "nowhere" / "page.html")
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert "nowhere/page.html: No such file or directory" in result.err


def test_the_report_of_the_folder_one_stands_in_goes_beside_it(
    run: Run, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_bundle)
    assert run("report", ".").code == 0
    assert small_bundle.with_suffix(".html").exists()
