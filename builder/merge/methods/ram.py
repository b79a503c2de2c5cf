"""Reinforced Agent Merging: what one model alone changed is kept whole, what several changed is averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from builder.merge.inputs import Inputs, Piece, Values


def ram(inputs: Inputs, *, epsilon: float = 1e-5, r: float = 0.0, alpha: float = 0.0) -> Iterator[Values]:
    """b + (d_i where only i changed the element by more than epsilon, the mean of those that did where several).

    arXiv 2601.13572. RAM+ (tensor-local), r > 0: lone changes of i are scaled by 1 + r clip(shared_i / alone_i, 0,
    alpha), the numbers of elements that i changed together with others and alone.
    """
    gains = _gains(inputs, epsilon, r, alpha) if r else [1.0] * len(inputs.sources)
    for piece in inputs.pieces():
        changed, alone, together = _changes(inputs, piece, epsilon)
        at_least_one = inputs.arrays.xp.clip(together, 1, None)
        update = together * 0
        for delta, mask, gain in zip(piece.deltas, changed, gains, strict=True):
            kept = inputs.arrays.masked(delta, mask)
            update = update + inputs.arrays.xp.where(alone, kept * gain, kept / at_least_one)
        yield piece.base + update


def _gains(inputs: Inputs, epsilon: float, r: float, alpha: float) -> list[float]:
    lone, shared = [0] * len(inputs.sources), [0] * len(inputs.sources)
    for piece in inputs.pieces():
        changed, alone, _ = _changes(inputs, piece, epsilon)
        for i, mask in enumerate(changed):
            lone[i] += int((mask & alone).sum())
            shared[i] += int((mask & ~alone).sum())
    # Without a lone element no gain is ever used.
    return [1 + r * min(s / max(u, 1), alpha) for s, u in zip(shared, lone, strict=True)]


def _changes(inputs: Inputs, piece: Piece, epsilon: float) -> tuple[Sequence[Values], Values, Values]:
    """For every input what it changed; what exactly one changed; how many changed it, float32."""
    changed = [abs(delta) > epsilon for delta in piece.deltas]
    together = piece.deltas[0] * 0
    for mask in changed:
        together = together + mask
    return changed, together == 1, together
