"""Merges by singular vectors, as the papers have them: plain SVDs of whole matrices.

``d`` are task vectors of one matrix [m, n], ``w`` their weights; every function gives the update of
the base, in F64. The core finds the same from Gram matrices without holding the task vectors, so it
agrees with this closely, and not bit by bit.

Singular values below `CUT` of the first count as zero: what direction they have is rounding's. A
plain SVD gives them one all the same, and a method that raises every value raises that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CUT",
    "boost",
    "iso_c",
    "iso_cts",
    "knots",
    "nearest_orthonormal",
    "spectral_sum",
    "star",
    "svd",
    "tsv_m",
]

Array: TypeAlias = NDArray[np.float64]
CUT = 1e-6


def svd(a: Array, norm: float = 0.0) -> tuple[Array, Array, Array]:
    """U, S and V^T of a matrix, without the values that are zero; of what is left of a matrix of a
    norm, also without those that are small beside that.

    >>> svd(np.outer([3.0, 4.0], [1.0, 0.0]))[1]
    array([5.])
    """
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    kept = int((s > CUT * max(s[0], norm)).sum()) if s.size else 0
    return u[:, :kept], s[:kept], vt[:kept]


def spectral_sum(d: Sequence[Array], w: Sequence[float]) -> Array:
    """The weighted sum of the task vectors."""
    total: Array = np.einsum("i,imn->mn", np.asarray(w, np.float64), np.asarray(d, np.float64))
    return total


def nearest_orthonormal(a: Array) -> Array:
    """The matrix with orthonormal columns that is nearest to ``a`` (Procrustes): ``P Q^T`` of
    ``a = P D Q^T``."""
    u, _, vt = svd(a)
    nearest: Array = u @ vt
    return nearest


def _first(a: Array, r: int, norm: float = 0.0) -> tuple[Array, Array, Array]:
    """The first ``r`` triplets, zeros where there are none."""
    u, s, vt = svd(a, norm)
    more = max(0, r - s.size)
    u = np.pad(u[:, :r], ((0, 0), (0, more)))
    return u, np.pad(s[:r], (0, more)), np.pad(vt[:r], ((0, more), (0, 0)))


def iso_c(d: Sequence[Array], w: Sequence[float], scale: float = 1.0) -> Array:
    """The sum of the task vectors with all singular values set to their mean (Iso-C, arXiv
    2502.04959, section 4)."""
    u, s, vt = svd(spectral_sum(d, w))
    mean = s.sum() / min(d[0].shape)
    update: Array = scale * mean * (u @ vt)
    return update


def iso_cts(
    d: Sequence[Array], w: Sequence[float], common: float = 0.8, scale: float = 1.0
) -> Array:
    """Iso-C whose last directions give way to directions of each task that are orthogonal to the
    others (Iso-CTS, arXiv 2502.04959, section 4): the first ``k`` of the sum, then the first of
    each task vector less its part in those; both sides made orthonormal."""
    size, tasks = min(d[0].shape), len(d)
    each = round((size - int(size * common)) / tasks)
    while each * tasks > size:
        each -= 1
    u, s, vt = _first(spectral_sum(d, w), size - each * tasks)
    scaled = [c * x for c, x in zip(w, d, strict=True)]
    own = [_first(x - u @ (u.T @ x), each, float(np.linalg.norm(x))) for x in scaled]
    left = nearest_orthonormal(np.concatenate([*(t[0] for t in own), u], axis=1))
    right = nearest_orthonormal(np.concatenate([*(t[2] for t in own), vt]).T).T
    mean = (sum(float(t[1].sum()) for t in own) + float(s.sum())) / size
    update: Array = scale * mean * (left @ right)
    return update


def tsv_m(
    d: Sequence[Array], w: Sequence[float], rank: float | None = None, scale: float = 1.0
) -> Array:
    """The first singular vectors of every task, a share ``rank`` (1 / tasks) of them each, side by
    side, each side made orthonormal, with the singular values that they had (TSV-Merge, arXiv
    2412.00081)."""
    size, tasks = min(d[0].shape), len(d)
    r = min(max(1, int(size * (1 / tasks if rank is None else rank) + 1e-9)), max(1, size // tasks))
    parts = [_first(c * x, r) for c, x in zip(w, d, strict=True)]
    left = nearest_orthonormal(np.concatenate([u for u, _, _ in parts], axis=1))
    right = nearest_orthonormal(np.concatenate([vt for _, _, vt in parts]).T).T
    update: Array = scale * (left * np.concatenate([s for _, s, _ in parts])) @ right
    return update


def star(
    d: Sequence[Array],
    w: Sequence[float],
    eta: float = 0.4,
    rank: int | None = None,
    scale: float = 1.0,
) -> Array:
    """Every task vector cut to the first singular values that make up more than ``eta`` of their
    sum, and rescaled so that their sum is what it was; then added (STAR, arXiv 2502.10339)."""
    total = np.zeros(d[0].shape)
    for c, x in zip(w, d, strict=True):
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        r = int(np.searchsorted(s.cumsum(), eta * s.sum())) + 1 if rank is None else rank
        r = min(r, svd(x)[1].size)
        if r:
            total += c * s.sum() / s[:r].sum() * (u[:, :r] * s[:r]) @ vt[:r]
    return scale * total


def boost(d: Sequence[Array], w: Sequence[float], beta: float = 0.01, scale: float = 1.0) -> Array:
    """The sum of the task vectors with small singular values raised to the one at which the sum of
    the values so far reaches ``beta`` of their sum (subspace boosting, arXiv 2506.16506)."""
    u, s, vt = svd(spectral_sum(d, w))
    if not s.size:
        return np.zeros(d[0].shape)
    floor = s[min(int(np.argmax(s.cumsum() >= beta * s.sum())), s.size - 1)]
    update: Array = scale * (u * np.maximum(s, floor)) @ vt
    return update


def knots(
    d: Sequence[Array],
    w: Sequence[float],
    density: Sequence[float],
    elect: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
) -> Array:
    """The task vectors side by side are ``U S [V_1 | ... | V_n]^T``; the parts ``S V_i^T``, which
    have one basis, are merged element by element as TIES does (trimmed to a share of the largest,
    then those that agree with the elected sign), and the result gets its basis back (KnOTS, arXiv
    2410.19735)."""
    u, s, vt = svd(np.concatenate(d, axis=1))
    parts = []
    for c, share, y in zip(w, density, np.split(s[:, None] * vt, len(d), axis=1), strict=True):
        keep = int(share * y.size)
        order = np.argsort(-np.abs(y), axis=None, kind="stable")[:keep]
        trimmed = np.zeros(y.size)
        trimmed[order] = y.ravel()[order]
        parts.append(c * trimmed.reshape(y.shape))
    positive = np.sum(parts, axis=0) >= 0
    counts = [np.where(positive, y > 0, y < 0) if elect else np.ones(y.shape) for y in parts]
    total = np.sum([y * m for y, m in zip(parts, counts, strict=True)], axis=0)
    by = np.sum([c * m for c, m in zip(w, counts, strict=True)], axis=0)
    merged = total / np.where(np.abs(by) < 1e-8, 1.0, by) if normalize else total
    update: Array = scale * (u @ merged)
    return update
