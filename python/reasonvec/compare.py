"""Two vectors side by side: cosine, sign agreement, overlap of what moved, by layer and module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from reasonvec.algebra import Vector
from reasonvec.compat.problem import Problem, demand
from reasonvec.errors import MismatchError
from reasonvec.json_values import Json
from reasonvec.measure import Measured, Quantities, measure
from reasonvec.names import kind_of, layer_of
from reasonvec.run import RunOptions
from reasonvec.terms import Operands, elements, leaf_layout, vector_quantity

__all__ = ["Comparison", "Pair", "compare"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two vectors over some tensors. ``overlap`` is the share of the elements that either moved
    which both moved; ``sign_agreement`` the share of those that both moved the same way. None where
    nothing moved."""

    cosine: float | None
    sign_agreement: float | None
    overlap: float | None
    first_norm: float
    second_norm: float
    first_moved: int
    second_moved: int
    both_moved: int

    @classmethod
    def of(cls, row: Measured) -> Pair:
        both, agree = row.both[0][1], row.agree[0][1]
        either = row.moved[0] + row.moved[1] - both
        return cls(
            row.cosine(0, 1),
            agree / both if both else None,
            both / either if either else None,
            row.norm(0),
            row.norm(1),
            row.moved[0],
            row.moved[1],
            both,
        )

    def as_json(self) -> Json:
        return {
            "cosine": self.cosine,
            "sign_agreement": self.sign_agreement,
            "overlap": self.overlap,
            "norms": [self.first_norm, self.second_norm],
            "moved": [self.first_moved, self.second_moved],
            "both_moved": self.both_moved,
        }


@dataclass(frozen=True)
class Comparison:
    """Two vectors, compared."""

    first: str
    second: str
    rows: list[Measured]

    @property
    def total(self) -> Pair:
        return Pair.of(Measured.total("total", self.rows))

    def by_kind(self) -> dict[str, Pair]:
        return _grouped(
            {
                kind: [r for r in self.rows if kind_of(r.name) == kind]
                for kind in dict.fromkeys(kind_of(r.name) for r in self.rows)
            }
        )

    def by_layer(self) -> dict[str, Pair]:
        layers = sorted({layer for r in self.rows if (layer := layer_of(r.name)) is not None})
        return _grouped({str(n): [r for r in self.rows if layer_of(r.name) == n] for n in layers})

    def tensors(self) -> dict[str, Pair]:
        return {row.name: Pair.of(row) for row in self.rows}

    def as_json(self) -> Json:
        return {
            "first": self.first,
            "second": self.second,
            "total": self.total.as_json(),
            "by_kind": {kind: pair.as_json() for kind, pair in self.by_kind().items()},
            "by_layer": {layer: pair.as_json() for layer, pair in self.by_layer().items()},
            "tensors": {name: pair.as_json() for name, pair in self.tensors().items()},
        }


def _grouped(groups: dict[str, list[Measured]]) -> dict[str, Pair]:
    return {name: Pair.of(Measured.total(name, rows)) for name, rows in groups.items()}


def compare(first: Vector, second: Vector, **options: Unpack[RunOptions]) -> Comparison:
    """Compare two vectors in one pass.

    Raises:
        MismatchError: they are not vectors of one architecture and size.
    """
    if not first.terms or not second.terms:
        message = "an empty vector (a point minus itself) cannot be compared"
        raise MismatchError(message)
    operands = Operands()
    layout = leaf_layout(first.terms[0].leaf)
    a, problems = vector_quantity(first, layout, operands)
    b, more = vector_quantity(second, layout, operands)
    problems += more
    for name in [*(set(a) - set(b)), *(set(b) - set(a))]:
        message = f"{name}: is in one of the two vectors only; compare vectors of one architecture"
        problems.append(Problem("missing", message, name))
    demand(problems)
    rows = measure(
        [Quantities(n, elements(layout.tensors[n].shape), [a[n], b[n]]) for n in a],
        operands,
        options,
    )
    return Comparison(str(first), str(second), rows)
