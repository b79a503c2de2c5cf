"""Downloads, by the real huggingface_hub from a hub on this machine: looked up first, pinned, whole, and once."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_hub import COMMIT, FakeHub
from small_models import random_tensors, write_model

from builder.config import Model, Zoo
from builder.errors import SourceError
from builder.progress import Quiet
from builder.sources import Fetched, Store

NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model as a repository holds it, with what a build has no use for."""
    folder = tmp_path_factory.mktemp("repository")
    write_model(folder, random_tensors(1))
    useful = {path.name: path.read_bytes() for path in folder.iterdir()}
    useful |= {"tokenizer.json": b'{"a": 1}', "tokenizer_config.json": b'{"b": 2}'}
    useless = (
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "model.Q4.gguf"),
        *("onnx/model.onnx", "original/model.safetensors", "README.md"),
    )
    return useful | dict.fromkeys(useless, b"never asked for")


@pytest.fixture
def fake(model_files: dict[str, bytes], empty_hub: FakeHub) -> FakeHub:
    """The hub with the repository org/model."""
    empty_hub.repos["org/model"] = model_files
    return empty_hub


def zoo(*sources: str, **facts: Any) -> Zoo:
    """A zoo of hub models, each called by the name of its repository."""
    models = [
        {"id": source.rpartition("/")[2], "source": source, "revision": "main", "subject": "all", **facts}
        for source in sources
    ]
    return Zoo.model_validate(
        {
            "name": "z",
            "models": models,
            "subjects": {"all": ["x"]},
            "proxy": {"tasks": ["t"]},
            "router": {"features": models[0]["id"]},
        }
    )


def fetch(cache: Path, *sources: str, **facts: Any) -> dict[str, Fetched]:
    return Store(zoo(*sources, **facts), cache).fetch(Quiet())


def test_only_what_a_build_reads_is_downloaded(fake: FakeHub, tmp_path: Path, model_files: dict[str, bytes]) -> None:
    folder = fetch(tmp_path, "org/model")["model"].folder

    assert fake.downloaded() == NEEDED
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: model_files[name] for name in NEEDED}


def test_pickles_are_downloaded_where_there_is_nothing_else(
    fake: FakeHub, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    names = {"config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"}
    files = {name: data for name, data in model_files.items() if name in names}
    # An index of safetensors that are not there would send the reader to them.
    fake.repos["org/model"] = {**files, "model.safetensors.index.json": b"{}"}
    fetch(tmp_path, "org/model")

    assert fake.downloaded() == sorted(names)


@pytest.mark.parametrize("trust", [False, True])
def test_a_models_own_code_is_downloaded_only_where_the_zoo_trusts_it(
    fake: FakeHub, tmp_path: Path, model_files: dict[str, bytes], trust: bool
) -> None:
    fake.repos["org/model"] = {**model_files, "modeling_own.py": b"print('hello')"}
    fetch(tmp_path, "org/model", trust_remote_code=trust)

    assert ("modeling_own.py" in fake.downloaded()) is trust


def test_main_is_pinned_to_its_commit(fake: FakeHub, tmp_path: Path) -> None:
    assert fetch(tmp_path, "org/model")["model"].revision == COMMIT
    assert all(f"/resolve/{COMMIT}/" in path for _, path in fake.asked if "resolve" in path)


def test_a_second_fetch_asks_the_hub_nothing(fake: FakeHub, tmp_path: Path) -> None:
    first = fetch(tmp_path, "org/model")
    fake.asked.clear()

    assert fetch(tmp_path, "org/model") == first
    assert fake.asked == []


def test_a_cache_that_moved_is_still_good(fake: FakeHub, tmp_path: Path) -> None:
    fetch(tmp_path / "old", "org/model")
    (tmp_path / "old").rename(tmp_path / "new")
    fake.asked.clear()

    assert fetch(tmp_path / "new", "org/model")["model"].folder.is_relative_to(tmp_path / "new")
    assert fake.asked == []


def test_names_that_differ_after_a_dot_are_two_models(
    fake: FakeHub, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    fake.repos = {f"org/vicuna-v1.{i}": {**model_files, "config.json": b'{"v": %d}' % i} for i in (3, 5)}
    found = fetch(tmp_path, *fake.repos)

    assert [(model.folder / "config.json").read_bytes() for model in found.values()] == [b'{"v": 3}', b'{"v": 5}']
    assert fetch(tmp_path, *fake.repos) == found


def test_a_connection_that_breaks_once_is_taken_up_where_it_broke(
    fake: FakeHub, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    fake.broken["model.safetensors"] = 1
    folder = fetch(tmp_path, "org/model")["model"].folder

    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    assert fake.downloaded().count("model.safetensors") == 2


def test_an_interrupted_download_goes_on_when_run_again(
    fake: FakeHub, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    fake.broken["model.safetensors"] = 100
    with pytest.raises(SourceError, match=r"org/model: model\.safetensors could not be downloaded .*: run it again"):
        fetch(tmp_path, "org/model")
    assert Store(zoo("org/model"), tmp_path).locate("model") is None
    fake.broken.clear()
    fake.asked.clear()

    folder = fetch(tmp_path, "org/model")["model"].folder

    assert fake.downloaded() == [name for name in NEEDED if name != "config.json"]
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]


def test_all_that_cannot_be_had_is_told_at_once_before_anything_is_downloaded(
    fake: FakeHub, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    fake.repos |= {"org/gated": model_files, "org/empty": {"README.md": b"hello"}}
    fake.gated.add("org/gated")
    told = zoo("org/model", "org/gated", "org/missing", "org/empty", "a/b/c", "./folder")
    old = Model(id="old", source="org/model", revision="v0", subject="all")

    with pytest.raises(SourceError) as caught:
        Store(told.model_copy(update={"models": (*told.models, old)}), tmp_path).fetch(Quiet())

    message = str(caught.value)
    assert "org/gated: gated; accept its terms on the hub and set HF_TOKEN" in message
    assert "org/missing: not on the hub, or private" in message
    assert "org/empty: holds no model*.safetensors and no pytorch_model*.bin" in message
    assert "a/b/c: is no hub id" in message
    assert "org/model: has no revision v0" in message
    assert "folder: there is no model in ./folder" in message
    assert "--models-dir" in message
    assert fake.downloaded() == []


def test_a_hub_that_cannot_be_reached_is_told_for_every_model(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(SourceError) as caught:
            fetch(tmp_path, "org/model", "org/other", note="gated: accept its terms")

    for name in ("org/model", "org/other"):
        assert f"{name}: the hub cannot be reached (ConnectError); gated: accept its terms" in str(caught.value)


def test_a_hub_that_refuses_says_with_what(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The page of a proxy, say: an endpoint that is no hub.
    monkeypatch.setenv("HF_ENDPOINT", f"{fake.url}/org/model/resolve/main")

    with pytest.raises(SourceError, match="org/model: the hub answered 404"):
        fetch(tmp_path, "org/model")


def test_models_that_do_not_fit_on_the_disk_are_refused_up_front(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=100))

    with pytest.raises(SourceError, match=r"the models need 0\.0 GB and .* has 0\.0 GB free: set MODELGLUE_CACHE"):
        fetch(tmp_path / "not/yet/there", "org/model")
    assert fake.downloaded() == []


def test_what_is_downloaded_already_needs_no_room(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.broken["tokenizer.json"] = 100
    with pytest.raises(SourceError, match=r"tokenizer\.json could not be downloaded"):
        fetch(tmp_path, "org/model")
    fake.broken.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=100))

    assert fetch(tmp_path, "org/model")


class Usage(NamedTuple):
    """What shutil.disk_usage answers, as far as we look."""

    free: int
