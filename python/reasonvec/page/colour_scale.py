"""A colour scale whose every boundary is a round number that can be printed beside it.

A continuous scale cannot be read back: the eye does not resolve it. Nine or fewer steps with
labelled boundaries can, on paper too. Steps are even where the values lie within a factor of
twelve, and even in the logarithm (1-2-5, 1-3 or whole decades) where they do not.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

STEPS = 9

# Even in OKLCH lightness, sand to indigo, so that order survives colour blindness and grey
# printing. The dark scheme runs the other way: what is small recedes into the background.
LIGHT = (
    ("#f9f2c4", "#000000"),
    ("#cadda5", "#000000"),
    ("#92c996", "#000000"),
    ("#53b293", "#000000"),
    ("#049795", "#000000"),
    ("#00788d", "#ffffff"),
    ("#005983", "#ffffff"),
    ("#173877", "#ffffff"),
    ("#241858", "#ffffff"),
)
DARK = (
    ("#322b66", "#ffffff"),
    ("#294783", "#ffffff"),
    ("#006698", "#ffffff"),
    ("#0b839b", "#000000"),
    ("#00a0a1", "#000000"),
    ("#49bb9c", "#000000"),
    ("#88d097", "#000000"),
    ("#c3e29a", "#000000"),
    ("#f7f3ac", "#000000"),
)


@dataclass(frozen=True, slots=True)
class Scale:
    """Boundaries of the steps, upwards; ``len(edges) - 1`` steps, at most nine."""

    edges: tuple[Decimal, ...]
    logarithmic: bool

    @classmethod
    def over(cls, values: Iterable[float]) -> Scale | None:
        """A scale that covers the finite values above zero; None when there are none."""
        positive = [x for x in values if math.isfinite(x) and x > 0]
        if not positive:
            return None
        low, high = min(positive), max(positive)
        if high / 12 > low:
            return cls(_decades(low, high), logarithmic=True)
        return cls(_even(low, high), logarithmic=False)

    @property
    def steps(self) -> int:
        """How many steps the scale has."""
        return len(self.edges) - 1

    def step(self, value: float) -> int:
        """The step a value falls in, 0 upwards; a value on a boundary belongs to the upper."""
        found = bisect_right(self.edges, Decimal(value)) - 1
        return min(max(found, 0), self.steps - 1)

    def shade(self, step: int) -> int:
        """Which of the ``STEPS`` colours paints a step: the first and last are always used."""
        return STEPS // 2 if self.steps == 1 else round(step * (STEPS - 1) / (self.steps - 1))

    def labels(self) -> tuple[str, ...]:
        """The boundaries as text, exact."""
        return tuple(_plain(edge) for edge in self.edges)


def _even(low: float, high: float) -> tuple[Decimal, ...]:
    # Without a least span, noise in the fourth digit would be drawn from end to end of the scale.
    bottom, top = Decimal(low), Decimal(high)
    span = max(top - bottom, top / 10)
    exponent = span.adjusted() - 2
    while True:
        for mantissa in ("1", "2", "2.5", "5"):
            unit = Decimal(mantissa).scaleb(exponent)
            if span > STEPS * unit:
                continue
            first, last = int(bottom // unit), int(top // unit)
            if last * unit < top:
                last += 1
            # A single value on a boundary: the step below it, which for 100 % is the only one.
            first = min(first, last - 1)
            if last - first <= STEPS:
                return tuple(k * unit for k in range(first, last + 1))
        exponent += 1


def _decades(low: float, high: float) -> tuple[Decimal, ...]:
    bottom, top = Decimal(low), Decimal(high)
    first, last = bottom.adjusted(), top.adjusted() + 1
    edges: tuple[Decimal, ...] = ()
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ladder = [Decimal(m).scaleb(power) for power in range(first, last + 1) for m in mantissas]
        edges = _trimmed(ladder, bottom, top)
        if len(edges) - 1 <= STEPS:
            return edges
    stride = -(-(len(edges) - 1) // STEPS)
    rungs = -(-(last - first) // stride)
    return tuple(Decimal(1).scaleb(first + k * stride) for k in range(rungs + 1))


def _trimmed(ladder: list[Decimal], bottom: Decimal, top: Decimal) -> tuple[Decimal, ...]:
    start = bisect_right(ladder, bottom) - 1
    stop = next(i for i, edge in enumerate(ladder) if edge >= top)
    return tuple(ladder[start : stop + 1])


def _plain(edge: Decimal) -> str:
    if edge == 0:
        return "0"
    power = edge.adjusted()
    if -3 <= power < 4:
        return f"{edge.normalize():f}"
    return f"{edge.scaleb(-power).normalize():f}e{power}"
