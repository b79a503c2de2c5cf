"""The story of a request: what to route, one route, the expert's pieces up to a stop string. No HTTP here."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from routers.errors import RoutingError
from routers.policy import Limits, Route
from routers.prompt import AUTO, PromptRouter, Pull
from service.engines.base import Engine, Job, Piece, Prompt, Sampling, Tokens
from service.errors import RequestError
from service.metrics import Metrics

TURNS = 3
"""User turns of a chat that are routed: the last and the two before it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for; without `max_tokens` the answer may fill the expert's window."""

    prompt: Prompt
    model: str = AUTO
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    k: int | None = None

    @property
    def limits(self) -> Limits:
        """What it asks of the route."""
        return Limits(k=self.k)


@dataclass(frozen=True, slots=True)
class Decision:
    """The route of a request, the text that it was made from, and how long it took."""

    text: str
    route: Route
    seconds: float


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer under way: its first piece is there, so the engine has taken the request. To be closed."""

    decision: Decision
    prompt_tokens: int
    _first: Piece
    _rest: AsyncGenerator[Piece, None]

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All pieces, the last with a finish; their texts may be empty while a stop string is pending."""
        yield self._first
        async for piece in self._rest:
            yield piece

    async def whole(self) -> Piece:
        """The answer as one piece."""
        pieces = [piece async for piece in self.pieces()]
        text = "".join(piece.text for piece in pieces)
        return Piece(text, sum(piece.tokens for piece in pieces), pieces[-1].finish)

    async def aclose(self) -> None:
        """End the engine's work, if there is any left."""
        await self._rest.aclose()


async def start(request: Request, router: PromptRouter, engine: Engine, metrics: Metrics) -> Completion:
    """Route once, pin, and wait for the first piece: whatever can be refused is refused here."""
    decision = decide(request, router)
    if request.k not in (None, 1):
        raise RequestError(
            f"k={request.k} would mix the answers of {request.k} experts, which is not served yet: leave k out",
            param="k",
            code="unsupported_value",
        )
    job = _prepare(request, decision.route.expert, engine)
    metrics.decided(decision.route, decision.seconds)
    pieces = metrics.metered(job, until(request.stop, engine.generate(job)))
    return Completion(decision, len(job.tokens), await anext(pieces), pieces)


def decide(request: Request, router: PromptRouter) -> Decision:
    """The one route of a request. Raises RoutingError for an unknown model, RequestError for an impossible k."""
    began = time.perf_counter()
    text = text_to_route(request.prompt)
    try:
        route = router.route(text, model=request.model, limits=request.limits)
    except RoutingError as exc:
        if request.model == AUTO:  # it is always there, so the fault is with k
            raise RequestError(str(exc), param="k", code="invalid_value") from exc
        raise
    if route.reason == "pinned" and request.k not in (None, 1):
        raise RequestError(f"k={request.k} is for model {AUTO!r}: a pinned expert stands alone", param="k")
    return Decision(text, route, time.perf_counter() - began)


def evidence(decision: Decision, router: PromptRouter) -> list[Pull]:
    """The words that spoke most for the chosen expert; none where it was not the scores that chose."""
    return router.explain(decision.text) if decision.route.reason == "top_score" else []


def text_to_route(prompt: Prompt) -> str:
    """What of a prompt the router sees: of a chat the last user turns, for only they say what is wanted."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Tokens):
        return ""
    turns = [message.content for message in prompt if message.role == "user"]
    return "\n".join(turns[-TURNS:])


async def until(stops: Sequence[str], pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """The pieces up to the first stop string to be complete, whatever the borders; none of it is ever yielded.

    Text that may be the beginning of a stop string is held back until the next piece settles it.
    """
    async with aclosing(pieces):
        held = ""
        async for piece in pieces:
            text = held + piece.text
            cut = _first_stop(text, stops)
            if cut is not None:
                await pieces.aclose()  # before the yield: the reader may take its time
                yield Piece(text[:cut], piece.tokens, "stop")
                return
            settled = len(text) if piece.finish else len(text) - _pending(text, stops)
            held = text[settled:]
            yield replace(piece, text=text[:settled])


def _prepare(request: Request, expert: str, engine: Engine) -> Job:
    sampling = Sampling(request.max_tokens, request.temperature, request.top_p, seed=request.seed)
    return engine.prepare({expert: 1.0}, request.prompt, sampling)


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that ends first: the one that a reader of single characters would meet."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _pending(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    sizes = (
        size for stop in stops for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])
    )
    return max(sizes, default=0)
