"""Means on the sphere. Each result is a combination of the inputs whose factors follow from their dot products alone.

So one look gives the Gram matrix, in fp64, a few lines of scalar arithmetic the factors, and a second look the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from builder.errors import MergeError
from builder.merge.inputs import Inputs, Piece, Values
from builder.merge.methods.linear import shares

Matrix = NDArray[np.float64]
PARALLEL_SINE = 1e-6
"""nuslerp is lerp below this sine: of opposite vectors a smaller one is rounding, and would be amplified."""
PARALLEL = 0.9995
"""slerp is lerp where the cosine is beyond this, as everywhere in the field."""


def slerp(inputs: Inputs, *, t: float) -> Iterator[Values]:
    """(sin((1-t) th) b + sin(t th) x) / sin th, cos th = cos(b, x) over the flattened tensor; lerp if |cos| > 0.9995.

    Shoemake 1985. Fine-tunes of one base nearly always have a cosine above that: slerp of those is a linear merge.
    """
    (norm_b, dot), (_, norm_x) = inputs.gram(_ends)
    cosine = float(np.clip(_cosine(dot, norm_b, norm_x), -1, 1))
    if abs(cosine) > PARALLEL:
        factors = (1 - t, t)
    else:
        angle = math.acos(cosine)
        factors = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    for piece in inputs.pieces():
        yield inputs.arrays.combine(_ends(piece), factors)


def nuslerp(
    inputs: Inputs, *, weight: Sequence[float], nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Iterator[Values]:
    """slerp of x_1 and x_2, or of their task vectors and then + b, at t = w_2 / (w_1 + w_2); lerp only if parallel.

    nuslerp_flatten: one angle a tensor. Without it one for every row, or, `nuslerp_row_wise`, for every column.
    """
    t = shares(weight)[1]
    if nuslerp_flatten:
        gram = inputs.gram(lambda piece: piece.deltas)
        factors = [float(factor) for factor in _interpolation(gram, t)]
        for piece in inputs.pieces():
            yield _from_base(piece, inputs.arrays.combine(piece.deltas, factors))
    elif nuslerp_row_wise and len(inputs.shape) > 1:
        yield from _by_columns(inputs, t)
    else:
        for piece in inputs.pieces(row=inputs.columns):
            first, second = _interpolation(row_gram(inputs, piece.deltas, piece.rows), t)
            yield _from_base(piece, scaled_rows(inputs, piece, first, 0) + scaled_rows(inputs, piece, second, 1))


def multislerp(
    inputs: Inputs, *, weight: Sequence[float], normalize_weights: bool = True, eps: float = 1e-8
) -> Iterator[Values]:
    """unit(sum w_i u_i) sum w_i |v_i|, u_i = v_i / |v_i|, v_i = x_i, or x_i - b and then + b.

    The method is published as one exponential-map step from that mean (goddard.blog, multislerp); the step's tangent
    vector sum w_i (u_i - (u_i.m) m) vanishes at the mean's own direction m, which leaves this. Raises MergeError where
    more than two directions cancel; two that do are interpolated linearly.
    """
    if len(inputs.sources) == 1:
        for piece in inputs.pieces():
            yield piece.values[0]
        return
    weights = np.array(shares(weight) if normalize_weights else weight, np.float64)
    gram = inputs.gram(lambda piece: piece.deltas)
    norms = np.sqrt(np.diagonal(gram))
    inverse = np.divide(1, norms + eps, out=np.zeros_like(norms), where=norms + eps > 0)
    mean = weights * inverse
    length = math.sqrt(max(float(mean @ gram @ mean), 0.0))
    if length >= max(eps, 1e-15):
        factors = mean / length * float(weights @ norms)
    elif len(weights) == 2 or not norms.any():
        factors = weights
    else:
        raise MergeError(f"the directions of {inputs.name} cancel under these weights: give multislerp other weights")
    for piece in inputs.pieces():
        yield _from_base(piece, inputs.arrays.combine(piece.deltas, factors.tolist()))


def karcher(inputs: Inputs, *, max_iter: int = 10, tol: float = 1e-5) -> Iterator[Values]:
    """The Riemannian mean of the directions, times the mean norm: m <- exp_m(mean_i log_m(u_i)) until a step < tol.

    Karcher 1977; equal weights; a zero tensor has no direction. All of it happens in the span of the inputs.
    """
    gram = inputs.gram(lambda piece: piece.values)
    norms = np.sqrt(np.diagonal(gram))
    factors = np.zeros(len(norms))
    valid = np.flatnonzero(norms > 0)
    if len(valid):
        cosines = gram[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
        factors[valid] = _karcher_mean(cosines, max_iter, tol) / norms[valid] * norms.mean()
    if len(norms) == 1:
        factors[:] = 1
    for piece in inputs.pieces():
        yield inputs.arrays.combine(piece.values, factors.tolist())


def _karcher_mean(cosines: Matrix, max_iter: int, tol: float) -> NDArray[np.float64]:
    """The mean's coordinates over the unit vectors whose dot products these are."""
    n = len(cosines)
    mean = np.full(n, 1 / n)
    length = math.sqrt(max(mean @ cosines @ mean, 0.0))
    mean = np.eye(n)[0] if length < tol else mean / length
    for _ in range(max_iter):
        dots = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(dots)
        pull = np.where(angles < tol, 0, angles / np.where(angles < tol, 1, np.sin(angles)) / n)
        tangent = pull - (pull @ dots) * mean
        step = math.sqrt(max(tangent @ cosines @ tangent, 0.0))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / math.sqrt(mean @ cosines @ mean)
    return mean


def row_gram(inputs: Inputs, vectors: Sequence[Values], rows: int) -> Matrix:
    """Dot products of the rows of n matrices, [n, n, rows], fp64."""
    n = len(vectors)
    gram = np.zeros((n, n, rows))
    for i in range(n):
        for j in range(i, n):
            gram[i, j] = gram[j, i] = inputs.arrays.row_dots(vectors[i], vectors[j], rows)
    return gram


def scaled_rows(inputs: Inputs, piece: Piece, factors: NDArray[np.float64], i: int) -> Values:
    """The piece's d_i, every row times its factor, flat."""
    column = inputs.arrays.device(factors.astype(np.float32)).reshape(-1, 1)
    return (piece.matrix(piece.deltas[i]) * column).reshape(-1)


def _by_columns(inputs: Inputs, t: float) -> Iterator[Values]:
    # Rows are added up one after another, whatever piece they come in.
    columns = inputs.size // inputs.shape[0]
    gram = np.zeros((2, 2, columns))
    for piece in inputs.pieces(row=columns):
        first, second = (inputs.arrays.host(piece.matrix(delta)).astype(np.float64) for delta in piece.deltas)
        for a, b in zip(first, second, strict=True):
            gram += [[a * a, a * b], [a * b, b * b]]
    factors = [inputs.arrays.device(factor.astype(np.float32)) for factor in _interpolation(gram, t)]
    for piece in inputs.pieces(row=columns):
        first, second = (piece.matrix(delta) * factor for delta, factor in zip(piece.deltas, factors, strict=True))
        yield _from_base(piece, (first + second).reshape(-1))


def _interpolation(gram: Matrix, t: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """slerp's two factors from dot products [2, 2, ...]; lerp where the vectors are parallel or zero."""
    cosine = np.clip(_cosine(gram[0, 1], gram[0, 0], gram[1, 1]), -1, 1)
    parallel = 1 - cosine**2 <= PARALLEL_SINE**2
    angle = np.arccos(np.where(parallel, 0, cosine))
    sine = np.sin(angle)
    first = np.where(parallel, 1 - t, np.sin((1 - t) * angle) / sine)
    second = np.where(parallel, t, np.sin(t * angle) / sine)
    return first, second


def _cosine(dot: Matrix | float, square_a: Matrix | float, square_b: Matrix | float) -> Matrix:
    """dot / sqrt(a b); 0 for a zero vector."""
    product = np.sqrt(square_a) * np.sqrt(square_b)
    cosine: Matrix = np.divide(dot, product, out=np.zeros_like(product), where=product > 0)
    return cosine


def _ends(piece: Piece) -> list[Values]:
    return [piece.base, piece.values[0]]


def _from_base(piece: Piece, update: Values) -> Values:
    return update if piece.base is None else piece.base + update
