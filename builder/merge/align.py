"""Permutes a model's units so that they meet another model's: Git Re-Basin's weight matching, for Llama-like decoders.

Ainsworth, Hayase & Srinivasa 2022 (arXiv 2209.04836), section 3.2: a network computes the same function whatever the
order of its hidden units; of all orders, take the one whose weights lie nearest to the reference's,

    max over P of  sum over tensors W of <P(W_model), W_reference>,

by coordinate ascent: a group of units at a time is a linear assignment problem, solved exactly. A decoder's groups:
the residual stream, shared by all layers; each layer's MLP units; each layer's attention heads, whole, because rotary
embeddings tie the order inside a head. Key and value heads move with the query heads that they serve.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from builder.checkpoints import Array, Checkpoint
from builder.errors import MergeError

Index = NDArray[np.intp]
Matrix = NDArray[np.float64]
Axes = tuple[Index | None, ...]

CHUNK = 1 << 23
"""Elements that are float64 at once, of each model."""
NOISE = 1e-12
"""A gain below this part of the largest inner product, for each unit, is rounding."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTSIDE: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("vocabulary", "residual"),
    "model.norm.weight": ("residual",),
    "lm_head.weight": ("vocabulary", "residual"),
}
_INSIDE: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("residual",),
    "post_attention_layernorm.weight": ("residual",),
    "self_attn.q_proj.weight": ("query", "residual"),
    "self_attn.k_proj.weight": ("key", "residual"),
    "self_attn.v_proj.weight": ("key", "residual"),
    "self_attn.o_proj.weight": ("residual", "query"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("key",),
    "self_attn.v_proj.bias": ("key",),
    "self_attn.o_proj.bias": ("residual",),
    "self_attn.q_norm.weight": ("rotary",),
    "self_attn.k_norm.weight": ("rotary",),
    "mlp.gate_proj.weight": ("mlp", "residual"),
    "mlp.up_proj.weight": ("mlp", "residual"),
    "mlp.down_proj.weight": ("residual", "mlp"),
    "mlp.gate_proj.bias": ("mlp",),
    "mlp.up_proj.bias": ("mlp",),
    "mlp.down_proj.bias": ("residual",),
}
_OPTIONAL = ("lm_head.weight", ".bias", "_norm.weight")
_FIXED = ("vocabulary", "rotary")
"""Axes whose order is not free: a row a token, and the dimensions inside a head."""
KNOWN = "alignment knows Llama-like decoders alone (Llama, Mistral, Qwen2, Qwen3, SmolLM)"
RESIDUAL: tuple[str, ...] = ("residual",)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of a tensor: `units` of a group, `block` entries each."""

    group: str
    units: int
    block: int = 1


def match(model: Checkpoint, reference: Checkpoint, *, seed: int = 0, sweeps: int = 100) -> dict[str, Axes]:
    """How to permute `model` towards `reference`: an index a tensor's axis, None where the axis stays, for `apply`.

    The permuted model computes the same function, and its inner product with the reference is never below the
    unpermuted one's. `seed` orders the groups in a sweep; at most `sweeps` sweeps are made, fewer when nothing changes.
    A vocabulary of other length counts in the rows that both have. Raises MergeError for other models than Llama-like
    decoders of one shape.

    A sweep reads both models up to twice, a tensor at a time. What is held is one tensor of each and two float64
    matrices of intermediate x intermediate size, 2 GB at 11008, which one core assigns in 1 s for like models and 20 s
    for unrelated ones.
    """
    if sweeps < 1:
        raise MergeError(f"{sweeps} sweeps align nothing: ask for at least one")
    ascent = _Ascent(model, reference)
    ascent.run(np.random.default_rng(seed), sweeps)
    return {name: tuple(_index(axis, ascent.orders) for axis in axes) for name, axes in ascent.axes.items()}


def apply(values: Array, axes: Axes) -> Array:
    """W[np.ix_(*axes)]; None leaves an axis as it is."""
    for axis, index in enumerate(axes):
        if index is not None:
            values = np.take(values, index, axis)
    return values


class _Ascent:
    """The order of every group, `order[i]` the model's unit that comes to place i, and the steps that improve it.

    A step is the groups that are solved together: the residual stream, a layer's MLP, a layer's query and key heads.
    """

    def __init__(self, model: Checkpoint, reference: Checkpoint) -> None:
        self.model, self.reference = model, reference
        self.axes = _layout(model)
        _check_same(self.axes, _layout(reference), model, reference)
        every = [axis for axes in self.axes.values() for axis in axes]
        self.unpermuted = {axis.group: np.arange(axis.units) for axis in every if axis.group not in _FIXED}
        self.orders = dict(self.unpermuted)
        layers = sorted({int(group.split(".")[0]) for group in self.orders if group != "residual"})
        self.inner = [step for i in layers for step in ((f"{i}.query", f"{i}.key"), (f"{i}.mlp",))]
        self.stale = {RESIDUAL, *self.inner}

    def run(self, rng: np.random.Generator, sweeps: int) -> None:
        """Sweep until nothing changes."""
        self._first_sweep()
        steps = [RESIDUAL, *self.inner]
        for _ in range(sweeps - 1):
            if not self.stale:
                break
            for i in rng.permutation(len(steps)):
                self._take(steps[i])

    def _first_sweep(self) -> None:
        """The residual stream by the embedding, the last norm and the head alone; then the groups inside the layers.

        Against a stream in another order the products of a layer's units are noise, and the ascent would end at the
        next best optimum. Should what this finds be worse than no permutation, it is undone.
        """
        moved = self._accept({"residual": self._products("residual", list(_OUTSIDE))})
        for step in self.inner:
            self._take(step)
        if moved and self._objective(self.orders) < self._objective(self.unpermuted):
            self.orders = dict(self.unpermuted)
            self.stale = {RESIDUAL, *self.inner}

    def _take(self, step: tuple[str, ...]) -> None:
        """Give the step's groups their best order, all others fixed; nothing to do when no other has changed since."""
        if step not in self.stale:
            return
        self.stale.discard(step)
        if self._accept({group: self._products(group, self.axes) for group in step}):
            self.stale |= set(self.inner) if step == RESIDUAL else {RESIDUAL}

    def _accept(self, products: Mapping[str, Matrix]) -> bool:
        """Take the best orders if they gain on the present ones; on a tie nothing moves."""
        best = _best(products)
        gain = sum(
            _earned(matrix, best[group]) - _earned(matrix, self.orders[group]) for group, matrix in products.items()
        )
        if gain <= NOISE * sum(len(matrix) * np.abs(matrix).max(initial=0.0) for matrix in products.values()):
            return False
        self.orders |= best
        return True

    def _products(self, group: str, names: Iterable[str]) -> Matrix:
        """sum over the tensors of <unit i of the reference, unit j of the model>, [units, units].

        The other axis of the model's tensors is in its present order.
        """
        units = len(self.orders[group])
        total = np.zeros((units, units))
        others = {**self.orders, group: self.unpermuted[group]}
        for name in names:
            groups = [axis.group for axis in self.axes.get(name, ())]
            if group in groups:
                ours, theirs = (
                    np.moveaxis(values, groups.index(group), 0).reshape(units, -1)
                    for values in self._pair(name, others)
                )
                _add_products(total, theirs, ours)
        return total

    def _objective(self, orders: Mapping[str, Index]) -> float:
        """sum over all tensors of <permuted model, reference>."""
        total = np.zeros((1, 1))
        for name in self.axes:
            ours, theirs = (values.reshape(1, -1) for values in self._pair(name, orders))
            _add_products(total, theirs, ours)
        return float(total[0, 0])

    def _pair(self, name: str, orders: Mapping[str, Index]) -> tuple[Array, Array]:
        """A tensor of the model, permuted, and of the reference, in the rows that both have."""
        ours = apply(self.model.read(name), tuple(_index(axis, orders) for axis in self.axes[name]))
        theirs = self.reference.read(name)
        rows = min(len(ours), len(theirs))
        return ours[:rows], theirs[:rows]


def _best(products: Mapping[str, Matrix]) -> dict[str, Index]:
    """The order of each group that earns most; of query heads and their key heads together."""
    if len(products) == 1:
        return {group: _assignment(matrix) for group, matrix in products.items()}
    (query, products_QQ), (key, products_KK) = products.items()
    return dict(zip((query, key), _best_heads(products_QQ, products_KK), strict=True))


def _best_heads(products_QQ: Matrix, products_KK: Matrix) -> tuple[Index, Index]:
    """The best order of query and key heads, each key head with the queries that it serves, in any order.

    Exact: key head j in place i earns its own products and those of the best order of its queries.
    """
    k = len(products_KK)
    served_KGKG = products_QQ.reshape(k, -1, k, len(products_QQ) // k)
    inner = [[_assignment(served_KGKG[i, :, j]) for j in range(k)] for i in range(k)]
    earned_KK = [[_earned(served_KGKG[i, :, j], inner[i][j]) for j in range(k)] for i in range(k)]
    keys = _assignment(products_KK + np.array(earned_KK))
    queries = [j * len(inner[i][j]) + inner[i][j] for i, j in enumerate(keys)]
    return np.concatenate(queries), keys


def _assignment(products: Matrix) -> Index:
    order: Index = linear_sum_assignment(products, maximize=True)[1]
    return order


def _earned(products: Matrix, order: Index) -> float:
    return float(products[np.arange(len(order)), order].sum())


def _add_products(total_UU: Matrix, theirs_UF: Array, ours_UF: Array) -> None:
    """Add theirs ours^T, products and sums in float64, some features at a time."""
    width = max(CHUNK // len(total_UU), 1)
    for begin in range(0, ours_UF.shape[1], width):
        part = slice(begin, begin + width)
        total_UU += theirs_UF[:, part].astype(np.float64) @ ours_UF[:, part].astype(np.float64).T


def _index(axis: _Axis, orders: Mapping[str, Index]) -> Index | None:
    """The entries along an axis in their new order; None where they keep it."""
    order = orders.get(axis.group)
    if order is None or np.array_equal(order, np.arange(axis.units)):
        return None
    entries: Index = (order[:, None] * axis.block + np.arange(axis.block)).ravel()
    return entries


def _layout(checkpoint: Checkpoint) -> dict[str, tuple[_Axis, ...]]:
    """What moves along each axis of each tensor. Raises MergeError for a tensor that does not fit, or lacks."""
    where, heads = checkpoint.folder.name, _heads(checkpoint)
    layout: dict[str, tuple[_Axis, ...]] = {}
    first: dict[str, _Axis] = {}
    for name, tensor in checkpoint.tensors.items():
        groups = _groups(name)
        if groups is None:
            raise MergeError(f"{where} has {name}: {KNOWN}")
        axes = tuple(
            _Axis(group, *heads.get(group.split(".")[-1], (size, 1)))
            for group, size in zip(groups, tensor.shape, strict=False)
        )
        sizes = tuple(axis.units * axis.block for axis in axes)
        if len(axes) != len(groups) or sizes != tensor.shape or any(first.setdefault(a.group, a) != a for a in axes):
            raise MergeError(f"{name} of {where} is {tensor.shape}, which does not fit its other tensors: {KNOWN}")
        layout[name] = axes
    layers = sorted({found[1] for found in map(_LAYER.fullmatch, layout) if found})
    wanted = [*_OUTSIDE, *(f"model.layers.{layer}.{name}" for layer in layers for name in _INSIDE)]
    for name in wanted:
        if name not in layout and not name.endswith(_OPTIONAL):
            raise MergeError(f"{where} has no {name}: {KNOWN}")
    return layout


def _groups(name: str) -> tuple[str, ...] | None:
    """The group of each axis of a tensor, by its name; a layer's own groups bear its number."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return _OUTSIDE.get(name)
    shared = ("residual", *_FIXED)
    kinds = _INSIDE.get(found[2])
    return None if kinds is None else tuple(kind if kind in shared else f"{found[1]}.{kind}" for kind in kinds)


def _heads(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Units and block of the axes that heads decide, from config.json."""
    config = checkpoint.config
    queries = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads") or queries
    if not (isinstance(queries, int) and isinstance(keys, int) and keys > 0 and queries > 0 and queries % keys == 0):
        raise MergeError(
            f"config.json of {checkpoint.folder.name} gives {queries} query heads and {keys} key heads: {KNOWN}"
        )
    query = next((t for name, t in checkpoint.tensors.items() if name.endswith("self_attn.q_proj.weight")), None)
    size = config.get("head_dim") or (query.shape[0] // queries if query and query.shape else 0)
    return {"query": (queries, size), "key": (keys, size), "rotary": (1, size)}


def _check_same(
    ours: Mapping[str, tuple[_Axis, ...]],
    theirs: Mapping[str, tuple[_Axis, ...]],
    model: Checkpoint,
    reference: Checkpoint,
) -> None:
    """Raises MergeError unless both have the same tensors, of the same axes but for the vocabulary's length."""
    a, b = model.folder.name, reference.folder.name
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise MergeError(f"{name} is in {a if name in ours else b} alone: only models of one shape can be aligned")
    for name, axes in ours.items():
        for axis, other in zip(axes, theirs[name], strict=True):
            if axis != other and axis.group != "vocabulary":
                raise MergeError(
                    f"{name} has {axis.units} units of {axis.block} in {a} and {other.units} of {other.block} in {b}: "
                    "only models of one shape can be aligned"
                )
