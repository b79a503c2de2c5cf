"""A Hugging Face hub on this machine, small enough to read: what huggingface_hub asks for, and nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories by id, each a mapping of file names to bytes; all have one commit, which `main` names.

    gated: repositories that refuse whoever asks. asked: every request so far, as (method, path).
    broken: file names whose bytes stop half way, and how many requests for them still will.
    """

    repos: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloaded(self) -> list[str]:
        """The names of the files whose bytes were asked for, in that order."""
        return [path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is for the tests."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        else:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _info(self, repo: str, revision: str) -> None:
        if self._may(repo, revision):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.hub.repos[repo].items()]
            body = json.dumps({"id": repo, "sha": COMMIT, "private": False, "siblings": siblings}).encode()
            self._send(200, body, {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not self._may(repo, revision):
            return
        data = self.hub.repos[repo].get(name)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        facts = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(200, data, facts, name)
        else:
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            facts["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            self._send(206, data[begin:], facts, name)

    def _may(self, repo: str, revision: str) -> bool:
        if repo not in self.hub.repos:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo in self.hub.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _send(self, status: int, body: bytes, facts: Mapping[str, Any], name: str = "") -> None:
        self.send_response(status)
        for key, value in {**facts, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.broken.get(name, 0) > 0:
            self.hub.broken[name] -= 1
            # A connection that was lost once gives nothing more until it is mended.
            body = body[: len(body) // 2] if status == 200 else b""
            self.close_connection = True
        self.wfile.write(body)
