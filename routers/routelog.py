"""The route log: a SQLite file of what the service decided, enough to ask another router the same questions later.

The service writes it, the builder replays it. One row a decision, and the feedback on it:

    decision   when, for whom, the prompt's digest (its text only where that was asked for), the vector it was routed by
               (float16, little-endian), what was expected of every expert, who answered, why, with what probability
    feedback   a score from 0 to 1, and perhaps a comment; of several on one decision the last counts

Reading needs neither torch nor the bundle that decided. D features.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np

from routers.base import Vector
from routers.errors import ModelGlueError
from routers.policy import Ranked, Reason

VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS decision (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,              -- seconds since 1970
    request TEXT NOT NULL,         -- x-request-id
    prompt INTEGER NOT NULL,       -- its number among the request's prompts
    key TEXT,                      -- the name of the client's key
    digest TEXT NOT NULL,          -- BLAKE2b of the routed text, 16 bytes in hex
    text TEXT,
    space TEXT NOT NULL,           -- digest of what made the vector
    vector BLOB NOT NULL,
    router TEXT NOT NULL,          -- digest of the router's file
    expert TEXT NOT NULL,
    reason TEXT NOT NULL,
    propensity REAL NOT NULL,      -- probability with which this expert was chosen
    k INTEGER,                     -- experts asked for; NULL is the policy's
    cost_weight REAL,
    experts TEXT NOT NULL,         -- JSON: of every expert, the best first, what routers.policy.Ranked has
    tokens INTEGER NOT NULL,
    finish TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS decision_request ON decision (request);
CREATE TABLE IF NOT EXISTS feedback (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    decision INTEGER NOT NULL REFERENCES decision (id) ON DELETE CASCADE,
    at REAL NOT NULL,
    score REAL NOT NULL,
    comment TEXT
);
CREATE INDEX IF NOT EXISTS feedback_decision ON feedback (decision);
"""
COLUMNS: Final = (
    "at", "request", "prompt", "key", "digest", "text", "space", "vector", "router", "expert", "reason", "propensity",
    "k", "cost_weight", "experts", "tokens", "finish",
)  # fmt: skip
READ: Final = f"""
SELECT {", ".join(COLUMNS)},
    (SELECT score FROM feedback WHERE feedback.decision = decision.id ORDER BY feedback.id DESC LIMIT 1)
FROM decision ORDER BY id
"""


class RouteLogError(ModelGlueError):
    """A file that is no route log, or cannot be read as one."""


@dataclass(frozen=True, slots=True, eq=False)
class Logged:
    """A decision; the columns' meaning is above. feedback: None where nobody gave any."""

    at: float
    request: str
    prompt: int
    key: str | None
    digest: str
    text: str | None
    space: str
    vector_D: Vector
    router: str
    expert: str
    reason: Reason
    propensity: float
    k: int | None
    cost_weight: float | None
    experts: tuple[Ranked, ...]
    tokens: int
    finish: str
    feedback: float | None = None

    def row(self) -> tuple[Any, ...]:
        """Its COLUMNS."""
        experts = [[each.expert, each.score, each.quality, each.std, each.cost, each.selected, each.weight,
                    each.excluded] for each in self.experts]  # fmt: skip
        return (
            self.at, self.request, self.prompt, self.key, self.digest, self.text, self.space,
            self.vector_D.astype("<f2").tobytes(), self.router, self.expert, self.reason, self.propensity, self.k,
            self.cost_weight, json.dumps(experts), self.tokens, self.finish,
        )  # fmt: skip


def create(path: Path) -> sqlite3.Connection:
    """A log to write to, new or as it was left. Readers and the writer do not wait for each other (WAL).

    Raises RouteLogError for a file that is something else, sqlite3.Error for one that cannot be opened.
    """
    connection = sqlite3.connect(path, timeout=5.0)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise RouteLogError(f"{path} is a route log of version {version}, this release writes {VERSION}: move it")
        if not version and connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise RouteLogError(f"{path} is another program's database: choose another file")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.executescript(SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def read(path: Path) -> Iterator[Logged]:
    """Every decision of a log, the oldest first, while it may be written to. Raises RouteLogError."""
    if not path.is_file():
        raise RouteLogError(f"no route log at {path}: `service --route-log {path}` writes one")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                raise RouteLogError(f"{path} is no route log of version {VERSION}: `service --route-log` writes them")
            for row in connection.execute(READ):
                yield _logged(row)
    except (sqlite3.Error, ValueError) as exc:
        raise RouteLogError(f"{path} cannot be read as a route log: {exc}") from exc


def text_digest(text: str) -> str:
    """What a prompt is known by where its text is not kept."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _logged(row: Sequence[Any]) -> Logged:
    named = dict(zip(COLUMNS, row, strict=False))
    vector_D = np.frombuffer(named.pop("vector"), "<f2").astype(np.float32)
    experts = tuple(Ranked(*each) for each in json.loads(named.pop("experts")))
    return Logged(vector_D=vector_D, experts=experts, feedback=row[-1], **named)
