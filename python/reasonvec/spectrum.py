"""Singular values of the matrices of an expression, and how many stand out of noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from reasonvec import _reasonvec as core
from reasonvec.inspection import in_order
from reasonvec.json_values import Json
from reasonvec.matrices import Matrices
from reasonvec.names import kind_of, layer_of
from reasonvec.run import RunOptions, settings, steps
from reasonvec.svd import check_seed

__all__ = ["Spectra", "TensorSpectrum", "spectra", "typical"]

_Key = TypeVar("_Key", bound=Hashable)


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
    what: Literal["vector", "checkpoint"]
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
            "what": self.what,
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
    check_seed(seed)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        message = f"count is a number of singular values from 1 on, or None for all, not {count!r}"
        raise ValueError(message)
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
    return Spectra(matrices.title, matrices.what, tuple(rows), skipped)


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
