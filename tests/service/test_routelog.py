"""The route log and feedback on it: what is kept, and that a log which fails fails alone."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from waiting import wait_until

from routers import routelog as logs
from routers.bundle import Bundle
from routers.routelog import Logged, RouteLogError
from service.access import Access, new_key
from service.app import create_app
from service.engines.echo import EchoEngine
from service.errors import UnknownRequestError
from service.routelog import RouteLog

BODY: dict[str, Any] = {"prompt": "write a python loop", "max_tokens": 3}


def app_of(bundle: Bundle, path: Path, **options: Any) -> Any:
    return create_app(bundle, EchoEngine(bundle.router.experts), routelog=RouteLog(path, **options))


def kept(path: Path) -> list[Logged]:
    return list(logs.read(path))


def test_a_decision_is_kept_so_that_it_can_be_made_again(bundle: Bundle, tmp_path: Path) -> None:
    with TestClient(app_of(bundle, tmp_path / "log")) as client:
        body = BODY | {"deny": ["code"], "cost_weight": 0.5}
        client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    (row,) = kept(tmp_path / "log")
    assert (row.request, row.prompt, row.key, row.text) == ("mine", 0, None, None)
    assert (row.reason, row.propensity, row.cost_weight, row.tokens, row.finish) == (
        "top_score",
        1.0,
        0.5,
        3,
        "length",
    )
    assert row.digest == logs.text_digest(BODY["prompt"])
    assert (row.router, row.space) == (bundle.router_sha256, bundle.features_digest)
    vector_D = bundle.router.features.vector(BODY["prompt"])
    np.testing.assert_allclose(row.vector_D, vector_D, atol=1e-3)
    assert {each.expert: each.excluded for each in row.experts} == {"math": None, "code": "denied", "story": None}
    estimate = bundle.router.router.estimate(vector_D)
    for each in row.experts:
        assert each.quality == pytest.approx(float(estimate.quality_E[bundle.router.experts.index(each.expert)]))
    assert row.experts[0].expert == row.expert


def test_every_prompt_of_a_request_is_a_decision(bundle: Bundle, tmp_path: Path) -> None:
    with TestClient(app_of(bundle, tmp_path / "log")) as client:
        client.post("/v1/completions", json=BODY | {"prompt": ["python loop", "the owl"]})
    assert [(row.prompt, row.expert) for row in kept(tmp_path / "log")] == [(0, "code"), (1, "story")]


def test_prompts_are_kept_only_where_that_is_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    for texts in (False, True):
        with TestClient(app_of(bundle, tmp_path / "log", texts=texts)) as client:
            client.post("/v1/completions", json=BODY)
    assert [row.text for row in kept(tmp_path / "log")] == [None, BODY["prompt"]]
    raw = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert raw.count(BODY["prompt"].encode()) == 1


def test_what_is_refused_or_only_routed_is_no_decision(bundle: Bundle, tmp_path: Path) -> None:
    with TestClient(app_of(bundle, tmp_path / "log")) as client:
        client.post("/v1/completions", json=BODY | {"model": "nobody"})
        client.get("/route", params={"prompt": "python"})
    assert not kept(tmp_path / "log")


@pytest.mark.parametrize(
    ("said", "score"), [({"score": 0.25}, 0.25), ({"thumbs": "up", "comment": "good"}, 1.0), ({"thumbs": "down"}, 0.0)]
)
def test_feedback_is_kept_beside_its_decision(
    bundle: Bundle, tmp_path: Path, said: dict[str, Any], score: float
) -> None:
    """At once after the answer, though decisions are written in batches."""
    with TestClient(app_of(bundle, tmp_path / "log")) as client:
        name = client.post("/v1/completions", json=BODY).headers["x-request-id"]
        told = client.post("/v1/feedback", json={"request_id": name} | said)
        assert (told.status_code, told.json()["score"]) == (200, score)
        assert kept(tmp_path / "log")[0].feedback == score


def test_the_last_feedback_counts(bundle: Bundle, tmp_path: Path) -> None:
    with TestClient(app_of(bundle, tmp_path / "log")) as client:
        name = client.post("/v1/completions", json=BODY | {"prompt": ["python", "owl"]}).headers["x-request-id"]
        for score in (0.1, 0.9):
            client.post("/v1/feedback", json={"request_id": name, "index": 1, "score": score})
    assert [row.feedback for row in kept(tmp_path / "log")] == [None, 0.9]


@pytest.mark.parametrize("said", [{"request_id": "nobody"}, {"request_id": "mine", "index": 1}])
def test_feedback_on_what_is_not_in_the_log_is_404(bundle: Bundle, tmp_path: Path, said: dict[str, Any]) -> None:
    with TestClient(app_of(bundle, tmp_path / "log")) as client:
        client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})
        refused = client.post("/v1/feedback", json=said | {"score": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "request_not_found")


def test_feedback_without_a_log_is_404_and_says_so(client: TestClient) -> None:
    refused = client.post("/v1/feedback", json={"request_id": "x", "score": 1})
    assert refused.status_code == 404
    assert "--route-log" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "said", [{}, {"score": 2}, {"score": 0.5, "thumbs": "up"}, {"thumbs": "sideways"}, {"score": 1, "stars": 5}]
)
def test_feedback_that_is_none_is_400(bundle: Bundle, tmp_path: Path, said: dict[str, Any]) -> None:
    with TestClient(app_of(bundle, tmp_path / "log")) as client:
        assert client.post("/v1/feedback", json={"request_id": "x"} | said).status_code == 400


def test_nobody_rates_the_answers_of_another_key(bundle: Bundle, tmp_path: Path) -> None:
    (ann, first), (bob, second) = new_key("ann"), new_key("bob")
    (tmp_path / "keys").write_text(f"{first}\n{second}\n")
    log = RouteLog(tmp_path / "log")
    app = create_app(bundle, EchoEngine(bundle.router.experts), routelog=log, access=Access(tmp_path / "keys"))
    with TestClient(app) as client:
        name = client.post("/v1/completions", json=BODY, headers={"authorization": f"Bearer {ann}"}).headers[
            "x-request-id"
        ]
        rate = {"request_id": name, "score": 1}
        assert client.post("/v1/feedback", json=rate, headers={"authorization": f"Bearer {bob}"}).status_code == 404
        assert client.post("/v1/feedback", json=rate, headers={"authorization": f"Bearer {ann}"}).status_code == 200
    assert kept(tmp_path / "log")[0].key == "ann"


def test_the_oldest_decisions_go_first_and_their_feedback_with_them(bundle: Bundle, tmp_path: Path) -> None:
    with TestClient(app_of(bundle, tmp_path / "log", most=3)) as client:
        for i in range(5):
            client.post("/v1/completions", json=BODY, headers={"x-request-id": str(i)})
            client.post("/v1/feedback", json={"request_id": str(i), "score": 1})
    assert [row.request for row in kept(tmp_path / "log")] == ["2", "3", "4"]
    with sqlite3.connect(tmp_path / "log") as log:
        assert log.execute("SELECT count(*) FROM feedback").fetchone() == (3,)


def test_a_broken_log_fails_no_request_and_is_written_again_once_it_can_be(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with TestClient(app_of(bundle, path)) as client:
        path.write_bytes(b"no database any more " * 9)
        assert client.post("/v1/completions", json=BODY).status_code == 200
        refused = client.post("/v1/feedback", json={"request_id": "x", "score": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        wait_until(lambda: "modelglue_route_log_lost_total 1.0" in client.get("/metrics").text)
        path.unlink()
        assert client.post("/v1/completions", json=BODY, headers={"x-request-id": "after"}).status_code == 200
    assert [row.request for row in kept(path)] == ["after"]


@pytest.mark.parametrize("locked", [False, True])
def test_feedback_that_is_given_up_leaves_the_log_as_it_was(bundle: Bundle, tmp_path: Path, locked: bool) -> None:
    """Whether it still waits or is being written, as it is where another process holds the file."""
    path = tmp_path / "log"
    with TestClient(app_of(bundle, path)) as client:
        client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})

    async def story() -> None:
        log = RouteLog(path)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE" if locked else "SELECT 1")
            given_up = asyncio.create_task(log.rated("mine", 0, None, 0.1, None))
            await asyncio.sleep(0.05)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
        async with asyncio.timeout(30):
            await log.rated("mine", 0, None, 0.9, None)
        log.close()

    asyncio.run(story())
    assert kept(path)[0].feedback == 0.9


def test_a_disk_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, create, again = RouteLog(tmp_path / "log"), logs.create, threading.Event()

    def hang(path: Path) -> sqlite3.Connection:
        assert again.wait(60)
        return create(path)

    monkeypatch.setattr("routers.routelog.create", hang)

    async def story() -> None:
        rating = asyncio.create_task(log.rated("nobody", 0, None, 1.0, None))
        await asyncio.sleep(0)
        await asyncio.to_thread(log.close, 0.1)
        assert not rating.done()
        again.set()
        with pytest.raises(UnknownRequestError):
            await rating

    asyncio.run(story())
    assert "could not be written to its end" in caplog.text


def test_a_full_disk_fails_no_request(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite says it of a file that may have no more pages, as of a disk."""
    path, create = tmp_path / "log", logs.create

    def cramped(path: Path) -> sqlite3.Connection:
        connection = create(path)
        connection.execute("PRAGMA max_page_count = 1")
        return connection

    monkeypatch.setattr("routers.routelog.create", cramped)
    prompt = "python " * 60
    with TestClient(app_of(bundle, path, texts=True)) as client:
        for _ in range(30):
            assert client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).status_code == 200
        wait_until(lambda: "modelglue_route_log_lost_total 0.0" not in client.get("/metrics").text)


@pytest.mark.parametrize("content", [b"plain text, and no database at all " * 9, None])
def test_a_log_that_cannot_be_is_a_sentence_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "log" if content else tmp_path / "nowhere" / "log"
    if content:
        path.write_bytes(content)
    with pytest.raises(RouteLogError, match="cannot be written"):
        RouteLog(path)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "theirs") as other:
        other.execute("CREATE TABLE users (name)")
    with pytest.raises(RouteLogError, match="another program's"):
        RouteLog(tmp_path / "theirs")
