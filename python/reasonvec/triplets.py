"""The leading singular triplets of a tensor of any expression."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonvec import _reasonvec as core
from reasonvec.json_values import Json
from reasonvec.run import RunOptions
from reasonvec.terms import Operands

__all__ = ["Rank", "Triplets", "leading"]

Rank: TypeAlias = int | Literal["auto"] | float
"""How many triplets: a number of them, "auto" for those above the noise floor, or a share between 0
and 1 of the sum of squares that they must hold."""


@dataclass(frozen=True, eq=False)
class Triplets:
    """``u @ diag(s) @ v`` of u [rows, rank] and v [rank, columns] in float32, orthonormal, and s
    [rank] in float64, descending; ``squares`` is the sum of squares of the whole matrix."""

    u: NDArray[np.float32]
    s: NDArray[np.float64]
    v: NDArray[np.float32]
    squares: float

    @property
    def rank(self) -> int:
        return int(self.s.size)


def leading(
    name: str,
    shape: Sequence[int],
    terms: Sequence[Json],
    operands: Operands,
    rank: Rank,
    options: RunOptions,
) -> Triplets:
    """The leading triplets of a sum of terms with the given shape [rows, columns]."""
    rows, columns = shape
    found = core.values(
        json.dumps(list(terms)), name, rows * columns, 0, rows * columns, operands.handles
    )
    matrix = np.asarray(found).reshape(rows, columns).astype(np.float64)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    squares = float(np.sum(matrix * matrix))
    if rank == "auto":
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=matrix.shape)
        kept = int(np.sum(s > np.linalg.norm(matrix * signs, 2)))
    elif isinstance(rank, float):
        kept = int(np.searchsorted(np.cumsum(s * s), rank * squares * (1 - 1e-12))) + 1
        kept = min(kept, s.size) if squares > 0 else 0
    else:
        kept = min(rank, s.size)
    kept = min(kept, int(np.sum(s > 0)))
    return Triplets(
        np.ascontiguousarray(u[:, :kept], np.float32),
        s[:kept],
        np.ascontiguousarray(v[:kept], np.float32),
        squares,
    )
