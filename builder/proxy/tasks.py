"""The tasks by name, and their disjoint splits: proxy decides merges, routing proves routers, test is kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

from builder.config import PRESETS
from builder.errors import ZooError
from builder.proxy import tiny
from builder.proxy.demo import DOMAINS as DEMO
from builder.proxy.demo import Domain
from builder.proxy.items import sample
from builder.proxy.task import Spec, Task

OWN: dict[str, Domain] = {f"demo/{name}": domain for name, domain in DEMO.items()}
OWN |= {f"tiny/{name}": Domain(domain, tiny.COUNT) for name, domain in tiny.DOMAINS.items()}


def check(names: Sequence[str]) -> None:
    """Raises ZooError for tasks that nobody knows, before anything is downloaded."""
    others = [name for name in names if name not in OWN]
    if not others:
        return
    from builder.proxy import harness

    unknown = [name for name in others if not harness.knows(name)]
    if unknown:
        raise ZooError(
            f"proxy.tasks: nobody knows {', '.join(unknown)}: name a preset ({', '.join(PRESETS)}), one of our own "
            f"({', '.join(OWN)}), a task of lm-evaluation-harness, or a YAML file of its kind"
        )


@lru_cache(maxsize=256)
def load(spec: Spec) -> Task:
    """The samples of a task. Raises ZooError for one whose data cannot be had."""
    if spec.name not in OWN:
        from builder.proxy import harness

        return harness.load(spec)
    domain = OWN[spec.name]
    units = spec.share(range(domain.count))
    items = domain.items(units, random.Random(f"{spec.name} {spec.split} {spec.seed}"))[: spec.limit]
    digest = hashlib.sha256(repr(items).encode()).hexdigest()
    return Task(spec.name, tuple(sample(item) for item in items), "accuracy", digest)


def check_sources(proxy: Sequence[str], test: Sequence[str]) -> None:
    """Raises ZooError where a test task reads the same split of the same data as a proxy task."""
    used = {source: name for name in proxy for source in _sources(name)}
    for name in test:
        for source in _sources(name):
            if source in used:
                path, subset, files, split = source
                data = files if files != "null" else f"{path} ({subset})"
                raise ZooError(
                    f"{used[source]} (proxy) and {name} (test) read the same split {split!r} of {data}: a test must be "
                    "data that no decision saw; name another, or leave [test] out and the proxy's tasks are divided"
                )


def _sources(name: str) -> tuple[tuple[str, ...], ...]:
    """Files and splits; our own sets divide themselves."""
    if name in OWN:
        return ()
    from builder.proxy import harness

    return harness.sources(name)


def check_apart(parts: Sequence[Sequence[Task]]) -> None:
    """Raises ZooError where a question is in two parts (splits): what decides must never be what proves.

    Two parts may divide one file's split between them, as `Spec.share` does; any other overlap is a leak.
    """
    seen: dict[str, tuple[int, str]] = {}
    for number, tasks in enumerate(parts):
        for task in tasks:
            for one in task.samples:
                key = repr(one.requests)
                part, name = seen.setdefault(key, (number, task.name))
                if part != number:
                    raise ZooError(
                        f"{name} and {task.name} share a question across splits that must be apart: "
                        f"{one.prompt[-80:]!r}. Leave one of the tasks out"
                    )
