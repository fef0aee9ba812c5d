"""Products of thin factors in NumPy: the specification of the core's kernel, in readable form.

What an adapter adds to a matrix (Hu et al. 2021, arXiv 2106.09685) and a low-rank
tensor of a vector are the same product: summed in float64 with k ascending, rounded once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reasonvec.reference.formats import Bits, Dtype, Work, WorkDtype, widen

__all__ = ["adapter_delta", "lowrank_values", "product"]


def product(
    left: NDArray[np.float64], right: NDArray[np.float64], scale: float, work: WorkDtype
) -> Work:
    """``scale * left @ right`` [rows, columns] of left [rows, rank] and right [rank, columns].

    Every product and every sum is rounded to float64, k ascending from +0; the result is rounded
    once to the work type.

    >>> product(np.ones((2, 1)), np.array([[1.0, 3.0]]), 0.5, "F32")
    array([[0.5, 1.5],
           [0.5, 1.5]], dtype=float32)
    """
    sums = np.zeros((left.shape[0], right.shape[1]))
    for k in range(left.shape[1]):
        sums += left[:, k, None] * right[None, k]
    with np.errstate(over="ignore"):
        return (scale * sums).astype(np.float32) if work == "F32" else scale * sums


def adapter_delta(
    a: tuple[Bits, Dtype],
    b: tuple[Bits, Dtype],
    scale: float,
    *,
    transposed: bool = False,
    work: WorkDtype = "F32",
) -> Work:
    """What a LoRA adds to a weight, of the factors a [rank, in] and b [out, rank].

    [out, in], or [in, out] if the model stores the matrix so (``transposed``).
    """
    (a_bits, a_dtype), (b_bits, b_dtype) = a, b
    left = widen(b_bits, b_dtype, "F64").astype(np.float64)
    right = widen(a_bits, a_dtype, "F64").astype(np.float64)
    values = product(left, right, scale, work)
    return values.T.copy() if transposed else values


def lowrank_values(
    u: tuple[Bits, Dtype],
    s: NDArray[np.float64],
    v: tuple[Bits, Dtype],
    *,
    work: WorkDtype = "F32",
) -> Work:
    """A low-rank tensor [rows, columns] of u [rows, rank], s [rank] and v [rank, columns]: every
    column of u is first multiplied by its entry of s, in float64. A stack of them, if all three
    have one more dimension in front."""
    (u_bits, u_dtype), (v_bits, v_dtype) = u, v
    if s.ndim == 2:
        found = [
            lowrank_values((x, u_dtype), w, (y, v_dtype), work=work).astype(np.float64)
            for x, w, y in zip(u_bits, s, v_bits, strict=True)
        ]
        # float64 holds what was rounded to float32 exactly.
        stacked = np.stack(found)
        return stacked.astype(np.float32) if work == "F32" else stacked
    left = widen(u_bits, u_dtype, "F64").astype(np.float64) * s
    return product(left, widen(v_bits, v_dtype, "F64").astype(np.float64), 1.0, work)
