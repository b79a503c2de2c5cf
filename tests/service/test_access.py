"""Keys and their limits, the origins of pages, and what is open to everybody."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from held import Held
from serving import asked, serve
from waiting import wait_until

from routers.bundle import Bundle
from service.access import Access, KeysError, new_key, read_keys
from service.app import create_app
from service.engines.echo import EchoEngine

BODY: dict[str, Any] = {"prompt": "python loop", "max_tokens": 2}


def line(name: str, key: str, *limits: str) -> str:
    return " ".join((name, hashlib.sha256(key.encode()).hexdigest(), *limits))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    lines = ["# ours", "", line("ann", "one"), line("ann", "two"), line("bob", "three", "2"), line("cy", "4", "-", "1")]
    path.write_text("\n".join(lines))
    return path


def app_of(bundle: Bundle, keys: Path, delay: float = 0.0) -> Any:
    return create_app(bundle, EchoEngine(bundle.router.experts, delay=delay), access=Access(keys))


@pytest.mark.parametrize("headers", [{}, bearer("nobody"), bearer(""), {"authorization": "Basic one"}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/feedback", "/admin/reload", "/nowhere"])
def test_without_a_known_key_nothing_is_answered(
    bundle: Bundle, keys: Path, headers: dict[str, str], path: str
) -> None:
    with TestClient(app_of(bundle, keys)) as client:
        refused = client.post(path, json=BODY, headers=headers)
    assert refused.status_code == 401
    error = refused.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.headers["x-request-id"]


def test_every_key_of_a_name_is_taken(bundle: Bundle, keys: Path) -> None:
    with TestClient(app_of(bundle, keys)) as client:
        for key in ("one", "two"):
            assert client.post("/v1/completions", json=BODY, headers=bearer(key)).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz", "/metrics", "/", "/docs", "/openapi.json"])
def test_who_watches_and_the_page_need_no_key(bundle: Bundle, keys: Path, path: str) -> None:
    with TestClient(app_of(bundle, keys)) as client:
        assert client.get(path).status_code == 200


def test_a_session_is_its_keys_own(bundle: Bundle, keys: Path) -> None:
    def reason(key: str, **body: Any) -> str:
        headers = bearer(key) | {"x-session-id": "mine"}
        return client.post("/v1/completions", json=BODY | body, headers=headers).headers["x-route-reason"]

    with TestClient(app_of(bundle, keys)) as client:
        assert reason("one", model="story") == "pinned"
        assert reason("three") == "top_score"
        assert reason("two") == "switched"  # ann's too
        route = client.post("/route", json=BODY, headers=bearer("4") | {"x-session-id": "mine"})
        assert route.json()["reason"] == "top_score"


def test_a_key_over_its_rate_is_told_when_to_come_again(
    bundle: Bundle, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.access.time", SimpleNamespace(monotonic=lambda: 1000.0))
    with TestClient(app_of(bundle, keys)) as client:
        got = [client.post("/v1/completions", json=BODY, headers=bearer("three")) for _ in range(3)]
        assert [each.status_code for each in got] == [200, 200, 429]
        assert got[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert got[2].headers["retry-after"] == "30"
        assert client.post("/v1/completions", json=BODY, headers=bearer("one")).status_code == 200
        assert 'vllm:admission_rejections_total{reason="rate_limit_exceeded"} 1.0' in client.get("/metrics").text


def test_a_keys_requests_come_back_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(line("bob", "three", "60"))
    access, now = Access(path), 1000.0
    monkeypatch.setattr("service.access.time.monotonic", lambda: now)
    key = access.who("Bearer three")
    for _ in range(60):
        with access.use(key):
            pass
    with pytest.raises(Exception, match="60 requests a minute") as refused, access.use(key):
        pass
    assert refused.value.after == pytest.approx(1)  # type: ignore[attr-defined]
    now += 1
    with access.use(key):
        pass
    with pytest.raises(Exception, match="a minute"), access.use(key):
        pass
    now += 3600  # an hour's silence is no credit for an hour
    for _ in range(60):
        with access.use(key):
            pass
    with pytest.raises(Exception, match="a minute"), access.use(key):
        pass


def test_a_key_has_only_so_many_requests_at_a_time(bundle: Bundle, keys: Path) -> None:
    engine = Held(bundle.router.experts)
    got: list[int] = []

    def ask() -> None:
        got.append(client.post("/v1/completions", json=BODY).status_code)

    with (
        serve(create_app(bundle, engine, access=Access(keys))) as (url, _),
        httpx.Client(base_url=url, headers=bearer("4"), timeout=60) as client,
    ):
        first = threading.Thread(target=ask)
        first.start()
        wait_until(lambda: engine.running == 1)
        refused = client.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency")
        assert refused.headers["retry-after"] == "1"
        engine.gate.release(2 * BODY["max_tokens"])
        first.join()
        ask()
    assert got == [200, 200]


def test_a_client_who_leaves_gives_its_place_back(bundle: Bundle, keys: Path) -> None:
    engine = Held(bundle.router.experts)
    with serve(create_app(bundle, engine, access=Access(keys))) as (url, _):
        for _ in range(2):
            with asked(url, BODY, **bearer("4")):
                wait_until(lambda: engine.running == 1)
            wait_until(lambda: engine.running == 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no keys"),
        ("ann", "keys:1 is not"),
        ("ann abc", "SHA-256"),
        ("a/b " + "0" * 64, "name 'a/b'"),
        ("ann " + "0" * 64 + " many", "limit 'many'"),
        ("ann " + "0" * 64 + " 0", "limit '0'"),
    ],
)
def test_a_file_of_keys_that_cannot_be_followed_is_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(KeysError, match=said):
        read_keys(tmp_path / "keys")


def test_a_missing_file_of_keys_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="service key NAME"):
        read_keys(tmp_path / "keys")


def test_a_new_key_is_known_by_its_line(tmp_path: Path) -> None:
    made, told = new_key("ann", per_minute=60)
    assert made not in told
    (tmp_path / "keys").write_text(told)
    known = Access(tmp_path / "keys").who(f"Bearer {made}")
    assert (known.name, known.per_minute, known.concurrent) == ("ann", 60, None)
    assert new_key("ann")[0] != made


def test_pages_of_other_origins_may_ask_only_where_that_is_said(bundle: Bundle, keys: Path) -> None:
    asked = {"origin": "https://ours.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, content-type"}  # fmt: skip
    with TestClient(app_of(bundle, keys)) as client:
        refused = client.post("/v1/completions", json=BODY, headers=bearer("one") | asked)
        assert "access-control-allow-origin" not in refused.headers
    engine = EchoEngine(bundle.router.experts)
    with TestClient(create_app(bundle, engine, access=Access(keys), cors=["https://ours.example"])) as client:
        allowed = client.options("/v1/completions", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://ours.example"
        assert client.options("/v1/completions", headers=asked | {"origin": "https://other.example"}).status_code == 400
        answer = client.post("/v1/completions", json=BODY, headers=bearer("one") | {"origin": "https://ours.example"})
        assert "x-route-expert" in answer.headers["access-control-expose-headers"]
        unknown = client.post("/v1/completions", json=BODY, headers={"origin": "https://ours.example"})
        assert (unknown.status_code, unknown.headers["access-control-allow-origin"]) == (401, "https://ours.example")
