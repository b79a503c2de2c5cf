"""Every result that took work, keyed by its inputs: a killed build goes on where it was, a repeated one is free."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from builder.errors import BuildError


class Journal:
    """A SQLite file of (kind, inputs) -> result; every result is durable before `once` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=60)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS results"
                " (key TEXT PRIMARY KEY, kind TEXT, inputs TEXT, result TEXT, seconds REAL)"
            )
        except sqlite3.DatabaseError as exc:
            raise BuildError(f"{path} cannot be used ({exc}): remove it; its results will be computed again") from exc

    def once(self, kind: str, inputs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The result of `compute`, a JSON value, from the journal when these inputs were seen before."""
        found = self.known(kind, inputs)
        if found is None:
            started = time.monotonic()
            result = compute()
            self.keep(kind, inputs, result, time.monotonic() - started)
            found = self.known(kind, inputs)
        return found

    def known(self, kind: str, inputs: Mapping[str, Any]) -> Any | None:
        """The result of these inputs if it was seen before."""
        key = digest(kind, json.dumps(inputs, sort_keys=True))
        row = self._db.execute("SELECT result FROM results WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, kind: str, inputs: Mapping[str, Any], result: Any, seconds: float) -> None:
        """Make a result known."""
        text = json.dumps(inputs, sort_keys=True)
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?)",
                (digest(kind, text), kind, text, json.dumps(result), seconds),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()


def digest(*parts: str) -> str:
    """A key for texts, in order."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()
