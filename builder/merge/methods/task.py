"""Merges of task vectors d_i = x_i - b: arithmetic on them, after some of their elements were dropped, or elected.

What differs is which elements of d_i are kept (all, the largest, a band, a random part), whether their loss is made up
for (`rescale`), and whether a sign is elected: `_merge` holds what all have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from builder import kernels
from builder.errors import MergeError
from builder.merge.inputs import EVERYTHING, Cut, Inputs, Piece, Top, Values, bin_of, clamped, joined, total
from builder.merge.methods.linear import shares

Rescale = bool | str
"""True or "l1": the kept elements get the L1 norm of all; "density": they are divided by their chance to be kept."""
Keep = Callable[[Piece, int], Any]
"""The mask of what a piece keeps of d_i; None for all of it. Pieces must come in order."""
Over = Callable[[Callable[..., Any], Sequence[Any]], Iterable[Any]]
"""A map over tensors that may run in parallel; results in order."""


def task_arithmetic(
    inputs: Inputs, *, weight: Sequence[float], normalize: bool = False, lambda_: float = 1.0
) -> Iterator[Values]:
    """b + lambda sum w_i d_i, or lambda sum w_i d_i / sum w_i.

    Ilharco et al. 2023, arXiv 2212.04089.
    """
    yield from _merge(inputs, _all, weight=weight, normalize=normalize, lambda_=lambda_, elect=False)


def ties(
    inputs: Inputs,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool = True,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    trim: str = "tensor",
    cuts: Sequence[Cut] | None = None,
) -> Iterator[Values]:
    """Trim, elect, merge: b + lambda (sum w_i d_i) / (sum w_i) over the inputs that agree with the elected sign.

    Yadav et al. 2023, arXiv 2306.01708. d_i keeps the int(density n) largest magnitudes, of the tensor, or of the whole
    model as in the paper (`trim: global`, whose `cuts` come from `survey_ties`). The weights vote, which the paper has
    not: it knows one lambda alone.
    """
    if cuts is None:
        cuts = inputs.cuts(lambda piece: piece.deltas, [_target(inputs.size, each) for each in density])
    yield from _merge(
        inputs,
        lambda: _among(inputs, cuts),
        weight=weight,
        density=density,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
        elect=True,
    )


def survey_ties(tensors: Sequence[tuple[Inputs, Mapping[str, Any]]], over: Over) -> Sequence[Mapping[str, Any]]:
    """The cuts of `trim: global` for every tensor, from histograms over the whole model; nothing for other tensors.

    Raises MergeError where densities differ between tensors, or the number of inputs does.
    """
    chosen = [(inputs, parameters) for inputs, parameters in tensors if parameters["trim"] == "global"]
    if not chosen:
        return [{} for _ in tensors]
    densities = chosen[0][1]["density"]
    if any(parameters["density"] != densities for _, parameters in chosen):
        raise MergeError("trim: global needs one density a model for all tensors: use trim: tensor with gradients")
    size = sum(inputs.size for inputs, _ in chosen)
    keep = [_target(size, each) for each in densities]

    def counts(within: Sequence[int | None]) -> np.ndarray[Any, np.dtype[np.int64]]:
        tables = over(lambda item: _counted(item[0], within), chosen)
        return sum(tables, np.zeros((len(keep), 2, kernels.BINS), np.int64))

    uppers = [bin_of(table, k) for table, k in zip(counts([None] * len(keep)), keep, strict=True)]
    lowers = counts([upper for upper, _ in uppers])
    cuts = [
        clamped(joined(upper, bin_of(table, room)), k, size)
        for table, (upper, room), k in zip(lowers, uppers, keep, strict=True)
    ]
    shared = iter(_shared_out(cuts, list(over(lambda item: _equal(item[0], cuts), chosen))))
    return [{"cuts": next(shared)} if parameters["trim"] == "global" else {} for _, parameters in tensors]


def dare(
    inputs: Inputs,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: Rescale,
    lambda_: float = 1.0,
    elect: bool,
) -> Iterator[Values]:
    """Task arithmetic, or TIES' election and merge, on d_i whose elements are kept with probability density.

    Yu et al. 2024, arXiv 2311.03099, which rescales by 1 / density (`rescale: density`); the default is mergekit's.
    """

    def keep(piece: Piece, i: int) -> Any:
        size = piece.rows * piece.columns
        return None if density[i] == 1 else inputs.arrays.bernoulli(inputs.key(i), piece.start, size, density[i])

    yield from _merge(
        inputs,
        lambda: keep,
        weight=weight,
        density=density,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
        elect=elect,
    )


def della(
    inputs: Inputs,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    rescale: Rescale,
    lambda_: float = 1.0,
    elect: bool,
) -> Iterator[Values]:
    """Task arithmetic, or TIES' election and merge, on d_i whose elements are kept with
    p = density - eps + 2 eps rank / (columns - 1).

    Deep et al. 2024, arXiv 2406.11617: rank is that of the magnitude in its row, from 0. A row of one has p = density.
    """
    arrays = inputs.arrays
    lone = inputs.columns < 2
    lows = [d if lone else d - e for d, e in zip(density, epsilon, strict=True)]
    steps = [0.0 if lone else 2 * e / (inputs.columns - 1) for e in epsilon]

    def keep(piece: Piece, i: int) -> Any:
        if density[i] == 1:
            return None
        if density[i] == 0:
            return arrays.bernoulli(0, 0, piece.rows * piece.columns, 0.0)
        ranks = arrays.ranks(piece.deltas[i], piece.rows, piece.columns)
        return arrays.bernoulli_by_rank(inputs.key(i), piece.start, ranks, lows[i], steps[i])

    def chances(piece: Piece, i: int) -> Values:
        ranks = arrays.host(arrays.ranks(piece.deltas[i], piece.rows, piece.columns))
        return arrays.device((lows[i] + ranks * steps[i]).astype(np.float32))

    yield from _merge(
        inputs,
        lambda: keep,
        weight=weight,
        density=density,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
        elect=elect,
        row=inputs.columns,
        chances=chances,
    )


def breadcrumbs(
    inputs: Inputs,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool,
    rescale: Rescale,
    lambda_: float = 1.0,
    elect: bool,
) -> Iterator[Values]:
    """Task arithmetic, or TIES' election, on d_i without its int(gamma n) largest magnitudes, and int(density n) below.

    Davari and Belilovsky 2024, arXiv 2312.06795. Where that is more than there are, fewer of the largest are dropped.
    """
    n = inputs.size
    targets = [int(each * n) for each in density]
    # All that is not below; of those the largest go.
    upper = [n if d == 1 else min(n, t + int(g * n)) for d, t, g in zip(density, targets, gamma, strict=True)]
    outliers = [u - t for u, t in zip(upper, targets, strict=True)]
    twice = inputs.cuts(lambda piece: [*piece.deltas, *piece.deltas], [*upper, *outliers])

    def looks() -> Keep:
        tops = [Top(inputs.arrays, each) for each in twice]

        def keep(piece: Piece, i: int) -> Any:
            if density[i] == 1:
                return None
            delta = piece.deltas[i]
            return tops[i].mask(delta) & ~tops[i + len(weight)].mask(delta)

        return keep

    yield from _merge(
        inputs,
        looks,
        weight=weight,
        density=density,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
        elect=elect,
    )


def check_sum(parameters: Mapping[str, Any]) -> str | None:
    """Weights that are to be divided by their sum must have one."""
    normalize = parameters.get("normalize", parameters.get("normalize_weights", True))
    if normalize and not abs(sum(parameters["weight"])) > 1e-8:
        return "the weights sum to zero: give them a positive sum, or normalize: false"
    return None


def check_della(parameters: Mapping[str, Any]) -> str | None:
    """Probabilities must lie between 0 and 1."""
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            return (
                f"density {density:g} with epsilon {epsilon:g} is no probability: "
                f"choose an epsilon below {min(density, 1 - density):g}"
            )
    return None


def check_della_linear(parameters: Mapping[str, Any]) -> str | None:
    """Both: probabilities, and weights that have a sum where it is divided by."""
    return check_della(parameters) or check_sum(parameters)


def _all() -> Keep:
    return lambda piece, i: None


def _merge(
    inputs: Inputs,
    looks: Callable[[], Keep],
    *,
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    elect: bool,
    density: Sequence[float] = (),
    rescale: Rescale = False,
    row: int | None = None,
    chances: Callable[[Piece, int], Values] | None = None,
) -> Iterator[Values]:
    """`looks` gives the masks of one look over the tensor; `chances` each element's own chance, where it has one."""
    arrays, keep = inputs.arrays, looks()
    gains = [1.0] * len(weight)
    if rescale == "density" and chances is None:
        gains = [1 / each if each > 0 else 1.0 for each in density]
    elif rescale and rescale != "density":
        keep = _Remembered(inputs, keep)
        gains = _lost(inputs, keep, row)
    factors = shares(weight) if normalize and not elect else list(weight)
    for piece in inputs.pieces(row=row):
        deltas = []
        for i, gain in enumerate(gains):
            delta = _kept(inputs, piece, keep, i)
            if rescale == "density" and chances is not None and 0 < density[i] < 1:
                delta = delta / chances(piece, i)
            deltas.append(delta if gain == 1 else delta * gain)
        update = arrays.consensus(deltas, factors, factors, normalize) if elect else arrays.combine(deltas, factors)
        yield piece.base + (update if lambda_ == 1 else update * lambda_)


def _kept(inputs: Inputs, piece: Piece, keep: Keep, i: int) -> Values:
    mask = keep(piece, i)
    return piece.deltas[i] if mask is None else inputs.arrays.masked(piece.deltas[i], mask)


def _lost(inputs: Inputs, keep: Keep, row: int | None) -> list[float]:
    """For every input sum |d| over sum |what is kept of d|; 1 where nothing is."""
    before: list[list[Any]] = [[] for _ in inputs.sources]
    after: list[list[Any]] = [[] for _ in inputs.sources]
    for piece in inputs.pieces(row=row):
        # Over blocks or over rows, what pieces are made of: so no piece size changes the sums.
        rows = piece.rows if row else None
        for i, delta in enumerate(piece.deltas):
            before[i].append(inputs.arrays.magnitudes(delta, rows))
            after[i].append(inputs.arrays.magnitudes(_kept(inputs, piece, keep, i), rows))
    sums = [(total(b), total(a)) for b, a in zip(before, after, strict=True)]
    return [b / a if a > 0 else 1.0 for b, a in sums]


class _Remembered:
    """Masks that are made once, in the first look, and kept a bit an element for the second."""

    def __init__(self, inputs: Inputs, keep: Keep) -> None:
        self._arrays, self._keep = inputs.arrays, keep
        self._masks: dict[tuple[int, int], Any] = {}

    def __call__(self, piece: Piece, i: int) -> Any:
        """The mask; the second call for a piece takes it out of memory."""
        if (piece.start, i) in self._masks:
            bits = self._masks.pop((piece.start, i))
            return None if bits is None else self._arrays.unpacked(bits, piece.rows * piece.columns)
        mask = self._keep(piece, i)
        self._masks[piece.start, i] = None if mask is None else self._arrays.packed(mask)
        return mask


def _target(size: int, density: float) -> int:
    return max(1, int(density * size)) if density > 0 else 0


def _among(inputs: Inputs, cuts: Sequence[Cut]) -> Keep:
    tops = [Top(inputs.arrays, each) for each in cuts]
    return lambda piece, i: None if cuts[i] == EVERYTHING else tops[i].mask(piece.deltas[i])


def _counted(inputs: Inputs, within: Sequence[int | None]) -> np.ndarray[Any, np.dtype[np.int64]]:
    tables = np.zeros((len(within), 2, kernels.BINS), np.int64)
    for piece in inputs.pieces():
        for table, delta, upper in zip(tables, piece.deltas, within, strict=True):
            inputs.arrays.count(delta, True, upper, table)
    return tables


def _equal(inputs: Inputs, cuts: Sequence[Cut]) -> list[int]:
    """How many magnitudes of each input stand exactly at the cut."""
    found = [0] * len(cuts)
    for piece in inputs.pieces():
        for i, (delta, each) in enumerate(zip(piece.deltas, cuts, strict=True)):
            if each != EVERYTHING:
                found[i] += inputs.arrays.top(delta, True, each.key, 0)[1]
    return found


def _shared_out(cuts: Sequence[Cut], equal: Sequence[Sequence[int]]) -> Iterator[list[Cut]]:
    """The room at the cut goes to the first tensors."""
    room = [each.room for each in cuts]
    for found in equal:
        yield [Cut(each.key, min(left, here)) for each, left, here in zip(cuts, room, found, strict=True)]
        room = [left - min(left, here) for left, here in zip(room, found, strict=True)]
