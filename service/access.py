"""Who may ask, and how much: API keys, their limits, and the gate that every request goes through."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from routers.errors import ModelGlueError
from service import errors, record
from service.ending import Drain
from service.errors import AccessError, ForbiddenError, LimitError, StoppingError

PREFIX: Final = "mg-"
NO_LIMIT: Final = "-"
ADMIN: Final = "admin"
"""The name of the key that may reload."""

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OPEN: Final = frozenset({"/healthz", "/health", "/readyz", "/metrics"})
"""For those who watch the service: always answered, and no key is asked for."""
FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class KeysError(ModelGlueError):
    """A file of keys that cannot be followed."""


@dataclass(frozen=True, slots=True)
class Key:
    """A client's key. digest: SHA-256 of it. per_minute, concurrent: requests; None is any number."""

    name: str
    digest: bytes
    per_minute: int | None = None
    concurrent: int | None = None


def new_key(name: str, per_minute: int | None = None, concurrent: int | None = None) -> tuple[str, str]:
    """A key and its line in the file. It has 256 random bits, so its hash needs no salt. Raises KeysError."""
    if not NAME.fullmatch(name):
        raise KeysError(f"{name!r} is no name for a key: letters, digits, dots, dashes")
    key = PREFIX + secrets.token_urlsafe(32)
    limits = " ".join(str(limit or NO_LIMIT) for limit in (per_minute, concurrent))
    return key, f"{name} {hashlib.sha256(key.encode()).hexdigest()} {limits}"


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file of lines `name sha256-hex [requests-per-minute] [concurrent]`; - is no limit, # a comment.

    Several lines may bear one name, so that a key can be changed while the old one still works. Raises KeysError.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise KeysError(f"the keys in {path} cannot be read ({exc}): make one with `service key NAME`") from exc
    keys = tuple(_key(words, f"{path}:{number}") for number, line in enumerate(lines, 1) if (words := _words(line)))
    if not keys:
        raise KeysError(f"{path} has no keys: make one with `service key NAME`")
    return keys


class Access:
    """Knows the keys in a file, and how much each is used. Raises KeysError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = read_keys(path)
        self._running = Counter[str]()
        self._left: dict[str, tuple[float, float]] = {}

    def reload(self) -> None:
        """Read the file again; what runs goes on. Raises KeysError, and the old keys stay."""
        self._keys = read_keys(self._path)

    def who(self, authorization: str | None) -> Key:
        """Whose request it is. Every key is compared, in constant time. Raises AccessError."""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise AccessError("no API key: send the header `Authorization: Bearer KEY`")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not found:
            raise AccessError("the API key is not known here: ask whoever runs this service for one")
        return found[0]

    @contextmanager
    def use(self, key: Key) -> Iterator[None]:
        """One request of a key. Raises LimitError."""
        if key.concurrent is not None and self._running[key.name] >= key.concurrent:
            raise LimitError(f"{key.name} has {key.concurrent} requests running, as many as it may", 1.0, "concurrency")
        self._take(key)
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1

    def _take(self, key: Key) -> None:
        """One of the requests of this minute: they come back evenly, and at most a minute's are kept."""
        if key.per_minute is None:
            return
        now, a_second = time.monotonic(), key.per_minute / 60
        left, last = self._left.get(key.name, (float(key.per_minute), now))
        left = min(left + (now - last) * a_second, key.per_minute)
        if left < 1:
            self._left[key.name] = left, now
            after = (1 - left) / a_second
            raise LimitError(f"{key.name} may send {key.per_minute} requests a minute", after, "rate_limit_exceeded")
        self._left[key.name] = left - 1, now


class Gate:
    """Lets a request in, or refuses it, before its body is read: by the service's end, its key, or the key's limits."""

    def __init__(self, app: ASGIApp, access: Access | None, drain: Drain, public: Collection[str]) -> None:
        """public: paths of pages, which are for everyone; what they ask for is not."""
        self._app = app
        self._access = access
        self._drain = drain
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self._app(scope, receive, send)
        with ExitStack() as inside:
            try:
                self._enter(scope, inside)
            except ModelGlueError as exc:
                return await errors.answer(exc, scope)(scope, receive, send)
            return await self._app(scope, receive, send)

    def _enter(self, scope: Scope, inside: ExitStack) -> None:
        """Raises StoppingError, AccessError or LimitError."""
        if self._drain.begun:
            raise StoppingError("the service is stopping")
        if self._access is not None and scope["path"] not in self._public:
            key = self._access.who(Headers(scope=scope).get("authorization"))
            record.of(scope).key = key.name
            inside.enter_context(self._access.use(key))
        inside.enter_context(self._drain.request())


def check_admin(scope: Scope) -> None:
    """Whether this request may change the service: by the key `admin`, or without keys from this very machine.

    Raises ForbiddenError.
    """
    key = record.of(scope).key
    if key == ADMIN:
        return
    if key is not None:
        raise ForbiddenError(f"the key {key} may not do this: it takes the one that is called {ADMIN}")
    headers = Headers(scope=scope)
    # A page in a browser here, or a proxy here, asks for others.
    if not _is_local(scope) or "origin" in headers or any(name in headers for name in FORWARDED):
        raise ForbiddenError(f"this may be asked from the service's own machine, or with a key called {ADMIN}")


def _is_local(scope: Scope) -> bool:
    try:
        return ip_address(scope["client"][0]).is_loopback
    except (TypeError, ValueError):
        return False


def _words(line: str) -> list[str]:
    return line.partition("#")[0].split()


def _key(words: Sequence[str], where: str) -> Key:
    if not 2 <= len(words) <= 4:
        raise KeysError(f"{where} is not `name sha256-hex [requests-per-minute] [concurrent]`")
    name, digest, *limits = words
    if not NAME.fullmatch(name):
        raise KeysError(f"{where} has the name {name!r}: letters, digits, dots, dashes")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise KeysError(f"{where} has no SHA-256 of 64 hex digits: make a line with `service key {name}`")
    for limit in limits:
        if limit != NO_LIMIT and not (limit.isdecimal() and int(limit)):
            raise KeysError(f"{where} has the limit {limit!r}: a number from 1, or {NO_LIMIT} for none")
    numbers = [None if limit == NO_LIMIT else int(limit) for limit in limits]
    return Key(name, bytes.fromhex(digest), *numbers)
