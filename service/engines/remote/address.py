"""Where an expert is served, as the command line says it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import httpx

from routers.errors import ModelGlueError


class RemoteError(ModelGlueError):
    """A server that is not described well enough to be asked."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A server and its model. Raises RemoteError for what is no address.

    url: with /v1 at its end or without. model: None is the first that the server lists. api_key: the environment
    variable that holds it. window: in tokens, where the server does not tell it.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and httpx.URL(self.url).host and parts.port != 0
        except (ValueError, httpx.InvalidURL):
            usable = False
        if not usable:
            raise RemoteError(f"{self.url!r} is not the address of a server: write http://HOST:PORT")
        if parts.username is not None:
            raise RemoteError(
                "an address holds no password: put the key into an environment variable, and name it with --expert-key"
            )
        if parts.query or parts.fragment:
            raise RemoteError(f"{self.url!r} ends in more than a path: write http://HOST:PORT")

    @classmethod
    def parse(cls, text: str) -> tuple[str, Self]:
        """The expert's name and its server, from NAME=URL or NAME=URL#MODEL. Raises RemoteError."""
        name, _, address = text.partition("=")
        url, mark, model = address.partition("#")
        if not name.strip() or not url or bool(mark) != bool(model):
            raise RemoteError(f"{text!r} names no expert and its server: write NAME=URL or NAME=URL#MODEL")
        return name.strip(), cls(url, model or None)

    @property
    def root(self) -> str:
        """What every path is appended to."""
        return self.url.rstrip("/").removesuffix("/v1")

    def headers(self) -> dict[str, str]:
        """What authorises the service there. Raises RemoteError when the environment holds no key."""
        if self.api_key is None:
            return {}
        key = os.environ.get(self.api_key)
        if not key:
            raise RemoteError(f"the key for {self.url} is not in the environment: set {self.api_key}")
        return {"authorization": f"Bearer {key}"}
