"""Merges that choose element by element: thresholds, ranks, random masks, elected signs.

Most work on task vectors d_i = x_i - base and share two parts. A choice: which elements of each
task vector stay (`largest`, `random_mask`, `ranked_mask`, `between`). And `consensus`, which
multiplies what stays by the weights, elects a sign if asked, and adds up.

"The k largest" are exactly k elements: of equal magnitudes the one with the lowest flat index comes
first. A share of N elements is int(share * N), computed in F64. Random choices are a function of
seed, tensor name, model index and flat index, so that any tile of a tensor can be made by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonvec.reference.elementary import exp, ln, ln_1p, slope_of_exp
from reasonvec.reference.formats import (
    Dtype,
    Index,
    Mask,
    Work,
    as_f64,
    as_work,
    narrow,
    widen,
    work_of,
)
from reasonvec.reference.linear_merges import normalized, step, tasks
from reasonvec.reference.measures import fixed_dot, in_order
from reasonvec.reference.philox import key64, splitmix64, words

__all__ = [
    "MASK_STREAM",
    "Rescale",
    "arcee_fusion",
    "between",
    "breadcrumbs",
    "cast_weights",
    "consensus",
    "dare",
    "della",
    "della_probabilities",
    "divergences",
    "fixed_sum",
    "largest",
    "magnitude_order",
    "nearswap",
    "quantile",
    "ram",
    "random_mask",
    "rescaled",
    "sce",
    "ties",
]

Rescale: TypeAlias = Literal["none", "density", "l1"]
"""How a random mask is paid back: not at all, by the probability to stay (arXiv 2311.03099), or so
that the sum of magnitudes is what it was (mergekit)."""
MASK_STREAM = 3
TINY = 1e-8
"""A sum of weights smaller than this divides nothing."""


# Choices


def magnitude_order(v: Work) -> Index:
    """The indices [n] by falling magnitude; of equals the lowest index first.

    >>> magnitude_order(np.float32([1, -3, 2, 3]))
    array([1, 3, 2, 0])
    """
    return np.argsort(-np.abs(v), kind="stable").astype(np.int64)


def between(v: Work, first: int, last: int) -> Mask:
    """The elements [n] that stand at first, ..., last - 1 in `magnitude_order`."""
    mask = np.zeros(v.size, np.bool_)
    mask[magnitude_order(v)[first:last]] = True
    return mask


def largest(v: Work, density: float) -> Mask:
    """The int(density * n) largest magnitudes of [n]; all of them from a density of 1.

    >>> largest(np.float32([1, -3, 2, 3]), 0.5)
    array([False,  True, False,  True])
    """
    return between(v, 0, v.size if density >= 1 else int(density * v.size))


def random_mask(
    probability: float | NDArray[np.float64], n: int, seed: int, name: str, model: int
) -> Mask:
    """Elements [n] that stay, each with its probability.

    Element j takes word j % 4 of counter j // 4 under the key of ``seed ^ splitmix64(model + 1)``,
    ``name`` and `MASK_STREAM`. It stays if that word is less than floor(probability * 2^32).
    ``model`` is the place in the recipe, the base not counted.
    """
    key = key64(seed ^ splitmix64(model + 1), name, MASK_STREAM)
    drawn = words(key, np.arange(-(-n // 4), dtype=np.uint64)).ravel()[:n].astype(np.float64)
    bound = np.floor(np.clip(np.asarray(probability), 0.0, 1.0) * 2.0**32)
    return np.asarray(drawn < bound)


def della_probabilities(
    v: Work, columns: int, density: float, epsilon: float
) -> NDArray[np.float64]:
    """The probability to stay [n], by the rank of a magnitude within its row of [rows, columns].

    It falls evenly from density + epsilon for the largest to density - epsilon for the smallest:
    (density + epsilon) - 2 epsilon (rank / (columns - 1)), in F64, within 0 and 1. A row of one has
    the density.

    >>> della_probabilities(np.float32([1, -3, 2]), 3, 0.5, 0.25)
    array([0.25, 0.75, 0.5 ])
    """
    found = np.empty(v.size)
    for start in range(0, v.size, columns):
        row = found[start : start + columns]
        if columns == 1:
            row[:] = density
            continue
        rank = np.arange(columns) / (columns - 1)
        row[magnitude_order(v[start : start + columns])] = (density + epsilon) - (
            2.0 * epsilon
        ) * rank
    return np.clip(found, 0.0, 1.0)


# What most of them share


def fixed_sum(v: Work) -> float:
    """The sum of [n] in the order of `fixed_dot`."""
    return fixed_dot(v, np.ones_like(v))


def cast_weights(weights: Sequence[float], dtype: Dtype) -> list[float]:
    """The weights rounded to the working format of the recipe: a quirk of mergekit.

    >>> cast_weights([0.3], "BF16")
    [0.30078125]
    """
    return [float(x) for x in widen(narrow(np.array(weights), dtype), dtype, "F64")]


def rescaled(d: Work, stays: Mask, density: float, rescale: Rescale) -> float:
    """What pays a task vector back for what its random mask took: a factor, in F64.

    1 / density, or the sum of all magnitudes over the sum of those that stay (1 if it is zero).
    """
    if rescale == "none" or density == 0:
        return 1.0
    if rescale == "density":
        return 1.0 / density
    size = np.abs(d)
    left = fixed_sum(as_work(np.where(stays, size, 0), work_of(d)))
    return fixed_sum(size) / left if left > 0.0 else 1.0


def consensus(
    vectors: Sequence[Work],
    stays: Sequence[Mask],
    weights: Sequence[float],
    scales: Sequence[float],
    elect: bool,
    normalize: bool,
    lambda_: float = 1.0,
    steps: Dtype | None = None,
) -> Work:
    """The weighted sum of what stays of each vector [n], after the election of a sign.

    W_i = c_i * d_i where element j stays, else 0, with c_i = w_i * scale_i (F64, rounded to W).
    With ``elect``: s = W_1 + W_2 + ..., the sign is + if s >= 0, else -, and only those W_i != 0
    with that sign count. num = the sum of those that count, in order. With ``normalize``: over
    den = the sum of w_i (rounded to W, in order) of those that count, or of all weights (F64, then
    rounded) without an election; where abs(den) < 1e-8 the divisor is 1. u = lambda * (num / den).
    (arXiv 2306.01708.) With ``steps``, every W_i, num, den, the quotient and u are rounded to that
    format, as mergekit does in 16 bits; the sums only when they are complete.
    """
    work = work_of(vectors[0])
    zero = np.zeros_like(vectors[0])
    with np.errstate(all="ignore"):
        parts = [
            step(np.where(stay, as_work(np.asarray(w * scale), work) * d, zero), steps)
            for d, stay, w, scale in zip(vectors, stays, weights, scales, strict=True)
        ]
        num, den = zero, zero
        if elect:
            total = zero
            for part in parts:
                total = total + part
            positive = total >= 0
            for part, w in zip(parts, weights, strict=True):
                counts = np.where(positive, part > 0, part < 0)
                num = np.where(counts, num + part, num)
                den = np.where(counts, den + as_work(np.asarray(w), work), den)
        else:
            for part in parts:
                num = num + part
            den = den + as_work(np.asarray(in_order(weights)), work)
        num, den = step(num, steps), step(den, steps)
        if normalize:
            num = step(num / np.where(np.abs(den) < TINY, np.ones_like(den), den), steps)
        return step(as_work(as_work(np.asarray(lambda_), work) * num, work), steps)


def ties(
    models: Sequence[Work],
    base: Work,
    weights: Sequence[float],
    density: Sequence[float],
    normalize: bool = True,
    lambda_: float = 1.0,
    steps: Dtype | None = None,
) -> Work:
    """Trim, elect signs, add what agrees (arXiv 2306.01708).

    Each task vector keeps its int(density_i * n) largest magnitudes; then `consensus`.

    >>> models = [np.float32([4, 1, -2]), np.float32([2, -3, 1])]
    >>> ties(models, np.zeros(3, np.float32), [1.0, 1.0], [0.7, 0.7])
    array([ 3., -3., -2.], dtype=float32)
    """
    vectors = tasks(models, base, steps)
    stays = [largest(d, share) for d, share in zip(vectors, density, strict=True)]
    ones = [1.0] * len(vectors)
    return consensus(vectors, stays, weights, ones, True, normalize, lambda_, steps)


def dare(
    models: Sequence[Work],
    base: Work,
    weights: Sequence[float],
    density: Sequence[float],
    seed: int,
    name: str,
    elect: bool,
    normalize: bool = False,
    rescale: Rescale = "density",
    lambda_: float = 1.0,
    steps: Dtype | None = None,
) -> Work:
    """Drop elements at random and rescale the rest (arXiv 2311.03099); then add.

    ``elect`` is dare_ties, without it dare_linear. ``name`` is the tensor's. A density of 1 or more
    keeps everything and scales nothing.
    """
    vectors = tasks(models, base, steps)
    stays, scales = [], []
    for i, (d, share) in enumerate(zip(vectors, density, strict=True)):
        stays.append(random_mask(share, d.size, seed, name, i))
        scales.append(1.0 if share >= 1 else rescaled(d, stays[i], share, rescale))
    return consensus(vectors, stays, weights, scales, elect, normalize, lambda_, steps)


def della(
    models: Sequence[Work],
    base: Work,
    weights: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    seed: int,
    name: str,
    columns: int,
    elect: bool,
    normalize: bool,
    rescale: Rescale = "density",
    lambda_: float = 1.0,
    steps: Dtype | None = None,
) -> Work:
    """Drop elements at random, small ones more often, and rescale (arXiv 2406.11617).

    Probabilities as in `della_probabilities`. With rescale "density" every element is divided, in
    W, by its own probability (rounded to W); that comes before the weight. ``elect`` is della,
    without it della_linear. A density of 1 or more keeps everything and scales nothing.
    """
    vectors = tasks(models, base, steps)
    work = work_of(base)
    stays, scales, paid = [], [], []
    for i, (d, share, spread) in enumerate(zip(vectors, density, epsilon, strict=True)):
        if share >= 1:
            stays.append(np.ones(d.size, np.bool_))
            scales.append(1.0)
            paid.append(d)
            continue
        probability = della_probabilities(d, columns, share, spread)
        stays.append(random_mask(probability, d.size, seed, name, i))
        scales.append(rescaled(d, stays[i], share, "l1") if rescale == "l1" else 1.0)
        with np.errstate(all="ignore"):
            own = as_work(d / as_work(probability, work), work)
        paid.append(np.where(stays[i], own, d) if rescale == "density" else d)
    return consensus(paid, stays, weights, scales, elect, normalize, lambda_, steps)


def breadcrumbs(
    models: Sequence[Work],
    base: Work,
    weights: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    elect: bool,
    normalize: bool = False,
    lambda_: float = 1.0,
    steps: Dtype | None = None,
) -> Work:
    """Drop the largest and the smallest elements (arXiv 2312.06795); then add.

    In `magnitude_order`, the first top = min(int(gamma_i * n), n - k) of n elements go, the next
    k = int(density_i * n) stay, the others go. ``elect`` is breadcrumbs_ties.
    """
    vectors = tasks(models, base, steps)
    stays = []
    for d, share, most in zip(vectors, density, gamma, strict=True):
        k = d.size if share >= 1 else int(share * d.size)
        top = min(int(most * d.size), d.size - k)
        stays.append(between(d, top, top + k))
    ones = [1.0] * len(vectors)
    return consensus(vectors, stays, weights, ones, elect, normalize, lambda_, steps)


def sce(
    models: Sequence[Work],
    base: Work,
    select_topk: float = 1.0,
    lambda_: float = 1.0,
    floor: float = 0.0,
) -> Work:
    """Select, calculate, erase (arXiv 2408.07990).

    Select: of the elements whose spread over the models is not zero, the int(select_topk * their
    number) largest; the spread is sum_i (d_i - mean)^2 with mean = sum_i d_i / count, all in W, in
    order. From a select_topk of 1 on, every element. Calculate: w_i = the sum of d_i^2 over the
    selected elements, divided by the sum of those sums (F64); all weigh the same where that sum is
    less than ``floor`` times the number of elements (1e-6 in mergekit). Erase: the sign is + if the
    sum of the d_i, in order, is >= 0, else -, and only the d_i != 0 with that sign count; their
    weighted mean as in `consensus`, with ``normalize``.
    """
    vectors = tasks(models, base)
    work = work_of(base)
    zero = np.zeros_like(base)
    with np.errstate(all="ignore"):
        total = zero
        for d in vectors:
            total = total + d
        mean = total / as_work(np.asarray(len(vectors)), work)
        spread = zero
        for d in vectors:
            off = d - mean
            spread = spread + off * off
    if select_topk >= 1:
        selected = np.ones(base.size, np.bool_)
    else:
        selected = between(spread, 0, int(select_topk * np.count_nonzero(spread)))
    energy = []
    for d in vectors:
        chosen = as_work(np.where(selected, d, zero), work)
        energy.append(fixed_dot(chosen, chosen))
    if in_order(energy) == 0:
        return zero
    equal = in_order(energy) < floor * base.size
    weights = [1.0 / len(vectors)] * len(vectors) if equal else normalized(energy)
    positive = total >= 0
    stays = [selected & np.where(positive, d > 0, d < 0) for d in vectors]
    return consensus(vectors, stays, weights, [1.0] * len(vectors), True, True, lambda_)


def ram(
    models: Sequence[Work],
    base: Work,
    plus: bool = False,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
) -> Work:
    """What one model moved stays whole, what several moved is averaged (arXiv 2601.13572).

    An element is moved by model i if abs(d_i) > epsilon (both in W). u = sum of the moved d_i, in
    order, over the number that moved it. With ``plus``, the element that only model i moved is
    multiplied by 1 + r * clip(shared_i / unique_i, 0, alpha) (F64, rounded to W), where shared_i
    and unique_i count the elements of the tensor that i moved with others and alone (alpha if
    unique_i is 0).
    """
    vectors = tasks(models, base)
    work = work_of(base)
    bound = as_work(np.asarray(epsilon), work)
    moved = [np.abs(d) > bound for d in vectors]
    count = np.sum(moved, axis=0)
    u = np.zeros_like(base)
    with np.errstate(all="ignore"):
        for d, mine in zip(vectors, moved, strict=True):
            alone = int(np.count_nonzero(mine & (count == 1)))
            shared = int(np.count_nonzero(mine)) - alone
            ratio = shared / alone if alone else alpha
            factor = 1.0 + r * min(max(ratio, 0.0), alpha) if plus else 1.0
            scale = np.where(count == 1, as_work(np.asarray(factor), work), np.ones_like(base))
            u = np.where(mine, u + scale * d, u)
        return as_work(u / as_work(np.maximum(count, 1), work), work)


def nearswap(a: Work, b: Work, t: float) -> Work:
    """The model a moved towards b by at most t in every element: a + clip(b - a, -t, t).

    The same as weight * b + (1 - weight) * a with weight = clip(t / abs(a - b), 0, 1). In W: b
    itself where abs(b - a) <= t, else a + t or a - t. (Alchemonaut, "NearSwap", 2024; no paper.)

    >>> nearswap(np.float32([1, 1, 1]), np.float32([1.25, 2, 0]), 0.5)
    array([1.25, 1.5 , 0.5 ], dtype=float32)
    """
    bound = as_work(np.asarray(t), work_of(a))
    with np.errstate(all="ignore"):
        d = b - a
        return np.where(np.abs(d) <= bound, b, a + np.copysign(bound, d))


def divergences(a: Work, b: Work, columns: int) -> NDArray[np.float64]:
    """KL(softmax(b) || softmax(a)) of every row [rows] of [rows, columns], in F64, at least 0.

    With the row's largest elements m_a and m_b and the weights e_b = exp(b - m_b):
    sum(e_b (b - a)) / sum(e_b) - ((m_b - m_a) + (ln sum(e_b) - ln sum(e_a))). Where all of
    d = b - a is below 1/64, that is a small difference of large numbers, and it is
    sum((e_a + g) d) / (sum(e_a) + sum(g)) - ln(1 + sum(g) / sum(e_a)) with g = e_a (exp d - 1).
    Sums as in `fixed_dot`, starting anew in each row; exp and ln are those of `elementary`.
    """
    found = []
    for start in range(0, a.size, columns):
        row_a, row_b = a[start : start + columns], b[start : start + columns]
        x, y = as_f64(row_a), as_f64(row_b)
        d = y - x
        e_x = exp(x - float(x.max()))
        if np.abs(row_b - row_a).max() < 1 / 64:
            g = e_x * (d * slope_of_exp(d))
            z, change = fixed_sum(e_x), fixed_sum(g)
            mean = fixed_sum((e_x + g) * d) / (z + change)
            shift = float(ln_1p(np.array([change / z]))[0])
        else:
            m_x, m_y = float(x.max()), float(y.max())
            e_y = exp(y - m_y)
            z_x, z_y = fixed_sum(e_x), fixed_sum(e_y)
            ln_x, ln_y = ln(np.array([z_x, z_y])).tolist()
            mean = fixed_dot(e_y, d) / z_y
            shift = (m_y - m_x) + (ln_y - ln_x)
        found.append(max(mean - shift, 0.0))
    return np.array(found)


def quantile(ordered: Work, q: float) -> float:
    """The q-quantile of ascending values [n], linear between neighbours, in F64.

    At p = q (n - 1): x + (p - floor p) (y - x), x and y being the values at floor p and after it.
    """
    p = q * (ordered.size - 1)
    low = int(p)
    x = float(ordered[low])
    y = float(ordered[min(low + 1, ordered.size - 1)])
    return x + (p - low) * (y - x)


def arcee_fusion(model: Work, base: Work, columns: int) -> Work:
    """The elements of the task vector that matter most (Arcee, "Arcee Fusion", 2024; no paper).

    Importance is abs(d) times the row's divergence (F64, rounded to W). An element stays if it is
    at least median + 1.5 (third quartile - first quartile) of the importances of the tensor.
    """
    d = tasks([model], base)[0]
    weight = np.repeat(divergences(base, model, columns), columns)
    importance = as_work(as_f64(np.abs(d)) * weight, work_of(base))
    ordered = importance[np.argsort(importance)]
    first, median, third = (quantile(ordered, q) for q in (0.25, 0.5, 0.75))
    stays = as_f64(importance) >= median + 1.5 * (third - first)
    return as_work(np.where(stays, d, 0), work_of(base))
