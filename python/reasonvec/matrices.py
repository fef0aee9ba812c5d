"""The matrices of an expression, as the core reads them: from the parts of a sum, never held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reasonvec.algebra import Point, Vector
from reasonvec.compat.layout import FLOATS
from reasonvec.compat.problem import demand
from reasonvec.errors import MismatchError
from reasonvec.json_values import Json
from reasonvec.terms import Operands, leaf_layout, place_term, vector_quantity

__all__ = ["Matrices", "point_matrices", "vector_matrices"]


@dataclass(frozen=True, slots=True)
class Matrices:
    """The matrices of an expression: what is summed, by tensor, and in which shapes."""

    title: str
    what: Literal["vector", "checkpoint"]
    operands: Operands
    shapes: dict[str, tuple[int, ...]]
    terms: dict[str, list[Json]]

    def plan(self, name: str, number: int | None) -> Json:
        """The core's name for one of them.

        Raises:
            MismatchError: there is no such matrix.
        """
        shape = self.shapes.get(name)
        if shape is None:
            message = f"{self.title}: has no float tensor {name!r}"
            raise MismatchError(message)
        if len(shape) not in {2, 3} or (len(shape) == 3) != (number is not None):
            advice = {2: "leave the number out", 3: "say which matrix of the stack: number=0"}
            message = (
                f"{self.title}: {name} has the shape {list(shape)}; singular values are those of a "
                f"matrix [m, n] or of one of a stack [E, m, n]: "
                f"{advice.get(len(shape), 'take another tensor')}"
            )
            raise MismatchError(message)
        if number is not None and not 0 <= number < shape[0]:
            message = (
                f"{self.title}: {name} has no matrix {number}; it is a stack of {shape[0]}, "
                "numbered from 0 on"
            )
            raise MismatchError(message)
        return {
            "name": name,
            "shape": list(shape),
            "number": number,
            "terms": self.terms[name],
        }

    def each(self) -> list[tuple[str, int | None]]:
        """Every matrix: name, and number in a stack."""
        found: list[tuple[str, int | None]] = []
        for name, shape in self.shapes.items():
            if 0 in shape:
                continue
            if len(shape) == 2:
                found.append((name, None))
            elif len(shape) == 3:
                found += [(name, i) for i in range(shape[0])]
        return found


def point_matrices(point: Point) -> Matrices:
    """The tensors of a checkpoint, with the vectors that are added to it, before any rounding.

    Raises:
        MismatchError: a vector does not fit.
    """
    operands = Operands()
    tensors = {n: t for n, t in point.base.layout.tensors.items() if t.dtype in FLOATS}
    terms: dict[str, list[Json]] = {
        n: [{"coefficient": 1.0, "source": {"tensor": operands.ref(point.base, n)}}]
        for n in tensors
    }
    for scaled in point.vector.terms:
        placed = place_term(scaled, point.base.layout, operands)
        demand(placed.problems)
        for name, term in placed.terms.items():
            terms[name].append(term)
    shapes = {name: info.shape for name, info in tensors.items()}
    return Matrices(str(point), "checkpoint", operands, shapes, terms)


def vector_matrices(vector: Vector) -> Matrices:
    """A vector's tensors.

    Raises:
        MismatchError: the vector is empty, or its parts have no sum.
    """
    if not vector.terms:
        message = "an empty vector (a point minus itself) has no singular values"
        raise MismatchError(message)
    operands = Operands()
    first = leaf_layout(vector.terms[0].leaf)
    quantities, problems = vector_quantity(vector, first, operands)
    demand(problems)
    shapes = {name: first.tensors[name].shape for name in quantities}
    return Matrices(str(vector), "vector", operands, shapes, quantities)
