from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stopping import stopped
from transformers import AutoModelForCausalLM, AutoTokenizer

from builder import pipeline
from builder.candidate import Kin, whole
from builder.checkpoints import Checkpoint
from builder.config import load_zoo
from builder.errors import BuildError, CheckpointError, SourceError, ZooError
from builder.explore import Explored, Found
from builder.progress import Quiet
from builder.record import Record
from builder.search.problem import Outcome
from builder.sources import Store
from routers import bundle


@pytest.fixture
def built(micro_bundle: Path) -> Path:
    return micro_bundle


def build(zoo_file: Path, folder: Path) -> Path:
    zoo = load_zoo(str(zoo_file))
    pipeline.build(zoo, folder / "bundle", Store(zoo, folder / "cache"), Quiet())
    return folder / "bundle"


def tree(path: Path) -> dict[str, str]:
    """Every file's hash, by its path in the folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def variant(zoo_file: Path, name: str, change: Callable[[str], str]) -> Path:
    file = zoo_file.with_name(f"{name}.toml")
    file.write_text(change(zoo_file.read_text("utf-8")), "utf-8")
    return file


def test_every_file_is_as_the_manifest_says_and_none_is_beside(built: Path) -> None:
    assert {*bundle.verify(built), bundle.MANIFEST} == set(tree(built))


def test_the_same_zoo_and_seed_give_the_same_bytes(built: Path, zoo_file: Path, tmp_path: Path) -> None:
    assert tree(build(zoo_file, tmp_path)) == tree(built)


def test_the_bundle_holds_no_path_of_this_machine(built: Path, zoo_file: Path) -> None:
    for name in (bundle.MANIFEST, bundle.RECORD):
        assert str(zoo_file.parent) not in (built / name).read_text("utf-8")


def test_specialists_are_kept_and_the_proven_router_finds_them(built: Path) -> None:
    manifest = bundle.read_manifest(built)
    assert len(manifest.experts) == 3
    assert manifest.router.kind == "linear"
    assert manifest.scorecard is not None
    assert manifest.scorecard.proven


def test_prompts_of_a_subject_go_to_the_expert_of_that_subject(built: Path) -> None:
    manifest = bundle.read_manifest(built)
    homes = {f"tiny/{subject}": expert.name for expert in manifest.experts for subject in expert.subjects}
    assert len(homes) == 4
    routed = Record.model_validate_json((built / bundle.RECORD).read_text("utf-8")).routing
    assert sum(item.picked == homes[item.task] for item in routed) >= 0.9 * len(routed)


def test_every_expert_loads_in_transformers_and_answers(built: Path) -> None:
    for expert in bundle.read_manifest(built).names:
        folder = built / bundle.EXPERTS / expert
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("def add(x, y):", return_tensors="pt").input_ids
        assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


def test_a_merged_expert_is_the_mean_of_its_members_rounded_once(built: Path, micro_zoo: dict[str, Path]) -> None:
    record = Record.model_validate_json((built / bundle.RECORD).read_text("utf-8"))
    merged = next(expert for expert in bundle.read_manifest(built).experts if expert.method == "linear")
    assert {s.model: s.coefficient for s in merged.sources} == record.clusters[0].weights
    members = [Checkpoint(micro_zoo[source.model]) for source in merged.sources]
    written = Checkpoint(built / bundle.EXPERTS / merged.name)
    for name in written.tensors:
        mean = np.mean([member.read(name).astype(np.float64) for member in members], axis=0)
        expected = torch.from_numpy(mean).to(torch.float32).to(torch.bfloat16).float().numpy()
        # float32 sums may fall on the other side of a rounding border than float64's.
        assert np.mean(written.read(name) != expected) < 0.01
        assert written.read(name) == pytest.approx(expected, rel=2**-7, abs=1e-6)


def test_building_again_is_free_and_changes_nothing(zoo_file: Path, tmp_path: Path) -> None:
    path = build(zoo_file, tmp_path)
    before = {file: (path / file).stat().st_mtime_ns for file in tree(path)}
    zoo = load_zoo(str(zoo_file))
    assert not pipeline.build(zoo, path, Store(zoo, tmp_path / "cache"), Quiet())
    assert {file: (path / file).stat().st_mtime_ns for file in tree(path)} == before


def test_a_build_that_is_killed_goes_on_and_ends_with_the_same_bundle(
    built: Path, zoo_file: Path, tmp_path: Path
) -> None:
    command = ["build", "--zoo", zoo_file, "--out", tmp_path / "bundle", "--cache", tmp_path / "cache"]
    assert stopped(signal.SIGKILL, 7, *command).returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    assert results(tmp_path / "cache") == 7
    subprocess.run([sys.executable, "-m", "builder", *map(str, command)], check=True, capture_output=True)
    assert tree(tmp_path / "bundle") == tree(built)
    assert not (tmp_path / "bundle.partial").exists()


def test_ctrl_c_stops_a_build_with_a_sentence_and_without_a_bundle(zoo_file: Path, tmp_path: Path) -> None:
    command = ["build", "--zoo", zoo_file, "--out", tmp_path / "bundle", "--cache", tmp_path / "cache"]
    ended = stopped(signal.SIGINT, 5, *command)
    assert ended.returncode == 130
    assert ended.stderr.endswith("stopped; run it again to go on\n")
    assert "Traceback" not in ended.stderr
    assert results(tmp_path / "cache") == 5
    assert not (tmp_path / "bundle").exists()


def results(cache: Path) -> int:
    with sqlite3.connect(cache / "journal.sqlite") as db:
        return int(db.execute("SELECT count(*) FROM results").fetchone()[0])


def test_what_a_killed_build_of_other_choices_left_is_not_in_the_bundle(
    built: Path, zoo_file: Path, tmp_path: Path
) -> None:
    stray = tmp_path / "bundle.partial" / bundle.EXPERTS / "stray"
    stray.mkdir(parents=True)
    (stray / "model.safetensors").write_bytes(b"x")
    assert tree(build(zoo_file, tmp_path)) == tree(built)


def test_one_expert_a_cluster_is_the_papers_choice(zoo_file: Path, tmp_path: Path) -> None:
    file = variant(zoo_file, "papers", lambda text: text.replace("experts = 3", 'experts = "cluster"'))
    manifest = bundle.read_manifest(build(file, tmp_path))
    assert len(manifest.experts) == 1
    assert manifest.router.kind == "fixed"
    apart = variant(zoo_file, "apart", lambda t: t.replace("experts = 3", 'experts = "cluster"').replace("0.5", "1.0"))
    assert set(bundle.read_manifest(build(apart, tmp_path / "apart")).names) == {"math", "code", "story", "chat"}


def test_a_router_that_does_not_win_gives_way_to_the_best_single(zoo_file: Path, tmp_path: Path) -> None:
    def confuse(text: str) -> str:
        """Every model is given the prompts of another."""
        names = ["math", "code", "story", "chat"]
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            text = text.replace(
                f'{{ id = "{name}", source = "./{name}", subject = "{name}" }}',
                f'{{ id = "{name}", source = "./{name}", subject = "{other}" }}',
            )
        return text.replace("[router]", '[router]\nkind = "linear"')

    path = build(variant(zoo_file, "confused", confuse), tmp_path)
    manifest = bundle.read_manifest(path)
    assert manifest.scorecard is not None
    assert manifest.scorecards["linear"].gain_low <= 0
    assert manifest.router.kind == "fixed"
    picked = {item.picked for item in Record.model_validate_json((path / bundle.RECORD).read_text("utf-8")).routing}
    assert picked == {manifest.scorecard.best_single_expert}


def test_a_merge_never_takes_the_name_of_another_candidate(zoo_file: Path) -> None:
    zoo = load_zoo(str(zoo_file))
    named = [
        model.model_copy(update={"id": name}) for model, name in zip(zoo.models, ("a", "b", "a-b", "c"), strict=True)
    ]
    pair = Kin(("a", "b"), None, "model.layers", 2, mixed=False).linear({"a": 0.5, "b": 0.5})
    found = [
        Found(models, Outcome(candidate, np.zeros(1)), (), None)
        for models, candidate in ((("a", "b", "a-b"), pair), (("c",), whole("c")))
    ]
    renamed = zoo.model_copy(update={"models": tuple(named)})
    candidates = pipeline._candidates(renamed, Explored((), tuple(found)), {})
    assert candidates == {"a-b-merged": pair} | {name: whole(name) for name in ("a", "b", "a-b", "c")}


def test_another_tokenizer_makes_another_member(zoo_file: Path, micro_zoo: dict[str, Path], tmp_path: Path) -> None:
    from builder.journal import Journal
    from builder.members import open_all

    copied = tmp_path / "zoo"
    for name in ("math", "code", "story", "chat"):
        shutil.copytree(micro_zoo[name], copied / name)
    (copied / "micro.toml").write_bytes(zoo_file.read_bytes())
    zoo = load_zoo(str(copied / "micro.toml"))

    def digests() -> dict[str, str]:
        with Journal(tmp_path / "journal.sqlite") as journal:
            members = open_all(zoo, Store(zoo, tmp_path / "cache").fetch(Quiet()), journal)
            return {name: member.sha256 for name, member in members.items()}

    before = digests()
    (copied / "math/tokenizer_config.json").write_text("{}")
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {"math"}


def test_an_out_that_is_another_bundle_is_left_alone(built: Path, zoo_file: Path, tmp_path: Path) -> None:
    path = build(zoo_file, tmp_path)
    before = tree(path)
    other = load_zoo(str(variant(zoo_file, "other", lambda text: text.replace("seed = 7", "seed = 8"))))
    with pytest.raises(BuildError, match="is a bundle of another zoo"):
        pipeline.build(other, path, Store(other, tmp_path / "cache"), Quiet())
    assert tree(path) == before


def test_an_out_that_is_no_bundle_is_left_alone(zoo_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("years of work")
    with pytest.raises(BuildError, match="exists and is not a bundle"):
        build(zoo_file, tmp_path)
    assert (tmp_path / "bundle" / "thesis.txt").read_text() == "years of work"


def test_two_builds_of_one_bundle_do_not_meet(zoo_file: Path, tmp_path: Path) -> None:
    from builder import files

    with files.locked(tmp_path / "bundle.partial"), pytest.raises(BuildError, match="another build is at work"):
        build(zoo_file, tmp_path)


def test_a_missing_model_stops_the_build_before_any_work(zoo_file: Path, tmp_path: Path) -> None:
    file = variant(zoo_file, "missing", lambda text: text.replace("./code", "./nowhere"))
    with pytest.raises(SourceError, match=r"code: there is no model in .*nowhere"):
        build(file, tmp_path)
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "bundle.partial").exists()


def test_a_truncated_model_stops_the_build_and_leaves_no_bundle(
    zoo_file: Path, micro_zoo: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "zoo"
    broken.mkdir()
    for name in ("math", "code", "story", "chat"):
        (broken / name).symlink_to(micro_zoo[name])
    (broken / "code").unlink()
    (broken / "code").mkdir()
    for file in micro_zoo["code"].iterdir():
        data = file.read_bytes()
        (broken / "code" / file.name).write_bytes(data[:-100] if file.name == "model.safetensors" else data)
    (broken / "micro.toml").write_bytes(zoo_file.read_bytes())
    with pytest.raises(CheckpointError, match=r"code/model.safetensors is truncated"):
        build(broken / "micro.toml", tmp_path)
    assert not (tmp_path / "bundle").exists()


def test_a_disk_without_room_for_the_experts_is_told_up_front(
    zoo_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from builder import files

    monkeypatch.setattr(files, "free", lambda _: 1000)
    with pytest.raises(BuildError, match=r"the experts need 0\.0 GB and .*experts has 0\.0 GB free: make room"):
        build(zoo_file, tmp_path)
    assert not (tmp_path / "bundle").exists()
    assert not list((tmp_path / "bundle.partial").rglob("*.safetensors"))


def test_unknown_tasks_are_refused_before_anything_is_fetched(zoo_file: Path, tmp_path: Path) -> None:
    file = variant(
        zoo_file, "tasks", lambda text: text.replace("tiny/chat", "tinyMMLUX").replace("./code", "./nowhere")
    )
    with pytest.raises(ZooError, match="nobody knows tinyMMLUX: name a preset"):
        build(file, tmp_path)


def test_scores_of_experts_in_the_manifest_are_those_of_the_record(built: Path) -> None:
    record = json.loads((built / bundle.RECORD).read_text("utf-8"))
    candidates = {candidate["name"]: candidate for candidate in record["candidates"]}
    for expert in bundle.read_manifest(built).experts:
        assert expert.scores == candidates[expert.name]["scores"]
        assert candidates[expert.name]["reach"] is not None
