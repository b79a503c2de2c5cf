"""The report's charts, as SVG that stands in the page: whiskers, small lines, the search's history, bars, layer groups.

Colours are the page's variables, by class. Every point tells its numbers when pointed at, every chart says what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from markupsafe import Markup

from builder.record import Estimate, TrialRecord
from builder.report.coefficients import OUTSIDE, Row
from builder.report.trials import Step, best_so_far, by_strategy, share

LABEL = 34
"""So many letters of a name fit beside a chart; pointing at it tells the rest."""
ROW = 15
STANDING, GAIN = 290, 112
SPARK, SPARK_HEIGHT = 132, 46
WIDE, TALL, LEFT, RIGHT, TOP, BOTTOM = 1000, 340, 66, 14, 28, 44
BARS, BAR, NUMBER = 480, 24, 52
CELL, CELL_HEIGHT = 84, 28
MANY = 100
"""Of more trials than this the points are smaller."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from `low` to `high` on pixels from `start` to `end`; what is beyond stays at the edge."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, margin: float = 0.06) -> Scale:
        """Around values, with a margin; they may all be equal."""
        seen = list(values)
        low, high = min(seen), max(seen)
        wide = (high - low) * margin if high > low else max(abs(high) * 0.05, 0.01)
        return cls(low - wide, high + wide, start, end)

    def at(self, value: float) -> float:
        """In pixels."""
        part = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """At most so many round numbers, about evenly spread; one at least."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True, slots=True)
class Mark:
    """An estimate in a chart, by a name that is told and a class that colours it."""

    name: str
    estimate: Estimate
    kind: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, with a whisker where its low and high are known."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


def number(value: float, digits: int, sign: bool = False) -> str:
    """With a minus that is as wide as a plus; never minus zero."""
    said = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    said = said if float(said) else said.replace("-", "+" if sign else "")
    return said.replace("-", "−")


def interval(estimate: Estimate, digits: int, sign: bool = False) -> str:
    """`0.512 (0.430 to 0.594)`."""
    mean, low, high = (number(each, digits, sign) for each in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} ({low} to {high})"


def short(name: str, letters: int = LABEL) -> str:
    """A name that fits: its two ends when it is long."""
    half = letters // 2
    return name if len(name) <= letters else f"{name[: letters - half - 1]}…{name[-half:]}"


def whiskers(marks: Sequence[Mark], scale: Scale, digits: int) -> Markup:
    """Estimates below one another on a scale that other rows share."""
    height = max(ROW * len(marks) + 6, 38)
    top = (height - ROW * len(marks)) / 2
    lines = "".join(_line(scale.at(tick), 0, scale.at(tick), height, "grid") for tick in scale.ticks(5))
    shown = "".join(_whisker(mark, scale, top + ROW * (i + 0.5), digits) for i, mark in enumerate(marks))
    label = "; ".join(f"{mark.name}: {interval(mark.estimate, digits)}" for mark in marks)
    return _svg(scale.end + 14, height, label, lines + shown, "whiskers")


def glyph(kind: str) -> Markup:
    """The mark of a kind alone, for a legend."""
    shape = _mark(kind, 13, 7, 1, 25)
    return Markup(f'<svg class="chart" width="26" height="14" viewBox="0 0 26 14" aria-hidden="true">{shape}</svg>')


def ticks(scale: Scale) -> Markup:
    """The numbers of that scale, for the table's last row."""
    found = scale.ticks(5)
    places = _places(found)
    said = "".join(_text(scale.at(tick), 12, number(tick, places), "middle") for tick in found)
    return _svg(scale.end + 14, 18, "scale", said, "whiskers")


def gain(estimate: Estimate, scale: Scale, digits: int) -> Markup:
    """A gain and its interval, beside the line of no gain."""
    kind = "good" if estimate.low > 0 else "bad" if estimate.high < 0 else "unsure"
    said = f"gain over the best single: {interval(estimate, digits, sign=True)}"
    zero = _line(scale.at(0), 0, scale.at(0), ROW + 6, "zero")
    return _svg(scale.end + 8, ROW + 6, said, zero + _whisker(Mark("gain", estimate, kind), scale, 10, digits), "gain")


def sparkline(step: Step, digits: int) -> Markup:
    """Scores over c, with the best c marked, the score to beat as a dashed line, and failures as crosses."""
    scored = [(share(trial), trial.score.mean) for trial in step.trials if trial.score is not None]
    x = Scale(0.1, 0.9, 10, SPARK - 10)
    y = Scale.over([step.beat, *(score for _, score in scored)], SPARK_HEIGHT - 9, 7)
    points = sorted((x.at(c), y.at(score)) for c, score in scored)
    parts = [_line(4, y.at(step.beat), SPARK - 4, y.at(step.beat), "beat")]
    parts.append(f'<polyline class="spark-line" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
    for trial in step.trials:
        parts.append(_spark_point(trial, trial is step.best, x, y, digits))
    said = f"scores of the merge with {step.member} over c from 0.1 to 0.9"
    if step.best is not None and step.best.score is not None:
        said += f"; best at c = {share(step.best):.1f}: {interval(step.best.score, digits)}"
    return _svg(SPARK, SPARK_HEIGHT, said, "".join(parts), "spark")


def history(trials: Sequence[TrialRecord], single: Estimate, single_name: str, digits: int) -> Markup:
    """Every trial's score in order, the best so far as a step line, and the best single model's score.

    A whisker is the interval of the gain over the best single model, paired by samples: of the score itself it would
    be as wide as samples differ, and hide all differences between trials.
    """
    x = Scale(0.5, len(trials) + 0.5, LEFT, WIDE - RIGHT)
    y = _heights(trials, single.mean)
    said = f"best single, {single_name}: {interval(single, digits)}"
    parts = [_frame(x, y, len(trials)), _bands(trials, x)]
    parts.append(_line(LEFT, y.at(single.mean), WIDE - RIGHT, y.at(single.mean), "single-line", said))
    parts.append(_steps(trials, x, y))
    radius = 2.4 if len(trials) > MANY else 3.6
    parts.extend(_point(i, trial, x, y, single.mean, radius, digits) for i, trial in enumerate(trials, 1))
    failed = sum(trial.score is None for trial in trials)
    label = f"score of each of {len(trials)} trials, {failed} of them failed, with the intervals of their gains over "
    return _svg(
        WIDE, TALL, f"{label}the best single model, {single_name}, and the best so far", "".join(parts), "history"
    )


def bars(given: Sequence[Bar], label: str, digits: int = 2) -> Markup:
    """Bars from a common zero, their labels on the left."""
    names = 16 + 7.2 * max(len(short(bar.label)) for bar in given)
    ends = [0.0, *(end for bar in given for end in (bar.value, bar.low, bar.high) if end is not None)]
    span = max(ends) - min(ends) or 1.0
    scale = Scale(min(ends), min(ends) + span, names, BARS - NUMBER)
    shown = "".join(_bar(bar, scale, BAR * i + 4, digits) for i, bar in enumerate(given))
    zero = _line(scale.at(0), 0, scale.at(0), BAR * len(given) + 4, "axis")
    return _svg(BARS, BAR * len(given) + 4, label, shown + zero, "bars")


def layers(rows: Sequence[Row], columns: Sequence[str], label: str) -> Markup:
    """Members by layer groups, coloured by their coefficient; what is outside of the layers stands apart."""
    left = 16 + 7.2 * max(len(short(row.member or row.parameter)) for row in rows)
    lefts = [left + CELL * i + (12 if name == OUTSIDE else 0) for i, name in enumerate(columns)]
    top = max(abs(value) for row in rows for value in row.values) or 1.0
    parts = [_text(at + CELL / 2, 16, name, "middle") for at, name in zip(lefts, columns, strict=True)]
    for i, row in enumerate(rows):
        y = 26 + CELL_HEIGHT * i
        parts.append(_label(row.member or row.parameter, left - 8, y + CELL_HEIGHT / 2))
        parts.extend(
            _cell(f"{row.label}, {name}", value, top, at, y)
            for at, name, value in zip(lefts, columns, row.values, strict=True)
        )
    return _svg(lefts[-1] + CELL + 4, 30 + CELL_HEIGHT * len(rows), label, "".join(parts), "layers")


def _svg(width: float, height: float, label: str, body: str, kind: str) -> Markup:
    # No xmlns: inside of HTML it is not needed, and the page names no address at all.
    return Markup(
        f'<svg class="chart {kind}" role="img" aria-label="{escape(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{body}</svg>'
    )


def _title(said: str) -> str:
    return f"<title>{escape(said)}</title>" if said else ""


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, said: str = "") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{_title(said)}</line>'


def _text(x: float, y: float, said: str, anchor: str = "start", kind: str = "soft-text") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def _label(name: str, x: float, y: float) -> str:
    said = f"{_title(name)}{escape(short(name))}"
    return f'<text class="ink-text" x="{x:.1f}" y="{y + 4.2:.1f}" text-anchor="end">{said}</text>'


def _whisker(mark: Mark, scale: Scale, y: float, digits: int) -> str:
    each = mark.estimate
    ends = [scale.at(value) for value in (each.mean, each.low, each.high)]
    return _mark(mark.kind, ends[0], y, ends[1], ends[2], f"{mark.name}: {interval(each, digits)}")


def _mark(kind: str, x: float, y: float, low: float, high: float, said: str = "") -> str:
    """A dot for the mean and a line for the interval; a square and a diamond tell kinds apart without colours."""
    shapes = {
        "soup": f'<rect x="{x - 3.8:.1f}" y="{y - 3.8:.1f}" width="7.6" height="7.6"/>',
        "merge": f'<path d="M{x:.1f} {y - 5.6:.1f}l5.6 5.6l-5.6 5.6l-5.6 -5.6z"/>',
    }
    shape = shapes.get(kind, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>')
    return f'<g class="whisker {kind}">{_title(said)}{_line(low, y, high, y, "reach")}{shape}</g>'


def _spark_point(trial: TrialRecord, best: bool, x: Scale, y: Scale, digits: int) -> str:
    c = share(trial)
    if trial.score is None:
        return _cross(x.at(c), SPARK_HEIGHT - 5, f"c = {c:.1f} failed: {trial.failure}")
    said = _title(f"c = {c:.1f}: {interval(trial.score, digits)}")
    kind, radius = ("spark-best", 4.4) if best else ("spark-dot", 2.2)
    return f'<circle class="{kind}" cx="{x.at(c):.1f}" cy="{y.at(trial.score.mean):.1f}" r="{radius}">{said}</circle>'


def _cross(x: float, y: float, said: str) -> str:
    return f'<path class="cross" d="M{x - 3.2:.1f} {y - 3.2:.1f}l6.4 6.4m0 -6.4l-6.4 6.4">{_title(said)}</path>'


def _heights(trials: Sequence[TrialRecord], single: float) -> Scale:
    """From the best trial down to the best single model and most trials; a few that are far worse would flatten all."""
    ends = [_reach(trial, single) for trial in trials if trial.score is not None]
    if not ends:
        return Scale.over([single], TALL - BOTTOM, TOP)
    middle, top = median(mean for mean, _, _ in ends), max(high for _, _, high in ends)
    lowest = max(min(low for _, low, _ in ends), middle - 3 * (top - middle))
    return Scale.over([top, lowest, single], TALL - BOTTOM, TOP)


def _reach(trial: TrialRecord, single: float) -> tuple[float, float, float]:
    """A trial's score, and the ends of its gain over the best single model's score, from there."""
    assert trial.score is not None
    assert trial.gain is not None
    return trial.score.mean, single + trial.gain.low, single + trial.gain.high


def _frame(x: Scale, y: Scale, count: int) -> str:
    parts, levels = [], y.ticks(8)
    places = _places(levels)
    for level in levels:
        parts.append(_line(LEFT, y.at(level), WIDE - RIGHT, y.at(level), "grid"))
        parts.append(_text(LEFT - 8, y.at(level) + 4, number(level, places), "end"))
    parts.append(_line(LEFT, TALL - BOTTOM, WIDE - RIGHT, TALL - BOTTOM, "axis"))
    marks = [tick for tick in x.ticks(10) if tick == int(tick) and 1 <= tick <= count]
    parts.extend(_text(x.at(tick), TALL - BOTTOM + 18, f"{tick:.0f}", "middle") for tick in marks)
    parts.append(_text((LEFT + WIDE - RIGHT) / 2, TALL - 6, "trial", "middle"))
    return "".join(parts)


def _bands(trials: Sequence[TrialRecord], x: Scale) -> str:
    """Where each strategy begins, and its name where there is room for it."""
    parts, first = [], 0
    for strategy, group in by_strategy(trials).items():
        left, right = x.at(first + 0.5), x.at(first + len(group) + 0.5)
        if first:
            parts.append(_line(left, TOP - 18, left, TALL - BOTTOM, "border"))
        if right - left > 7.2 * len(strategy):
            parts.append(_text((left + right) / 2, TOP - 10, strategy, "middle", f"band {_kind(strategy)}"))
        first += len(group)
    return "".join(parts)


def _kind(strategy: str) -> str:
    return f"by-{strategy.replace('+', '-')}"


def _point(place: int, trial: TrialRecord, x: Scale, y: Scale, single: float, radius: float, digits: int) -> str:
    middle = x.at(place)
    said = f"trial {place}, {trial.strategy}, {trial.tried}"
    if trial.score is None or trial.gain is None:
        return _cross(middle, TALL - BOTTOM, f"{said} failed: {trial.failure}")
    said += f": {interval(trial.score, digits)}, over the best single {interval(trial.gain, digits, sign=True)}, "
    said += "taken" if trial.accepted else "not taken"
    mean, low, high = _reach(trial, single)
    if mean < y.low:
        below = f'<path class="below" d="M{middle - 4:.1f} {y.start - 9:.1f}h8l-4 7z"/>'
        return f'<g class="trial {_kind(trial.strategy)}">{_title(said + ", below this chart")}{below}</g>'
    dot = f'<circle class="{"taken" if trial.accepted else "left"}" cx="{middle:.1f}" cy="{y.at(mean):.1f}" '
    dot += f'r="{radius + trial.accepted * 0.8:.1f}"/>'
    reach = _line(middle, y.at(low), middle, y.at(high), "reach")
    return f'<g class="trial {_kind(trial.strategy)}">{_title(said)}{reach}{dot}</g>'


def _steps(trials: Sequence[TrialRecord], x: Scale, y: Scale) -> str:
    path = ""
    for place, best in enumerate(best_so_far(trials), 1):
        if best is not None:
            start = f"V{y.at(best):.1f}" if path else f"M{x.at(place - 0.5):.1f} {y.at(best):.1f}"
            path += f"{start}H{x.at(place + 0.5):.1f}"
    return f'<path class="best-so-far" d="{path}"><title>best so far</title></path>' if path else ""


def _bar(bar: Bar, scale: Scale, y: float, digits: int) -> str:
    left, right = sorted((scale.at(0), scale.at(bar.value)))
    said = f"{bar.label}: {number(bar.value, digits)}"
    parts = [_label(bar.label, scale.start - 10, y + 8)]
    shape = f'<rect class="bar" x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" height="16" rx="3"/>'
    end = max(scale.at(0), scale.at(bar.value))
    if bar.low is not None and bar.high is not None:
        said += f" ({number(bar.low, digits)} to {number(bar.high, digits)})"
        shape += _line(scale.at(bar.low), y + 8, scale.at(bar.high), y + 8, "bar-reach")
        end = max(end, scale.at(bar.high))
    parts.append(f"<g>{_title(said)}{shape}</g>")
    parts.append(_text(end + 8, y + 12.4, number(bar.value, digits), kind="ink-text"))
    return "".join(parts)


def _cell(name: str, value: float, top: float, x: float, y: float) -> str:
    part = abs(value) / top
    kind = "cold" if value < 0 else "warm"
    said = number(value, 2)
    return (
        f'<g>{_title(f"{name}: {number(value, 4)}")}<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{CELL - 3}" '
        f'height="{CELL_HEIGHT - 3}" rx="4" fill-opacity="{0.05 + 0.95 * part:.3f}"/>'
        f"{_text(x + CELL / 2 - 1.5, y + 17, said, 'middle', 'bright-text' if part > 0.8 else 'ink-text')}</g>"
    )


def _places(values: Sequence[float]) -> int:
    """Decimals that tell round numbers apart."""
    if len(values) < 2:
        return 2
    return max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
