"""Spectral methods: by the singular vectors of the task vectors of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reasonvec.errors import ReasonvecError
from reasonvec.json_values import Json
from reasonvec.merging.method import BaseRule, Coefficients, Method, Reader
from reasonvec.merging.parameters import Parameter

__all__ = ["IsoC", "IsoCts", "Knots", "Normalised", "Spectral", "Star", "SubspaceBoosting", "TsvM"]


@dataclass(frozen=True, slots=True)
class Spectral(Method):
    """A method for matrices. What is none (norms, biases), and the vocabulary's, whose rows are
    tokens, gets the mean of the task vectors, times ``lambda``."""

    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    usual_weight: ClassVar[float | None] = 1.0
    mean: ClassVar[bool] = True
    """Whether the weights are divided by their sum where the method proper is not used."""

    def aside(self, read: Reader, models: int) -> Coefficients | None:
        if read.matrix:
            return None
        weights = self.weights(read, models)
        scale = self.number(read, "lambda")
        return Coefficients([scale * w / _total(weights, self.mean) for w in weights], True)


@dataclass(frozen=True, slots=True)
class Normalised(Spectral):
    """A spectral method whose weights are divided by their sum only if ``normalize``."""

    def aside(self, read: Reader, models: int) -> Coefficients | None:
        if read.matrix:
            return None
        scale = self.number(read, "lambda") / self.total(read, models)
        return Coefficients([scale * w for w in self.weights(read, models)], True)

    def total(self, read: Reader, models: int) -> float:
        """What the weights are divided by."""
        return _total(self.weights(read, models), self.flag(read, "normalize"))


def _total(weights: Sequence[float], mean: bool) -> float:
    if not mean:
        return 1.0
    if sum(weights) == 0.0:
        raise ReasonvecError("the weights sum to 0, so there is no mean: give other weights")
    return sum(weights)


@dataclass(frozen=True, slots=True)
class IsoC(Spectral):
    """The sum of the task vectors with all singular values set to their mean (arXiv 2502.04959)."""

    name: ClassVar[str] = "iso_c"
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {"kind": "iso_c", "lambda": self.number(read, "lambda")}


@dataclass(frozen=True, slots=True)
class IsoCts(Spectral):
    """As `IsoC`, with a share ``common`` of the directions from the sum and the others from the
    single tasks (arXiv 2502.04959)."""

    name: ClassVar[str] = "iso_cts"
    common: Parameter = 0.8
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "iso_cts",
            "common": self.share(read, "common"),
            "lambda": self.number(read, "lambda"),
        }


@dataclass(frozen=True, slots=True)
class TsvM(Spectral):
    """The first singular vectors of every task, a share ``rank`` of them each (if nothing is said,
    1 / models), made orthogonal to each other (arXiv 2412.00081)."""

    name: ClassVar[str] = "tsv_m"
    rank: Parameter | None = None
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        rank = self.number(read, "rank")
        if not math.isnan(rank) and not 0.0 < rank <= 1.0 / models + 1e-9:
            message = (
                f"rank is {rank:g} for each of {models} models, expected a share of the directions "
                f"above 0 and at most 1 / {models}"
            )
            raise ReasonvecError(message)
        return {
            "kind": "tsv_m",
            "rank": None if math.isnan(rank) else rank,
            "lambda": self.number(read, "lambda"),
        }


@dataclass(frozen=True, slots=True)
class Star(Normalised):
    """Task vectors cut to the first singular values that make up a share ``eta`` of their sum, or
    to the first ``rank``, rescaled to the sum that they had, then averaged (arXiv 2502.10339)."""

    name: ClassVar[str] = "star"
    eta: Parameter = 0.4
    rank: Parameter | None = None
    normalize: Parameter = True
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        rank = self.number(read, "rank")
        if not math.isnan(rank) and (rank < 1 or rank != int(rank)):
            raise ReasonvecError(f"rank is {rank:g}, expected a whole number from 1")
        return {
            "kind": "star",
            "eta": self.share(read, "eta"),
            "rank": None if math.isnan(rank) else int(rank),
            "lambda": self.number(read, "lambda") / self.total(read, models),
        }


@dataclass(frozen=True, slots=True)
class SubspaceBoosting(Spectral):
    """The weighted sum of the task vectors with small singular values raised: to the one at which
    the sum of those so far reaches a share ``beta`` of all (arXiv 2506.16506). On top of another
    method: with that merge as the only model."""

    name: ClassVar[str] = "subspace_boosting"
    mean: ClassVar[bool] = False
    beta: Parameter = 0.01
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "boost",
            "beta": self.share(read, "beta"),
            "lambda": self.number(read, "lambda"),
        }


@dataclass(frozen=True, slots=True)
class Knots(Normalised):
    """TIES in the space that the task vectors side by side span (arXiv 2410.19735); where there is
    no matrix, TIES. Without ``elect`` no signs are elected."""

    name: ClassVar[str] = "knots"
    by_model: ClassVar[frozenset[str]] = frozenset({"density"})
    density: Parameter = 1.0
    elect: Parameter = True
    normalize: Parameter = True
    lambda_: Parameter = 1.0

    def aside(self, read: Reader, models: int) -> Coefficients | None:
        # With signs elected it is TIES, of which there is a plan.
        return None if self.flag(read, "elect") else Normalised.aside(self, read, models)

    def plan(self, read: Reader, models: int) -> Json:
        shared: Json = {
            "density": self.shares(read, "density", models),
            "normalize": self.flag(read, "normalize"),
            "lambda": self.number(read, "lambda"),
        }
        if not read.matrix:
            return {"kind": "ties", **shared}
        return {"kind": "knots", "elect": self.flag(read, "elect"), **shared}
