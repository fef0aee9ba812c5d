"""Merges whose coefficients come from the products of the models with each other.

Each is: the Gram matrix of the inputs, summed in the fixed order; coefficients solved from it in
F64 with the sine, cosine and arc functions of the C library; one sum with these coefficients. So a
tensor of any size needs two passes and a handful of numbers. Even the iteration of `karcher` is on
coefficients: a mean of n models is always a combination of them.

The inputs are models, or task vectors if there is a base. Per row, every row of a tensor
[rows, columns] is a vector of its own, with its own Gram matrix, whose sums start anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from reasonvec.reference.formats import Work, as_f64, work_of
from reasonvec.reference.linear_merges import normalized, tasks
from reasonvec.reference.measures import fixed_dot, in_order
from reasonvec.reference.update import combine

__all__ = [
    "Gram",
    "by_columns",
    "by_rows",
    "gram",
    "gram_columns",
    "karcher",
    "karcher_coefficients",
    "model_stock",
    "model_stock_coefficients",
    "multislerp",
    "multislerp_coefficients",
    "nuslerp",
    "nuslerp_coefficients",
    "slerp",
    "slerp_coefficients",
]

Gram: TypeAlias = list[list[float]]
"""[k, k] sums of x_i * x_j, symmetric."""
SLERP_LINE = 0.9995
"""`slerp` takes vectors with a cosine beyond this, of either sign, for parallel."""
NUSLERP_LINE = 1.0 - 1e-9
"""`nuslerp` has a finer cut: there the sine is 4e-5, and both formulas give the same F32."""


def gram(vectors: Sequence[Work]) -> Gram:
    """The sums of products of vectors [n], each as in `fixed_dot`.

    >>> gram([np.float32([1, 2]), np.float32([0, 1])])
    [[5.0, 2.0], [2.0, 1.0]]
    """
    return [[fixed_dot(a, b) for b in vectors] for a in vectors]


def gram_columns(vectors: Sequence[Work], columns: int) -> list[Gram]:
    """The Gram matrix of every column of [rows, columns].

    Products are made and added in F64, row after row.
    """
    sums = np.zeros((columns, len(vectors), len(vectors)))
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            for row in (as_f64(a) * as_f64(b)).reshape(-1, columns):
                sums[:, i, j] += row
    return [[[float(x) for x in line] for line in matrix] for matrix in sums]


def by_rows(
    vectors: Sequence[Work], columns: int, solve: Callable[[Gram], Sequence[float]]
) -> Work:
    """Each row of [rows, columns] combined with coefficients solved from its own products."""
    work = work_of(vectors[0])
    rows = [[v[i : i + columns] for v in vectors] for i in range(0, vectors[0].size, columns)]
    return np.concatenate([combine(row, solve(gram(row)), work) for row in rows])


def by_columns(
    vectors: Sequence[Work], columns: int, solve: Callable[[Gram], Sequence[float]]
) -> Work:
    """Each column of [rows, columns] combined with coefficients solved from its own products."""
    out = np.empty_like(vectors[0])
    for column, products in enumerate(gram_columns(vectors, columns)):
        parts = [v[column::columns] for v in vectors]
        out[column::columns] = combine(parts, solve(products), work_of(vectors[0]))
    return out


def _cosine(products: Gram, i: int, j: int, floor: float = 0.0) -> float:
    # Square roots apart, so that their product does not overflow.
    scale = max(math.sqrt(products[i][i]) * math.sqrt(products[j][j]), floor)
    return max(-1.0, min(1.0, products[i][j] / scale)) if scale else 0.0


def slerp_coefficients(products: Gram, t: float, line: float = SLERP_LINE) -> list[float]:
    """The coefficients of a and b: sin((1-t) q) / sin q and sin(t q) / sin q, q their angle.

    1 - t and t if abs(cos q) > ``line``. A zero vector is at right angles to everything.

    >>> slerp_coefficients([[1.0, 1.0], [1.0, 1.0]], 0.25)
    [0.75, 0.25]
    """
    cosine = _cosine(products, 0, 1)
    if abs(cosine) > line:
        return [1.0 - t, t]
    q = math.acos(cosine)
    return [math.sin((1.0 - t) * q) / math.sin(q), math.sin(t * q) / math.sin(q)]


def slerp(a: Work, b: Work, t: float) -> Work:
    """Spherical interpolation of two models, flat (Shoemake, "Animating rotation", SIGGRAPH 1985).

    >>> slerp(np.float32([2, 0]), np.float32([0, 1]), 0.5)
    array([1.4142135 , 0.70710677], dtype=float32)
    """
    return combine([a, b], slerp_coefficients(gram([a, b]), t), work_of(a))


def nuslerp_coefficients(products: Gram, weights: Sequence[float]) -> list[float]:
    """Those of `slerp` at t = w_2 / (w_1 + w_2), with the finer cut.

    ValueError if the weights add up to zero.
    """
    return slerp_coefficients(products, normalized(weights)[1], NUSLERP_LINE)


def nuslerp(
    models: Sequence[Work],
    weights: Sequence[float],
    columns: int,
    base: Work | None = None,
    flatten: bool = True,
    row_wise: bool = False,
) -> Work:
    """Spherical interpolation of two models, or of their task vectors over a base.

    Flat, or for every row or every column of [rows, columns] by itself. (Goddard et al.,
    "NuSLERP", mergekit 2024; no paper.)

    >>> nuslerp([np.float32([2, 0]), np.float32([0, 1])], [1.0, 1.0], columns=2)
    array([1.4142135 , 0.70710677], dtype=float32)
    """
    vectors = models if base is None else tasks(models, base)

    def solve(products: Gram) -> list[float]:
        return nuslerp_coefficients(products, weights)

    if flatten or vectors[0].size == columns:
        return combine(vectors, solve(gram(vectors)), work_of(vectors[0]))
    return (by_rows if row_wise else by_columns)(vectors, columns, solve)


def _times(products: Gram, coefs: Sequence[float]) -> list[float]:
    # The products of every vector with the combination.
    return [in_order([g * c for g, c in zip(row, coefs, strict=True)]) for row in products]


def _length(products: Gram, coefs: Sequence[float]) -> float:
    square = in_order([c * p for c, p in zip(coefs, _times(products, coefs), strict=True)])
    return math.sqrt(max(square, 0.0))


def _directions(products: Gram) -> Gram:
    # The products of the unit vectors: cosines, and 1 on the diagonal.
    n = range(len(products))
    return [[1.0 if i == j else _cosine(products, i, j) for j in n] for i in n]


def multislerp_coefficients(
    products: Gram, weights: Sequence[float], normalize_weights: bool = True, eps: float = 1e-8
) -> list[float]:
    """The weighted mean of the unit vectors v_i = x_i / |x_i|, to the length sum(w_i |x_i|).

    The mean of points projected onto the tangent plane at sum(w_i v_i) is the point of contact,
    so no step along the sphere follows (`karcher` takes them). Zero vectors have no direction.
    Where |sum(w_i v_i)| <= eps there is no mean, and the coefficients are the weights.
    """
    found = normalized(weights) if normalize_weights else list(weights)
    norms = [math.sqrt(products[i][i]) for i in range(len(products))]
    pull = [w if norm > 0.0 else 0.0 for w, norm in zip(found, norms, strict=True)]
    length = _length(_directions(products), pull)
    if length <= eps:
        return found
    scale = in_order([w * norm for w, norm in zip(found, norms, strict=True)]) / length
    return [scale * w / norm if norm > 0.0 else 0.0 for w, norm in zip(pull, norms, strict=True)]


def multislerp(
    models: Sequence[Work],
    weights: Sequence[float],
    base: Work | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Work:
    """The weighted mean direction of models, or of their task vectors over a base, at mean length.

    (A method of mergekit, without a paper.)

    >>> multislerp([np.float32([2, 0]), np.float32([0, 1])], [1.0, 1.0])
    array([1.0606601, 1.0606601], dtype=float32)
    """
    vectors = models if base is None else tasks(models, base)
    coefs = multislerp_coefficients(gram(vectors), weights, normalize_weights, eps)
    return combine(vectors, coefs, work_of(vectors[0]))


def _step(
    cosines: Gram, mean: Sequence[float], weights: Sequence[float]
) -> tuple[list[float], float]:
    # The weighted sum of the logarithms of the unit vectors at the mean, and its length: each
    # logarithm is q / sin q (v_i - cos q m), q being the angle from the mean m to v_i.
    tangent = [0.0] * len(mean)
    for i, product in enumerate(_times(cosines, mean)):
        cosine = max(-1.0, min(1.0, product))
        q = math.acos(cosine)
        sine = math.sqrt(1.0 - cosine * cosine)
        pull = weights[i] * (q / sine if sine > 0.0 else 1.0)
        tangent[i] += pull
        tangent = [x - pull * cosine * m for x, m in zip(tangent, mean, strict=True)]
    return tangent, _length(cosines, tangent)


def _walk(mean: Sequence[float], tangent: Sequence[float], length: float) -> list[float]:
    # The exponential: from the mean along the tangent, as far as it is long.
    ahead = math.sin(length) / length if length > 0.0 else 1.0
    cosine = math.cos(length)
    return [cosine * m + ahead * x for m, x in zip(mean, tangent, strict=True)]


def karcher_coefficients(products: Gram, max_iter: int = 10, tol: float = 1e-5) -> list[float]:
    """The Riemannian mean of the unit vectors, times the mean of the norms.

    From m = the sum of the units v_i to unit length: walk along the mean of the logarithms of
    v_i at m, make the length 1 again, until a step is shorter than ``tol`` or ``max_iter`` steps
    are done. Zero vectors count in the mean of the norms only. Where the mean of the units is not
    longer than 1e-6 it has no direction that means anything, and m starts at the first of them.
    """
    norms = [math.sqrt(products[i][i]) for i in range(len(products))]
    count = sum(norm > 0.0 for norm in norms)
    if not count:
        return [0.0] * len(norms)
    cosines = _directions(products)
    weights = [1.0 / count if norm > 0.0 else 0.0 for norm in norms]
    length = _length(cosines, weights)
    if length > 1e-6:
        mean = [w / length for w in weights]
    else:
        first = next(i for i, norm in enumerate(norms) if norm > 0.0)
        mean = [1.0 if i == first else 0.0 for i in range(len(norms))]
    for _ in range(max_iter):
        tangent, length = _step(cosines, mean, weights)
        if length < tol:
            break
        mean = _walk(mean, tangent, length)
        length = _length(cosines, mean)
        mean = [c / length for c in mean]
    scale = in_order(norms) / len(norms)
    return [scale * c / norm if norm > 0.0 else 0.0 for c, norm in zip(mean, norms, strict=True)]


def karcher(models: Sequence[Work], max_iter: int = 10, tol: float = 1e-5) -> Work:
    """The Riemannian (Karcher) mean of models, equal weights, flat.

    (Karcher, "Riemannian center of mass and mollifier smoothing", CPAM 1977.)

    >>> karcher([np.float32([2, 0]), np.float32([0, 1])])
    array([1.0606601, 1.0606601], dtype=float32)
    """
    return combine(models, karcher_coefficients(gram(models), max_iter, tol), work_of(models[0]))


def model_stock_coefficients(products: Gram, floor: float = 0.0) -> list[float]:
    """t / n for every task vector: t = n c / (1 + (n - 1) c), c their mean pairwise cosine.

    Pairs are added with the first index slower. One task vector: t = 1. Where 1 + (n - 1) c is not
    above 1e-8 the task vectors cancel each other: t = 0. A product of two norms counts as ``floor``
    at least (1e-6 in mergekit).

    >>> model_stock_coefficients([[1.0, 0.5], [0.5, 1.0]])
    [0.3333333333333333, 0.3333333333333333]
    """
    n = len(products)
    pairs = [_cosine(products, i, j, floor) for i in range(n) for j in range(i + 1, n)]
    c = in_order(pairs) / len(pairs) if pairs else 1.0
    apart = 1.0 + (n - 1) * c
    t = n * c / apart if apart > 1e-8 else 0.0
    return [t / n] * n


def model_stock(
    models: Sequence[Work],
    base: Work,
    columns: int,
    filter_wise: bool = False,
    floor: float = 0.0,
) -> Work:
    """t (mean(x_i) - base): as far towards the mean as the angles say (arXiv 2403.19522).

    For a tensor as a whole, or ``filter_wise`` for every row of [rows, columns].
    """
    vectors = tasks(models, base)
    solve = partial(model_stock_coefficients, floor=floor)
    if filter_wise:
        return by_rows(vectors, columns, solve)
    return combine(vectors, solve(gram(vectors)), work_of(base))
