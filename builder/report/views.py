"""What the page's templates lay out: the parts of a cluster and of a family, arranged from the record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import yaml
from markupsafe import Markup

from builder.cluster import Linkage, clusters
from builder.record import ClusterRecord, FamilyRecord, SearchRecord, TrialRecord
from builder.report import charts
from builder.report.charts import Bar, Mark, Scale
from builder.report.coefficients import columns, rows, shares
from builder.report.heatmap import heatmap
from builder.report.importance import Importance, importance
from builder.report.trials import EVOLVED, WITH_GRID, Step, by_strategy, failures, kept, steps, top

MOST_BARS, LEAST = 14, 0.005
"""So many of the most important numbers are drawn, where they round to more than nothing."""
RULES = {
    "paper": "A merge is taken where it scores no less than what was found before it.",
    "paired": "A merge is taken where its gain over what was found before it is above zero in a paired bootstrap, at "
    "level {level:g}.",
}
NOTES = {
    "average": "The next best model joins the uniform mean of all that are in.",
    "coefficient": "The next best model m joins the merge M as c M + (1 − c) m.",
    "similarity": "As coefficient, but next is the model that is {similar} similar to the merge so far.",
}


@dataclass(frozen=True, slots=True)
class FamilyView:
    """parts: what was compared beside everything, and its heatmap."""

    key: str
    all: Markup
    parts: tuple[tuple[str, Markup], ...]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task's scores, or those of all tasks, of each that is held against the others."""

    name: str
    marks: tuple[Mark, ...]

    @property
    def best(self) -> float:
        """The highest score."""
        return max(mark.estimate.mean for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Heuristic:
    """A strategy that tried members; with a grid of coefficients or without. gains: the scale of its rows' gains."""

    name: str
    note: str
    grid: bool
    steps: tuple[Step, ...]
    gains: Scale


@dataclass(frozen=True, slots=True)
class Evolution:
    """A strategy that tried numbers; `importance` is empty where the trials say nothing of it."""

    name: str
    trials: tuple[TrialRecord, ...]
    best: TrialRecord | None
    importance: tuple[Importance, ...]

    @property
    def failures(self) -> tuple[tuple[str, int], ...]:
        """Why trials failed, and how many."""
        return failures(self.trials)

    @property
    def taken(self) -> int:
        """How many trials were accepted."""
        return sum(trial.accepted for trial in self.trials)

    @property
    def drawn(self) -> int:
        """How many of the most important numbers are drawn."""
        return sum(each.mean >= LEAST for each in self.importance[:MOST_BARS])

    @property
    def bars(self) -> list[Bar]:
        """The most important numbers."""
        return [Bar(each.label, each.mean, each.low, each.high) for each in self.importance[: self.drawn]]

    @property
    def others(self) -> tuple[Importance, ...]:
        """Those that are not drawn."""
        return self.importance[self.drawn :]


@dataclass(frozen=True, slots=True)
class ClusterView:
    """A cluster of the record, and what is shown of it. table: all tasks' row first, on one scale."""

    record: ClusterRecord
    digits: int
    kept: TrialRecord | None
    table: tuple[TaskRow, ...]
    scale: Scale
    heuristics: tuple[Heuristic, ...]
    evolutions: tuple[Evolution, ...]
    coefficients: tuple[tuple[str, Markup], ...]

    @property
    def strategies(self) -> list[str]:
        """In the order of the search."""
        return list(by_strategy(self.record.trials))

    @property
    def single(self) -> str:
        """The best single model."""
        return self.record.standings[0].name

    @property
    def failed(self) -> int:
        """How many trials failed."""
        return sum(trial.score is None for trial in self.record.trials)

    @property
    def proven(self) -> bool:
        """Whether the merge beats the best single model beyond luck."""
        return self.kept is not None and self.kept.gain is not None and self.kept.gain.low > 0

    @property
    def recipe(self) -> str:
        """In YAML, with the models' names."""
        return yaml.safe_dump(self.record.said, sort_keys=False, allow_unicode=True)


def rule(search: Mapping[str, Any]) -> str:
    """When a merge was taken, in a sentence."""
    return RULES[search["accept"]].format(**search)


def family(record: SearchRecord, each: FamilyRecord) -> FamilyView:
    """The heatmap of everything, framed by the clusters of the record; of a part, by those it would make itself."""
    linkage: Linkage = "complete" if record.linkage == "complete" else "components"
    found = [cluster.models for cluster in record.clusters if cluster.models[0] in each.models]

    def drawn(part: str, groups: Sequence[Sequence[str]]) -> Markup:
        svg = heatmap(each.models, each.similarity[part], record.threshold, linkage, groups)
        # Inside of HTML no namespace is needed, and the page names no address at all.
        return Markup(svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))

    parts = tuple(
        (part, drawn(part, clusters(each.models, matrix, record.threshold, linkage)))
        for part, matrix in each.similarity.items()
        if part != "all"
    )
    return FamilyView(each.key, drawn("all", found), parts)


def cluster(record: SearchRecord, each: ClusterRecord) -> ClusterView:
    """A cluster as the page shows it."""
    single, strategies = each.standings[0].score, by_strategy(each.trials)
    table = _table(each, record.tasks)
    ends = [end for row in table for mark in row.marks for end in (mark.estimate.low, mark.estimate.high)]
    return ClusterView(
        record=each,
        digits=_digits(each),
        kept=kept(each) if each.said else None,
        table=table,
        scale=Scale.over(ends, 8, charts.STANDING),
        heuristics=tuple(
            _heuristic(name, trials, single.mean, record.search)
            for name, trials in strategies.items()
            if name not in EVOLVED
        ),
        evolutions=tuple(
            Evolution(name, tuple(trials), top(trials), tuple(importance(trials, record.search, record.seed)))
            for name, trials in strategies.items()
            if name in EVOLVED
        ),
        coefficients=tuple(_coefficients(each.said, record.search["groups"])),
    )


def _digits(each: ClusterRecord) -> int:
    """Decimals by which the usual interval has about two digits: no more is shown than is known, but never below 3."""
    known = [scored.score for scored in each.standings] + [trial.gain for trial in each.trials if trial.gain]
    widths = [estimate.high - estimate.low for estimate in known if estimate.high > estimate.low]
    return min(max(1 - math.floor(math.log10(median(widths))), 3), 6) if widths else 3


def _table(each: ClusterRecord, tasks: Sequence[str]) -> tuple[TaskRow, ...]:
    kinds = ["single", *("soup" if one.name == "uniform soup" else "merge" for one in each.standings[1:])]
    every = list(zip(each.standings, kinds, strict=True))
    mean = TaskRow("all tasks", tuple(Mark(one.name, one.score, kind) for one, kind in every))
    if len(tasks) == 1:
        return (TaskRow(tasks[0], mean.marks),)
    return mean, *(TaskRow(task, tuple(Mark(one.name, one.tasks[task], kind) for one, kind in every)) for task in tasks)


def _heuristic(name: str, trials: Sequence[TrialRecord], single: float, search: Mapping[str, Any]) -> Heuristic:
    tried = tuple(steps(trials, single))
    gains = [step.best.gain for step in tried if step.best is not None and step.best.gain is not None]
    scale = Scale.over([0.0, *(end for each in gains for end in (each.low, each.high))], 6, charts.GAIN)
    return Heuristic(name, NOTES[name].format(**search), name in WITH_GRID, tried, scale)


def _coefficients(said: Mapping[str, Any], groups: int) -> list[tuple[str, Markup]]:
    """A chart of each parameter and its title: members by layer groups where it has them, else a bar for each."""
    given, spans, drawn = rows(said, groups), columns(said, groups), []
    for parameter in dict.fromkeys(row.parameter for row in given):
        same = [row for row in given if row.parameter == parameter]
        shown = shares(said, same) if parameter == "weight" else same
        title = "weight, as a share of the sum" if shown != same else parameter
        label = f"{title}, of each model in the merge"
        if len(shown[0].values) > 1:
            drawn.append((title, charts.layers(shown, spans, f"{label}, by layer group")))
        else:
            bars = [Bar(row.member or row.parameter, row.values[0]) for row in shown]
            drawn.append((title, charts.bars(bars, label)))
    return drawn
