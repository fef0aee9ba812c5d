"""Sums in one fixed order, whatever the threads, tiles and vector registers, and what is measured
with them: the rounding of an output, the size of a vector, what two vectors have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonvec.reference.formats import Bits, Dtype, Work, as_f64, as_work, widen, work_of

__all__ = [
    "BLOCK",
    "GROUP",
    "LANES",
    "LEAST",
    "MICRO",
    "Extent",
    "Pair",
    "Rounding",
    "extent",
    "fixed_dot",
    "in_order",
    "pair",
    "rounding",
]

MICRO = 4096
"""Elements over which one set of lanes sums."""
BLOCK = 64 * MICRO
"""Elements of a block: the unit of digests, of shuffling, and of the tables for random access."""
LANES = 16
GROUP = 64
LEAST = 2.0**-100
"""The least sum of a MICRO that is believed. A product too small for F32 loses 2^-150 at most: all
of them, less than 2^-37 of a sum as large as this."""


def fixed_dot(a: Work, b: Work) -> float:
    """The sum of a * b of [n] and [n] in the one order that every machine can keep.

    Of every 64 elements of a MICRO, lane j of 16 adds up the products at j, j + 16, j + 32 and
    j + 48 in the work type, as (first + second) + (third + fourth), and takes them into its F64
    sum; the lanes join in halves (0 + 8, 1 + 9, ..., then 0 + 4, ...); MICRO sums join in order
    within a BLOCK, and BLOCK sums in order within the tensor.

    The products of large or small F32 do not fit F32. The sum of a MICRO tells: if it is not
    finite, or below `LEAST`, it is made again in the same order with products in F64.
    """
    micros = -(-a.size // MICRO)
    a, b = _filled(a, micros), _filled(b, micros)
    sums = _sums(a, b)
    with np.errstate(invalid="ignore"):
        again = ~((np.abs(sums) >= LEAST) & (np.abs(sums) < math.inf))
    if work_of(a) == "F32" and again.any():
        sums[again] = _sums(as_f64(a[again]), as_f64(b[again]))
    step = BLOCK // MICRO
    found: list[float] = sums.tolist()
    return in_order([in_order(found[i : i + step]) for i in range(0, micros, step)])


def _sums(a: Work, b: Work) -> NDArray[np.float64]:
    # Of each MICRO, a row of a and b.
    with np.errstate(all="ignore"):
        four = (a * b).reshape(len(a), MICRO // GROUP, GROUP // LANES, LANES)
        runs = as_f64((four[:, :, 0] + four[:, :, 1]) + (four[:, :, 2] + four[:, :, 3]))
        lanes = np.zeros((len(a), LANES))
        for run in range(MICRO // GROUP):
            lanes += runs[:, run]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _filled(values: Work, micros: int) -> Work:
    # With zeros, whose products change no sum that began at +0.0.
    filled = np.zeros(micros * MICRO, values.dtype)
    filled[: values.size] = values
    return filled.reshape(micros, MICRO)


def in_order(values: Sequence[float]) -> float:
    """The sum from left to right."""
    # Not sum(): since Python 3.12 it compensates, which is another result.
    total = 0.0
    for value in values:
        total += value
    return total


@dataclass(frozen=True)
class Rounding:
    """The change that an output really contains, against the one that was asked for."""

    intended: float
    """Sum of u * u, u being the update."""
    realised: float
    """Sum of r * r, r being output minus target."""
    dot: float
    """Sum of u * r."""
    updated: int
    """Elements with u != 0."""
    lost: int
    """Of those, the ones that rounding put back on the target."""

    @property
    def cosine(self) -> float:
        """dot / sqrt(intended * realised); NaN when either is zero."""
        scale = math.sqrt(self.intended * self.realised)
        return self.dot / scale if scale else math.nan

    @property
    def norm_ratio(self) -> float:
        """sqrt(realised / intended); NaN when nothing was intended."""
        return math.sqrt(self.realised / self.intended) if self.intended else math.nan

    @property
    def lost_share(self) -> float:
        """lost / updated; NaN when nothing was updated."""
        return self.lost / self.updated if self.updated else math.nan


def rounding(t: Bits, t_dtype: Dtype, u: Work, out: Bits, out_dtype: Dtype) -> Rounding:
    """The rounding report of one tensor [n]. Second parts of the update are not part of ``u``."""
    work = work_of(u)
    before, after = widen(t, t_dtype, work), widen(out, out_dtype, work)
    with np.errstate(all="ignore"):
        realised = as_work(after - before, work)
    return Rounding(
        intended=fixed_dot(u, u),
        realised=fixed_dot(realised, realised),
        dot=fixed_dot(u, realised),
        updated=int(np.count_nonzero(u != 0)),
        lost=int(np.count_nonzero((u != 0) & (realised == 0))),
    )


@dataclass(frozen=True)
class Extent:
    """The size of a vector on one tensor: what its manifest row and ``inspect`` say."""

    moved: int
    """Elements that are not zero."""
    norm: float
    """Square root of the sum of squares: of the elements of each MICRO that are not zero, one
    behind the other, in the order of `fixed_dot`."""
    max: float
    """The largest absolute value; NaN counts as none."""
    max_at: int | None
    """The first index that has it; None when nothing moved."""


def extent(v: Work) -> Extent:
    """How many elements of [n] moved, how far together, and which one farthest.

    >>> extent(np.array([0, -2, 1, 2], np.float32))
    Extent(moved=3, norm=3.0, max=2.0, max_at=1)
    """
    size = np.where(np.isnan(v), 0, np.abs(v))
    at = int(size.argmax()) if size.any() else None
    largest = 0.0 if at is None else float(size[at])
    rows = _filled(v, -(-v.size // MICRO))
    order = np.argsort(rows == 0, axis=1, kind="stable")
    moved: Work = rows[np.arange(len(rows))[:, None], order].ravel()
    return Extent(int(np.count_nonzero(v != 0)), math.sqrt(fixed_dot(moved, moved)), largest, at)


@dataclass(frozen=True)
class Pair:
    """Two vectors on one tensor: what ``compare`` and ``check`` say."""

    dot: float
    """Sum of a * b."""
    a_squared: float
    b_squared: float
    overlap: int
    """Elements that both moved."""
    agree: int
    """Of those, the ones moved in the same direction."""

    @property
    def cosine(self) -> float:
        """dot / (|a| |b|); NaN when either is zero."""
        scale = math.sqrt(self.a_squared) * math.sqrt(self.b_squared)
        return self.dot / scale if scale else math.nan


def pair(a: Work, b: Work) -> Pair:
    """Products and agreement of two vectors [n] and [n]; products sum as in `fixed_dot`."""
    both = (a != 0) & (b != 0)
    return Pair(
        dot=fixed_dot(a, b),
        a_squared=fixed_dot(a, a),
        b_squared=fixed_dot(b, b),
        overlap=int(np.count_nonzero(both)),
        agree=int(np.count_nonzero(both & ((a > 0) == (b > 0)))),
    )
