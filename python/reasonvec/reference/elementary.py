"""Logarithm, exponential, sine and cosine, written out because the last bits of the ones that come
with a system differ from the next system's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reasonvec.reference.formats import as_f64

__all__ = ["cos_sin_turns", "exp", "ln", "ln_1p", "slope_of_exp"]

_ROUNDS = 1.5 * 2.0**52 + 1023.0


def ln(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """The natural logarithm [n] of positive numbers."""
    # u = m * 2^e with m in [sqrt(1/2), sqrt(2)], and the series of ln m = 2 artanh(s).
    bits = u.view(np.uint64)
    e = (bits >> np.uint64(52)).astype(np.int64) - 1023
    m = ((bits & np.uint64(2**52 - 1)) | np.uint64(1023 << 52)).view(np.float64)
    high = m > 1.4142135623730951
    m = np.where(high, m * 0.5, m)
    s = (m - 1.0) / (m + 1.0)
    return as_f64(e + high) * 0.6931471805599453 + 2.0 * s * _artanh_series(s)


def ln_1p(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln(1 + v) [n] for magnitudes up to 0.41."""
    s = v / (2.0 + v)
    return 2.0 * s * _artanh_series(s)


def exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The exponential [n] of numbers that are not positive; zero below -708.

    Below that it would become subnormal.
    """
    # x = k ln 2 + r with r within half of ln 2, ln 2 in two parts so that r is exact; then the
    # series of exp r, and k into the exponent. What is added to a number and taken away again
    # rounds it, of two equally near to the odd one.
    at = np.maximum(x, -708.0)
    k = (at * 1.4426950408889634 + _ROUNDS) - _ROUNDS
    r = (at - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    power = (k.astype(np.int64) + 1023).astype(np.uint64) << np.uint64(52)
    series = _in_pairs(r, [1.0 / math.factorial(m) for m in range(14)])
    return np.where(x < -708.0, 0.0, series * power.view(np.float64))


def slope_of_exp(d: NDArray[np.float64]) -> NDArray[np.float64]:
    """(exp d - 1) / d [n] for magnitudes below 1/64, also for zero."""
    return _in_pairs(d, [1.0 / math.factorial(m) for m in range(1, 8)])


def cos_sin_turns(u: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine [n] of angles in turns."""
    # The nearest quarter turn, then Taylor polynomials on the eighth of a turn to either side.
    x = 4.0 * u
    quarter = np.floor(x + 0.5)
    theta = (x - quarter) * 1.5707963267948966
    z = theta * theta
    s = theta * _horner(z, [(-1) ** m / math.factorial(2 * m + 1) for m in range(7, -1, -1)])
    c = _horner(z, [(-1) ** m / math.factorial(2 * m) for m in range(8, -1, -1)])
    turns = [quarter.astype(np.int64) % 4 == k for k in range(4)]
    return np.select(turns, [c, -s, -c, s]), np.select(turns, [s, c, -s, -c])


def _horner(z: NDArray[np.float64], coefs: Sequence[float]) -> NDArray[np.float64]:
    p = np.full_like(z, coefs[0])
    for coef in coefs[1:]:
        p = p * z + coef
    return p


def _artanh_series(s: NDArray[np.float64]) -> NDArray[np.float64]:
    return _horner(s * s, [1.0 / k for k in range(19, 0, -2)])


def _in_pairs(z: NDArray[np.float64], coefs: Sequence[float]) -> NDArray[np.float64]:
    """The polynomial of rising `coefs`, its terms added in pairs, then pairs of pairs."""
    terms = [np.full_like(z, coef) for coef in coefs]
    while len(terms) > 1:
        pairs = [high * z + low for low, high in zip(terms[::2], terms[1::2], strict=False)]
        terms, z = pairs + terms[2 * len(pairs) :], z * z
    return terms[0]
