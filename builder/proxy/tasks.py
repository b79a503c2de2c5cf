"""The tasks by name, and their three disjoint splits: proxy decides merges, routing proves routers, test is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence

from builder.config import Split
from builder.errors import ZooError
from builder.proxy import tiny
from builder.proxy.demo import DOMAINS as DEMO
from builder.proxy.demo import Domain
from builder.proxy.items import Item

TASKS: dict[str, Domain] = {f"demo/{name}": domain for name, domain in DEMO.items()}
TASKS |= {f"tiny/{name}": Domain(domain, tiny.COUNT) for name, domain in tiny.DOMAINS.items()}
SPLITS: tuple[Split, ...] = ("proxy", "routing", "test")


def check(names: Sequence[str]) -> None:
    """Raises ZooError for a task that this release does not score."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ZooError(f"proxy.tasks: {', '.join(unknown)} cannot be scored by this release; known: {', '.join(TASKS)}")


def load(name: str, split: Split, limit: int, seed: int) -> list[Item]:
    """The first `limit` items of a task's split. No unit (problem, function, story, question) is in two splits."""
    domain = TASKS[name]
    order = list(range(domain.count))
    random.Random(f"{name} {seed}").shuffle(order)
    units = order[SPLITS.index(split) :: len(SPLITS)]
    return domain.items(units, random.Random(f"{name} {split} {seed}"))[:limit]
