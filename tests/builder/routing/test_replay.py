"""A log under another router: who would go elsewhere, and what the feedback says of that."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from builder.errors import BuildError
from builder.routing.replay import FEW, replay
from routers import routelog
from routers.base import Vector
from routers.bundle import (
    ROUTER,
    ROUTING,
    Bundle,
    Digest,
    Expert,
    FeaturesEntry,
    Manifest,
    RouterEntry,
    RoutingRow,
    Source,
    digest,
    save_routing,
)
from routers.linear import LinearRouter
from routers.policy import Policy, Ranked, Reason
from routers.prompt import PromptRouter
from routers.routelog import Logged, RouteLogError

EXPERTS = ("math", "code")


class Letters:
    """A text's share of a and b."""

    kind = "token-embeddings"
    dimension = 2

    def vector(self, text: str) -> Vector:
        found_2 = np.array([text.count("a"), text.count("b")], np.float32)
        return found_2 / max(float(np.linalg.norm(found_2)), 1e-6)

    def without_each(self, text: str) -> list[tuple[str, Vector]]:
        return []

    def arrays(self) -> dict[str, Vector]:
        return {"mean": np.zeros(2, np.float32)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Sends texts of a to math and texts of b to code."""
    rows = [RoutingRow(task="t", prompt=text, scores={"math": float("a" in text), "code": float("b" in text)})
            for text in ("a", "aa", "aaa", "b", "bb", "bbb")]  # fmt: skip
    save_routing(tmp_path, rows)
    source = Source(model="m", source="m", revision=None, weights="0" * 64, coefficient=1.0)
    manifest = Manifest(
        zoo="two",
        inputs_sha256="0" * 64,
        seed=0,
        default="math",
        experts=tuple(
            Expert(name=name, method="copy", sources=(source,), context_window=64, files={}) for name in EXPERTS
        ),
        router=RouterEntry(kind="linear", k=1),
        features=FeaturesEntry(model="letters", dimension=2),
        files={ROUTER: Digest(bytes=0, sha256="0" * 64), ROUTING: digest(tmp_path / ROUTING)},
    )
    features = Letters()
    vectors = {"math": [features.vector("a")], "code": [features.vector("b")]}
    linear = LinearRouter.from_vectors({name: [name] for name in EXPERTS}, vectors)
    return Bundle(tmp_path, manifest, PromptRouter(features, linear, Policy("math")))


def logged(
    bundle: Bundle, text: str, expert: str, feedback: float | None = None, *, reason: Reason = "top_score",
    propensity: float = 1.0, keeps_text: bool = False, space: str | None = None, shut: tuple[str, ...] = (),
) -> Logged:  # fmt: skip
    ranking = tuple(
        Ranked(name, 0.5, 0.5, 0.1, 0.0, name == expert, float(name == expert), "denied" if name in shut else None)
        for name in sorted(EXPERTS, key=lambda name: name != expert)
    )
    return Logged(
        0.0, text, 0, None, routelog.text_digest(text), text if keeps_text else None,
        bundle.features_digest if space is None else space, bundle.router.features.vector(text), "0" * 64,
        expert, reason, propensity, None, None, ranking, 3, "stop", feedback,
    )  # fmt: skip


def write(path: Path, rows: list[Logged]) -> Path:
    with closing(routelog.create(path)) as log, log:
        for row in rows:
            marks = ", ".join("?" * len(routelog.COLUMNS))
            made = log.execute(
                f"INSERT INTO decision ({', '.join(routelog.COLUMNS)}) VALUES ({marks})", row.row()
            ).lastrowid
            if row.feedback is not None:
                log.execute("INSERT INTO feedback (decision, at, score) VALUES (?, 0, ?)", (made, row.feedback))
    return path


def test_a_log_reads_as_it_was_written(bundle: Bundle, tmp_path: Path) -> None:
    rows = [logged(bundle, "ab", "math", 0.25, keeps_text=True), logged(bundle, "b", "code", shut=("math",))]
    for was, is_ in zip(rows, routelog.read(write(tmp_path / "log", rows)), strict=True):
        assert (is_.request, is_.text, is_.experts, is_.feedback) == (was.request, was.text, was.experts, was.feedback)
        assert is_.vector_D == pytest.approx(was.vector_D, abs=1e-3)


def test_it_counts_who_would_go_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    rows = [logged(bundle, "a", "math"), logged(bundle, "a", "code"), logged(bundle, "b", "math")]
    done = replay(write(tmp_path / "log", rows), bundle)
    assert (done.rows, done.moved) == (3, {"code -> math": 1, "math -> code": 1})
    assert "no feedback" in done.sentences()[-1]


def test_what_no_router_chose_is_left_out_and_said(bundle: Bundle, tmp_path: Path) -> None:
    rows = [logged(bundle, "a", "code", 1.0, reason=reason) for reason in ("pinned", "retained", "fallback")]
    done = replay(write(tmp_path / "log", [*rows, logged(bundle, "a", "math", 1.0)]), bundle)
    assert (done.rows, done.rated, done.moved) == (1, 1, {})
    assert done.left_out == {"pinned": 1, "retained": 1, "fallback": 1}


def test_an_expert_that_a_request_could_not_have_is_not_given_now(bundle: Bundle, tmp_path: Path) -> None:
    assert not replay(write(tmp_path / "log", [logged(bundle, "a", "code", shut=("math",))]), bundle).moved


def test_the_value_is_of_the_agreeing_rows_against_all(bundle: Bundle, tmp_path: Path) -> None:
    good = [logged(bundle, "a", "math", 1.0) for _ in range(40)]
    bad = [logged(bundle, "a", "code", 0.0) for _ in range(40)]
    done = replay(write(tmp_path / "log", good + bad), bundle)
    assert done.replay is not None
    assert done.weighted == done.replay
    assert (done.logged, done.replay.mean, done.replay.gain) == (0.5, 1.0, 0.5)
    assert 0.3 < done.replay.low < 0.5 < done.replay.high < 0.7
    assert done.enough
    assert "nothing is known of the answer of the other expert" in done.sentences()[-1]


def test_choices_by_chance_are_weighed_by_their_propensity(bundle: Bundle, tmp_path: Path) -> None:
    """Of 100 prompts 90 went to math, where one in two was good, and 10 to code, where all were: to each its share."""
    rows = [logged(bundle, "a" if i % 2 else "aa", "math", float(i % 2), propensity=0.9) for i in range(90)]
    rows += [logged(bundle, "b", "code", 1.0, propensity=0.1) for _ in range(10)]
    done = replay(write(tmp_path / "log", rows), bundle)
    assert done.weighted is not None
    assert done.weighted.mean == pytest.approx((45 / 0.9 + 10 / 0.1) / (90 / 0.9 + 10 / 0.1))
    assert not done.certain
    assert done.effective == pytest.approx(200**2 / (90 / 0.9**2 + 10 / 0.1**2))


def test_too_few_agreeing_rows_are_said_to_be_too_few(bundle: Bundle, tmp_path: Path) -> None:
    rows = [logged(bundle, "a", "math", 1.0) for _ in range(FEW - 1)] + [logged(bundle, "a", "code", 0.0)] * 100
    done = replay(write(tmp_path / "log", rows), bundle)
    assert not done.enough
    assert any(line.startswith("too few rows agree") for line in done.sentences())


def test_a_router_of_another_kind_is_fitted_on_the_routing_set(bundle: Bundle, tmp_path: Path) -> None:
    log = write(tmp_path / "log", [logged(bundle, "b", "code")])
    assert replay(log, bundle, kind="fixed").moved == {"code -> math": 1}
    assert not replay(log, bundle, kind="knn").moved
    with pytest.raises(BuildError, match="no router 'oracle'; there are: "):
        replay(log, bundle, kind="oracle")


def test_other_features_need_the_prompts_text(bundle: Bundle, tmp_path: Path) -> None:
    row = logged(bundle, "b", "math", space="other", keeps_text=True)
    assert replay(write(tmp_path / "log", [row]), bundle).moved == {"math -> code": 1}
    with pytest.raises(BuildError, match="other features"):
        replay(write(tmp_path / "log", [logged(bundle, "b", "math", space="other")]), bundle)


@pytest.mark.parametrize("content", [b"not a database at all, but a text", b""])
def test_what_is_no_log_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(RouteLogError, match="--route-log"):
        list(routelog.read(tmp_path / "nowhere"))
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(RouteLogError, match="route log"):
        list(routelog.read(tmp_path / "log"))


def test_a_log_is_read_without_torch(bundle: Bundle, tmp_path: Path) -> None:
    log = write(tmp_path / "log", [logged(bundle, "a", "math")])
    code = (
        "import sys; from pathlib import Path; from routers import routelog; import builder.routing.replay;"
        f"assert len(list(routelog.read(Path({str(log)!r})))) == 1; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=60)
