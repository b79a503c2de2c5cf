"""What a build will do, as data: models, families, bytes, steps, trials; made without opening a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder import files
from builder.architecture import family_key
from builder.checkpoints import Checkpoint
from builder.config import Model, Zoo
from builder.explore import budget
from builder.sources import Store

BYTES_PER_PARAMETER = 2
FP32 = 2
"""How many times larger a model is where the processor does not multiply bfloat16 and it is scored in fp32."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model as far as it is known: from its header when it is here, from the zoo file when it is not."""

    id: str
    source: str
    here: bool
    family: str
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one build; None where nobody can know yet."""

    zoo: str
    models: tuple[PlannedModel, ...]
    families: dict[str, tuple[str, ...]]
    disk: int | None
    memory: int | None
    trials: int
    steps: tuple[str, ...]


def plan(zoo: Zoo, store: Store) -> Plan:
    """The plan of a build of `zoo` with what is on this machine; asks no network and writes nothing."""
    models = tuple(_planned(model, store) for model in zoo.models)
    families: dict[str, list[str]] = {}
    for model in models:
        families.setdefault(model.family, []).append(model.id)
    trials = sum(budget(zoo, len(members)) for members in families.values())
    sizes = [model.bytes for model in models]
    known = [size for size in sizes if size is not None]
    experts = len(families) if zoo.experts == "cluster" else min(zoo.experts, len(models) + len(families))
    complete = len(known) == len(sizes)
    mixtures = _mixtures(zoo, models, families) if complete else []
    return Plan(
        zoo.name,
        models,
        {key: tuple(members) for key, members in families.items()},
        disk=sum(known) + experts * max(known) + sum(mixtures) if complete else None,
        memory=FP32 * max([*known, *mixtures]) + 1_000_000_000 if complete else None,
        trials=trials,
        steps=_steps(zoo, store, trials, _largest(models, families) if complete else None, mixtures),
    )


def _planned(model: Model, store: Store) -> PlannedModel:
    found = store.locate(model.id)
    source = model.source or f"{model.base} + {model.adapter}"
    if found is not None:
        checkpoint = Checkpoint(found.folder)
        return PlannedModel(model.id, source, True, family_key(checkpoint), checkpoint.bytes)
    size = None if model.parameters is None else model.parameters * BYTES_PER_PARAMETER
    return PlannedModel(model.id, source, False, model.family or f"unknown ({model.id})", size)


def _largest(models: Sequence[PlannedModel], families: Mapping[str, Sequence[str]]) -> int:
    """Bytes of the family with most of them."""
    return max(sum(model.bytes or 0 for model in models if model.id in names) for names in families.values())


def _mixtures(zoo: Zoo, models: Sequence[PlannedModel], families: Mapping[str, Sequence[str]]) -> list[int]:
    """Bytes of every family's mixture at most: all the members, and what they share."""
    sizes = {model.id: model.bytes or 0 for model in models}
    kin = [[sizes[name] for name in names] for names in families.values() if len(names) > 1]
    return [sum(each) + max(each) for each in kin] if zoo.mixture else []


def _held(size: int | None) -> str:
    """Whether the members of a search stay in memory between its trials."""
    if size is None:
        return "members are mapped once"
    free = files.available_memory()
    if size < free:
        return f"members ({size / 1e9:.1f} GB) are mapped once and fit in memory"
    return (
        f"members ({size / 1e9:.1f} GB) do not fit in {free / 1e9:.1f} GB of memory: every trial streams them from disk"
    )


def _mixing(zoo: Zoo, mixtures: Sequence[int]) -> tuple[str, ...]:
    if zoo.mixture is None:
        return ()
    size = f", {max(mixtures) / 1e9:.1f} GB at most, in the temporary folder too" if mixtures else ""
    return (f"mix every cluster's models as {zoo.mixture.mixture} and score the mixtures{size}",)


def _steps(zoo: Zoo, store: Store, trials: int, members: int | None, mixtures: Sequence[int]) -> tuple[str, ...]:
    missing = [name for name in store.needed() if store.locate(name) is None]
    kept = "one expert a cluster" if zoo.experts == "cluster" else f"up to {zoo.experts} experts, greedily"
    return (
        f"fetch {len(missing)} models" if missing else "all models are here",
        "families from configs and headers",
        f"similarity in one pass; clusters at {zoo.cluster.threshold}, {zoo.cluster.linkage}",
        f"score {len(zoo.models)} models by {zoo.proxy.metric} on {', '.join(zoo.proxy.tasks)}",
        f"search by {zoo.search.strategy} with {zoo.search.method} merges: at most {trials} trials; {_held(members)}",
        *_mixing(zoo, mixtures),
        f"keep {kept}",
        f"score the experts on the routing set, fit the {zoo.router.kind} router, k = {zoo.router.k}",
        "write the bundle",
    )
