"""One server: whether it lives, what it serves, and one request to it with retries before the first byte."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from service.engines.base import BusyError, EngineError, NotReadyError, State, Status
from service.engines.remote.address import Remote
from service.engines.remote.breaker import Breaker
from service.engines.remote.call import Served
from service.engines.remote.events import DONE, Event, Events
from service.engines.remote.refusals import RETRIED, refusal, retry_after

log = logging.getLogger(__name__)

LAST_BYTES = 0.5
"""Seconds that a server has after [DONE] to end its response, so that its connection can serve the next."""

STOPPING = "the service is stopping"

LONGEST_REFUSAL = 1 << 16
"""Bytes of a refusal that are read."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How much of a server is used, how long it is waited for, and how often it is tried.

    connections: streams of an expert at a time. connect, first, between: seconds to connect, until the first byte of
    an answer, and until each next. attempts: before the first byte; backoff: seconds before the second, doubled from
    then on; longest_retry: seconds that a Retry-After may ask for. failures: in a row, before the server is left alone
    for `pause` seconds. every: seconds between two looks at its health, each of which may take `health` seconds.
    misses: looks in a row that a server which was ready may fail.
    """

    connections: int = 256
    connect: float = 5.0
    first: float = 300.0
    between: float = 60.0
    attempts: int = 3
    backoff: float = 0.25
    longest_retry: float = 5.0
    failures: int = 5
    pause: float = 10.0
    every: float = 5.0
    health: float = 5.0
    misses: int = 1


class Meta(BaseModel):
    """llama.cpp's facts of a model."""

    n_ctx: int | None = None
    n_ctx_train: int | None = None


class Card(BaseModel):
    """A model as /v1/models lists it: vLLM tells max_model_len, this service window."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    window: int | None = None
    meta: Meta | None = None


class Listing(BaseModel):
    """/v1/models."""

    data: list[Card] = []


class Settings(BaseModel):
    """Of llama.cpp's slots."""

    n_ctx: int | None = None


class Props(BaseModel):
    """llama.cpp's /props."""

    default_generation_settings: Settings = Settings()


class Unhealthy(Exception):
    """What a look at the server found."""

    def __init__(self, state: State, why: str) -> None:
        super().__init__(why)
        self.state = state


class Passing(Exception):
    """A failure that another try may not meet. after: seconds that the server asks for."""

    def __init__(self, failure: EngineError, after: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.after = after


@dataclass(frozen=True, slots=True)
class Opened:
    """A response of which the first bytes are there."""

    response: httpx.Response
    chunks: AsyncGenerator[bytes, None]
    first: bytes

    async def aclose(self) -> None:
        """Close the connection, unless the response has ended; the server notices."""
        await self.response.aclose()
        await self.chunks.aclose()


class Server:
    """An expert's server, asked through a client that the experts share."""

    def __init__(self, expert: str, remote: Remote, client: httpx.AsyncClient, patience: Patience) -> None:
        """Raises RemoteError when its key is missing."""
        self.breaker = Breaker(patience.failures, patience.pause)
        self.running = 0
        self.waiting = 0
        self._expert = expert
        self._remote = remote
        self._headers = remote.headers()
        self._client = client
        self._patience = patience
        self._health = Status("loading", "not asked yet")
        self._misses = 0
        self._served: Served | None = None
        self._closed = False
        self._waits: set[asyncio.Timeout] = set()

    def status(self) -> Status:
        """Its health, as last looked at, and whether it is left alone."""
        if self._health.state == "ready" and (refusal := self.breaker.refusal):
            return Status("failed", refusal)
        return self._health

    def served(self) -> Served:
        """What it serves. Raises NotReadyError or EngineError when it cannot be asked."""
        status = self.status()
        if status.state == "loading":
            raise NotReadyError(f"{self._expert}'s server is not ready: {status.detail}")
        if status.state == "failed" or self._served is None:
            raise EngineError(f"{self._expert} cannot answer: {status.detail}")
        return self._served

    def make_room(self) -> None:
        """Raise BusyError when every connection is taken."""
        if self.running + self.waiting >= self._patience.connections:
            raise BusyError(f"{self._expert}'s server has {self._patience.connections} requests: try again soon")

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Event, None]:
        """The events of one answer; closing it closes the server's stream.

        Raises BusyError, NotReadyError, PromptError, UnsupportedError or, later too, EngineError.
        """
        self.waiting += 1
        try:
            opened = await self._open(path, body)
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            async with aclosing(opened), aclosing(self._read(opened)) as events:
                async for event in events:
                    yield event
        finally:
            self.running -= 1

    async def watch(self) -> None:
        """Look at its health for ever."""
        while True:
            await self._look()
            await asyncio.sleep(self._patience.every)

    def close(self) -> None:
        """End every wait for it at once, with an EngineError."""
        self._closed = True
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(0)

    async def _open(self, path: str, body: dict[str, Any]) -> Opened:
        backoff = self._patience.backoff
        for attempts_left in reversed(range(self._patience.attempts)):
            try:
                opened = await self._try(path, body)
            except Passing as exc:
                # Half of it by chance, so that those who failed together do not come back together.
                wait = exc.after if exc.after is not None else backoff * random.uniform(0.5, 1)
                if not attempts_left or wait > self._patience.longest_retry:
                    raise exc.failure from exc.__cause__
                log.warning("%s: %s; tried again in %.2f s", self._remote.url, exc, wait)
            else:
                self.breaker.answered()
                return opened
            async with self._within(wait + 1):
                await asyncio.sleep(wait)
            backoff *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _try(self, path: str, body: dict[str, Any]) -> Opened:
        request = self._client.build_request("POST", self._remote.root + path, json=body, headers=self._headers)
        try:
            async with self._within(self._patience.first):
                response = await self._client.send(request, stream=True)
                try:
                    if response.status_code != 200:
                        raise await self._refusal(response)
                    chunks = response.aiter_bytes()
                    assert isinstance(chunks, AsyncGenerator)
                    return Opened(response, chunks, await anext(chunks, b""))
                except BaseException:
                    await response.aclose()
                    raise
        except httpx.RequestError as exc:
            raise Passing(EngineError(f"{self._expert}'s server cannot be reached: {_reason(exc)}")) from exc

    async def _refusal(self, response: httpx.Response) -> Exception:
        body = b""
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > LONGEST_REFUSAL:
                break
        failure = refusal(self._expert, response, body)
        if response.status_code == 404 and isinstance(failure, EngineError):  # it may serve another model by now
            self._health = Status("loading", "its server is asked anew what it serves")
            self._served = None
        forbidden = response.headers.get("x-should-retry") == "false"
        if response.status_code in RETRIED and isinstance(failure, EngineError) and not forbidden:
            return Passing(failure, retry_after(response.headers))
        return failure

    async def _read(self, opened: Opened) -> AsyncGenerator[Event, None]:
        events = Events()
        chunk: bytes | None = opened.first
        while chunk is not None:
            for event in events.feed(chunk):
                yield event
                if event.data == DONE:
                    with suppress(EngineError):
                        await self._next(opened, LAST_BYTES)
                    return
            chunk = await self._next(opened, self._patience.between)

    async def _next(self, opened: Opened, seconds: float) -> bytes | None:
        try:
            async with self._within(seconds):
                return await anext(opened.chunks, None)
        except httpx.RequestError as exc:
            raise EngineError(f"{self._expert}'s server broke off: {_reason(exc)}") from exc

    @asynccontextmanager
    async def _within(self, seconds: float) -> AsyncIterator[None]:
        """Raise EngineError after so many seconds, or when the server is closed."""
        if self._closed:
            raise EngineError(STOPPING)
        try:
            async with asyncio.timeout(seconds) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError as exc:
            silent = f"{self._expert}'s server said nothing for {seconds} s"
            raise EngineError(STOPPING if self._closed else silent) from exc

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(self._patience.health):
                await self._check_health()
            found = Status("ready")
        except Unhealthy as exc:
            found = Status(exc.state, str(exc))
        except TimeoutError:
            found = Status("failed", f"its server did not say within {self._patience.health} s how it is")
        except httpx.RequestError as exc:
            found = Status("failed", f"its server cannot be reached: {_reason(exc)}")
        except ValidationError:
            found = Status("failed", "its server lists its models in another form than OpenAI's")
        except Exception as exc:  # or nobody would look again
            log.exception("%s at %s cannot be looked at", self._expert, self._remote.url)
            found = Status("failed", f"its server cannot be asked: {exc!r}")
        self._settle(found)

    def _settle(self, found: Status) -> None:
        self._misses = self._misses + 1 if found.state == "failed" else 0
        if self._health.state == "ready" and 0 < self._misses <= self._patience.misses:
            return  # a server under load may be late once
        if found.state != "ready":
            self._served = None
        if found != self._health:
            log.log(
                logging.WARNING if found.state == "failed" else logging.INFO,
                "%s at %s is %s %s",
                self._expert,
                self._remote.url,
                found.state,
                found.detail,
            )
        self._health = found

    async def _check_health(self) -> None:
        """Raise Unhealthy, or know what the server serves."""
        health = await self._get("/health")
        if health.status_code >= 500:
            raise self._unhealthy(health)
        if self._served is None or health.status_code not in (200, 204):
            self._served = await self._describe(await self._get("/v1/models"))

    async def _describe(self, response: httpx.Response) -> Served:
        card = self._card(response)
        window = card.max_model_len or card.window
        if card.owned_by == "llamacpp":
            window = await self._llamacpp_window(card)
        window = window or self._remote.window
        if window is None:
            raise Unhealthy(
                "failed", f"its server tells no window for {card.id}: --expert-window says how many tokens it takes"
            )
        return Served(card.id, window, card.owned_by or "")

    def _card(self, response: httpx.Response) -> Card:
        wanted = self._remote.model
        if response.status_code in (404, 405) and wanted is not None:
            return Card(id=wanted)
        if response.status_code != 200:
            raise self._unhealthy(response)
        cards = {card.id: card for card in Listing.model_validate_json(response.content).data}
        if not cards:
            raise Unhealthy("failed", "its server lists no model")
        if wanted is not None and wanted not in cards:
            raise Unhealthy("failed", f"its server has no model {wanted}; there are: {', '.join(cards)}")
        return cards[wanted] if wanted is not None else next(iter(cards.values()))

    async def _llamacpp_window(self, card: Card) -> int | None:
        """A slot's share of the context, which may be far less than what the model was trained for."""
        if card.meta is not None and card.meta.n_ctx:
            return card.meta.n_ctx
        response = await self._get("/props")
        if response.status_code == 200:
            told = Props.model_validate_json(response.content).default_generation_settings.n_ctx
        else:
            told = None
        return told or (card.meta.n_ctx_train if card.meta is not None else None)

    async def _get(self, path: str) -> httpx.Response:
        return await self._client.get(self._remote.root + path, headers=self._headers)

    def _unhealthy(self, response: httpx.Response) -> Unhealthy:
        if response.status_code == 503:
            return Unhealthy("loading", "its server is still loading")
        if response.status_code in (401, 403):
            key = f"the key in {self._remote.api_key}" if self._remote.api_key else "requests without a key"
            return Unhealthy("failed", f"its server refuses {key}")
        return Unhealthy("failed", f"its server answers {response.status_code} to {response.request.url.path}")


def _reason(exc: httpx.RequestError) -> str:
    return str(exc) or type(exc).__name__
