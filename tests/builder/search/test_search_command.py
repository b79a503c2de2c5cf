from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Run
from stopping import stopped

from builder.record import SearchRecord
from builder.search.command import RECORD

SEARCH = ("search", "--strategy", "coefficient", "--limit", "4")


def evaluations(cache: Path) -> dict[str, tuple[int, float]]:
    """What was scored: by key, the row and the seconds; a row that is computed again is another row."""
    if not (cache / "journal.sqlite").exists():
        return {}
    with sqlite3.connect(cache / "journal.sqlite", timeout=30) as db:
        try:
            rows = db.execute("SELECT key, rowid, seconds FROM results WHERE kind IN ('score', 'failure')").fetchall()
        except sqlite3.OperationalError:
            return {}
    return {key: (row, seconds) for key, row, seconds in rows}


def record(out: Path) -> SearchRecord:
    return SearchRecord.model_validate_json((out / RECORD).read_text("utf-8"))


def test_a_search_writes_recipes_that_builder_merge_runs_and_a_record_of_every_trial(
    run: Run, zoo_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run(*SEARCH, "--zoo", zoo_file, "--out", out)
    assert result.code == 0, result.err
    found = record(out)
    (cluster,) = found.clusters
    assert len(cluster.trials) == 27
    assert found.samples == 16
    best = max(trial.score.mean for trial in cluster.trials if trial.score)
    assert cluster.score == pytest.approx(max(best, cluster.standings[0].score.mean))
    assert [one.name for one in cluster.standings][1] == "uniform soup"
    for one in cluster.standings:
        assert one.score.low <= one.score.mean <= one.score.high
    assert len(cluster.weights) > 1  # every branch knows a task that the others do not
    (recipe,) = (out / "recipes").iterdir()
    assert run("merge", recipe, tmp_path / "merged").code == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert "uniform soup" in result.out


def test_a_second_search_is_free_and_says_the_same(run: Run, zoo_file: Path, tmp_path: Path) -> None:
    assert run(*SEARCH, "--zoo", zoo_file, "--out", tmp_path / "one").code == 0
    before = evaluations(tmp_path / "cache")
    assert run(*SEARCH, "--zoo", zoo_file, "--out", tmp_path / "two").code == 0
    assert evaluations(tmp_path / "cache") == before
    assert (tmp_path / "one" / RECORD).read_bytes() == (tmp_path / "two" / RECORD).read_bytes()


def test_json_lines_tell_of_every_trial_and_of_the_result(run: Run, zoo_file: Path, tmp_path: Path) -> None:
    result = run(
        "search",
        "--zoo",
        zoo_file,
        "--strategy",
        "evolution",
        "--trials",
        6,
        "--limit",
        3,
        "--out",
        tmp_path / "run",
        "--json",
    )
    lines = [json.loads(line) for line in result.out.splitlines()]
    trials = [line for line in lines if line["event"] == "trial"]
    assert [line["number"] for line in trials] == list(range(1, 7))
    assert trials[-1]["best"] == max(line["score"] for line in trials)
    accepted = [line["score"] for line in lines if line["event"] == "accepted"]
    assert accepted == sorted(accepted)
    assert lines[-1]["event"] == "result"
    assert lines[-1]["clusters"][0]["trials"] == 6


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--strategy", "luck"), "search.strategy: Input should be 'average', 'coefficient'"),
        (("--method", "tise", "--strategy", "evolution"), "no method 'tise' (did you mean 'ties'?)"),
        (("--method", "ties"), "average merges linearly: for ties the strategy is evolution"),
        (("--level", "2"), "search.level: Input should be less than 1"),
        (("--tasks", "tiny/moth"), "nobody knows tiny/moth"),
        (("--strategy", "evolution", "--method", "ties"), "ties needs the base of"),
        (("--devices", "cpu", "--executor", "ray"), "--devices is of --executor local"),
        (("--limit", "0"), "proxy.limit: Input should be greater than 0"),
        (("--strategy", "evolution", "--groups", "50"), "search.groups is 50 and the models have 2 layers"),
    ],
)
def test_wrong_choices_are_one_sentence_and_nothing_is_written(
    run: Run, zoo_file: Path, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    result = run("search", "--zoo", zoo_file, "--out", tmp_path / "run", *words)
    assert result.code == 1
    assert sentence in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_a_plan_says_the_budget_and_whether_members_fit_in_memory(run: Run, zoo_file: Path) -> None:
    result = run("search", "--zoo", zoo_file, "--strategy", "evolution", "--trials", 77, "--plan")
    assert result.code == 0
    assert "at most 77 trials" in result.out
    assert "mapped once and fit in memory" in result.out


def test_a_plan_says_so_where_members_do_not_fit_in_memory(
    run: Run, zoo_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from builder import files

    monkeypatch.setattr(files, "available_memory", lambda: 1000)
    result = run("search", "--zoo", zoo_file, "--plan")
    assert "do not fit in 0.0 GB of memory: every trial streams them from disk" in result.out


def test_a_search_killed_at_any_time_goes_on_and_ends_as_an_unbroken_one(zoo_file: Path, tmp_path: Path) -> None:
    search = ["search", "--strategy", "heuristic+evolution", "--trials", 16, "--limit", 4, "--zoo", zoo_file]
    broken = [*search, "--out", tmp_path / "broken", "--cache", tmp_path / "cache"]
    known = evaluations(tmp_path / "cache")
    for _ in range(2):
        assert stopped(signal.SIGKILL, 18, *broken).returncode == -signal.SIGKILL
        before, known = known, evaluations(tmp_path / "cache")
        assert len(known) > len(before)
        assert {key: known[key] for key in before} == before  # nothing finished was computed again
        assert not (tmp_path / "broken" / RECORD).exists()
    whole = [*search, "--out", tmp_path / "unbroken", "--cache", tmp_path / "other"]
    for words in (broken, whole):
        subprocess.run([sys.executable, "-m", "builder", *map(str, words)], check=True, capture_output=True)
    assert {key: evaluations(tmp_path / "cache")[key] for key in known} == known
    assert (tmp_path / "broken" / RECORD).read_bytes() == (tmp_path / "unbroken" / RECORD).read_bytes()


@pytest.mark.usefixtures("own_code")
def test_a_zoo_with_every_trap_of_which16_is_searched_cluster_by_cluster(
    run: Run, mini_which16_zoo: Path, tmp_path: Path
) -> None:
    """Vocabularies differ, one head is tied, one model is of an architecture of its own; merges are of task vectors."""
    import mini_which16
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ("--strategy", "evolution", "--method", "ties", "--trials", 4, "--limit", 2, "--groups", 2)
    result = run("search", "--zoo", mini_which16_zoo, "--out", tmp_path / "run", *words)
    assert result.code == 0, result.err
    found = record(tmp_path / "run")
    assert {frozenset(cluster.models) for cluster in found.clusters} == set(map(frozenset, mini_which16.CLUSTERS))
    tried = {len(cluster.models): [trial.failure for trial in cluster.trials] for cluster in found.clusters}
    assert tried == {12: [None] * 4, 2: [None] * 4, 1: []}
    for recipe in (tmp_path / "run" / "recipes").iterdir():
        assert run("merge", recipe, tmp_path / recipe.stem).code == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / recipe.stem)
        assert len(AutoTokenizer.from_pretrained(tmp_path / recipe.stem)) <= model.config.vocab_size
