"""Linear methods: the coefficients are known before anything is read."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from reasonvec.errors import ReasonvecError
from reasonvec.json_values import Json
from reasonvec.merging.method import BaseRule, Coefficients, Method, Reader
from reasonvec.merging.parameters import Parameter

__all__ = ["Linear", "LinearMethod", "Lines", "Passthrough", "TaskArithmetic"]


@dataclass(frozen=True, slots=True)
class LinearMethod(Method):
    """A method whose coefficients depend on the tensor's place alone."""

    @abstractmethod
    def coefficients(self, read: Reader, models: int) -> Coefficients:
        """What each model, or its difference from the base, is multiplied by.

        Raises:
            ReasonvecError: the weights cannot be normalised.
        """

    def plan(self, read: Reader, models: int) -> Json:
        return {"kind": "linear"}


def _normalised(weights: list[float]) -> list[float]:
    total = sum(weights)
    if total == 0.0:
        message = (
            "the weights sum to 0, so they cannot be normalised: give other weights, or "
            "normalize: false"
        )
        raise ReasonvecError(message)
    if not math.isfinite(total):
        message = (
            f"the weights sum to {total:g}, so they cannot be normalised: give smaller weights of "
            "the same ratio"
        )
        raise ReasonvecError(message)
    return [weight / total for weight in weights]


@dataclass(frozen=True, slots=True)
class Linear(LinearMethod):
    """The weighted average (model soups, arXiv 2203.05482): ``sum w_i x_i``, over ``sum w_i`` if
    ``normalize``."""

    name: ClassVar[str] = "linear"
    weighted: ClassVar[bool] = True
    normalize: Parameter = True

    def coefficients(self, read: Reader, models: int) -> Coefficients:
        weights = self.weights(read, models)
        return Coefficients(_normalised(weights) if self.flag(read, "normalize") else weights)


@dataclass(frozen=True, slots=True)
class TaskArithmetic(LinearMethod):
    """``B + lambda sum w_i (x_i - B)`` (arXiv 2212.04089)."""

    name: ClassVar[str] = "task_arithmetic"
    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    normalize: Parameter = False
    lambda_: Parameter = 1.0

    def coefficients(self, read: Reader, models: int) -> Coefficients:
        weights, scale = self.weights(read, models), self.number(read, "lambda")
        if self.flag(read, "normalize"):
            weights = _normalised(weights)
        return Coefficients([scale * weight for weight in weights], differences=True)

    def plan(self, read: Reader, models: int) -> Json:
        # Nothing is dropped; but the steps are mergekit's, and can be rounded.
        return {
            "kind": "dare",
            "density": [1.0] * models,
            "normalize": self.flag(read, "normalize"),
            "lambda": self.number(read, "lambda"),
        }


@dataclass(frozen=True, slots=True)
class Lines(LinearMethod):
    """Task arithmetic whose scale grows with depth (LiNeS, arXiv 2410.17146):
    ``B + (alpha + beta l / (L - 1)) sum w_i (x_i - B)`` in layer l; embeddings take ``alpha``, the
    final norm and the head ``alpha + beta``."""

    name: ClassVar[str] = "lines"
    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    alpha: Parameter = 0.5
    beta: Parameter = 0.5

    def coefficients(self, read: Reader, models: int) -> Coefficients:
        scale = self.number(read, "alpha") + self.number(read, "beta") * read.ramp
        return Coefficients([scale * read.weight(i) for i in range(models)], differences=True)


@dataclass(frozen=True, slots=True)
class Passthrough(LinearMethod):
    """A copy, times ``scale``."""

    name: ClassVar[str] = "passthrough"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    scale: Parameter = 1.0

    def coefficients(self, read: Reader, models: int) -> Coefficients:
        return Coefficients([self.number(read, "scale", 0)])
