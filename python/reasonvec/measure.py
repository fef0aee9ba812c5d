"""Quantities measured in one pass: norms, products, counts, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

from reasonvec import _reasonvec as core
from reasonvec.json_values import Json
from reasonvec.run import RunOptions, settings
from reasonvec.terms import Operands

__all__ = ["Measured", "Quantities", "measure"]

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class Quantities:
    """Things with as many elements as each other, each a list of core terms."""

    name: str
    elements: int
    terms: Sequence[list[Json]]


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a tensor with k quantities: ``gram[i][j]`` sums of products, ``moved[i]`` non-zero
    elements, ``max[i]`` largest magnitudes at ``max_at[i]``, ``both[i][j]`` positions where both
    are non-zero, ``agree[i][j]`` those of them with the same sign."""

    name: str
    gram: list[list[float]]
    moved: list[int]
    max: list[float]
    max_at: list[int | None]
    both: list[list[int]]
    agree: list[list[int]]

    def norm(self, i: int) -> float:
        return math.sqrt(self.gram[i][i])

    def cosine(self, i: int, j: int) -> float | None:
        """None where one of the two is zero."""
        length = self.norm(i) * self.norm(j)
        return self.gram[i][j] / length if length > 0 else None

    @classmethod
    def total(cls, name: str, parts: Iterable[Measured]) -> Measured:
        """Several tensors as one; ``max_at`` says nothing then."""
        rows = list(parts)
        if not rows:
            return cls(name, [], [], [], [], [], [])
        k = range(len(rows[0].moved))
        return cls(
            name,
            [[math.fsum(r.gram[i][j] for r in rows) for j in k] for i in k],
            [sum(r.moved[i] for r in rows) for i in k],
            [max(r.max[i] for r in rows) for i in k],
            [None for _ in k],
            [[sum(r.both[i][j] for r in rows) for j in k] for i in k],
            [[sum(r.agree[i][j] for r in rows) for j in k] for i in k],
        )


def measure(
    tensors: Sequence[Quantities],
    operands: Operands,
    options: RunOptions,
    *,
    allow_nonfinite: bool = False,
) -> list[Measured]:
    """Measure every quantity and every pair of them."""
    plan: Json = {
        "tensors": [
            {"name": t.name, "elements": t.elements, "quantities": list(t.terms)} for t in tensors
        ],
        "allow_nonfinite": allow_nonfinite,
    } | settings(options)
    rows: list[_Row] = json.loads(
        core.measure(json.dumps(plan), operands.handles, options.get("progress"))
    )
    return [_measured(row) for row in rows]


class _Row(TypedDict):
    """One tensor, as the core reports it: squares line by line, None where a sum is not finite."""

    name: str
    gram: list[float | None]
    moved: list[int]
    max: list[float | None]
    max_at: list[int | None]
    both: list[int]
    agree: list[int]


def _measured(row: _Row) -> Measured:
    k = len(row["moved"])

    def square(flat: list[_Number]) -> list[list[_Number]]:
        return [flat[i * k : (i + 1) * k] for i in range(k)]

    return Measured(
        row["name"],
        square(_numbers(row["gram"])),
        row["moved"],
        _numbers(row["max"]),
        row["max_at"],
        square(row["both"]),
        square(row["agree"]),
    )


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
