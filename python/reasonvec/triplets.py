"""The leading singular triplets of a tensor of any expression."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonvec import _reasonvec as core
from reasonvec.adapter import AdapterFolder
from reasonvec.errors import MismatchError
from reasonvec.folders import Folder, VectorFolder
from reasonvec.json_values import Json
from reasonvec.run import RunOptions, settings
from reasonvec.svd import rank_rule, recompress, svd
from reasonvec.terms import Operands

__all__ = ["Rank", "Triplets", "check_rank", "leading", "memory"]

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


def check_rank(rank: Rank) -> None:
    """Raise MismatchError if it is no rank."""
    if rank != "auto" and not (rank > 0 if isinstance(rank, int) else 0 < rank <= 1):
        message = f"rank: expected 1 or more, a share between 0 and 1, or 'auto', found {rank!r}"
        raise MismatchError(message)


def memory(shape: Sequence[int], rank: Rank, options: RunOptions) -> tuple[int, int]:
    """Bytes of anonymous memory that `leading` takes of a matrix beside what the process has: of
    order (rows + columns) * rank. With a rule in place of a number, from the least to the most."""
    plan = {
        "rows": shape[-2],
        "columns": shape[-1],
        "rank": _rule(rank),
        "which": "top",
        "settings": settings(options),
    }
    return core.svd_memory(json.dumps(plan))


def leading(
    name: str,
    shape: Sequence[int],
    terms: Sequence[Json],
    operands: Operands,
    rank: Rank,
    options: RunOptions,
    number: int | None = None,
) -> Triplets:
    """The leading triplets of a sum of terms with the given shape [rows, columns], or of matrix
    ``number`` of a stack [E, rows, columns].

    A sum of low-rank parts whose ranks together are less than a side has is taken apart from the
    factors side by side, in float32, by QR and a small SVD; the matrix is never made. There
    ``"auto"`` keeps all but rounding, since no noise of storage is in it. A single row or column is
    kept whole by ``"auto"``: random signs leave its one singular value as it is, so nothing tells
    it from noise.

    Raises:
        NonFiniteError: NaN or infinity, or factors that float32 cannot hold.
    """
    if rank == "auto" and min(shape[-2:]) == 1:
        rank = 1
    found = _side_by_side(name, terms, operands, number)
    rows, columns = shape[-2:]
    if found is not None and found[1].shape[0] <= min(rows, columns):
        u, v = found
        size = rows, columns, v.shape[0]
        rule = {"error": 1e-6} if rank == "auto" else _rule(rank)
        turned = np.ascontiguousarray(v.T)
        best = recompress(name, u.tobytes(), turned.tobytes(), size, rule=rule)
    else:
        matrix: Json = {
            "name": name,
            "shape": list(shape),
            "number": number,
            "terms": list(terms),
        }
        best = svd(matrix, operands, rule=_rule(rank), options=options)
    u, s, vt = (np.asarray(memoryview(part)) for part in (best.u, best.s, best.vt))
    return Triplets(u, s, vt, best.squares)


def _rule(rank: Rank) -> object:
    return rank_rule(None, energy=rank) if isinstance(rank, float) else rank_rule(rank)


def _side_by_side(
    name: str, terms: Sequence[Json], operands: Operands, number: int | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """``u`` [rows, k] and ``v`` [k, columns] whose product is the sum, where every part has
    factors."""
    us, vs = [], []
    for term in terms:
        factors = None if "control" in term else _factors(term, operands, number)
        if factors is None:
            return None
        coefficient = float(str(term["coefficient"]))
        left, right = coefficient * factors[0], factors[1]
        if not (_fits(left) and _fits(right)):
            # The elements will do, or tell where they are not finite, and in which file.
            return None
        us.append(left.astype(np.float32))
        vs.append(right.astype(np.float32))
    return (np.hstack(us), np.vstack(vs)) if us else None


def _fits(factor: NDArray[np.float64]) -> bool:
    """Whether float32 holds what a factor is: it is finite, and neither too large nor too small."""
    largest = np.abs(factor).max(initial=0.0)
    return bool(largest == 0 or 1e-30 < largest < 1e30)


def _factors(
    term: Json, operands: Operands, number: int | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Two factors whose product a term is, but for its coefficient."""
    source = term.get("source")
    stored, product = _at(source, "stored"), _at(source, "product")
    if stored is not None:
        folder, name = _operand(stored, operands)
        row = folder.row(name) if isinstance(folder, VectorFolder) else {}
        if not isinstance(folder, VectorFolder) or row.get("encoding") != "lowrank":
            return None
        parts = row.get("parts")
        u, s, v = (
            _floats(folder.part(str(_at(_at(parts, role), "entry"))), number)
            for role in ("u", "s", "v")
        )
        if number is not None:
            filled = s != 0
            u, s, v = u[:, filled], s[filled], v[filled]
        with np.errstate(over="ignore", invalid="ignore"):
            return u * s, v
    if _at(product, "a") is None or number is not None:
        return None
    a, b = (
        _floats(folder.handle.tensor(name))
        for folder, name in (_operand(_at(product, part), operands) for part in ("a", "b"))
        if isinstance(folder, AdapterFolder)
    )
    left, right = (a.T, b.T) if _at(product, "transposed") else (b, a)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(str(_at(product, "scale"))) * left, right


def _at(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _operand(ref: object, operands: Operands) -> tuple[Folder, str]:
    return operands.folders[int(str(_at(ref, "operand")))], str(_at(ref, "name"))


def _floats(tensor: core.Tensor, number: int | None = None) -> NDArray[np.float64]:
    """The values of a tensor, or of matrix ``number`` of a stack: of the others nothing is read."""
    kind = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}.get(tensor.dtype, np.float64)
    stored = np.frombuffer(memoryview(tensor).cast("B"), kind).reshape(tensor.shape)
    values = stored if number is None else stored[number]
    if tensor.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64, copy=False)
