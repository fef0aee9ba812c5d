"""What a merge method is: its parameters and defaults, what inputs it needs, and its plan.

One frozen class a method. Numbers may differ by layer and by tensor name; what a class says is its
own parameters' values where nothing narrower (a slice, a model) says another. The formulas are in
`reasonvec.reference` and in docs; the arithmetic is the core's.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, Protocol, TypeAlias

from reasonvec.errors import ReasonvecError
from reasonvec.json_values import Json
from reasonvec.merging.parameters import Parameter

__all__ = [
    "BaseRule",
    "Coefficients",
    "Method",
    "Numerics",
    "Reader",
    "field_keys",
    "zero_floor",
]

BaseRule: TypeAlias = Literal["needed", "optional", "model", "none"]
"""What a base is to a method: what task vectors are taken from ("needed", "optional"), its first
model ("model"), or one more model ("none")."""

Numerics: TypeAlias = Literal["default", "mergekit"]


class Reader(Protocol):
    """The parameters of one tensor."""

    @property
    def numerics(self) -> Numerics:
        """Whose numerics."""

    @property
    def seed(self) -> int:
        """Of everything random."""

    @property
    def dimensions(self) -> int:
        """Of the tensor."""

    @property
    def matrix(self) -> bool:
        """Whether it is a matrix or a stack of experts, and not the vocabulary's."""

    @property
    def ramp(self) -> float:
        """How deep the tensor is, from 0 (embeddings, the first layer) to 1 (the last layer, the
        final norm, the head)."""

    def value(self, key: str, default: float, model: int | None = None) -> float:
        """A parameter's number here, of one model or of the whole."""

    def weight(self, model: int) -> float:
        """The weight of a model here."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """A linear method at one tensor: a coefficient for every model, or for every difference from
    the base that is then added to."""

    values: list[float]
    differences: bool = False


@dataclass(frozen=True, slots=True)
class Method(ABC):
    """What all methods have. ``models`` are the fewest and the most that it takes, the base of a
    "needed" or "optional" rule not counted; ``stepwise``: mergekit rounds the weights and every
    step to the working dtype, as its runs show."""

    name: ClassVar[str]
    base: ClassVar[BaseRule] = "none"
    models: ClassVar[tuple[int, int | None]] = (1, None)
    weighted: ClassVar[bool] = False
    stepwise: ClassVar[bool] = False
    usual_weight: ClassVar[float | None] = None
    """The weight of a model that is given none; without one, that is an error."""
    by_model: ClassVar[frozenset[str]] = frozenset()
    """The parameters, weights aside, that every model may have a value of its own for."""

    def parameters(self) -> dict[str, Parameter]:
        """What this instance says itself, by the names that a YAML has."""
        said: dict[str, Parameter] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                said[_key(field.name)] = value
        return said

    # The parameters at one tensor, for the plans.

    def number(self, read: Reader, key: str, model: int | None = None) -> float:
        """A number, of one model or of the whole; NaN where nobody says one and the class has no
        default."""
        return read.value(key, _defaults(type(self))[key], model)

    def flag(self, read: Reader, key: str) -> bool:
        """Yes or no."""
        return self.number(read, key) != 0.0

    def share(self, read: Reader, key: str, model: int | None = None) -> float:
        """A number from 0 to 1.

        Raises:
            ReasonvecError: it is none.
        """
        value = self.number(read, key, model)
        if not 0.0 <= value <= 1.0:
            message = f"{key} is {value:g}, expected a share from 0 to 1"
            raise ReasonvecError(message)
        return value

    def shares(self, read: Reader, key: str, models: int) -> list[float]:
        """`share`, of every model."""
        return [self.share(read, key, model) for model in range(models)]

    def asked(self, read: Reader, key: str) -> float:
        """A number that has no default.

        Raises:
            ReasonvecError: nobody says it.
        """
        value = self.number(read, key)
        if math.isnan(value):
            raise ReasonvecError(f"{self.name}: needs the parameter {key}, which is nowhere given")
        return value

    def weights(self, read: Reader, models: int) -> list[float]:
        """The weights of all models."""
        return [read.weight(model) for model in range(models)]

    @abstractmethod
    def plan(self, read: Reader, models: int) -> Json:
        """The core's plan of one tensor.

        Raises:
            ReasonvecError: a parameter is out of its range.
        """

    def aside(self, read: Reader, models: int) -> Coefficients | None:
        """What it is at a tensor that the method proper is not for, if that is a weighted sum."""
        return None

    def check(self, models: int) -> str | None:
        """What is wrong with this number of models, or None."""
        fewest, most = self.models
        if models >= fewest and (most is None or models <= most):
            return None
        wanted = (
            f"exactly {fewest}"
            if most == fewest
            else f"at least {fewest}"
            if most is None
            else f"{fewest} to {most}"
        )
        besides = " besides the base" if self.base in {"needed", "model"} else ""
        plural = "" if wanted.endswith(" 1") else "s"
        return f"{self.name}: needs {wanted} model{plural}{besides}, found {models}"


def _key(name: str) -> str:
    return name.removesuffix("_")


@cache
def _defaults(method: type[Method]) -> Mapping[str, float]:
    """What a parameter is where nobody says anything: NaN for none."""
    return {
        _key(field.name): float(field.default)
        if isinstance(field.default, (int, float))
        else math.nan
        for field in dataclasses.fields(method)
    }


def field_keys(method: type[Method]) -> frozenset[str]:
    """The parameters of a method, by the names that a YAML has."""
    own = {_key(field.name) for field in dataclasses.fields(method)}
    return frozenset(own | ({"weight"} if method.weighted else set()))


def zero_floor(read: Reader) -> Json:
    """The part of a plan that says what counts as zero."""
    # What mergekit takes for zero: products of norms (model_stock), mean squares (sce).
    return {"floor": 1e-6} if read.numerics == "mergekit" else {}
