"""What multiplies a vector, tensor by tensor: alpha, regular expressions, ramps over layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from reasonvec.errors import ReasonvecError
from reasonvec.names import kind_of, layer_of

__all__ = ["AlphaFor", "Constant", "Factor", "Function", "Ramp", "Where", "coefficient", "pattern"]


class Factor(Protocol):
    """One step on the way from 1 to a tensor's coefficient."""

    def __call__(self, alpha: float, name: str, layers: int) -> float:
        """The coefficient after this step, from the one before it, in a model that deep."""

    @property
    def text(self) -> str:
        """The step as a recipe shows it."""


def pattern(regex: str) -> re.Pattern[str]:
    """Compile a regular expression of the caller's.

    Raises:
        ReasonvecError: it is none, with the place where it breaks.
    """
    try:
        return re.compile(regex)
    except re.error as error:
        message = f"{regex!r} is no regular expression: {error}"
        raise ReasonvecError(message) from None


class Constant(NamedTuple):
    """Times a number."""

    value: float

    def __call__(self, alpha: float, name: str, layers: int) -> float:
        return alpha * self.value

    @property
    def text(self) -> str:
        return f"{self.value:g} *"


class AlphaFor(NamedTuple):
    """A number of its own for tensors whose name a regular expression finds; the last wins."""

    rules: tuple[tuple[re.Pattern[str], float], ...]

    @classmethod
    def of(cls, rules: Mapping[str, float]) -> AlphaFor:
        return cls(tuple((pattern(regex), float(value)) for regex, value in rules.items()))

    def __call__(self, alpha: float, name: str, layers: int) -> float:
        for regex, value in self.rules:
            if regex.search(name):
                alpha = value
        return alpha

    @property
    def text(self) -> str:
        return f"alpha_for({ {regex.pattern: value for regex, value in self.rules} })"


class Ramp(NamedTuple):
    """Times a straight line over depth (LiNeS, arXiv 2410.17146): ``first`` in layer 0, ``last`` in
    the last layer. What stands before the layers takes ``first``, what stands after them
    ``last``."""

    first: float
    last: float

    def __call__(self, alpha: float, name: str, layers: int) -> float:
        layer = layer_of(name)
        if layer is None:
            return alpha * (self.first if kind_of(name) == "embed" else self.last)
        t = layer / (layers - 1) if layers > 1 else 0.0
        return alpha * (self.first + (self.last - self.first) * t)

    @property
    def text(self) -> str:
        return f"ramp({self.first:g}, {self.last:g})"


class Where(NamedTuple):
    """Zero for tensors that are not wanted."""

    include: tuple[re.Pattern[str], ...]
    exclude: tuple[re.Pattern[str], ...]

    def wants(self, name: str) -> bool:
        if self.include and not any(regex.search(name) for regex in self.include):
            return False
        return not any(regex.search(name) for regex in self.exclude)

    def __call__(self, alpha: float, name: str, layers: int) -> float:
        return alpha if self.wants(name) else 0.0

    @property
    def text(self) -> str:
        include = [regex.pattern for regex in self.include]
        exclude = [regex.pattern for regex in self.exclude]
        said = [f"{k}={v}" for k, v in (("include", include), ("exclude", exclude)) if v]
        return f"where({', '.join(said)})"


class Function(NamedTuple):
    """Times whatever a function of the tensor's name says."""

    function: Callable[[str], float]

    def __call__(self, alpha: float, name: str, layers: int) -> float:
        return alpha * float(self.function(name))

    @property
    def text(self) -> str:
        return f"{getattr(self.function, '__name__', 'function')}(name) *"


def coefficient(factors: tuple[Factor, ...], name: str, layers: int) -> float:
    """The coefficient of a tensor.

    Raises:
        ReasonvecError: it is NaN or infinite.
    """
    alpha = 1.0
    for factor in factors:
        alpha = factor(alpha, name, layers)
    if not math.isfinite(alpha):
        steps = " ".join(factor.text for factor in factors)
        message = (
            f"the coefficient of {name} is {alpha}, expected a finite number; it was made by: "
            f"{steps}"
        )
        raise ReasonvecError(message)
    return alpha
