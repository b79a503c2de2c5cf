"""Four small self-written multiple-choice sets, one a domain, that score the demo zoo's models."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from builder.proxy.demo import chat, code, math, story
from builder.proxy.items import Item


@dataclass(frozen=True, slots=True)
class Domain:
    """A set: `items` turns distinct units, numbered below `count`, into one question each."""

    items: Callable[[Sequence[int], random.Random], list[Item]]
    count: int


DOMAINS: dict[str, Domain] = {
    "math": Domain(math.items, math.COUNT),
    "code": Domain(code.items, code.COUNT),
    "story": Domain(story.items, story.COUNT),
    "chat": Domain(chat.items, chat.COUNT),
}
