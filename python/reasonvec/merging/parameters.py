"""Parameters of a merge, evaluated tensor by tensor: numbers, gradients over layers, rules by name.

A parameter of the Python API is a number, a list (a gradient over the layers), a mapping from
regular expressions to either, or a function of the tensor's name. One of a mergekit YAML is a
number, a list, or conditions with plain substrings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from reasonvec.coefficients import pattern
from reasonvec.errors import ReasonvecError

__all__ = [
    "Conditions",
    "Parameter",
    "Place",
    "Setting",
    "evaluate",
    "gradient",
    "setting",
]

Level: TypeAlias = float | Sequence[float]
Parameter: TypeAlias = Level | Mapping[str, Level] | Callable[[str], float]
"""What the Python API takes: 0.5, ``[0.0, 1.0]``, ``{"self_attn": 0.3}``, ``lambda name: ...``."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: its name, and how far through the layers it is, from 0 to 1.

    Embeddings, the final norm and the head stand at 0, where mergekit puts them; ``after`` says
    which of them come behind the layers."""

    name: str
    depth: float = 0.0
    after: bool = False


@dataclass(frozen=True, slots=True)
class Conditions:
    """Values by substrings of the tensor's name; the first that fits wins, "*" fits all."""

    rules: tuple[tuple[str | None, float | tuple[float, ...]], ...]

    def __call__(self, place: Place) -> float | None:
        for text, value in self.rules:
            if text is None or text == "*" or text in place.name:
                return value if isinstance(value, float) else gradient(value, place.depth)
        return None

    @property
    def text(self) -> str:
        return "; ".join(
            _level_text(value) if text is None else f"{text}: {_level_text(value)}"
            for text, value in self.rules
        )


@dataclass(frozen=True, slots=True)
class _Rules:
    """Values by regular expressions; the last that fits wins, as in `Vector.alpha_for`."""

    rules: tuple[tuple[re.Pattern[str], float | tuple[float, ...]], ...]

    def __call__(self, place: Place) -> float | None:
        found: float | None = None
        for regex, value in self.rules:
            if regex.search(place.name):
                found = value if isinstance(value, float) else gradient(value, place.depth)
        return found

    @property
    def text(self) -> str:
        return "; ".join(f"{regex.pattern}: {_level_text(value)}" for regex, value in self.rules)


@dataclass(frozen=True, slots=True)
class _Function:
    function: Callable[[str], float]

    def __call__(self, place: Place) -> float | None:
        return float(self.function(place.name))

    @property
    def text(self) -> str:
        return f"{getattr(self.function, '__name__', 'function')}(name)"


Setting: TypeAlias = Conditions | _Rules | _Function
"""A parameter that has been checked: gives a number for a place, or None where it has none."""


def gradient(values: Sequence[float], depth: float) -> float:
    """A list stretched over the layers, straight lines between its values.

    Examples:
        >>> gradient([0.0, 1.0, 0.0], 0.25)
        0.5
    """
    at = depth * (len(values) - 1)
    low = min(int(at), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    share = at - low
    return (1.0 - share) * values[low] + share * values[high]


def setting(value: Parameter, label: str) -> Setting:
    """Check a parameter of the Python API.

    Raises:
        ReasonvecError: it is neither a finite number, nor a list, mapping or function of them.
    """
    if isinstance(value, Mapping):
        return _Rules(tuple((pattern(key), _level(v, label)) for key, v in value.items()))
    if callable(value):
        return _Function(value)
    return Conditions(((None, _level(value, label)),))


def evaluate(settings: Sequence[Setting | None], place: Place, default: float) -> float:
    """The value at a place: of the first setting, the narrowest, that has one there."""
    for said in settings:
        if said is not None and (value := said(place)) is not None:
            return value
    return default


def _level(value: object, label: str) -> float | tuple[float, ...]:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, (list, tuple)) and value:
        return tuple(_number(part, label) for part in value)
    return _number(value, label)


def _number(value: object, label: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type] # numpy scalars are numbers too
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        message = (
            f"{label}: expected a finite number, a list of them (a gradient over the layers), "
            f"a mapping from regular expressions, or a function of the name; found {value!r}"
        )
        raise ReasonvecError(message)
    return number


def _level_text(value: float | tuple[float, ...]) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(f'{part:g}' for part in value)}]"
