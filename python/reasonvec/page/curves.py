"""Singular values as curves: one small picture a module, one curve a layer, all on the same axes.

Each value is divided by the noise floor of its matrix, so that the floor is one line for all of
them and a curve's rank can be read where it crosses that line. The pictures are SVG of their own
size, drawn here: nothing scales text with them, on a phone or on paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reasonvec.page.markup import brief, name, whole_name

__all__ = ["Curve", "Panel", "curve_panels", "curve_style"]

_WIDTH, _HEIGHT = 360.0, 236.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 350.0, 20.0, 194.0
# The shades of the colour scale that stand out from the paper as lines, in light and dark.
_SHADES = (3, 4, 5, 6, 7, 8)
# Counting from here on, a logarithmic axis reads better than an even one.
_MANY = 100
# What lies further below the floor is rounding.
_DEPTH = 0.03


@dataclass(frozen=True, slots=True)
class Curve:
    """The values of a layer, or of what is in no layer, over their noise floor, descending.

    ``said`` is what a pointer reads, ``matrices`` how many the values are medians of.
    """

    layer: int | None
    values: tuple[float, ...]
    matrices: int
    said: str

    @property
    def rank(self) -> int:
        return sum(value > 1.0 for value in self.values)


@dataclass(frozen=True, slots=True)
class Panel:
    """The curves of one kind of module, and what is said below its name."""

    kind: str
    note: str
    curves: tuple[Curve, ...]


def curve_panels(panels: Sequence[Panel], intro: str) -> str:
    """The section with all pictures and their legend; empty where there is no curve."""
    curves = [curve for panel in panels for curve in panel.curves]
    if not curves:
        return ""
    axes = _Axes(curves)
    groups = _groups([curve.layer for curve in curves if curve.layer is not None])
    shades = {layer: shade for shade, layers in groups.items() for layer in layers}
    return (
        '<section class="curves sheet">\n<h2>Singular values</h2>\n'
        f'<p class="quiet">{intro}</p>\n{_legend(groups)}<div class="panels">\n'
        f"{''.join(_picture(i, panel, axes, shades) for i, panel in enumerate(panels))}"
        "</div>\n</section>\n"
    )


def curve_style() -> str:
    """The colours of the curves."""
    return "".join(f".c{i}{{stroke:var(--s{i});fill:var(--s{i})}}" for i in _SHADES) + "\n"


class _Axes:
    """The window that all pictures share, so that they can be compared."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.last = max(2, *(len(curve.values) for curve in curves))
        self.by_decades = self.last > _MANY
        positive = [v for curve in curves for v in curve.values if v > _DEPTH]
        # Always some room on both sides of the floor.
        self.low = min([0.5, *positive]) / 1.06
        self.high = max([2.0, *positive]) * 1.12

    def x(self, number: float) -> float:
        """Where the number-th value stands, 1 for the largest."""
        share = (
            math.log(number) / math.log(self.last)
            if self.by_decades
            else (number - 1) / (self.last - 1)
        )
        return _LEFT + 4 + share * (_RIGHT - _LEFT - 8)

    def y(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return _BOTTOM - max(share, 0.0) * (_BOTTOM - _TOP)

    def numbers(self) -> list[int]:
        """Where the axis below has its marks."""
        if self.by_decades:
            return [10**k for k in range(len(str(self.last))) if 10**k <= self.last]
        step = next(s for s in (1, 2, 5, 10, 20) if self.last / s <= 7)
        return [1, *range(step if step > 1 else 2, self.last + 1, step)]

    def values(self) -> list[float]:
        """Where the axis beside has its marks: 1-2-5 in a short window, else decades."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for mantissas in ((1, 2, 5), (1, 3), (1,)):
            marks = [m * 10.0**k for k in range(first, last + 1) for m in mantissas]
            marks = [mark for mark in marks if self.low <= mark <= self.high]
            if len(marks) <= 7:
                return marks
        return marks[:: len(marks) // 6]


def _picture(index: int, panel: Panel, axes: _Axes, shades: Mapping[int, int]) -> str:
    caption = (
        f"<figcaption><h3{whole_name(panel.kind)}>{name(panel.kind)}</h3>"
        f"<p>{panel.note}</p></figcaption>\n"
    )
    if not panel.curves:
        return f"<figure>\n{caption}</figure>\n"
    label = f"curve-{index}"
    layers = "one curve a layer" if len(panel.curves) > 1 else "one curve"
    ranks = sorted(curve.rank for curve in panel.curves)
    tops = sorted(curve.values[0] for curve in panel.curves)
    about = (
        f"Singular values over the noise floor, {layers}: the largest is "
        f"{_span(f'{tops[0]:.3g}', f'{tops[-1]:.3g}')} times the floor, and "
        f"{_span(str(ranks[0]), str(ranks[-1]))} of them are above it."
    )
    # Late layers lie over early ones: their shades are the darker ones on paper.
    drawn = "".join(_curve(curve, axes, shades) for curve in panel.curves)
    return (
        f'<figure>\n{caption}<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-labelledby="{label}-title {label}-desc">'
        f'<title id="{label}-title">{brief(panel.kind, 160)}</title>'
        f'<desc id="{label}-desc">{about}</desc>\n'
        f"{_frame(axes)}{drawn}</svg>\n</figure>\n"
    )


def _frame(axes: _Axes) -> str:
    floor = axes.y(1.0)
    parts = [
        f'<rect class="below" x="{_LEFT:g}" y="{floor:.1f}" width="{_RIGHT - _LEFT:g}" '
        f'height="{_BOTTOM - floor:.1f}"/>'
    ]
    for value in axes.values():
        y = axes.y(value)
        parts.append(
            f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{_RIGHT:g}"/>'
            f'<text class="beside" x="{_LEFT - 6:g}" y="{y + 4:.1f}">{value:g}\u00d7</text>'
        )
    for number in axes.numbers():
        x = axes.x(number)
        parts.append(
            f'<path class="tick" d="M{x:.1f} {_BOTTOM:g}v4"/>'
            f'<text class="under" x="{x:.1f}" y="{_BOTTOM + 17:g}">{number}</text>'
        )
    parts.append(
        f'<text class="under" x="{(_LEFT + _RIGHT) / 2:g}" y="{_HEIGHT - 7:g}">'
        "number of the singular value</text>"
        f'<path class="floor" d="M{_LEFT:g} {floor:.1f}H{_RIGHT:g}"/>'
    )
    parts.append(
        f'<text class="beside" x="{_RIGHT:g}" y="{_TOP - 8:g}">times the noise floor</text>'
    )
    if _BOTTOM - floor > 16:
        # In the corner that descending curves leave free.
        parts.append(f'<text class="noise" x="{_LEFT + 6:g}" y="{_BOTTOM - 6:g}">noise</text>')
    return "".join(parts) + "\n"


def _curve(curve: Curve, axes: _Axes, shades: Mapping[int, int]) -> str:
    numbers = _thinned(curve, axes)
    points = [(axes.x(i), axes.y(max(curve.values[i - 1], axes.low))) for i in numbers]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dot = ""
    if curve.rank:
        x, y = axes.x(curve.rank), axes.y(curve.values[curve.rank - 1])
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>'
    paint = "loose" if curve.layer is None else f"c{shades[curve.layer]}"
    # A lone point has no line, and its dot shows it.
    line = f'<path d="M{path}"/>' if len(points) > 1 else f'<path d="M{path}h0"/>'
    return f'<g class="curve {paint}"><title>{brief(curve.said, 200)}</title>{line}{dot}</g>\n'


def _thinned(curve: Curve, axes: _Axes) -> list[int]:
    """Numbers of the values that are drawn: all, or where there are many, those that differ on a
    logarithmic axis."""
    count = len(curve.values)
    if not axes.by_decades:
        return list(range(1, count + 1))
    spread = {round(math.exp(k / 60 * math.log(count))) for k in range(61)}
    return sorted(spread | ({curve.rank} if curve.rank else set()))


def _groups(layers: Sequence[int]) -> dict[int, list[int]]:
    """Shade to layers: as many runs of neighbours as there are shades, or one a layer."""
    ordered = sorted(set(layers))
    runs = min(len(_SHADES), len(ordered))
    groups: dict[int, list[int]] = {}
    for i, layer in enumerate(ordered):
        run = i * runs // len(ordered)
        # Few runs are spread over all shades.
        place = round(run * (len(_SHADES) - 1) / (runs - 1)) if runs > 1 else len(_SHADES) // 2
        groups.setdefault(_SHADES[place], []).append(layer)
    return groups


def _legend(groups: Mapping[int, Sequence[int]]) -> str:
    keys = "".join(
        f'<span class="key"><svg width="22" height="10" aria-hidden="true">'
        f'<g class="curve c{shade}"><path d="M1 5H21"/></g></svg>'
        f"{'layer ' if i == 0 else ''}{_span(str(layers[0]), str(layers[-1]))}</span>"
        for i, (shade, layers) in enumerate(groups.items())
    )
    return (
        f'<div class="legend">{keys}<span class="key"><svg width="22" height="10" '
        'aria-hidden="true"><path class="floor" d="M1 5H21"/></svg>noise floor</span></div>\n'
    )


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"
