"""Picks the next tokens of a batch of requests, each in its own way.

What a row gets is the same, bit for bit, whatever the other rows are: sums over the vocabulary are of whole numbers
that fp64 holds exactly, so it does not matter in which order a device adds them up.

Shapes: B rows of a batch, R some of them, V the vocabulary, K blocks of L tokens, N the likeliest tokens, S tokens of a
prompt, E experts, I pairs of a row and a token, W words of 32 tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engines.base import EngineError, Failure, Sampling, UnsupportedError
from service.engines.local.guides import Matcher

BLOCK = 256
HEAD = 2048
"""Of so many of the likeliest tokens top_k and top_p are served; the whole vocabulary is sorted where it takes more."""
AT_ONCE = 1 << 18
"""Logits that a CPU draws from at a time: larger intermediate results, glibc gives back and the system clears anew."""
PROMPT_ROWS = 64
TINY = torch.finfo(torch.float32).tiny

Pairs = tuple[NDArray[np.int64], NDArray[np.float32]]
Draw = Callable[[Sequence["Row"], Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Pick:
    """A token: the next of an answer, or one of a prompt.

    logprob: where asked for, by the model alone: before temperature, penalties, guide and cuts. top: the likeliest in
    its place with theirs, the likeliest first and of equals the lowest id.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Row:
    """What the picks of one request depend on: how to pick, its tokens so far, its random numbers to come.

    stops: tokens that end the answer. picked: how many tokens it has. cuts: whether it picks from the likeliest only.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int],
        eos: Collection[int],
        vocabulary: int,
        matcher: Matcher | None = None,
    ) -> None:
        """Raises UnsupportedError where logit_bias names a token that is not in the vocabulary."""
        bias = dict(sampling.logit_bias)
        if beyond := [token for token in bias if not 0 <= token < vocabulary]:
            raise UnsupportedError(f"logit_bias names token {beyond[0]}; there are {vocabulary} of them", "logit_bias")
        self.sampling = sampling
        self.stops = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else frozenset(eos))
        self.picked = 0
        self.matcher = matcher
        self.seen = _seen(sampling, prompt)
        self.cuts = sampling.top_p < 1 or 0 < sampling.top_k < vocabulary
        self._bias = _pairs(bias)
        self._early_bias = _pairs(bias | {token: -np.inf for token in self.stops if 0 <= token < vocabulary})
        seed = sampling.seed
        self._numbers = np.random.Generator(np.random.Philox() if seed is None else np.random.Philox(key=seed % 2**128))
        self._number: float | None = None

    @property
    def bias(self) -> Pairs:
        """Tokens, each once, and what is added to their logits for the next pick."""
        # A guide that is complete leaves nothing but the end.
        complete = self.matcher is not None and self.matcher.finished
        return self._bias if complete or self.picked >= self.sampling.min_tokens else self._early_bias

    @property
    def plain(self) -> bool:
        """Whether the logits are taken as they are."""
        return self.matcher is None and self.seen is None and not len(self.bias[0])

    def number(self) -> float:
        """The next pick's random number, from 0 up to 1; the seed and its place alone decide it."""
        if self._number is None:
            self._number = self._numbers.random()
        return self._number

    def accept(self, token: int) -> None:
        """Go on with a token. Raises EngineError for one that the guide rules out."""
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.seen is not None:
            self.seen.add(token)
        self.picked += 1
        self._number = None


class _Seen:
    """Tokens that penalties apply to, each once, and how often the answer has them."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self.ids = array("q", dict.fromkeys(prompt))
        self.counts = array("q", bytes(8 * len(self.ids)))
        self._places = {token: place for place, token in enumerate(self.ids)}

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.counts.append(0)
        self.counts[place] += 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch alone in its thread: on a processor its others take longer to wake than what is done here takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def pick(rows: Sequence[Row], logits_BV: Tensor) -> list[Pick | Failure]:
    """The next token of every row, which the row then goes on with, or why there is none to pick.

    An UnsupportedError where the request itself leaves none, an EngineError where the model or the guide does. Whatever
    it raises, no row has gone on: each can be picked for by itself, with the same token.
    """
    raw_BV = logits_BV.float()
    errors: dict[int, Failure]
    scores_BV, errors = (raw_BV, {}) if all(row.plain for row in rows) else _changed(rows, raw_BV)
    ids_B = _best(scores_BV)
    errors = _without_pick(raw_BV, _at(scores_BV, ids_B)) | errors
    drawn = [b for b, row in enumerate(rows) if row.sampling.temperature > 0 and b not in errors]
    _fill(ids_B, [b for b in drawn if not rows[b].cuts], _draw, rows, scores_BV)
    _fill(ids_B, [b for b in drawn if rows[b].cuts], _draw_cut, rows, scores_BV)
    ids = ids_B.tolist()
    told = _told(rows, [b for b in range(len(rows)) if b not in errors], raw_BV, ids)
    for b, row in enumerate(rows):
        if b not in errors:
            try:
                row.accept(ids[b])
            except Exception as exc:  # whatever it is, the other rows go on
                errors[b] = EngineError(str(exc))
    return [errors[b] if b in errors else told.get(b) or Pick(ids[b]) for b in range(len(rows))]


@one_thread()
def blend(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The logits of a mixture, from those of its experts, [..., V] each: the weighted mean of their distributions.

    Exactly an expert's own where it has all the weight, or all say the same. Their scale is the experts' mean one,
    because repetition penalties depend on it.
    """
    some = [(each, weight) for each, weight in zip(logits, weights, strict=True) if weight > 0]
    if len(some) == 1:
        return some[0][0]
    logits_EV = torch.stack([each.float() for each, _ in some])
    same = (logits_EV == logits_EV[0]).all(-1, keepdim=True).all(0)
    if same.all():
        return logits_EV[0]
    weights_E = logits_EV.new_tensor([weight for _, weight in some]).reshape(-1, *[1] * (logits_EV.dim() - 1))
    peaks_E = logits_EV.amax(-1, keepdim=True)
    odds_EV = _exp_(logits_EV - peaks_E)
    sums_E = odds_EV.sum(-1, keepdim=True)
    mixed_V = _log_((odds_EV * (weights_E / sums_E)).sum(0)) + ((peaks_E + sums_E.log()) * weights_E).sum(0)
    return torch.where(same, logits_EV[0], mixed_V)


def prompt_scores(logits_SV: Tensor, ids_S: Sequence[int], top: int) -> list[Pick]:
    """How likely the model found tokens of a prompt, and the `top` likeliest in their places.

    logits_SV: those that foretell the tokens, so of the tokens before them. Raises EngineError for unsound ones.
    """
    picks: list[Pick] = []
    for start in range(0, len(ids_S), PROMPT_ROWS):  # a prompt's at once would be gigabytes
        part_SV = logits_SV[start : start + PROMPT_ROWS].float()
        if not part_SV.amax(-1).isfinite().all():
            raise EngineError("the logits of the prompt are not finite")
        picks += _scored(part_SV, ids_S[start : start + PROMPT_ROWS], top)
    return picks


def _without_pick(raw_BV: Tensor, peaks_B: Tensor) -> dict[int, Failure]:
    """The rows that have no token to pick: the model's logits are no numbers, or all were ruled out."""
    errors: dict[int, Failure] = {}
    checks = torch.stack((raw_BV.amax(-1).isfinite(), peaks_B.isfinite()), -1).tolist()
    for b, (sound, possible) in enumerate(checks):
        if not sound:
            errors[b] = EngineError("the expert's logits are not finite")
        elif not possible:
            told = "min_tokens, logit_bias and response_format together rule every token out: leave one of them out"
            errors[b] = UnsupportedError(told, "min_tokens")
    return errors


def _seen(sampling: Sampling, prompt: Iterable[int]) -> _Seen | None:
    if sampling.repetition_penalty != 1:
        return _Seen(prompt)
    return _Seen(()) if sampling.presence_penalty or sampling.frequency_penalty else None


def _pairs(values: dict[int, float]) -> Pairs:
    return np.array(list(values), np.int64), np.array(list(values.values()), np.float32)


# What changes the logits, in this order.


def _changed(rows: Sequence[Row], raw_BV: Tensor) -> tuple[Tensor, dict[int, Failure]]:
    """The logits after penalties, biases and guides, and the rows whose guide failed."""
    scores_BV = raw_BV.clone()
    _penalise(rows, scores_BV)
    _add_biases(rows, scores_BV)
    return scores_BV, _apply_guides(rows, scores_BV)


def _penalise(rows: Sequence[Row], scores_BV: Tensor) -> None:
    some = [(b, row.sampling, row.seen) for b, row in enumerate(rows) if row.seen is not None and row.seen.ids]
    if not some:
        return
    counts_I = np.concatenate([np.array(seen.counts) for _, _, seen in some])
    of_I = np.repeat(np.arange(len(some)), [len(seen.ids) for _, _, seen in some])
    repetition_R = np.array([sampling.repetition_penalty for _, sampling, _ in some])
    frequency_R = np.array([sampling.frequency_penalty for _, sampling, _ in some])
    presence_R = np.array([sampling.presence_penalty for _, sampling, _ in some])
    penalty_I = frequency_R[of_I] * counts_I + presence_R[of_I] * (counts_I > 0)
    device = scores_BV.device
    places = _places([(b, np.array(seen.ids)) for b, _, seen in some], device)
    factor_I = torch.from_numpy(repetition_R[of_I]).float().to(device)
    score_I = scores_BV[places]
    score_I = torch.where(score_I > 0, score_I / factor_I, score_I * factor_I)
    scores_BV[places] = score_I - torch.from_numpy(penalty_I).float().to(device)


def _add_biases(rows: Sequence[Row], scores_BV: Tensor) -> None:
    some = [(b, *row.bias) for b, row in enumerate(rows) if len(row.bias[0])]
    if some:
        places = _places([(b, ids) for b, ids, _ in some], scores_BV.device)
        scores_BV[places] += torch.from_numpy(np.concatenate([values for _, _, values in some])).to(scores_BV.device)


def _places(some: Sequence[tuple[int, NDArray[np.int64]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of rows and some tokens of each, as an index."""
    rows_I = np.repeat([b for b, _ in some], [len(ids) for _, ids in some])
    ids_I = np.concatenate([ids for _, ids in some])
    return torch.from_numpy(rows_I).to(device), torch.from_numpy(ids_I).to(device)


def _apply_guides(rows: Sequence[Row], scores_BV: Tensor) -> dict[int, Failure]:
    some = [(b, row.matcher) for b, row in enumerate(rows) if row.matcher is not None]
    errors: dict[int, Failure] = {}
    if not some:
        return errors
    device, vocabulary = scores_BV.device, scores_BV.shape[-1]
    masks_RW = np.empty((len(some), -(-vocabulary // 32)), np.int32)
    for r, (b, matcher) in enumerate(some):
        try:
            matcher.allow(masks_RW, r)
        except EngineError as exc:
            errors[b] = exc
    bits = torch.arange(32, dtype=torch.int32, device=device)
    allowed_RV = ((torch.from_numpy(masks_RW).to(device)[..., None] >> bits) & 1).flatten(1)[:, :vocabulary]
    of_R = torch.tensor([b for b, _ in some], device=device)
    scores_BV[of_R] = scores_BV[of_R].masked_fill(allowed_RV == 0, -torch.inf)
    return errors


# Drawing: a token's weight is its probability over that of the best, as a whole number.


def _fill(ids_B: Tensor, some: Sequence[int], draw: Draw, rows: Sequence[Row], scores_BV: Tensor) -> None:
    """Write what some of the rows draw into the ids."""
    step = max(1, AT_ONCE // scores_BV.shape[-1]) if scores_BV.is_cpu else len(rows)
    for part in (some[start : start + step] for start in range(0, len(some), step)):
        beside = part[-1] - part[0] == len(part) - 1
        of_R = slice(part[0], part[-1] + 1) if beside else torch.tensor(part, device=ids_B.device)
        scores_RV = scores_BV[of_R]
        ids_B[of_R] = draw([rows[b] for b in part], scores_RV, _at(scores_RV, ids_B[of_R]))


def _draw(rows: Sequence[Row], scores_RV: Tensor, peaks_R: Tensor) -> Tensor:
    """A token of each row, from all of them but those that min_p cuts."""
    weights_RV = _weights(rows, scores_RV, peaks_R)
    if any(row.sampling.min_p for row in rows):
        weights_RV = weights_RV * (weights_RV >= _floors(rows, weights_RV)[:, None])
    numbers_R = _per_row([row.number() for row in rows], weights_RV.device)
    blocks_RKL, sums_RK = _blocks(weights_RV)
    return _find(blocks_RKL, sums_RK, _share(numbers_R, sums_RK.sum(-1)))


def _draw_cut(rows: Sequence[Row], scores_RV: Tensor, peaks_R: Tensor) -> Tensor:
    """A token of each row, from the likeliest: first the top_k, of their mass top_p, of these what min_p leaves."""
    weights_RV = _weights(rows, scores_RV, peaks_R)
    vocabulary, device = weights_RV.shape[-1], weights_RV.device
    cuts = _Cuts(
        weights_RV,
        _per_row([row.sampling.top_k or vocabulary for row in rows], device).clamp(max=vocabulary),
        _per_row([row.sampling.top_p for row in rows], device),
        _floors(rows, weights_RV),
        _per_row([row.number() for row in rows], device),
    )
    ids_R, enough_R = cuts.draw(min(HEAD, vocabulary))
    if not enough_R.all():
        short_R = (~enough_R).nonzero()[:, 0]
        ids_R[short_R], _ = cuts.of(short_R).draw(vocabulary)
    return ids_R


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Which of the likeliest tokens rows draw from, and with which random number. floors: the least weight."""

    weights_RV: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    floors_R: Tensor
    numbers_R: Tensor

    def of(self, some_R: Tensor) -> _Cuts:
        """Those of some rows."""
        each = (self.weights_RV, self.top_k_R, self.top_p_R, self.floors_R, self.numbers_R)
        return _Cuts(*(of_all[some_R] for of_all in each))

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """A token of each row, and whether the `size` likeliest, which alone are looked at, are enough to tell."""
        head_RN = _likeliest(self.weights_RV, size)
        ends_RN = head_RN.flip(-1).double().cumsum(-1)
        bounded_R = self.top_k_R <= size
        last_R = self.top_k_R.clamp(max=size).long() - 1
        total_R = torch.where(bounded_R, _at(ends_RN, last_R), self.weights_RV.sum(-1, dtype=torch.float64))
        mass_R = total_R * self.top_p_R
        enough_R = bounded_R | (self.top_k_R == self.weights_RV.shape[-1]) & (ends_RN[:, -1] >= mass_R)
        # The one that reaches the mass is the last; the best stays, at any top_p.
        last_R = torch.minimum(last_R, _below(ends_RN, mass_R))
        last_R = torch.minimum(last_R, size - 1 - _below(head_RN, self.floors_R))
        rank_R = _up_to(ends_RN, _share(self.numbers_R, _at(ends_RN, last_R)))
        weight_R = _at(head_RN, size - 1 - rank_R)
        # Of tokens with the same weight those with the lowest ids come first, on every device.
        place_R = rank_R - (size - _up_to(head_RN, weight_R))
        return _nth(self.weights_RV, weight_R, place_R), enough_R


def _at(values_RN: Tensor, places_R: Tensor) -> Tensor:
    """A value of each row."""
    return values_RN.gather(-1, places_R[:, None])[:, 0]


def _below(rising_RN: Tensor, values_R: Tensor) -> Tensor:
    """How many are less than the row's value."""
    return torch.searchsorted(rising_RN, values_R[:, None])[:, 0]


def _up_to(rising_RN: Tensor, values_R: Tensor) -> Tensor:
    """How many are not more than the row's value."""
    return torch.searchsorted(rising_RN, values_R[:, None], right=True)[:, 0]


def _weights(rows: Sequence[Row], scores_RV: Tensor, peaks_R: Tensor) -> Tensor:
    """Whole numbers up to that of the best, in fp32; the sum of all is less than 2**53."""
    temperatures_R = scores_RV.new_tensor([max(row.sampling.temperature, TINY) for row in rows])
    # The best goes to 0 first: a tiny temperature then divides into -inf, never into NaN.
    weights_RV = (scores_RV - peaks_R[:, None]).div_(temperatures_R[:, None])
    return _exp_(weights_RV).mul_(_whole(weights_RV)).round_()


def _whole(weights_RV: Tensor) -> float:
    """The weight of the best."""
    return float(2 ** (52 - (weights_RV.shape[-1] - 1).bit_length()))


def _floors(rows: Sequence[Row], weights_RV: Tensor) -> Tensor:
    return weights_RV.new_tensor([row.sampling.min_p * _whole(weights_RV) for row in rows])


def _share(numbers_R: Tensor, total_R: Tensor) -> Tensor:
    """Whole numbers below the totals, each as far up as its number is from 0 to 1."""
    return torch.minimum((numbers_R * total_R).floor(), total_R - 1)


def _blocks(masses_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Whole masses in blocks of tokens [R, K, L], and the sum of each block."""
    padding = -masses_RV.shape[-1] % BLOCK
    padded_RV = torch.nn.functional.pad(masses_RV, (0, padding)) if padding else masses_RV
    blocks_RKL = padded_RV.reshape(len(masses_RV), -1, BLOCK)
    return blocks_RKL, blocks_RKL.sum(-1, dtype=torch.float64)


def _find(blocks_RKL: Tensor, sums_RK: Tensor, targets_R: Tensor) -> Tensor:
    """The first token at which the running sum of masses is over the target."""
    ends_RK = sums_RK.cumsum(-1)
    k_R = _up_to(ends_RK, targets_R)
    left_R = targets_R - (_at(ends_RK, k_R) - _at(sums_RK, k_R))
    inside_RL = blocks_RKL.take_along_dim(k_R[:, None, None], 1)[:, 0].double().cumsum(-1)
    return k_R * BLOCK + _up_to(inside_RL, left_R)


def _per_row(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


# On CPUs numpy does these 2 to 30 times as fast as torch.


def _best(scores_BV: Tensor) -> Tensor:
    """The first of the highest in each row."""
    return torch.from_numpy(scores_BV.numpy().argmax(-1)) if scores_BV.is_cpu else scores_BV.argmax(-1)


def _exp_(values_RV: Tensor) -> Tensor:
    """In place."""
    if not values_RV.is_cpu:
        return values_RV.exp_()
    np.exp(values_RV.numpy(), out=values_RV.numpy())
    return values_RV


def _log_(values_V: Tensor) -> Tensor:
    """In place."""
    if not values_V.is_cpu:
        return values_V.log_()
    with np.errstate(divide="ignore"):  # of nothing it is minus infinity
        np.log(values_V.numpy(), out=values_V.numpy())
    return values_V


def _likeliest(weights_RV: Tensor, size: int) -> Tensor:
    """The highest weights of each row, without their tokens, rising."""
    if not weights_RV.is_cpu:
        return weights_RV.topk(size).values.flip(-1)
    weights = weights_RV.numpy()
    cut = weights.shape[-1] - size
    head = np.partition(weights, cut, -1)[:, cut:].copy() if cut else weights.copy()
    head.sort(-1)
    return torch.from_numpy(head)


def _nth(weights_RV: Tensor, weight_R: Tensor, place_R: Tensor) -> Tensor:
    """Of the tokens with this weight the one at this place."""
    if not weights_RV.is_cpu:
        return _find(*_blocks((weights_RV == weight_R[:, None]).float()), place_R.double())
    wanted = zip(weights_RV.numpy(), weight_R.numpy(), place_R.tolist(), strict=True)
    return torch.tensor([np.flatnonzero(weights_V == weight)[place] for weights_V, weight, place in wanted])


# Log-probabilities.


def _told(rows: Sequence[Row], some: Iterable[int], raw_BV: Tensor, ids: Sequence[int]) -> dict[int, Pick]:
    """Of some rows the picks of those that ask for log-probabilities."""
    tops = {b: top for b in some if (top := rows[b].sampling.logprobs) is not None}
    if not tops:
        return {}
    of_R = torch.tensor(list(tops), device=raw_BV.device)
    scored = _scored(raw_BV[of_R], [ids[b] for b in tops], max(tops.values()))
    return {b: replace(each, top=each.top[:top]) for (b, top), each in zip(tops.items(), scored, strict=True)}


def _scored(logits_RV: Tensor, ids: Sequence[int], top: int) -> list[Pick]:
    ids_RN = torch.tensor(ids, device=logits_RV.device)[:, None]
    if top:
        ids_RN = torch.cat((ids_RN, _top(logits_RV, min(top, logits_RV.shape[-1]))), -1)
    logs = logits_RV.log_softmax(-1).gather(-1, ids_RN).tolist()
    return [
        Pick(id_, log, tuple(zip(others, theirs, strict=True)))
        for (id_, *others), (log, *theirs) in zip(ids_RN.tolist(), logs, strict=True)
    ]


def _top(logits_RV: Tensor, count: int) -> Tensor:
    """The likeliest tokens, of equals the lowest ids, in that order."""
    found = logits_RV.topk(min(count + 1, logits_RV.shape[-1]))
    ids_RN = found.indices[:, :count].clone()
    least_R = found.values[:, count - 1]
    # topk leaves open which of several equals it takes.
    for r in (found.values[:, count:] == least_R[:, None]).any(-1).nonzero()[:, 0].tolist():
        above = found.indices[r][found.values[r] > least_R[r]]
        equal = (logits_RV[r] == least_R[r]).nonzero()[:, 0]
        ids_RN[r] = torch.cat((above, equal))[:count]
    ids_RN = ids_RN.sort(-1).values
    order_RN = logits_RV.gather(-1, ids_RN).argsort(dim=-1, descending=True, stable=True)
    return ids_RN.gather(-1, order_RN)
