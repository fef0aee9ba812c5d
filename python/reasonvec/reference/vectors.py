"""Vectors: formats, update and rounding, sums, random numbers, encodings, statistics.

A tensor is its bit patterns (``Bits``: uint16 for BF16 and F16, uint32 for F32, uint64 for F64)
together with the safetensors name of its format. Arithmetic happens on ``Work`` arrays, float32 or
float64, and ends in bit patterns again after one rounding. All arrays are flat, in row-major
order; ``[n]`` in a docstring is a shape.

The order of the file is the order of a run: formats, update and rounding, sums, digests, random
numbers, controls, extraction, encodings, statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

MICRO = 4096
"""Elements over which one set of lanes sums."""
BLOCK = 64 * MICRO
"""Elements of a block: the unit of digests, of shuffling, and of the tables for random access."""
LANES = 16
GROUP = 64

Dtype = Literal["BF16", "F16", "F32", "F64"]
WorkDtype = Literal["F32", "F64"]
Encoding = Literal["zero", "dense", "sparse"]
Codec = Literal["U8", "BF16", "F32", "F64"]

Bits: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint64]
Work: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
Index: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Stored: TypeAlias = NDArray[np.uint8] | Bits | Work
_Number: TypeAlias = Stored | Index | NDArray[np.float16]
_S = TypeVar("_S", np.bool_, np.uint8, np.uint16, np.uint32, np.uint64, np.float32, np.float64)

ITEMSIZE: dict[str, int] = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
NAN: dict[str, int] = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8 << 48}
"""The quiet NaN that every NaN result becomes: processors disagree about sign and payload."""
ESCAPE = 255
"""The U8 code that means: the value is the next entry of ``escapes``."""

_LOW32 = np.uint64(0xFFFFFFFF)
_MASK64 = 2**64 - 1


# Formats


def work_dtype(*dtypes: str) -> WorkDtype:
    """The arithmetic of a tensor: F64 when any operand or the output is F64, else F32."""
    return "F64" if "F64" in dtypes else "F32"


def widen(bits: Bits, dtype: Dtype, work: WorkDtype = "F32") -> Work:
    """The values of bit patterns [n], exactly. F64 does not fit in F32: ValueError.

    >>> widen(np.array([0x3F80, 0xC000], np.uint16), "BF16")
    array([ 1., -2.], dtype=float32)
    """
    if dtype == "F64" and work == "F32":
        raise ValueError("F64 elements are combined in F64, not in F32")
    values: NDArray[np.float16] | Work
    if dtype == "BF16":  # the upper half of an F32
        values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif dtype == "F16":
        values = bits.view(np.float16)
    else:
        values = bits.view(np.float32) if dtype == "F32" else bits.view(np.float64)
    return _as_work(values, work)


def narrow(values: Work, dtype: Dtype) -> Bits:
    """The nearest bit patterns [n]: one rounding, ties to even, subnormals kept, NaN canonical.

    >>> [hex(b) for b in narrow(np.array([1.00390625, 1.01171875, np.nan], np.float32), "BF16")]
    ['0x3f80', '0x3f82', '0x7fc0']
    """
    bits: Bits
    if dtype == "F64":
        bits = _as_f64(values).view(np.uint64)
    elif dtype == "F32":
        bits = _as_f32(values).view(np.uint32)
    else:
        single = round_to_odd(values) if values.dtype == np.float64 else _as_f32(values)
        bits = _f32_to_bf16(single) if dtype == "BF16" else _f32_to_f16(single)
    bits[np.isnan(values)] = NAN[dtype]
    return bits


def round_to_odd(values: Work) -> NDArray[np.float32]:
    """F64 [n] to F32, such that rounding that to BF16 or F16 is as good as rounding only once.

    A value that F32 cannot hold goes to whichever of its two neighbours has an odd last bit. That
    bit then says "not exact" to the next rounding, as a sticky bit does, so no false tie can arise
    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008). F32 has at least two bits more than BF16 and F16 everywhere, among the
    subnormals too, which is all that the proof needs.
    """
    exact = _as_f64(values)
    nearest = _as_f32(exact)
    back = _as_f64(nearest)
    # One less is one step towards zero, whatever the sign: the magnitude is the low 31 bits.
    bits: NDArray[np.uint32] = nearest.view(np.uint32)
    bits = bits - (np.abs(back) > np.abs(exact)).astype(np.uint32)
    bits = bits | (back != exact).astype(np.uint32)
    return bits.view(np.float32)


def _f32_to_bf16(single: NDArray[np.float32]) -> NDArray[np.uint16]:
    # Add half a unit of the last kept place, a little less when that place is even: the carry out
    # of the low half is the rounding.
    bits = single.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)


def _f32_to_f16(single: NDArray[np.float32]) -> NDArray[np.uint16]:
    with np.errstate(all="ignore"):
        return single.astype(np.float16).view(np.uint16)


def _as_f32(values: _Number) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return values.astype(np.float32)


def _as_f64(values: _Number) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        return values.astype(np.float64)


def _as_work(values: _Number, work: WorkDtype) -> Work:
    return _as_f64(values) if work == "F64" else _as_f32(values)


def _work_of(values: Work) -> WorkDtype:
    return "F64" if values.dtype == np.float64 else "F32"


def first_nonfinite(bits: Bits, dtype: Dtype) -> int | None:
    """The index of the first NaN or infinity in bit patterns [n], for error messages, or None."""
    at = np.flatnonzero(~np.isfinite(widen(bits, dtype, "F64")))
    return int(at[0]) if at.size else None


# The update and its one rounding: target + sum of c_k * v_k (arXiv 2509.01363)


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
        return _as_work(widen(p, p_dtype, work) - widen(n, n_dtype, work), work)


def combine(terms: Sequence[Work], coefs: Sequence[float], work: WorkDtype) -> Work:
    """The update [n]: c_1 * v_1 + c_2 * v_2 + ..., left to right, every operation in ``work``.

    Coefficients are rounded to ``work`` first. Multiply and add are two roundings: a fused one
    would give other bits on the processors that have it.
    """
    if len(terms) != len(coefs) or not terms:
        raise ValueError(f"{len(terms)} terms and {len(coefs)} coefficients: give one for each")
    with np.errstate(all="ignore"):
        scaled = [
            _as_work(v, work) * _as_work(np.asarray(c), work)
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
    work = _work_of(u)
    kept = t.copy() if t_dtype == out_dtype else narrow(widen(t, t_dtype, work), out_dtype)
    with np.errstate(all="ignore"):
        out = narrow(_as_work(widen(t, t_dtype, work) + u, work), out_dtype)
    still = u == 0
    out[still] = kept[still]
    out[wide.at] = _finish_wide(widen(t[wide.at], t_dtype, "F64"), u[wide.at], wide.lo, out_dtype)
    return out


def _finish_wide(t: Work, u: Work, lo: NDArray[np.float64], out_dtype: Dtype) -> Bits:
    with np.errstate(all="ignore"):
        total = (_as_f64(t) + _as_f64(u)) + lo
    return narrow(np.where(total == 0, np.copysign(0.0, lo), total), out_dtype)


# Sums: one fixed order, whatever the threads, tiles and vector registers


def fixed_dot(a: Work, b: Work) -> float:
    """The sum of a * b of [n] and [n] in the one order that every machine can keep.

    Of every 64 elements of a MICRO, lane j of 16 adds up the products at j, j + 16, j + 32 and
    j + 48 in the work type, as (first + second) + (third + fourth), and takes them into its F64
    sum; the lanes join in halves (0 + 8, 1 + 9, ..., then 0 + 4, ...); MICRO sums join in order
    within a BLOCK, and BLOCK sums in order within the tensor.
    """
    micros = -(-a.size // MICRO)
    grid = (micros, MICRO // GROUP, GROUP // LANES, LANES)
    with np.errstate(all="ignore"):
        four = (_filled(a, micros) * _filled(b, micros)).reshape(grid)
        runs = _as_f64((four[:, :, 0] + four[:, :, 1]) + (four[:, :, 2] + four[:, :, 3]))
        lanes = np.zeros((micros, LANES))
        for run in range(MICRO // GROUP):
            lanes += runs[:, run]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
    sums: list[float] = lanes[:, 0].tolist()
    step = BLOCK // MICRO
    return _in_order([_in_order(sums[i : i + step]) for i in range(0, micros, step)])


def _filled(values: Work, micros: int) -> Work:
    # With zeros, whose products change no sum that began at +0.0.
    filled = np.zeros(micros * MICRO, values.dtype)
    filled[: values.size] = values
    return filled


def _in_order(values: Sequence[float]) -> float:
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
    work = _work_of(u)
    before, after = widen(t, t_dtype, work), widen(out, out_dtype, work)
    with np.errstate(all="ignore"):
        realised = _as_work(after - before, work)
    return Rounding(
        intended=fixed_dot(u, u),
        realised=fixed_dot(realised, realised),
        dot=fixed_dot(u, realised),
        updated=int(np.count_nonzero(u != 0)),
        lost=int(np.count_nonzero((u != 0) & (realised == 0))),
    )


# Digests


def tensor_digest(data: bytes, itemsize: int, hash_bytes: Callable[[bytes], bytes]) -> str:
    """The hash, in lower-case hex, of the hashes of the blocks of ``data``.

    A block is BLOCK elements, the last one what is left; so any thread can hash any block while it
    passes by. No data, no blocks: the hash of nothing. A file that is not safetensors is a tensor
    of one-byte elements. ``hash_bytes`` is XXH3-128 (seed 0, 16 bytes, big-endian) or BLAKE3 (32).

    >>> import hashlib
    >>> sha = lambda data: hashlib.sha256(data).digest()
    >>> tensor_digest(b"abc", 1, sha) == sha(sha(b"abc")).hex()
    True
    """
    step = BLOCK * itemsize
    blocks = [data[i : i + step] for i in range(0, len(data), step)]
    return hash_bytes(b"".join(map(hash_bytes, blocks))).hex()


# Random numbers: value = f(seed, tensor name, index), so that any block can be made anywhere

RANDOM_STREAM = 1
SHUFFLE_STREAM = 2


def splitmix64(x: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood 2014): spreads 64 bits over all 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def fnv1a64(data: bytes) -> int:
    """The 64-bit FNV-1a hash.

    >>> hex(fnv1a64(b"a"))
    '0xaf63dc4c8601ec8c'
    """
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & _MASK64
    return h


def key64(seed: int, name: str, stream: int) -> int:
    """The Philox key of one use (``stream``) of a seed on a tensor; its low word comes first."""
    purpose = splitmix64(stream ^ 0x5265617356656300)
    return splitmix64(fnv1a64(name.encode()) ^ splitmix64(seed) ^ purpose)


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: counters [n, 4] to random words [n, 4].

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    >>> [hex(x) for x in philox4x32(np.zeros((1, 4), np.uint32), (0, 0))[0]]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    x0, x1, x2, x3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        a = x0 * np.uint64(0xD2511F53)
        b = x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (b >> np.uint64(32)) ^ x1 ^ np.uint64(k0), b & _LOW32
        x2, x3 = (a >> np.uint64(32)) ^ x3 ^ np.uint64(k1), a & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32)


def words(key: int, counters: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The random words [n, 4] of 64-bit counters [n]: low word first, then two words of zero."""
    counter = np.zeros((counters.size, 4), np.uint32)
    counter[:, 0] = (counters & _LOW32).astype(np.uint32)
    counter[:, 1] = (counters >> np.uint64(32)).astype(np.uint32)
    return philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))


def normal(key: int, index: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal deviates [n] at the given indices [n] (Box and Muller 1958).

    Indices 2j and 2j + 1 are the cosine and the sine of counter j. Its words make two numbers of
    52 bits, the first in the middle of its step so that the logarithm never sees zero.
    """
    x = words(key, index >> np.uint64(1)).astype(np.uint64)
    u1 = (_as_f64((x[:, 0] << np.uint64(20)) | (x[:, 1] >> np.uint64(12))) + 0.5) * 2.0**-52
    u2 = _as_f64((x[:, 2] << np.uint64(20)) | (x[:, 3] >> np.uint64(12))) * 2.0**-52
    cos, sin = _cos_sin_turns(u2)
    return np.sqrt(-2.0 * _ln(u1)) * np.where(index % np.uint64(2) == 0, cos, sin)


# The logarithm, exponential, sine and cosine are written out because the last bits of the ones that
# come with a system differ from the next system's.


def _ln(u: NDArray[np.float64]) -> NDArray[np.float64]:
    # u = m * 2^e with m in [sqrt(1/2), sqrt(2)], and the series of ln m = 2 artanh(s).
    bits = u.view(np.uint64)
    e = (bits >> np.uint64(52)).astype(np.int64) - 1023
    m = ((bits & np.uint64(2**52 - 1)) | np.uint64(1023 << 52)).view(np.float64)
    high = m > 1.4142135623730951
    m = np.where(high, m * 0.5, m)
    s = (m - 1.0) / (m + 1.0)
    series = _horner(s * s, [1.0 / k for k in range(19, 0, -2)])
    return _as_f64(e + high) * 0.6931471805599453 + 2.0 * s * series


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    # x <= 0. x = k ln 2 + r with r within half of ln 2, ln 2 in two parts so that r is exact; then
    # the series of exp r, and k into the exponent. What would be subnormal is zero.
    x = np.maximum(x, -1000.0)
    k = np.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    series = _horner(r, [1.0 / math.factorial(m) for m in range(13, -1, -1)])
    power = (np.maximum(k, -1022.0).astype(np.int64) + 1023).astype(np.uint64) << np.uint64(52)
    return np.where(k < -1021.0, 0.0, series * power.view(np.float64))


def _cos_sin_turns(u: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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


# Controls: what a vector must beat before its direction gets the credit. They take and give the
# values of one vector on one tensor, before any coefficient.


def reverse(v: Work) -> Work:
    """The opposite vector [n]: if v helps, this should hurt. Second parts change sign with it."""
    return -v


def random(v: Work, seed: int, name: str) -> Work:
    """Noise [n] with the norm of ``v``: would any push of that length have done?

    Second parts are ignored and none are made; ``shuffle`` does the same.
    """
    z = normal(key64(seed, name, RANDOM_STREAM), np.arange(v.size, dtype=np.uint64))
    energy = fixed_dot(v, v)
    scale = math.sqrt(energy / fixed_dot(z, z)) if energy > 0 else 0.0
    return _as_work(z * scale, _work_of(v))


def shuffle(v: Work, seed: int, name: str) -> Work:
    """The same values [n] at other places: does it matter which element gets which change?"""
    return v[permutation(v.size, seed, name)]


def permutation(n: int, seed: int, name: str) -> Index:
    """The source index [n] of every destination.

    Whole blocks change places, then elements change places inside each block, so that memory for
    one block is enough. A shorter last block stays where it is.
    """
    whole = n // BLOCK
    order = [*_fisher_yates(whole, key64(seed, name, SHUFFLE_STREAM)).tolist(), whole]
    perm = np.empty(n, np.int64)
    for b in range(-(-n // BLOCK)):
        inside = perm[b * BLOCK : (b + 1) * BLOCK]
        key = key64(seed ^ splitmix64(b + 1), name, SHUFFLE_STREAM)
        inside[:] = order[b] * BLOCK + _fisher_yates(inside.size, key)
    return perm


def _fisher_yates(n: int, key: int) -> Index:
    a = list(range(n))
    drawn = words(key, np.arange((n + 3) // 4, dtype=np.uint64)).ravel().tolist()
    for i, r in zip(range(n - 1, 0, -1), drawn, strict=False):
        j = (r * (i + 1)) >> 32
        a[i], a[j] = a[j], a[i]
    return np.array(a, np.int64)


# Extraction


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
        lo = _as_f64(p_at - (n_at + _as_f64(values[missed])))
    lo = np.where(lo == 0, np.copysign(0.0, p_at), lo)
    helps = _finish_wide(n_at, values[missed], lo, p_dtype) == p[missed]
    return Extracted(values, Wide(missed[helps], lo[helps]), int(np.count_nonzero(~helps)))


# Encodings: how a vector lies in its file (docs/format.md)


class Part(NamedTuple):
    """One entry of the safetensors file: its format, and its array (BF16 as uint16 patterns)."""

    dtype: str
    data: Stored


Parts: TypeAlias = dict[str, Part]


def entry(name: str, encoding: Encoding, part: str) -> str:
    """The name of a part in the safetensors file; dense values have the tensor's own.

    >>> entry("lm_head.weight", "sparse", "bitmap")
    'lm_head.weight:bitmap'
    """
    return name if (encoding, part) == ("dense", "values") else f"{name}:{part}"


def exact_in_bf16(v: Work) -> Mask:
    """Whether each element [n] is a finite BF16 number. NaN is not: its bits mean "escape"."""
    return np.asarray(np.isfinite(v) & (widen(narrow(v, "BF16"), "BF16", _work_of(v)) == v))


def encode_dense(v: Work, shape: Sequence[int], codec: Codec) -> Parts:
    """Every value [n] in the tensor's shape: as BF16 if F32 and exact in it, or as it is."""
    return {"values": Part(codec, _stored(v, codec).reshape(shape))}


def encode_sparse(v: Work, codec: Codec, palette: NDArray[np.float32] | None = None) -> Parts:
    """One bit per element [n], and a value for every set bit.

    U8 values are places in ``palette`` [<= 255]; BF16 are the values that are exact in it; F32 and
    F64 are the values. What U8 and BF16 cannot say, ``escapes`` says. ``starts`` counts what lies
    before each block, so that a reader can begin at any of them.
    """
    moved = v != 0
    values = v[moved]
    escaped = np.zeros(values.size, np.bool_)
    parts = {"bitmap": Part("U8", _pad(np.packbits(moved, bitorder="little"), 8))}
    if codec == "U8":
        if palette is None or not 0 < palette.size <= ESCAPE:
            raise ValueError("U8 values need a palette of 1 to 255 entries")
        codes = _codes(_single(values), palette)
        escaped = codes == ESCAPE
        parts["values"] = Part("U8", _pad(codes, 8))
        parts["palette"] = Part("F32", palette)
    elif codec == "BF16":
        escaped = ~exact_in_bf16(values)
        bits = narrow(_single(values), "BF16").astype(np.uint16)
        bits[escaped] = NAN["BF16"]
        parts["values"] = Part("BF16", _pad(bits, 4))
    elif codec == "F32":
        parts["values"] = Part("F32", _pad(_single(values), 2))
    else:
        parts["values"] = Part("F64", _stored(values, "F64"))
    if escaped.any():
        parts["escapes"] = Part("F32", _pad(_single(values[escaped]), 2))
    escapes = moved.copy()
    escapes[moved] = escaped
    parts["starts"] = Part("U64", np.stack([_starts(moved), _starts(escapes)], axis=1))
    return parts


def encode_wide(wide: Wide, n: int) -> Parts:
    """Second parts of n elements: places in their blocks, values, and counts before each block."""
    if not wide.at.size:
        return {}
    listed = np.zeros(n, np.bool_)
    listed[wide.at] = True
    return {
        "wide_at": Part("U32", _pad((wide.at % BLOCK).astype(np.uint32), 2)),
        "wide_lo": Part("F64", wide.lo),
        "wide_starts": Part("U64", _starts(listed)),
    }


def encode(
    v: Work,
    shape: Sequence[int],
    encoding: Encoding,
    codec: Codec = "F32",
    palette: NDArray[np.float32] | None = None,
    wide: Wide = NOT_WIDE,
) -> Parts:
    """The parts of one tensor [n]. ValueError if encoding or codec cannot hold it exactly."""
    if encoding == "zero":
        if v.any() or wide.at.size:
            raise ValueError("some elements moved, and the zero encoding stores nothing")
        return {}
    dense = encoding == "dense"
    parts = encode_dense(v, shape, codec) if dense else encode_sparse(v, codec, palette)
    return parts | encode_wide(wide, v.size)


def decode(encoding: Encoding, parts: Parts, n: int) -> tuple[Work, Wide]:
    """The values [n] of any encoding, F64 if stored so and else F32, and the second parts."""
    if encoding == "zero":
        return np.zeros(n, np.float32), NOT_WIDE
    if encoding == "dense":
        return _read(parts["values"]), _read_wide(parts)
    moved = np.unpackbits(_array(parts["bitmap"], np.uint8), bitorder="little")[:n] == 1
    count = np.count_nonzero(moved)
    values = _read(parts["values"], parts.get("palette"))[:count]
    escaped = _is_escape(parts["values"])[:count]
    if escaped.any():
        values[escaped] = _array(parts["escapes"], np.float32)[: np.count_nonzero(escaped)]
    v = _as_work(np.zeros(n), _work_of(values))
    v[moved] = values
    return v, _read_wide(parts)


def _read(part: Part, palette: Part | None = None) -> Work:
    if palette is not None:
        codes = _array(part, np.uint8)
        return _array(palette, np.float32)[np.where(codes == ESCAPE, 0, codes)]
    if part.dtype == "BF16":
        return widen(_array(part, np.uint16), "BF16")
    return _array(part, np.float64) if part.dtype == "F64" else _array(part, np.float32).copy()


def _is_escape(part: Part) -> Mask:
    escape = {"U8": ESCAPE, "BF16": NAN["BF16"]}.get(part.dtype)
    return np.zeros(part.data.size, np.bool_) if escape is None else np.asarray(part.data == escape)


def _read_wide(parts: Parts) -> Wide:
    if "wide_at" not in parts:
        return NOT_WIDE
    starts = _array(parts["wide_starts"], np.uint64).astype(np.int64)
    block = np.repeat(np.arange(starts.size - 1), np.diff(starts))
    at = _array(parts["wide_at"], np.uint32)[: block.size].astype(np.int64)
    return Wide(block * BLOCK + at, _array(parts["wide_lo"], np.float64))


def _array(part: Part, kind: type[_S]) -> NDArray[_S]:
    return np.asarray(part.data, kind).ravel()


def _pad(data: NDArray[_S], multiple: int) -> NDArray[_S]:
    # Padded parts end on eight bytes, so that whatever follows them in the file can be aligned.
    padded = np.zeros(-(-data.size // multiple) * multiple, data.dtype)
    padded[: data.size] = data
    return padded


def _stored(v: Work, codec: Codec) -> Work | Bits:
    if codec == "BF16" and v.dtype == np.float32 and exact_in_bf16(v).all():
        return narrow(v, "BF16")
    if codec != _work_of(v):
        raise ValueError(f"{codec} does not hold these {v.dtype} values exactly")
    return v


def _single(values: Work) -> NDArray[np.float32]:
    if values.dtype != np.float32:
        raise ValueError("sparse values of an F64 tensor are stored as F64")
    return _as_f32(values)


def _codes(values: NDArray[np.float32], palette: NDArray[np.float32]) -> NDArray[np.uint8]:
    # Compared as bit patterns, so that even NaN would find itself.
    wanted, known = values.view(np.uint32), palette.view(np.uint32)
    order = np.argsort(known, kind="stable")
    at = order[np.minimum(np.searchsorted(known[order], wanted), known.size - 1)]
    return np.where(known[at] == wanted, at, ESCAPE).astype(np.uint8)


def _starts(flags: Mask) -> NDArray[np.uint64]:
    blocks = -(-flags.size // BLOCK)
    counts = _pad(flags, BLOCK).reshape(blocks, BLOCK).sum(axis=1)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)


# Statistics


@dataclass(frozen=True)
class Extent:
    """The size of a vector on one tensor: what its manifest row and ``inspect`` say."""

    moved: int
    """Elements that are not zero."""
    norm: float
    """Square root of the sum of squares, in the fixed order."""
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
    return Extent(int(np.count_nonzero(v != 0)), math.sqrt(fixed_dot(v, v)), largest, at)


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
