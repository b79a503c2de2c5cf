"""The router is read again while the service runs: taken when it is good, and left when it is not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from held import Held
from serving import echoing, serve
from waiting import wait_until

from routers import bundle as bundles
from routers.bundle import MANIFEST, ROUTER, Manifest, digest
from routers.fixed import FixedRouter
from service.access import Access, new_key
from service.app import create_app
from service.engines.echo import EchoEngine

BODY: dict[str, Any] = {"prompt": "python loop", "max_tokens": 2}


def republish(folder: Path, **changes: Any) -> None:
    """Publish a router that always says math, as a new build does."""
    read = bundles.read(folder)
    router = FixedRouter.always(read.router.experts, "math")
    bundles.save_router(folder, router, read.router.features)
    entry = read.manifest.router.model_copy(update={"kind": "fixed"})
    files = read.manifest.files | {ROUTER: digest(folder / ROUTER)}
    changed = read.manifest.model_copy(update={"router": entry, "files": files} | changes)
    bundles.write(folder, Manifest.model_validate(changed.model_dump()))


@pytest.fixture
def local(folder: Path) -> TestClient:
    """Asks from the service's own machine."""
    app = create_app(bundles.read(folder), EchoEngine(("math", "code", "story")))
    return TestClient(app, client=("127.0.0.1", 5000))


def test_a_new_router_is_taken_and_told(folder: Path, local: TestClient) -> None:
    with local as client:
        before = client.get("/version").json()["router_sha256"]
        assert client.post("/v1/completions", json=BODY).json()["model"] == "code"
        republish(folder)
        assert client.post("/v1/completions", json=BODY).json()["model"] == "code"
        told = client.post("/admin/reload")
        assert told.status_code == 200
        assert "the fixed router" in told.json()["detail"]
        assert client.post("/v1/completions", json=BODY).json()["model"] == "math"
        assert client.get("/route", params={"prompt": "python", "detail": "full"}).json()["router"] == "fixed"
        assert client.get("/version").json()["router_sha256"] != before
        assert 'modelglue_router_reloads_total{result="taken"} 1.0' in client.get("/metrics").text


def truncate(folder: Path) -> None:
    (folder / ROUTER).write_bytes((folder / ROUTER).read_bytes()[:100])


def lose(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def block(folder: Path) -> None:
    lose(folder)
    (folder / MANIFEST).mkdir()


def rename(folder: Path) -> None:
    read = bundles.read(folder)
    names = {"math": "sums", "code": "code", "story": "story"}
    bundles.save_router(folder, FixedRouter.always(tuple(names.values()), "code"), read.router.features)
    experts = tuple(each.model_copy(update={"name": names[each.name]}) for each in read.manifest.experts)
    entry = read.manifest.router.model_copy(update={"kind": "fixed"})
    files = read.manifest.files | {ROUTER: digest(folder / ROUTER)}
    changed = read.manifest.model_copy(update={"experts": experts, "router": entry, "files": files})
    bundles.write(folder, Manifest.model_validate(changed.model_dump()))


def reweigh(folder: Path) -> None:
    read = bundles.read(folder)
    weights = folder / "experts" / "math" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"other")
    files = {"model.safetensors": digest(weights)}
    experts = tuple(
        each.model_copy(update={"files": files if each.name == "math" else {}}) for each in read.manifest.experts
    )
    republish(folder, experts=experts)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncate, "truncated"),
        (lose, "no manifest.json"),
        (block, "manifest.json cannot be read"),
        (rename, "has the experts sums, code, story now"),
        (reweigh, "other weights of math"),
    ],
)
def test_a_router_that_is_not_good_is_refused_and_the_old_one_goes_on(
    folder: Path, local: TestClient, spoil: Callable[[Path], None], said: str
) -> None:
    with local as client:
        spoil(folder)
        refused = client.post("/admin/reload")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_refused")
        assert said in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json=BODY).json()["model"] == "code"
        assert 'modelglue_router_reloads_total{result="refused"} 1.0' in client.get("/metrics").text


def test_a_running_answer_keeps_its_decision(folder: Path) -> None:
    engine = Held(("math", "code", "story"), free=2)
    body = {"prompt": "python loop " * 10, "max_tokens": 20, "stream": True}
    with (
        serve(create_app(bundles.read(folder), engine)) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body, headers={"x-route-debug": "1"}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        republish(folder)
        assert client.post("/admin/reload").status_code == 200
        assert client.post("/v1/completions", json=BODY).json()["model"] == "math"
        assert engine.running == 1
        engine.gate.release(20)
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert {chunk["model"] for chunk in chunks} == {"code"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["route"]["router"] == "linear"


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        (("192.0.2.1", 5000), {}),
        (("127.0.0.1", 5000), {"x-forwarded-for": "192.0.2.1"}),
        (("127.0.0.1", 5000), {"origin": "https://any.example"}),
        (None, {}),
    ],
)
def test_only_the_services_own_machine_may_reload(folder: Path, client: Any, headers: dict[str, str]) -> None:
    app = create_app(bundles.read(folder), EchoEngine(("math", "code", "story")))
    with TestClient(app, client=client) as asking:
        refused = asking.post("/admin/reload", headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")


def test_with_keys_only_the_admins_may_reload_and_the_keys_are_read_again(folder: Path, tmp_path: Path) -> None:
    (admin, first), (ann, second), (bob, third) = new_key("admin"), new_key("ann"), new_key("bob")
    keys = folder.parent / f"{folder.name}.keys"
    keys.write_text(f"{first}\n{second}\n")
    app = create_app(bundles.read(folder), EchoEngine(("math", "code", "story")), access=Access(keys))

    def ask(key: str, path: str = "/admin/reload") -> int:
        return client.post(path, json=BODY, headers={"authorization": f"Bearer {key}"}).status_code

    with TestClient(app, client=("127.0.0.1", 5000)) as client:
        assert (ask(ann), ask(bob), ask(bob, "/v1/completions")) == (403, 401, 401)
        keys.write_text(f"{first}\n{third}\n")
        assert ask(admin) == 200
        assert (ask(ann, "/v1/completions"), ask(bob, "/v1/completions")) == (401, 200)
        keys.write_text("")
        assert ask(admin) == 409
        assert ask(bob, "/v1/completions") == 200


def says(client: httpx.Client, text: str) -> bool:
    return text in client.get("/metrics").text


def test_sighup_reloads(folder: Path) -> None:
    with echoing(folder) as echo:
        republish(folder)
        echo.process.send_signal(signal.SIGHUP)
        wait_until(lambda: echo.client.post("/v1/completions", json=BODY).json()["model"] == "math")
        for times, spoil in enumerate((truncate, block), 1):
            spoil(folder)
            echo.process.send_signal(signal.SIGHUP)
            wait_until(partial(says, echo.client, f'result="refused"}} {times}.0'))
        assert echo.client.post("/v1/completions", json=BODY).json()["model"] == "math"


def test_the_command_reloads_a_running_service(folder: Path) -> None:
    with serve(create_app(bundles.read(folder), EchoEngine(("math", "code", "story")))) as (url, _):
        republish(folder)
        done = reload("--url", url)
        assert (done.returncode, done.stdout[:16]) == (0, "the fixed router")
        truncate(folder)
        failed = reload("--url", url)
    assert failed.returncode == 1
    assert "truncated" in failed.stderr
    nobody = reload("--url", url)
    assert nobody.returncode == 1
    assert nobody.stderr.startswith(f"error: {url} does not answer")


def reload(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", "reload", *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2]
    )
