from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from routers import bundle
from routers.errors import BundleError
from routers.prompt import PromptRouter

PROMPTS = ("solve the sum", "a python loop", "the dragon in the castle", "the", "", "sum code castle")


def edit(path: Path, **changes: Any) -> None:
    facts = json.loads((path / bundle.MANIFEST).read_text())
    (path / bundle.MANIFEST).write_text(json.dumps({**facts, **changes}))


def test_a_bundle_routes_as_the_router_that_was_written(bundle_path: Path, prompt_router: PromptRouter) -> None:
    read = bundle.read(bundle_path).router
    for prompt in PROMPTS:
        assert read.route(prompt) == prompt_router.route(prompt)


def test_another_process_with_another_hash_seed_routes_the_same(bundle_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from routers import bundle;"
        "r = bundle.read(Path(sys.argv[1])).router; print([r.route(p) for p in sys.argv[2:]])"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program, bundle_path, *PROMPTS],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout
        for seed in ("1", "2")
    }
    assert answers == {f"{[bundle.read(bundle_path).router.route(prompt) for prompt in PROMPTS]}\n"}


def test_reading_a_bundle_needs_neither_torch_nor_the_web() -> None:
    program = (
        "import sys; import routers.bundle;"
        "print(sorted({'torch', 'transformers', 'fastapi', 'builder', 'service'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_verify_names_every_file_it_hashed(bundle_path: Path) -> None:
    expected = {"router.safetensors", "tokenizer.json", "routing.jsonl", "build.json"}
    expected |= {f"experts/{name}/model.safetensors" for name in ("math", "code", "story")}
    assert set(bundle.verify(bundle_path)) == expected


def test_a_truncated_expert_is_refused_by_name(bundle_path: Path) -> None:
    path = bundle_path / "experts/code/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"experts/code/model.safetensors has 399 bytes, not 400: truncated"):
        bundle.read(bundle_path)


def test_verify_finds_changed_bytes_that_the_size_does_not_show(bundle_path: Path) -> None:
    path = bundle_path / "experts/code/model.safetensors"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    bundle.read(bundle_path)
    with pytest.raises(BundleError, match=r"experts/code/model.safetensors is not the file that was built"):
        list(bundle.verify(bundle_path))


def test_a_changed_router_is_refused_at_once(bundle_path: Path) -> None:
    data = bytearray((bundle_path / bundle.ROUTER).read_bytes())
    data[-1] ^= 1
    (bundle_path / bundle.ROUTER).write_bytes(data)
    with pytest.raises(BundleError, match=r"router.safetensors is not the file that was built"):
        bundle.read(bundle_path)


def test_a_missing_file_is_named(bundle_path: Path) -> None:
    (bundle_path / bundle.TOKENIZER).unlink()
    with pytest.raises(BundleError, match=r"tokenizer.json is missing"):
        bundle.read(bundle_path)


@pytest.mark.parametrize("name", [bundle.MANIFEST, bundle.TOKENIZER])
def test_what_is_there_and_cannot_be_read_is_named(bundle_path: Path, name: str) -> None:
    """A folder in a file's place, as large as the file; files of others are not read either."""
    (bundle_path / name).unlink()
    (bundle_path / name).mkdir()
    if name != bundle.MANIFEST:
        files = json.loads((bundle_path / bundle.MANIFEST).read_text())["files"]
        size = (bundle_path / name).stat().st_size
        edit(bundle_path, files=files | {name: {"bytes": size, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match=rf"{name} cannot be read \(Is a directory\)"):
        bundle.read(bundle_path)


def test_a_folder_without_a_manifest_asks_whether_the_build_finished(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="did the build finish"):
        bundle.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 1}, "a bundle of format 1, this release reads 2"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"default": "nobody"}, "no expert 'nobody', its default"),
        ({"router": {"kind": "oracle", "k": 1}}, "a router of kind 'oracle'; known: linear, ridge"),
        ({"router": {"kind": "linear", "k": 4}}, "routes to 4 experts and has 3"),
        ({"router": {"kind": "fixed", "k": 1}}, "was fitted for the kind linear, this bundle has fixed"),
        ({"features": {"model": "m", "dimension": 8}}, "16 dimensions, the manifest says 8"),
        ({"experts": []}, "experts: Tuple should have at least 1 item"),
        ({"files": {"../secret": {"bytes": 1, "sha256": "0" * 64}}}, "not a path inside the bundle"),
        ({"files": {}}, "does not list router.safetensors"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_with_a_sentence(
    bundle_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    edit(bundle_path, **changes)
    with pytest.raises(BundleError, match=sentence):
        bundle.read(bundle_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\x00"])
def test_a_manifest_that_is_no_manifest_is_refused(bundle_path: Path, text: str) -> None:
    (bundle_path / bundle.MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="is not a manifest"):
        bundle.read(bundle_path)


def test_a_manifest_that_is_not_text_is_refused(bundle_path: Path) -> None:
    (bundle_path / bundle.MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="is not a manifest"):
        bundle.read(bundle_path)


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"experts": '["math", "code", "poem"]'}, r"fitted for the experts .*poem.*, this bundle has .*story"),
        ({"tokenizer": "0" * 64}, "fitted for the tokenizer 0000"),
        ({"kind": "knn"}, "fitted for the kind knn, this bundle has linear"),
    ],
)
def test_a_router_of_another_bundle_is_refused_by_what_differs(
    bundle_path: Path, told: dict[str, str], sentence: str
) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    file = bundle_path / bundle.ROUTER
    with safe_open(file, framework="numpy") as opened:
        fitted_for = json.loads(opened.metadata()["fitted_for"]) | told
    save_file(load_file(file), file, {"fitted_for": json.dumps(fitted_for)})
    files = json.loads((bundle_path / bundle.MANIFEST).read_text())["files"]
    edit(bundle_path, files=files | {bundle.ROUTER: bundle.digest(file).model_dump()})
    with pytest.raises(BundleError, match=sentence):
        bundle.read(bundle_path)
