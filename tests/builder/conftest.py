"""What tests of the builder share: its command line, and a hub of models on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Result, Run
from fake_hub import FakeHub

from builder import __main__ as command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs commands in this process, with a cache of their own and wide lines."""
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str | Path) -> Result:
        monkeypatch.setattr("sys.argv", ["builder", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        captured = capsys.readouterr()
        return Result(int(stopped.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def mini_which16_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo file of a toy Which16; its models and bases are folders beside it. No test changes them."""
    import mini_which16

    return mini_which16.make(tmp_path_factory.mktemp("mini_which16"))


@pytest.fixture
def own_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code of models is copied to a place of the test's, not to the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that huggingface_hub talks to, with nobody logged in."""
    from huggingface_hub import close_session

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # It waits a second before it asks again.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    with FakeHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
        close_session()
