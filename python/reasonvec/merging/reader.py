"""The parameters of a merge at one tensor, from the narrowest level that has them."""

from __future__ import annotations

from dataclasses import dataclass

from reasonvec.errors import ReasonvecError
from reasonvec.merging.method import Numerics
from reasonvec.merging.parameters import Place, evaluate
from reasonvec.merging.slices import OpenedModel, Settings
from reasonvec.names import is_matrix

__all__ = ["TensorReader"]


@dataclass(frozen=True, slots=True)
class TensorReader:
    """The parameters of one tensor; see `reasonvec.merging.method.Reader`."""

    models: list[OpenedModel]
    levels: list[Settings]
    place: Place
    dimensions: int
    ramp: float
    numerics: Numerics
    seed: int
    steps: str | None
    """The format that every step is rounded to, if any."""
    usual_weight: float | None

    @property
    def matrix(self) -> bool:
        return is_matrix(self.place.name, self.dimensions)

    def value(self, key: str, default: float, model: int | None = None) -> float:
        levels = self.levels if model is None else [self.models[model].settings, *self.levels]
        return evaluate([level.get(key) for level in levels], self.place, default)

    def weight(self, model: int) -> float:
        levels = [self.models[model].settings, *self.levels]
        usual = float("nan") if self.usual_weight is None else self.usual_weight
        found = evaluate([level.get("weight") for level in levels], self.place, usual)
        if found != found:
            message = (
                f"{self.models[model].input.label} has no weight: give it one under its "
                "parameters, or one for all under the parameters of the whole"
            )
            raise ReasonvecError(message)
        return found if self.steps is None else _rounded(found, self.steps)


def _rounded(value: float, dtype: str) -> float:
    """A number as a tensor of 16 bits holds it."""
    import numpy as np

    if dtype == "F16":
        return float(np.float16(value))
    bits = int(np.float32(value).view(np.uint32))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return float(np.uint32(bits & 0xFFFFFFFF).view(np.float32))
