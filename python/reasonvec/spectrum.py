"""Singular values and vectors of the matrices of an expression, and what stands out of noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from reasonvec import _reasonvec as core
from reasonvec._reasonvec import Tensor
from reasonvec.algebra import Vector
from reasonvec.compat.layout import FLOATS
from reasonvec.compat.problem import demand
from reasonvec.errors import MismatchError
from reasonvec.folders import CheckpointFolder
from reasonvec.inspection import in_order
from reasonvec.json_values import Json
from reasonvec.names import kind_of, layer_of
from reasonvec.run import RunOptions, settings, steps
from reasonvec.terms import Operands, leaf_layout, vector_quantity

__all__ = [
    "Matrices",
    "Spectra",
    "Svd",
    "TensorSpectrum",
    "checkpoint_matrices",
    "rank_rule",
    "spectra",
    "svd",
    "typical",
    "vector_matrices",
]

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Svd:
    """Singular triplets of a matrix ``[m, n]``: ``u`` ``[m, r]``, ``s`` ``[r]`` (F64), ``vt``
    ``[r, n]``, singular values descending.

    ``norm`` is the matrix's Frobenius norm and ``residual`` that of what the triplets leave.
    ``floor``, where the rank was ``"auto"``, is the singular value that the others had to exceed.
    The tensors go to ``numpy.asarray`` and ``torch.from_dlpack`` without a copy.
    """

    name: str
    u: Tensor
    s: Tensor
    vt: Tensor
    rank: int
    norm: float
    residual: float
    floor: float | None


@dataclass(frozen=True, slots=True)
class Matrices:
    """The matrices of an expression: what is summed, by tensor, and in which shapes."""

    title: str
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


def checkpoint_matrices(folder: CheckpointFolder) -> Matrices:
    """A checkpoint's own tensors."""
    operands = Operands()
    operands.number(folder)
    tensors = {n: t for n, t in folder.layout.tensors.items() if t.dtype in FLOATS}
    terms: dict[str, list[Json]] = {
        n: [{"coefficient": 1.0, "source": {"tensor": operands.ref(folder, n)}}] for n in tensors
    }
    return Matrices(folder.path.name, operands, {n: t.shape for n, t in tensors.items()}, terms)


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
    return Matrices(str(vector), operands, shapes, quantities)


def rank_rule(
    rank: int | str | None, energy: float | None = None, error: float | None = None
) -> object:
    """The core's word for how many triplets to take.

    Raises:
        ValueError: not exactly one rule is given, or it makes no sense.
    """
    if sum(x is not None for x in (rank, energy, error)) != 1:
        message = "give one of rank=N, rank='auto', energy=SHARE and error=SHARE"
        raise ValueError(message)
    for key, share in (("energy", energy), ("error", error)):
        if share is not None:
            if not 0.0 <= share <= 1.0:
                message = f"{key} is a share from 0 to 1, not {share}"
                raise ValueError(message)
            return {key: float(share)}
    if rank == "auto":
        return "noise"
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        message = f"rank is a number of singular values or 'auto', not {rank!r}"
        raise ValueError(message)
    return {"fixed": rank}


def svd(
    matrices: Matrices,
    name: str,
    *,
    rule: object,
    number: int | None = None,
    which: str = "top",
    seed: int = 0,
    double: bool = False,
    options: RunOptions | None = None,
) -> Svd:
    """Singular triplets of one matrix; `Vector.svd` says what the arguments are."""
    options = {} if options is None else options
    plan = matrices.plan(name, number) | {
        "rank": rule,
        "which": which,
        "seed": seed,
        "settings": settings(options),
    }
    u, s, vt, said = core.svd(
        json.dumps(plan), matrices.operands.handles, options.get("progress"), double
    )
    rest: dict[str, float | None] = json.loads(said)
    return Svd(
        name if number is None else f"{name}[{number}]",
        u,
        s,
        vt,
        int(rest["rank"] or 0),
        math.sqrt(rest["squares"] or 0.0),
        rest["residual"] or 0.0,
        rest["floor"],
    )


@dataclass(frozen=True, slots=True)
class TensorSpectrum:
    """The leading singular values of a matrix against its noise floor.

    ``floor`` is the largest singular value of the same matrix with random signs, ``rank`` counts
    the values above it. Where ``complete``, ``values`` are all there are.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    values: tuple[float, ...]
    norm: float
    floor: float
    complete: bool

    @property
    def rank(self) -> int:
        return sum(value > self.floor for value in self.values)

    @property
    def stable_rank(self) -> float:
        """Sum of squares over the largest square: 1 for a rank-1 matrix, 0 for zero."""
        return (self.norm / self.values[0]) ** 2 if self.values and self.values[0] > 0 else 0.0

    @property
    def energy(self) -> float:
        """The share of the sum of squares that the values above the floor hold."""
        above = math.fsum(v * v for v in self.values if v > self.floor)
        return above / self.norm**2 if self.norm > 0 else 0.0

    def as_json(self) -> Json:
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": self.layer,
            "shape": list(self.shape),
            "rank": self.rank,
            "floor": self.floor,
            "norm": self.norm,
            "energy": self.energy,
            "stable_rank": self.stable_rank,
            "complete": self.complete,
            "values": list(self.values),
        }


@dataclass(frozen=True, slots=True)
class Spectra:
    """The spectra of an expression's matrices."""

    title: str
    tensors: tuple[TensorSpectrum, ...]
    skipped: tuple[str, ...]

    def grouped(
        self, key: Callable[[TensorSpectrum], _Key]
    ) -> dict[_Key, tuple[TensorSpectrum, ...]]:
        """Tensors by a key, in the order in which keys appear."""
        groups: dict[_Key, tuple[TensorSpectrum, ...]] = {}
        for row in self.tensors:
            groups[key(row)] = (*groups.get(key(row), ()), row)
        return groups

    def by_kind(self) -> dict[str, tuple[TensorSpectrum, ...]]:
        groups = self.grouped(lambda row: row.kind)
        return {kind: groups[kind] for kind in in_order(groups)}

    def by_layer(self) -> dict[int | None, tuple[TensorSpectrum, ...]]:
        return self.grouped(lambda row: row.layer)

    def as_json(self) -> Json:
        return {
            "title": self.title,
            "tensors": [row.as_json() for row in self.tensors],
            "skipped": list(self.skipped),
        }


def spectra(
    matrices: Matrices,
    *,
    count: int | None = 64,
    seed: int = 0,
    select: Callable[[str], bool] = lambda _: True,
    options: RunOptions | None = None,
) -> Spectra:
    """Leading singular values (``count`` of them, None for all) and noise floors, matrix by matrix.

    A matrix of which more than ``count`` values exceed the floor gives all of its values.
    """
    options = {} if options is None else options
    rows = []
    chosen = [(name, number) for name, number in matrices.each() if select(name)]
    sizes = [math.prod(matrices.shapes[name][-2:]) for name, _ in chosen]
    for (name, number), part in zip(chosen, steps(options, sizes), strict=True):
        shape = matrices.shapes[name]
        small = min(shape[-2:])
        many = None if count is None or count >= small else count
        row = _spectrum(matrices, name, number, many, seed, part)
        if many is not None and row.rank >= many:
            row = _spectrum(matrices, name, number, None, seed, part)
        rows.append(row)
    skipped = tuple(n for n, s in matrices.shapes.items() if len(s) not in {2, 3} and select(n))
    return Spectra(matrices.title, tuple(rows), skipped)


def _spectrum(
    matrices: Matrices,
    name: str,
    number: int | None,
    count: int | None,
    seed: int,
    options: RunOptions,
) -> TensorSpectrum:
    plan = matrices.plan(name, number) | {
        "count": count,
        "floor": True,
        "seed": seed,
        "settings": settings(options),
    }
    said = core.spectrum(json.dumps(plan), matrices.operands.handles, options.get("progress"))
    found = json.loads(said)
    rows, columns = matrices.shapes[name][-2:]
    return TensorSpectrum(
        name if number is None else f"{name}[{number}]",
        kind_of(name),
        layer_of(name),
        (rows, columns),
        tuple(found["values"]),
        math.sqrt(found["squares"]),
        found["floor"],
        count is None,
    )


def typical(values: Iterable[float]) -> float:
    """The median; 0 of nothing."""
    ordered: Sequence[float] = sorted(values)
    if not ordered:
        return 0.0
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
