"""What the four sets share: an item's choices in a random order, and distractors taken from other units."""

from __future__ import annotations

import random
from collections.abc import Sequence

from builder.proxy.items import Item


def shuffled(prompt: str, right: str, others: Sequence[str], rng: random.Random) -> Item:
    """The item that asks `prompt`, the right choice at a place that `rng` picks."""
    choices = [right, *others]
    rng.shuffle(choices)
    return Item(prompt, tuple(choices), choices.index(right))


def matches(pairs: Sequence[tuple[str, str]], units: Sequence[int], rng: random.Random) -> list[Item]:
    """One item a unit: its prompt, its own continuation, and those of three other units of `units`."""
    found = []
    for unit in units:
        others = rng.sample([other for other in units if other != unit], 3)
        prompt, right = pairs[unit]
        found.append(shuffled(prompt, right, [pairs[other][1] for other in others], rng))
    return found
