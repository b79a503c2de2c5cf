"""How alike models are, as one SVG: a heatmap, the tree of who joins whom, and the clusters.

Colours are CSS variables of the page around it, with fallbacks of its own for light and dark; each is an attribute too,
for viewers that know no variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from builder.cluster import Linkage, Tree, tree

LIGHT = {
    **{"ink": "#1b1f24", "soft": "#5d6673", "line": "#dfe3e8", "card": "#ffffff"},
    **{"heat": "#2563eb", "mark": "#c2410c", "bright": "#ffffff"},
}
DARK = {
    **{"ink": "#e6e9ee", "soft": "#9aa4b2", "line": "#2c333d", "card": "#191d24"},
    **{"heat": "#3b7bf0", "mark": "#fb923c", "bright": "#ffffff"},
}
PAD, GAP, TREE = 20, 16, 220
TITLE, AXIS, SCALE = 46, 44, 132
WITH_VALUES = 16
"""So many models have their numbers in the cells; of more, pointing at a cell tells."""
LETTER = 6.7
"""Width of a letter, about."""
FAINT, BRIGHT = 0.05, 0.85
"""The colour of the lowest value; above the other a cell is so dark on a light page that its number is white."""
MIDDLE = ' dy=".35em"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One family: matrix[N, N] in the order of names."""

    title: str
    names: Sequence[str]
    matrix: ArrayLike
    clusters: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class _Drawn:
    width: float
    height: float
    body: str


def heatmap(
    names: Sequence[str],
    matrix: ArrayLike,
    threshold: float,
    linkage: Linkage,
    clusters: Sequence[Sequence[str]],
    title: str = "",
) -> str:
    """One family as an SVG."""
    return heatmaps([Panel(title, names, matrix, clusters)], threshold, linkage)


def heatmaps(panels: Sequence[Panel], threshold: float, linkage: Linkage) -> str:
    """Every family, one below the other, as one SVG."""
    drawn = [_panel(panel, threshold, linkage) for panel in panels]
    width, height = max(each.width for each in drawn), sum(each.height for each in drawn)
    parts, top = [], 0.0
    for each in drawn:
        parts.append(f'<g transform="translate(0 {top:g})">{each.body}</g>')
        top += each.height
    label = escape("; ".join(f"similarity of {', '.join(panel.names)}" for panel in panels), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="likeness" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        'style="max-width:100%;height:auto" font-family="system-ui, sans-serif" font-size="12">\n'
        f"<style>{_style()}</style>\n"
        f'<rect width="{width:g}" height="{height:g}" {_fill("card")}/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _style() -> str:
    """Variables of the page win; without a page, those of light or dark."""
    both = []
    for colours in (LIGHT, DARK):
        both.append(".likeness{" + ";".join(f"--l-{n}:var(--{n},{value})" for n, value in colours.items()) + "}")
    rules = [f".likeness .l-{n}{{fill:var(--l-{n})}} .likeness .s-{n}{{stroke:var(--l-{n})}}" for n in LIGHT]
    rules.append(".likeness text{font-variant-numeric:tabular-nums}")
    return f"{both[0]} @media (prefers-color-scheme:dark){{{both[1]}}} {' '.join(rules)}"


def _fill(colour: str) -> str:
    return f'class="l-{colour}" fill="{LIGHT[colour]}"'


def _stroke(colour: str) -> str:
    return f'class="s-{colour}" stroke="{LIGHT[colour]}" fill="none"'


def _text(x: float, y: float, said: str, colour: str, anchor: str = "start", size: float = 10.5, more: str = "") -> str:
    return (
        f'<text x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}" font-size="{size:.3g}" {_fill(colour)}{more}>'
        f"{escape(said)}</text>"
    )


def _panel(panel: Panel, threshold: float, linkage: Linkage) -> _Drawn:
    names, matrix, count = panel.names, np.asarray(panel.matrix, float), len(panel.names)
    grown = tree(names, matrix, linkage) if count > 1 else None
    order = _order(grown) if grown else [0]
    digits = _digits(matrix)
    cell = max(30.0, 6.2 * (digits + 1) + 10) if count <= WITH_VALUES else max(9.0, min(20.0, 800 / count))
    labels = LETTER * max(map(len, names)) + 10
    left, top, side = PAD + labels, PAD + (TITLE if panel.title else 0.0), cell * count
    body = [_title(panel, threshold, linkage)] if panel.title else []
    width, below = left + side + PAD, 0
    if grown:
        top, below = top + labels * 0.72 + 10, GAP + AXIS
        width = max(width + GAP + TREE + 24, left + side + labels * 0.72)
        body.append(_columns([names[i] for i in order], left, top, cell))
        body.append(_tree(grown, threshold, left + side + GAP, top, cell))
        body.append(_scale(matrix, digits, left if side > SCALE else max(PAD, left + side - SCALE), top + side + GAP))
    body.append(_rows([names[i] for i in order], left, top, cell))
    body.append(_cells(names, matrix, order, left, top, cell, digits))
    body.append(_outlines(panel, order, left, top, cell))
    title = PAD * 2 + 8 * max(len(panel.title), 40) if panel.title else 0
    return _Drawn(max(width, title), top + side + below + PAD, "\n".join(body))


def _order(grown: Tree) -> list[int]:
    """The models as the tree's leaves lie."""
    return [int(grown.leaves[i]) for i in _dendrogram(grown)["leaves"]]


def _dendrogram(grown: Tree) -> dict[str, Any]:
    """scipy's coordinates; a height is a rank and one, so that a leaf's is zero."""
    from scipy.cluster.hierarchy import dendrogram

    links = grown.links.copy()
    links[:, 2] += 1
    found: dict[str, Any] = dendrogram(links, no_plot=True, count_sort="descending")
    return found


def _digits(matrix: NDArray[np.float64]) -> int:
    """Decimals that tell the numbers apart, from each other and from 1."""
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    gaps = [gap for gap in (np.ptp(others), 1 - others.max()) if gap > 1e-9] if others.size else []
    return int(np.clip(max((1 + math.ceil(-math.log10(gap)) for gap in gaps), default=2), 2, 6))


def _said(value: float, digits: int) -> str:
    return "1" if value == 1 else f"{value:.{digits}f}".replace("0.", ".", 1)


def _shade(value: float, matrix: NDArray[np.float64]) -> float:
    """How much colour a value gets, between the lowest and the highest."""
    low, high = matrix.min(), matrix.max()
    return 1.0 if high <= low else float(FAINT + (1 - FAINT) * (value - low) / (high - low))


def _title(panel: Panel, threshold: float, linkage: Linkage) -> str:
    models, groups = len(panel.names), len(panel.clusters)
    facts = f"{models} model{'s' * (models > 1)}, {groups} cluster{'s' * (groups > 1)} at {threshold:g}, {linkage}"
    title = _text(PAD, PAD + 13, panel.title, "ink", size=15, more=' font-weight="600"')
    return title + _text(PAD, PAD + 32, facts, "soft", size=12)


def _rows(names: Sequence[str], left: float, top: float, cell: float) -> str:
    size = min(12, cell)
    return "\n".join(
        _text(left - 8, top + (i + 0.5) * cell, name, "ink", "end", size, MIDDLE) for i, name in enumerate(names)
    )


def _columns(names: Sequence[str], left: float, top: float, cell: float) -> str:
    return "\n".join(
        f'<g transform="translate({left + (i + 0.5) * cell + 3:.5g} {top - 8:.5g}) rotate(-45)">'
        f"{_text(0, 0, name, 'ink', size=min(12, cell))}</g>"
        for i, name in enumerate(names)
    )


def _cells(
    names: Sequence[str],
    matrix: NDArray[np.float64],
    order: Sequence[int],
    left: float,
    top: float,
    cell: float,
    digits: int,
) -> str:
    side, parts = cell - (1.5 if cell > 20 else 0.5), []
    for row, i in enumerate(order):
        for column, j in enumerate(order):
            value, x, y = float(matrix[i, j]), left + column * cell, top + row * cell
            shade = _shade(value, matrix)
            parts.append(
                f'<rect x="{x:.5g}" y="{y:.5g}" width="{side:.4g}" height="{side:.4g}" rx="{min(3, cell / 8):.2g}" '
                f'{_fill("heat")} fill-opacity="{shade:.3f}">'
                f"<title>{escape(names[i])}, {escape(names[j])}: {value:.7g}</title></rect>"
            )
            if len(names) <= WITH_VALUES:
                colour = "bright" if shade > BRIGHT else "ink"
                place = (x + side / 2, y + side / 2)
                parts.append(
                    _text(*place, _said(value, digits), colour, "middle", more=f'{MIDDLE} pointer-events="none"')
                )
    return "\n".join(parts)


def _outlines(panel: Panel, order: Sequence[int], left: float, top: float, cell: float) -> str:
    """A frame round each cluster, whose members lie side by side."""
    rows = {panel.names[i]: row for row, i in enumerate(order)}
    parts = []
    for cluster in panel.clusters:
        first, side = min(rows[name] for name in cluster) * cell, len(cluster) * cell
        parts.append(
            f'<rect x="{left + first - 2:.5g}" y="{top + first - 2:.5g}" width="{side + 2.5:.5g}" '
            f'height="{side + 2.5:.5g}" rx="5" stroke-width="2" {_stroke("mark")}/>'
        )
    return "\n".join(parts)


def _scale(matrix: NDArray[np.float64], digits: int, left: float, top: float) -> str:
    """The colours, and the numbers at their ends."""
    low, high, steps = float(matrix.min()), float(matrix.max()), SCALE // 4
    if high <= low:
        return ""
    bar = "".join(
        f'<rect x="{left + i * 4:.5g}" y="{top:.5g}" width="4" height="9" {_fill("heat")} '
        f'fill-opacity="{_shade(low + (high - low) * i / (steps - 1), matrix):.3f}"/>'
        for i in range(steps)
    )
    ends = _text(left, top + 23, _said(low, digits), "soft")
    ends += _text(left + SCALE, top + 23, _said(high, digits), "soft", "end")
    return f'<g shape-rendering="crispEdges">{bar}</g>{ends}'


def _tree(grown: Tree, threshold: float, left: float, top: float, cell: float) -> str:
    """Leaves at the left; who joins further right is less alike, by the logarithm of 1 - similarity."""
    bottom = top + cell * len(grown.leaves)
    distances = np.concatenate([[0.0], np.clip(1 - grown.levels, 0, None)])
    axis = _Axis.over([*distances[grown.links[:, 2].astype(int) + 1], 1 - threshold])
    parts = [_text(left + TREE / 2, bottom + GAP + 25, "similarity at which they join", "soft", "middle")]
    for distance in axis.ticks():
        x = left + axis.at(distance)
        parts.append(f'<path d="M{x:.5g} {top:.5g}V{bottom:.5g}" {_stroke("line")}/>')
        parts.append(_text(x, bottom + GAP + 7, f"{1 - distance:.7g}", "soft", "middle"))
    found = _dendrogram(grown)
    for rows, heights in zip(found["icoord"], found["dcoord"], strict=True):
        joined = grown.levels[int(heights[1]) - 1] >= threshold
        x0, x1, _, x3 = (left + axis.at(float(distances[int(height)])) for height in heights)
        y0, _, y2, _ = (top + row / 10 * cell for row in rows)
        parts.append(
            f'<path d="M{x0:.5g} {y0:.5g}H{x1:.5g}V{y2:.5g}H{x3:.5g}" stroke-width="1.8" stroke-linejoin="round" '
            f"{_stroke('heat' if joined else 'soft')}/>"
        )
    x = left + axis.at(1 - threshold)
    dashes = 'stroke-width="1.5" stroke-dasharray="4 3"'
    parts.append(f'<path d="M{x:.5g} {top - 6:.5g}V{bottom + 4:.5g}" {dashes} {_stroke("mark")}/>')
    parts.append(_text(x, top - 11, f"{threshold:g}", "mark", "middle", 11, ' font-weight="600"'))
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Distances from `low` to `high`, by their logarithm; smaller ones are at the edge."""

    low: float
    high: float

    @classmethod
    def over(cls, distances: Sequence[float]) -> _Axis:
        seen = [float(each) for each in distances if each > 1e-12] or [1e-3]
        return cls(min(seen) / 2.5, max(seen) * 1.3)

    def at(self, distance: float) -> float:
        """Pixels from the left."""
        if distance <= self.low:
            return 0.0
        return TREE * math.log(distance / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Round distances that have room for their labels."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1,) if self.high / self.low > 300 else (1, 2, 5)
        chosen: list[float] = []
        for each in (step * 10.0**power for power in powers for step in steps):
            if self.low < each < self.high and (not chosen or self.at(each) - self.at(chosen[-1]) > 46):
                chosen.append(each)
        return chosen
