"""Gram methods: the coefficients come out of the Gram matrix of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reasonvec.errors import ReasonvecError
from reasonvec.json_values import Json
from reasonvec.merging.method import BaseRule, Method, Reader, zero_floor
from reasonvec.merging.parameters import Parameter

__all__ = ["Karcher", "ModelStock", "Multislerp", "Nuslerp", "Slerp"]

# What converges at all has done so long before.
_ROUNDS = 10_000


@dataclass(frozen=True, slots=True)
class Slerp(Method):
    """The great circle from a to b (Shoemake 1985), of the flattened tensors."""

    name: ClassVar[str] = "slerp"
    base: ClassVar[BaseRule] = "model"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    t: Parameter | None = None

    def plan(self, read: Reader, models: int) -> Json:
        return {"kind": "slerp", "t": self.asked(read, "t")}


@dataclass(frozen=True, slots=True)
class Nuslerp(Method):
    """Slerp at ``t = w_2 / (w_1 + w_2)``, of the models or of their task vectors; flattened, or row
    by row (``nuslerp_row_wise`` false, as mergekit has it) or column by column."""

    name: ClassVar[str] = "nuslerp"
    base: ClassVar[BaseRule] = "optional"
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    weighted: ClassVar[bool] = True
    nuslerp_flatten: Parameter = True
    nuslerp_row_wise: Parameter = False

    def plan(self, read: Reader, models: int) -> Json:
        if read.weight(0) + read.weight(1) == 0.0:
            raise ReasonvecError("nuslerp: the two weights sum to 0, and t is a share of their sum")
        # What mergekit calls row-wise normalises along the rows' dimension: its vectors are the
        # columns. A bias is one vector either way.
        return {
            "kind": "nuslerp",
            "row_wise": not self.flag(read, "nuslerp_row_wise"),
            "flatten": read.dimensions < 2 or self.flag(read, "nuslerp_flatten"),
        }


@dataclass(frozen=True, slots=True)
class Multislerp(Method):
    """The barycentre on the sphere, in the tangent space at the weighted mean, times the weighted
    mean of the norms."""

    name: ClassVar[str] = "multislerp"
    base: ClassVar[BaseRule] = "optional"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    weighted: ClassVar[bool] = True
    normalize_weights: Parameter = True
    eps: Parameter = 1e-8

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "multislerp",
            "normalize_weights": self.flag(read, "normalize_weights"),
            "eps": self.number(read, "eps"),
        }


@dataclass(frozen=True, slots=True)
class Karcher(Method):
    """The Riemannian mean of the unit vectors, times the mean of the norms."""

    name: ClassVar[str] = "karcher"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    max_iter: Parameter = 10
    tol: Parameter = 1e-5

    def plan(self, read: Reader, models: int) -> Json:
        rounds = self.number(read, "max_iter")
        if not 1 <= rounds <= _ROUNDS or rounds != int(rounds):
            message = f"max_iter is {rounds:g}, expected a whole number from 1 to {_ROUNDS}"
            raise ReasonvecError(message)
        return {"kind": "karcher", "max_iter": int(rounds), "tol": self.number(read, "tol")}


@dataclass(frozen=True, slots=True)
class ModelStock(Method):
    """Between the base and the mean of the models, by the angle between them (arXiv 2403.19522)."""

    name: ClassVar[str] = "model_stock"
    base: ClassVar[BaseRule] = "needed"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    filter_wise: Parameter = False

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "model_stock",
            "filter_wise": self.flag(read, "filter_wise"),
            **zero_floor(read),
        }
