"""Which expert answered a session last: a conversation stays with its own unless another is clearly better."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from routers.policy import Reason, Route
from service.engines.base import Message

MARGIN: Final = 0.05
"""Score that another expert has to be ahead of a session's to take it over."""

MOST: Final = 10_000
"""Sessions that are remembered."""


class Sessions:
    """The experts of the latest sessions; the one that was silent for longest is forgotten first."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._experts: OrderedDict[str, str] = OrderedDict()

    def last(self, session: str) -> str | None:
        """Who answered it last; None for a session that is not known."""
        return self._experts.get(session)

    def answered(self, session: str, expert: str) -> None:
        """Remember who answers it now."""
        self._experts[session] = expert
        self._experts.move_to_end(session)
        if len(self._experts) > self._most:
            self._experts.popitem(last=False)


def named(client: str | None, session: str) -> str:
    """The key of a session that the client names."""
    return f"{client or ''}:id:{session}"


def of_chat(client: str | None, messages: Sequence[Message]) -> str:
    """The key of a client's chat: its messages up to the user's first, which every later turn begins with."""
    first = next((i for i, message in enumerate(messages) if message.role == "user"), len(messages))
    opening = [(message.role, message.content) for message in messages[: first + 1]]
    return f"{client or ''}:chat:{hashlib.blake2b(json.dumps(opening).encode(), digest_size=16).hexdigest()}"


def keep(route: Route, last: str) -> Route:
    """The route of a session's next turn: `last` retained unless it may not answer, or another beats it by MARGIN.

    A mixture, and a pinned expert, are as asked for.
    """
    if route.reason == "pinned" or sum(ranked.selected for ranked in route.ranking) != 1:
        return route
    score = next((ranked.score for ranked in route.ranking if ranked.expert == last and not ranked.excluded), None)
    if score is None or (route.expert != last and route.ranking[0].score - score > MARGIN):
        return replace(route, reason="switched")
    return alone(route, last, "retained")


def alone(route: Route, expert: str, reason: Reason) -> Route:
    """The same ranking, with this expert at its head and selected alone."""
    ranking = [
        replace(ranked, selected=ranked.expert == expert, weight=float(ranked.expert == expert))
        for ranked in route.ranking
    ]
    ranking.sort(key=lambda ranked: ranked.expert != expert)
    confidence = route.confidence if expert == route.expert else None
    return replace(route, ranking=tuple(ranking), reason=reason, confidence=confidence)
