"""The vector between two checkpoints, and the update of a third: target + sum of c_k * v_k (arXiv
2509.01363), rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reasonvec.reference.formats import (
    Bits,
    Dtype,
    Index,
    Work,
    WorkDtype,
    as_f64,
    as_work,
    narrow,
    widen,
    work_dtype,
    work_of,
)

__all__ = [
    "NOT_WIDE",
    "Extracted",
    "Wide",
    "combine",
    "combine_wide",
    "difference",
    "extract",
    "finish",
]


class Wide(NamedTuple):
    """Elements of a vector whose F32 value needs a second, small part: v = hi + lo."""

    at: Index
    """[w] flat indices, ascending."""
    lo: NDArray[np.float64]
    """[w] what the F32 value at that index leaves out."""


NOT_WIDE = Wide(np.empty(0, np.int64), np.empty(0, np.float64))


def difference(p: Bits, p_dtype: Dtype, n: Bits, n_dtype: Dtype, work: WorkDtype) -> Work:
    """The vector p - n of bit patterns [n] and [n]: widened exactly, subtracted in ``work``."""
    with np.errstate(all="ignore"):
        return as_work(widen(p, p_dtype, work) - widen(n, n_dtype, work), work)


def combine(terms: Sequence[Work], coefs: Sequence[float], work: WorkDtype) -> Work:
    """The update [n]: c_1 * v_1 + c_2 * v_2 + ..., left to right, every operation in ``work``.

    Coefficients are rounded to ``work`` first. Multiply and add are two roundings: a fused one
    would give other bits on the processors that have it.
    """
    if len(terms) != len(coefs) or not terms:
        raise ValueError(f"{len(terms)} terms and {len(coefs)} coefficients: give one for each")
    with np.errstate(all="ignore"):
        scaled = [
            as_work(v, work) * as_work(np.asarray(c), work)
            for v, c in zip(terms, coefs, strict=True)
        ]
        update = scaled[0]
        for term in scaled[1:]:
            update = update + term
    return update


def combine_wide(wides: Sequence[Wide], coefs: Sequence[float]) -> Wide:
    """The second parts of an update: the F64 sum of c_k * lo_k wherever a term lists one.

    Coefficients are not rounded first, unlike in ``combine``. The order is that of the terms.
    """
    at = np.unique(np.concatenate([wide.at for wide in wides]))
    lo = np.full(at.size, -0.0)  # not +0.0, which would take the sign from a lo of -0.0
    for wide, c in zip(wides, coefs, strict=True):
        lo[np.searchsorted(at, wide.at)] += c * wide.lo
    return Wide(at, lo)


def finish(t: Bits, t_dtype: Dtype, u: Work, out_dtype: Dtype, wide: Wide = NOT_WIDE) -> Bits:
    """The output [n]: target plus update, rounded once into ``out_dtype``.

    An element whose update is zero, of either sign, is not arithmetic: it keeps the target's bits,
    so that -0.0 stays -0.0, and a vector that stores its zeros gives the same bytes as one that
    leaves them out. Where ``out_dtype`` is not ``t_dtype`` the target is converted instead.

    An element in ``wide`` is summed in F64, ``lo`` last, and rounded from
    there straight to ``out_dtype``. If that sum is zero it has the sign of ``lo``.

    >>> minus_zero = np.array([0x8000], np.uint16)
    >>> hex(finish(minus_zero, "BF16", np.zeros(1, np.float32), "BF16")[0])
    '0x8000'
    """
    work = work_of(u)
    kept = t.copy() if t_dtype == out_dtype else narrow(widen(t, t_dtype, work), out_dtype)
    with np.errstate(all="ignore"):
        out = narrow(as_work(widen(t, t_dtype, work) + u, work), out_dtype)
    still = u == 0
    out[still] = kept[still]
    out[wide.at] = _finish_wide(widen(t[wide.at], t_dtype, "F64"), u[wide.at], wide.lo, out_dtype)
    return out


def _finish_wide(t: Work, u: Work, lo: NDArray[np.float64], out_dtype: Dtype) -> Bits:
    with np.errstate(all="ignore"):
        total = (as_f64(t) + as_f64(u)) + lo
    return narrow(np.where(total == 0, np.copysign(0.0, lo), total), out_dtype)


class Extracted(NamedTuple):
    """The vector between two donors on one tensor."""

    values: Work
    """[n] p - n in the work type."""
    wide: Wide
    """Second parts, where n + values is not p and n + values + lo is."""
    inexact: int
    """Elements that n + vector misses in every way."""


def extract(p: Bits, p_dtype: Dtype, n: Bits, n_dtype: Dtype) -> Extracted:
    """The vector from n [n] to p [n], tested: n + vector must be p, bit for bit.

    F32 holds nearly every difference that matters. Where it does not, what n + values misses p by
    in F64 is kept as a second part, if that helps; a second part of zero has the sign of p, and
    says what sign a zero must have. Tensors combined in F64 have no second parts. Which NaN stands
    in p is not kept.
    """
    values = difference(p, p_dtype, n, n_dtype, work_dtype(p_dtype, n_dtype))
    number = ~np.isnan(widen(p, p_dtype, "F64"))
    missed = np.flatnonzero((finish(n, n_dtype, values, p_dtype) != p) & number)
    if values.dtype == np.float64:
        return Extracted(values, NOT_WIDE, missed.size)
    p_at, n_at = widen(p[missed], p_dtype, "F64"), widen(n[missed], n_dtype, "F64")
    with np.errstate(all="ignore"):
        lo = as_f64(p_at - (n_at + as_f64(values[missed])))
    lo = np.where(lo == 0, np.copysign(0.0, p_at), lo)
    helps = _finish_wide(n_at, values[missed], lo, p_dtype) == p[missed]
    return Extracted(values, Wide(missed[helps], lo[helps]), int(np.count_nonzero(~helps)))
