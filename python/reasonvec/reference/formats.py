"""Formats of numbers: bit patterns to values and back, with one rounding.

A tensor is its bit patterns (``Bits``: uint16 for BF16 and F16, uint32 for F32, uint64 for F64)
together with the safetensors name of its format. Arithmetic happens on ``Work`` arrays, float32 or
float64, and ends in bit patterns again after one rounding. All arrays are flat, in row-major
order; ``[n]`` in a docstring is a shape.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ITEMSIZE",
    "NAN",
    "Bits",
    "Dtype",
    "Index",
    "Mask",
    "Number",
    "Stored",
    "Work",
    "WorkDtype",
    "as_f32",
    "as_f64",
    "as_work",
    "first_nonfinite",
    "narrow",
    "round_to_odd",
    "widen",
    "work_dtype",
    "work_of",
]

Dtype = Literal["BF16", "F16", "F32", "F64"]
WorkDtype = Literal["F32", "F64"]

Bits: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint64]
Work: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
Index: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Stored: TypeAlias = NDArray[np.uint8] | Bits | Work
Number: TypeAlias = Stored | Index | NDArray[np.float16]

ITEMSIZE: dict[str, int] = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
NAN: dict[str, int] = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8 << 48}
"""The quiet NaN that every NaN result becomes: processors disagree about sign and payload."""


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
    return as_work(values, work)


def narrow(values: Work, dtype: Dtype) -> Bits:
    """The nearest bit patterns [n]: one rounding, ties to even, subnormals kept, NaN canonical.

    >>> [hex(b) for b in narrow(np.array([1.00390625, 1.01171875, np.nan], np.float32), "BF16")]
    ['0x3f80', '0x3f82', '0x7fc0']
    """
    bits: Bits
    if dtype == "F64":
        bits = as_f64(values).view(np.uint64)
    elif dtype == "F32":
        bits = as_f32(values).view(np.uint32)
    else:
        single = round_to_odd(values) if values.dtype == np.float64 else as_f32(values)
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
    exact = as_f64(values)
    nearest = as_f32(exact)
    back = as_f64(nearest)
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


def as_f32(values: Number) -> NDArray[np.float32]:
    """Rounded to F32; what is too large becomes infinite without a warning."""
    with np.errstate(all="ignore"):
        return values.astype(np.float32)


def as_f64(values: Number) -> NDArray[np.float64]:
    """The same values in F64."""
    with np.errstate(all="ignore"):
        return values.astype(np.float64)


def as_work(values: Number, work: WorkDtype) -> Work:
    """Rounded to the work type."""
    return as_f64(values) if work == "F64" else as_f32(values)


def work_of(values: Work) -> WorkDtype:
    """The work type that an array is of."""
    return "F64" if values.dtype == np.float64 else "F32"


def first_nonfinite(bits: Bits, dtype: Dtype) -> int | None:
    """The index of the first NaN or infinity in bit patterns [n], for error messages, or None."""
    at = np.flatnonzero(~np.isfinite(widen(bits, dtype, "F64")))
    return int(at[0]) if at.size else None
