"""`builder cluster`: a zoo's families, how alike their models are, and which of them may be merged."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from builder.errors import ZooError

if TYPE_CHECKING:
    from builder.config import Base, Zoo
    from builder.families import On
    from builder.members import Members
    from builder.progress import Progress
    from builder.record import FamilyRecord
    from builder.sources import Fetched


@dataclass(frozen=True, slots=True)
class _Found:
    """A family with its clusters."""

    family: FamilyRecord
    clusters: Sequence[tuple[str, ...]]


def cluster(
    zoo: Annotated[str, typer.Option("--zoo", help="A shipped zoo, or a TOML file.")],
    threshold: Annotated[
        float | None, typer.Option(help="Similarity that makes a cluster; the zoo's by default.")
    ] = None,
    linkage: Annotated[str | None, typer.Option(help="components or complete; the zoo's by default.")] = None,
    on: Annotated[str, typer.Option(help="What is compared: weights, or deltas from the base.")] = "weights",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw heatmap and tree into an .svg file.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="A folder that holds models already.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where models and results are kept [MODELGLUE_CACHE].")] = None,
) -> None:
    """Which models of a zoo are alike: families, the matrix of similarities, clusters."""
    from builder.cluster import clusters
    from builder.config import load_zoo
    from builder.families import families
    from builder.files import default_cache
    from builder.journal import Journal
    from builder.members import open_all

    if plot is not None:
        _check_plot(plot)
    loaded, compared = _chosen(load_zoo(zoo), threshold, linkage), _on(on)
    said = loaded.cluster
    cache, progress = cache or default_cache(), _progress(quiet=as_json)
    fetched = _fetched(loaded, compared, cache, models_dir, progress)
    with Journal(cache / "journal.sqlite") as journal:
        members = open_all(loaded, fetched, journal)
        kin = families(loaded, members, journal, progress, compared)
    found = [
        _Found(family, clusters(family.models, family.similarity["all"], said.threshold, said.linkage))
        for family in kin
    ]
    if plot is not None:
        _draw(plot, loaded, found)
    if as_json:
        print(json.dumps(_facts(loaded, compared, members, found), indent=2))
    else:
        _print(loaded, compared, found)


def _check_plot(plot: Path) -> None:
    if plot.suffix != ".svg":
        raise ZooError(f"--plot {plot}: the drawing is SVG, so give a name that ends in .svg")
    if not plot.parent.is_dir():
        raise ZooError(f"--plot {plot}: there is no folder {plot.parent}")


def _on(on: str) -> On:
    from builder.families import On

    for known in get_args(On):
        if on == known:
            found: On = known
            return found
    raise ZooError(f"--on {on}: compare {' or '.join(get_args(On))}")


def _chosen(zoo: Zoo, threshold: float | None, linkage: str | None) -> Zoo:
    """The zoo with what the command line says instead."""
    from builder.cluster import Linkage
    from builder.config import Cluster

    said = zoo.cluster.model_dump()
    if threshold is not None:
        if not 0 < threshold <= 1:
            raise ZooError(f"--threshold {threshold:g}: give a similarity above 0, and 1 at most")
        said["threshold"] = threshold
    if linkage is not None:
        if linkage not in get_args(Linkage):
            raise ZooError(f"--linkage {linkage}: how models are linked is {' or '.join(get_args(Linkage))}")
        said["linkage"] = linkage
    return zoo.model_copy(update={"cluster": Cluster(**said)})


def _fetched(zoo: Zoo, on: On, cache: Path, models_dir: Path | None, progress: Progress) -> dict[str, Fetched]:
    """The models, with their bases where deltas need them, and nothing that only a search or a router asks for."""
    from builder.config import Search
    from builder.families import bases
    from builder.sources import Store

    wanted = [_as_model(zoo.entry(name), zoo) for name in bases(zoo)] if on == "deltas" else []
    needed = zoo.model_copy(
        update={
            "models": (*wanted, *zoo.models),
            "router": zoo.router.model_copy(update={"features": zoo.models[0].id}),
            "search": Search(),
        }
    )
    return Store(needed, cache, models_dir).fetch(progress)


def _as_model(base: Base, zoo: Zoo) -> Any:
    from builder.config import Model

    return Model(**base.model_dump(), subject=zoo.models[0].subject)


def _progress(*, quiet: bool) -> Progress:
    """Bars for people; none where nobody looks."""
    from builder.progress import Quiet, Terminal

    return Quiet() if quiet or not sys.stderr.isatty() else Terminal()


def _draw(plot: Path, zoo: Zoo, found: Sequence[_Found]) -> None:
    from builder.report.heatmap import Panel, heatmaps

    panels = [
        Panel(each.family.key, each.family.models, each.family.similarity["all"], each.clusters) for each in found
    ]
    plot.write_text(heatmaps(panels, zoo.cluster.threshold, zoo.cluster.linkage), "utf-8")


def _print(zoo: Zoo, on: On, found: Sequence[_Found]) -> None:
    """Plain lines, never folded: text that can be searched and compared."""
    clusters = [group for each in found for group in each.clusters]
    cluster_of = {name: str(i) for i, group in enumerate(clusters, 1) for name in group}
    for each in found:
        names = each.family.models
        print(f"{each.family.key}: {len(names)} model{'s' * (len(names) > 1)}")
        rows = [["cluster", "", "model", *(str(i) for i in range(1, len(names) + 1))]]
        for i, (name, values) in enumerate(zip(names, each.family.similarity["all"], strict=True), 1):
            rows.append([cluster_of[name], str(i), name, *(f"{value:.5f}" for value in values)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            # Names to the left, numbers to the right.
            cells = [
                c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            print("  " + "  ".join(cells).rstrip())
        print()
    said = zoo.cluster
    print(f"{len(clusters)} cluster{'s' * (len(clusters) > 1)} at {said.threshold:g}, {said.linkage}, by {on}:")
    for i, group in enumerate(clusters, 1):
        print(f"  {i}: {', '.join(group)}")


def _facts(zoo: Zoo, on: On, members: Members, found: Sequence[_Found]) -> dict[str, Any]:
    entries = {model.id: model for model in zoo.models}
    return {
        "zoo": zoo.name,
        "on": on,
        "threshold": zoo.cluster.threshold,
        "linkage": zoo.cluster.linkage,
        "families": [
            {
                "key": each.family.key,
                "models": each.family.models,
                "base": entries[each.family.models[0]].base if on == "deltas" else None,
                "similarity": each.family.similarity,
                "dots": each.family.dots,
                "clusters": each.clusters,
            }
            for each in found
        ],
        "clusters": [group for each in found for group in each.clusters],
        "weights": {name: member.weights for name, member in members.items()},
    }
