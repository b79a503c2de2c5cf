"""Items for the tiny models: how does a generated text go on?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from builder.proxy.demo import draw
from builder.proxy.items import Item
from builder.zoos.tiny import corpus

COUNT = 96


def _items(domain: str, units: Sequence[int], rng: random.Random) -> list[Item]:
    """One item a unit: a text's first words, its own rest, and the rests of three other units."""
    # Seeds beyond those that any model is trained with.
    texts = {unit: corpus.DOMAINS[domain](random.Random(f"item {domain} {unit}")) for unit in units}
    pairs = {unit: _cut(text) for unit, text in texts.items()}
    return [
        draw.shuffled(prompt, rest, _others(unit, pairs, rng), rng)
        for unit, (prompt, rest) in pairs.items()
        if len({other for _, other in pairs.values()} - {rest}) >= 3
    ]


def _others(unit: int, pairs: dict[int, tuple[str, str]], rng: random.Random) -> list[str]:
    rests = dict.fromkeys(rest for _, rest in pairs.values() if rest != pairs[unit][1])
    return rng.sample(list(rests), 3)


def _cut(text: str) -> tuple[str, str]:
    """A text after the word that ends its first half."""
    place = text.index(" ", len(text) // 2)
    return text[:place], text[place:]


DOMAINS: dict[str, Callable[[Sequence[int], random.Random], list[Item]]] = {
    domain: partial(_items, domain) for domain in corpus.DOMAINS
}
