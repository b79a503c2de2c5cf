"""The scorecard as one SVG: every router's gain with its interval, and what confidence is worth."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from builder.routing.evaluation import Evaluation, Row

WIDTH, ROW, TOP, LABEL, PANEL, GAP = 1000, 26, 64, 90, 400, 90
COLOURS = ("#0f766e", "#b45309", "#1d4ed8", "#7e22ce", "#be123c", "#52525b")
TALL = 220
STYLE = "text{font:13px system-ui,sans-serif;fill:#27272a}.t{font-weight:600}.m{fill:#71717a;font-size:12px}"


def plot(evaluation: Evaluation) -> str:
    """An SVG file's text."""
    height = TOP + max(ROW * len(evaluation.rows), TALL) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="Routers: gain over the best single expert, and gain by confidence">',
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        *_gains(evaluation.rows),
        *_risks(evaluation.rows),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _gains(rows: Sequence[Row]) -> list[str]:
    ends = [0.0] + [end for row in rows for end in (row.card.gain_low, row.card.gain_high)]
    ends += [end for row in rows if row.elsewhere for end in (row.elsewhere.low, row.elsewhere.high)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return LABEL + (value - low) / span * PANEL

    parts = [
        '<text x="10" y="22" class="t">Gain over the best single expert, 95 %</text>',
        '<text x="10" y="42" class="m">filled: cross-validation; hollow: tasks never seen</text>',
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP - 10}" y2="{TOP + ROW * len(rows)}" stroke="#a1a1aa"/>',
    ]
    for number, row in enumerate(rows):
        y, colour, card = TOP + ROW * number + 8, COLOURS[number % len(COLOURS)], row.card
        told = f"{row.kind}: {card.gain:+.4f} ({card.gain_low:+.4f} to {card.gain_high:+.4f})"
        parts.append(f'<text x="10" y="{y + 5}">{escape(row.kind)}</text>')
        parts.append(_whisker(x(card.gain_low), x(card.gain), x(card.gain_high), y - 3, colour, colour, told))
        if row.elsewhere:
            away = row.elsewhere
            told = f"{row.kind}, unseen tasks: {away.gain:+.4f} ({away.low:+.4f} to {away.high:+.4f})"
            parts.append(_whisker(x(away.low), x(away.gain), x(away.high), y + 6, colour, "#fff", told))
    parts += [
        f'<text x="{x(end):.1f}" y="{TOP + ROW * len(rows) + 18}" class="m" text-anchor="middle">{end:+.3f}</text>'
        for end in (low, high)
    ]
    return parts


def _whisker(low: float, mean: float, high: float, y: float, colour: str, fill: str, told: str) -> str:
    return (
        f'<g><title>{escape(told)}</title><line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
        f'stroke-width="2"/><circle cx="{mean:.1f}" cy="{y}" r="4" stroke="{colour}" fill="{fill}"/></g>'
    )


def _risks(rows: Sequence[Row]) -> list[str]:
    left, bottom = LABEL + PANEL + GAP, TOP + TALL
    known = [(number, row) for number, row in enumerate(rows) if row.card.risk]
    gains = [point.gain for _, row in known for point in row.card.risk] + [0.0]
    low, high = min(gains), max(gains)
    span = (high - low) or 1.0
    parts = [
        f'<text x="{left}" y="22" class="t">Gain where only the surest prompts are routed</text>',
        f'<text x="{left}" y="42" class="m">share of prompts, from 10 % at the left to all at the right</text>',
    ]
    for value in (low, 0.0, high):
        y = bottom - (value - low) / span * TALL
        parts.append(f'<line x1="{left}" x2="{left + PANEL - 60}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e7"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="m" text-anchor="end">{value:+.3f}</text>')
    for place, (number, row) in enumerate(known):
        points = " ".join(
            f"{left + (point.coverage - 0.1) / 0.9 * (PANEL - 60):.1f},{bottom - (point.gain - low) / span * TALL:.1f}"
            for point in row.card.risk
        )
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 70 * place}" y="{bottom + 24}" style="fill:{colour}">{escape(row.kind)}</text>')
    return parts
