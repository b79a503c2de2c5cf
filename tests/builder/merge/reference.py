"""Every merge method again, in float64 on whole tensors, written to be read: what the engine's results are held to.

Names: x an input, b the base, d = x - b, w a weight. Among equal magnitudes the lower index counts as larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Rescale = bool | str


def _rows(x: Array) -> Array:
    """The tensor as a matrix whose rows run along its last axis; up to one dimension there is one row."""
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def _cosine(x: Array, y: Array) -> float:
    """Of the angle between two whole tensors; a zero tensor is at right angles to everything."""
    length = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.clip(np.vdot(x, y) / length, -1, 1)) if length > 0 else 0.0


def _ascending(d: Array) -> NDArray[np.intp]:
    """Indices into the flattened tensor, from the smallest magnitude to the largest."""
    index = np.arange(d.size)
    return np.lexsort((-index, np.abs(d).ravel()))


def _mask(size: int, indices: NDArray[np.intp]) -> Mask:
    mask = np.zeros(size, dtype=bool)
    mask[indices] = True
    return mask


# Means of the inputs.


def linear(tensors: Sequence[Array], base: Array | None, *, weight: Sequence[float], normalize: bool = True) -> Array:
    total = sum(w * x for w, x in zip(weight, tensors, strict=True))
    return total / sum(weight) if normalize else total


def passthrough(tensors: Sequence[Array], base: Array | None, *, scale: Sequence[float | None] = (None,)) -> Array:
    (x,) = tensors
    return x.copy() if scale[0] is None else x * scale[0]


def fisher(
    tensors: Sequence[Array],
    base: Array | None,
    *,
    weight: Sequence[float] | None = None,
    statistics: Sequence[Array] | None = None,
) -> Array:
    weight = weight or [1.0] * len(tensors)
    mean = linear(tensors, None, weight=weight)
    if statistics is None:
        return mean
    above = sum(w * f * x for w, f, x in zip(weight, statistics, tensors, strict=True))
    below = sum(w * f for w, f in zip(weight, statistics, strict=True))
    return np.where(below > 0, above / np.where(below > 0, below, 1), mean)


def regmean(
    tensors: Sequence[Array],
    base: Array | None,
    *,
    weight: Sequence[float] | None = None,
    reduction: float = 0.9,
    statistics: Sequence[Array] | None = None,
) -> Array:
    """The matrix whose outputs are nearest to all inputs' outputs; a feature that no model ever saw takes the mean."""
    weight = weight or [1.0] * len(tensors)
    mean = linear(tensors, None, weight=weight)
    if statistics is None:
        return mean
    reduced = [g * np.where(np.eye(len(g), dtype=bool), 1, reduction) for g in statistics]
    left = sum(w * g for w, g in zip(weight, reduced, strict=True))
    right = sum(w * g @ x.T for w, g, x in zip(weight, reduced, tensors, strict=True))
    seen = np.diagonal(left) > 0
    merged = mean.copy()
    merged[:, seen] = np.linalg.solve(left[np.ix_(seen, seen)], right[seen]).T
    return merged


# On the sphere.


def slerp(tensors: Sequence[Array], base: Array | None, *, t: float) -> Array:
    (x,) = tensors
    cosine = _cosine(base, x)
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * x
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * base + math.sin(t * angle) * x) / math.sin(angle)


def nuslerp(
    tensors: Sequence[Array],
    base: Array | None,
    *,
    weight: Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:
    t = weight[1] / (weight[0] + weight[1])
    x, y = (tensor if base is None else tensor - base for tensor in tensors)
    if nuslerp_flatten or x.ndim < 2:
        merged = _nuslerp_vector(t, x, y)
    else:
        axis = 0 if nuslerp_row_wise else -1
        vectors = zip(_rows(np.moveaxis(x, axis, -1)), _rows(np.moveaxis(y, axis, -1)), strict=True)
        shape = np.moveaxis(x, axis, -1).shape
        merged = np.moveaxis(np.array([_nuslerp_vector(t, *pair) for pair in vectors]).reshape(shape), -1, axis)
    return merged if base is None else base + merged


def _nuslerp_vector(t: float, x: Array, y: Array) -> Array:
    if not x.any() or not y.any():
        angle = math.pi / 2  # a zero vector is at right angles to everything
    else:
        u, v = x / np.linalg.norm(x), y / np.linalg.norm(y)
        # Kahan's angle: acos of a dot product cannot tell 1e-9 from 0.
        angle = 2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    if math.sin(angle) <= 1e-8:
        return (1 - t) * x + t * y
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def multislerp(
    tensors: Sequence[Array],
    base: Array | None,
    *,
    weight: Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """Where two directions cancel out, or all are zero, there is no mean direction: the weighted sum stands in."""
    w = np.array(weight) / (sum(weight) if normalize_weights else 1)
    vectors = [x if base is None else x - base for x in tensors]
    norms = [float(np.linalg.norm(v)) for v in vectors]
    units = [v / (norm + eps) if norm > 0 else v for v, norm in zip(vectors, norms, strict=True)]

    mean = sum(w_i * u for w_i, u in zip(w, units, strict=True))
    if np.linalg.norm(mean) <= eps:
        assert len(vectors) == 2 or not any(norms), "a merge without an answer"
        merged = sum(w_i * v for w_i, v in zip(w, vectors, strict=True))
    else:
        mean = mean / np.linalg.norm(mean)
        tangent = sum(w_i * (u - np.vdot(u, mean) * mean) for w_i, u in zip(w, units, strict=True))
        step = float(np.linalg.norm(tangent)) + eps
        direction = mean * math.cos(step) + tangent * (math.sin(step) / step if step > 0 else 1)
        merged = direction * float(w @ norms)
    return merged if base is None else base + merged


def karcher(tensors: Sequence[Array], base: Array | None, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    """The mean direction times the mean norm; a zero tensor has no direction and counts in the norm alone."""
    if len(tensors) == 1:
        return tensors[0].copy()
    norms = [float(np.linalg.norm(x)) for x in tensors]
    units = [x / norm for x, norm in zip(tensors, norms, strict=True) if norm > 0]
    if not units:
        return np.zeros_like(tensors[0])

    mean = sum(units) / len(units)
    length = np.linalg.norm(mean)
    mean = units[0] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for u in units:
            dot = float(np.clip(np.vdot(u, mean), -1, 1))
            angle = math.acos(dot)
            if tol <= angle <= math.pi - tol:  # to the same point and to the opposite one there is no direction
                tangent += angle / math.sin(angle) * (u - dot * mean) / len(units)
        step = float(np.linalg.norm(tangent))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean = mean / np.linalg.norm(mean)
    return mean * (sum(norms) / len(norms))


def model_stock(tensors: Sequence[Array], base: Array | None, *, filter_wise: bool = False) -> Array:
    mean = sum(tensors) / len(tensors)
    if not filter_wise:
        return base + _stock_ratio([x - base for x in tensors]) * (mean - base)
    merged = _rows(base).copy()
    for i in range(len(merged)):
        ratio = _stock_ratio([_rows(x)[i] - _rows(base)[i] for x in tensors])
        merged[i] += ratio * (_rows(mean)[i] - merged[i])
    return merged.reshape(base.shape)


def _stock_ratio(deltas: Sequence[Array]) -> float:
    count = len(deltas)
    cosine = float(np.mean([_cosine(deltas[i], deltas[j]) for i in range(count) for j in range(i + 1, count)]))
    below = 1 + (count - 1) * cosine
    return count * cosine / below if abs(below) >= 1e-6 else 0.0


# Sums of task vectors, sparse or whole.


def trim(d: Array, density: float) -> Mask:
    """The share of the largest magnitudes; of anything above zero at least one element."""
    count = min(d.size, max(1, int(density * d.size))) if density > 0 else 0
    return _mask(d.size, _ascending(d)[d.size - count :]).reshape(d.shape)


def global_trim(deltas: Sequence[Array], density: float) -> list[Mask]:
    """One model's tensors, trimmed as the one vector that they make when laid end to end."""
    kept = trim(np.concatenate([d.ravel() for d in deltas]), density)
    ends = np.cumsum([d.size for d in deltas])
    return [part.reshape(d.shape) for part, d in zip(np.split(kept, ends[:-1]), deltas, strict=True)]


def trim_outliers(d: Array, density: float, gamma: float) -> Mask:
    """Without the share `gamma` of the largest magnitudes, and without the smallest, to keep `density` in all."""
    if density >= 1:
        return np.ones(d.shape, dtype=bool)
    keep, top = int(density * d.size), int(gamma * d.size)
    bottom = max(0, d.size - keep - top)
    return _mask(d.size, _ascending(d)[bottom : bottom + keep]).reshape(d.shape)


def della_probabilities(d: Array, density: float, epsilon: float) -> Array:
    """Of keeping each element: by its rank in its row, from density - epsilon to density + epsilon."""
    if density >= 1 or density <= 0:
        return np.full(d.shape, float(density >= 1))
    rows = _rows(d)
    probabilities = np.full(rows.shape, float(density))
    for row, p in zip(rows, probabilities, strict=True):
        if len(row) > 1:
            p[_ascending(row)] = density - epsilon + 2 * epsilon * np.arange(len(row)) / (len(row) - 1)
    return probabilities.reshape(d.shape)


def sparse(d: Array, kept: Mask, rescale: Rescale, probability: Array | float) -> Array:
    """What is kept of a task vector: as it is, with the L1 norm of the whole, or over the probability of keeping it."""
    masked = np.where(kept, d, 0.0)
    if rescale == "density":
        return np.divide(masked, probability, out=np.zeros_like(masked), where=kept)
    after = np.abs(masked).sum()
    return masked * (np.abs(d).sum() / after) if rescale and after > 0 else masked


def combine(
    deltas: Sequence[Array], base: Array, weight: Sequence[float], elect: bool, normalize: bool, lambda_: float
) -> Array:
    """base + lambda * the weighted sum; with `elect` of those that agree with the sign of that sum (0 counts as +)."""
    weighted = [w * d for w, d in zip(weight, deltas, strict=True)]
    total = sum(weighted)
    agree = [np.sign(wd) == np.where(total >= 0, 1, -1) if elect else np.ones(base.shape, bool) for wd in weighted]
    merged = sum(np.where(yes, wd, 0) for yes, wd in zip(agree, weighted, strict=True))
    if normalize:
        divisor = sum(w * yes for w, yes in zip(weight, agree, strict=True))
        merged = merged / np.where(np.abs(divisor) < 1e-8, 1, divisor)
    return base + lambda_ * merged


def task_arithmetic(
    tensors: Sequence[Array],
    base: Array | None,
    *,
    weight: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Array:
    return combine([x - base for x in tensors], base, weight, False, normalize, lambda_)


def ties(
    tensors: Sequence[Array],
    base: Array | None,
    *,
    weight: Sequence[float],
    density: Sequence[float] | None = None,
    normalize: bool = True,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    kept: Sequence[Mask] | None = None,
) -> Array:
    """`kept`: the masks of a trim over whole models, see `global_trim`; else each tensor is trimmed alone."""
    deltas, density = [x - base for x in tensors], density or [1.0] * len(tensors)
    masks = kept or [trim(d, p) for d, p in zip(deltas, density, strict=True)]
    deltas = [sparse(d, mask, rescale, p) for d, mask, p in zip(deltas, masks, density, strict=True)]
    return combine(deltas, base, weight, True, normalize, lambda_)


def _breadcrumbs(elect: bool) -> Callable[..., Array]:
    def breadcrumbs(
        tensors: Sequence[Array],
        base: Array,
        *,
        weight: Sequence[float],
        density: Sequence[float] | None = None,
        gamma: Sequence[float] | None = None,
        normalize: bool = False,
        rescale: Rescale = False,
        lambda_: float = 1.0,
    ) -> Array:
        deltas, count = [x - base for x in tensors], len(tensors)
        cuts = list(zip(density or [1.0] * count, gamma or [0.01] * count, strict=True))
        masks = [trim_outliers(d, *cut) for d, cut in zip(deltas, cuts, strict=True)]
        deltas = [sparse(d, mask, rescale, p) for d, mask, (p, _) in zip(deltas, masks, cuts, strict=True)]
        return combine(deltas, base, weight, elect, normalize, lambda_)

    return breadcrumbs


def _dare(elect: bool) -> Callable[..., Array]:
    def dare(
        tensors: Sequence[Array],
        base: Array,
        *,
        kept: Sequence[Mask],
        weight: Sequence[float],
        density: Sequence[float] | None = None,
        normalize: bool = False,
        rescale: Rescale = True,
        lambda_: float = 1.0,
    ) -> Array:
        """`kept`: the elements that chance has kept of each input."""
        density = density or [1.0] * len(tensors)
        deltas = [sparse(x - base, mask, rescale, p) for x, mask, p in zip(tensors, kept, density, strict=True)]
        return combine(deltas, base, weight, elect, normalize, lambda_)

    return dare


def _della(elect: bool) -> Callable[..., Array]:
    def della(
        tensors: Sequence[Array],
        base: Array,
        *,
        kept: Sequence[Mask],
        weight: Sequence[float],
        density: Sequence[float] | None = None,
        epsilon: Sequence[float] | None = None,
        normalize: bool = elect,
        rescale: Rescale = True,
        lambda_: float = 1.0,
    ) -> Array:
        """`kept`: the elements that chance has kept of each input."""
        deltas, count = [x - base for x in tensors], len(tensors)
        chances = zip(density or [1.0] * count, epsilon or [0.15] * count, strict=True)
        probabilities = [della_probabilities(d, *chance) for d, chance in zip(deltas, chances, strict=True)]
        deltas = [sparse(d, mask, rescale, p) for d, mask, p in zip(deltas, kept, probabilities, strict=True)]
        return combine(deltas, base, weight, elect, normalize, lambda_)

    return della


# Elements chosen by what they say.


def sce(tensors: Sequence[Array], base: Array | None, *, select_topk: float = 1.0) -> Array:
    deltas = [x - base for x in tensors]
    if select_topk < 1:
        variance = np.var(deltas, axis=0)
        count = int(select_topk * np.count_nonzero(variance))
        chosen = _mask(base.size, _ascending(variance)[base.size - count :]).reshape(base.shape)
        deltas = [np.where(chosen, d, 0) for d in deltas]
    weight = [float(np.mean(d * d)) for d in deltas]
    if not any(weight):
        weight = [1.0] * len(deltas)
    sign = np.where(sum(deltas) >= 0, 1, -1)
    agree = [np.sign(d) == sign for d in deltas]
    above = sum(w * np.where(yes, d, 0) for w, yes, d in zip(weight, agree, deltas, strict=True))
    below = sum(w * yes for w, yes in zip(weight, agree, strict=True))
    return base + np.divide(above, below, out=np.zeros_like(base), where=below > 0)


def arcee_fusion(tensors: Sequence[Array], base: Array | None) -> Array:
    (x,) = tensors
    importance = np.abs(_rows(x) - _rows(base))
    for i, (row, base_row) in enumerate(zip(_rows(x), _rows(base), strict=True)):
        p, q = _softmax(row) + 1e-8, _softmax(base_row) + 1e-8
        importance[i] *= np.sum(p * np.log(p / q))
    ordered = np.sort(importance, axis=None)
    low, median, high = (ordered[math.floor(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    kept = importance >= median + 1.5 * (high - low)
    return np.where(kept.reshape(base.shape), x, base)


def _softmax(row: Array) -> Array:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def nearswap(tensors: Sequence[Array], base: Array | None, *, t: float) -> Array:
    """Each element goes to the other model's by at most t."""
    (x,) = tensors
    d = x - base
    return base + np.sign(d) * np.minimum(np.abs(d), t)


def ram(tensors: Sequence[Array], base: Array | None, *, epsilon: float = 1e-5) -> Array:
    return ramplus_tl(tensors, base, epsilon=epsilon, r=0.0, alpha=0.0)


def ramplus_tl(
    tensors: Sequence[Array], base: Array | None, *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Array:
    deltas = [x - base for x in tensors]
    changed = [np.abs(d) > epsilon for d in deltas]
    count = sum(mask.astype(int) for mask in changed)
    merged = np.zeros_like(base)
    for d, mask in zip(deltas, changed, strict=True):
        alone, shared = mask & (count == 1), mask & (count > 1)
        if alone.any():
            merged[alone] += d[alone] * (1 + r * min(alpha, shared.sum() / alone.sum()))
        merged[shared] += d[shared] / count[shared]
    return base + merged


def _named(method: Callable[..., Array]) -> Callable[..., Array]:
    """The method with its lambda under the name that a recipe gives it, a keyword of Python's."""

    def call(tensors: Sequence[Any], base: Any = None, **parameters: Any) -> Array:
        if "lambda" in parameters:
            parameters["lambda_"] = parameters.pop("lambda")
        wide = [np.asarray(x, np.float64) for x in tensors]
        return method(wide, None if base is None else np.asarray(base, np.float64), **parameters)

    return call


REFERENCE: dict[str, Callable[..., Array]] = {
    name: _named(method)
    for name, method in {
        "linear": linear,
        "passthrough": passthrough,
        "slerp": slerp,
        "nuslerp": nuslerp,
        "multislerp": multislerp,
        "karcher": karcher,
        "model_stock": model_stock,
        "task_arithmetic": task_arithmetic,
        "ties": ties,
        "dare_linear": _dare(elect=False),
        "dare_ties": _dare(elect=True),
        "della": _della(elect=True),
        "della_linear": _della(elect=False),
        "breadcrumbs": _breadcrumbs(elect=False),
        "breadcrumbs_ties": _breadcrumbs(elect=True),
        "sce": sce,
        "arcee_fusion": arcee_fusion,
        "nearswap": nearswap,
        "ram": ram,
        "ramplus_tl": ramplus_tl,
        "fisher": fisher,
        "regmean": regmean,
    }.items()
}
