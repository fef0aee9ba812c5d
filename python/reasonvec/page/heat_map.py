"""Heat maps, layer by module: measures of the same grid, as tables whose cells are coloured.

They are tables and not pictures: a screen reader walks them, a search finds a value in them, and a
printer keeps them sharp.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from reasonvec.inspection import in_order
from reasonvec.page.colour_scale import DARK, LIGHT, Scale
from reasonvec.page.markup import brief, name

__all__ = ["Grid", "HeatMap", "heat_maps", "heat_style"]

_Cell = TypeVar("_Cell")

# More columns than this would be too narrow to tap, so the map goes on in a second table.
_LAYER_COLUMNS = 24
_STRIP_COLUMNS = 6

_BEYOND = " The colours span the matrices; norms and biases may lie beyond, at either end."


@dataclass(frozen=True, slots=True)
class HeatMap(Generic[_Cell]):
    """One measure: how a cell is coloured, written and explained.

    ``written`` is empty where there is nothing to measure, and the cell is then a gap; ``still``
    says what zero is. Cells narrower than ``cell_px`` keep their values for a pointer to bring out.
    """

    label: str
    heading: str
    meaning: str
    unit: str
    still: str
    value: Callable[[_Cell], float]
    written: Callable[[_Cell], str]
    cell_px: int

    def cell(self, scale: Scale | None, group: _Cell | None, extra: str = "") -> str:
        written = "" if group is None else self.written(group)
        if group is None or not written:
            return f'<td class="{f"gap {extra}".strip()}"></td>'
        value = self.value(group)
        if not math.isfinite(value):
            paint = "bad"
        elif scale is None or value <= 0:
            paint = "still"
        else:
            paint = f"s{scale.shade(scale.step(value))}"
        return f'<td class="{f"{paint} {extra}".strip()}"><span>{html.escape(written)}</span></td>'


class Grid(Generic[_Cell]):
    """The groups that maps show: layers by kinds, what takes them together, what is in no layer.

    ``cells`` are by (layer, kind), ``by_layer``, ``by_kind`` and ``total`` of what is in a layer.
    The colours span the cells of ``spanning``, or all where there are none.
    """

    def __init__(
        self,
        cells: Mapping[tuple[int | None, str], _Cell],
        by_layer: Mapping[int, _Cell],
        by_kind: Mapping[str, _Cell],
        total: _Cell,
        spanning: Iterable[tuple[int | None, str]],
    ) -> None:
        self.cells, self.by_layer, self.by_kind, self.total = cells, by_layer, by_kind, total
        self.chunks = _chunks(list(by_kind), _LAYER_COLUMNS)
        outside = in_order(kind for layer, kind in cells if layer is None)
        self.strips = _chunks(outside, _STRIP_COLUMNS)
        self.shown = [*cells.values(), *by_layer.values(), *by_kind.values()]
        wanted = set(spanning)
        self.spanned = [cells[key] for key in cells if key in wanted] or self.shown

    def widths(self) -> list[int]:
        """How many columns its tables have, each number once."""
        layered = [len(chunk) for chunk in self.chunks]
        if layered:
            layered[-1] += 1
        return sorted({*layered, *(len(chunk) for chunk in self.strips)})


def heat_maps(
    grid: Grid[_Cell], maps: Sequence[HeatMap[_Cell]], *, first: int, together: str
) -> str:
    """The section with the maps and the choice between them, the one numbered ``first`` chosen;
    empty without tensors. ``together`` says what the last row and column are."""
    if not grid.cells:
        return ""
    choices = "".join(
        f'<label><input type="radio" name="measure" id="measure-{i}"'
        f"{' checked' if i == first else ''}> {one.label}</label>"
        for i, one in enumerate(maps)
    )
    return (
        '<section class="maps sheet">\n<h2>Layer by module</h2>\n<p class="intro quiet">Rows are '
        f"layers, columns the modules inside one; the last row and column {together}.</p>\n"
        '<div class="bar"><fieldset class="choice"><legend class="unseen">Measure</legend>'
        f'{choices}</fieldset><p class="read" aria-live="polite">'
        "Point at a cell, or tap it, to read all three measures.</p></div>\n"
        f"{''.join(_map_section(i, one, grid) for i, one in enumerate(maps))}</section>\n"
    )


def heat_style(grid: Grid[_Cell], maps: Sequence[HeatMap[_Cell]]) -> str:
    """The rules that a style sheet cannot know: the colours, and the widths at which tables fold.

    Below a width that depends on how many columns a table has, its labels turn upright and its
    values leave their cells.
    """
    rules = [_ramp()]
    for n in grid.widths():
        rules.append(
            f"@container (max-width:{44 + n * 68}px){{.n{n} .label{{display:inline-block;"
            "writing-mode:vertical-rl;transform:rotate(180deg);max-height:13em;overflow:hidden}}\n"
            f"@container (max-width:{30 + n * 26}px){{.n{n} wbr{{display:none}}"
            f".n{n} .label{{white-space:nowrap}}}}\n"
        )
        for i, one in enumerate(maps):
            # With no room for it the value stays in the cell for a screen reader, and a pointer
            # or a finger brings it out.
            rules.append(
                f"@container (max-width:{30 + n * one.cell_px}px){{"
                f"#map-{i} .n{n} td:not(:hover) span{{position:absolute;width:1px;height:1px;"
                "overflow:hidden;clip-path:inset(50%)}"
                f"#map-{i} .n{n} td:hover span{{position:absolute;z-index:2;bottom:105%;left:50%;"
                "transform:translateX(-50%);padding:3px 5px;font-size:.8rem;"
                "background:var(--ink);color:var(--paper)}}\n"
            )
    return "".join(rules)


def _map_section(index: int, one: HeatMap[_Cell], grid: Grid[_Cell]) -> str:
    scale = Scale.over(one.value(group) for group in grid.spanned)
    beyond = _BEYOND if scale is not None and any(_open(one, scale, grid.shown)) else ""
    return (
        f'<section class="map" id="map-{index}" data-name="{one.label.lower()}" '
        f'data-unit="{one.unit}">\n<h3>{one.heading}</h3>\n<p>{one.meaning}{beyond}</p>\n'
        f"{_legend(one, scale, grid.shown)}"
        f"{''.join(_layer_table(one, scale, grid, chunk) for chunk in grid.chunks)}"
        f"{''.join(_strip_table(one, scale, grid, chunk) for chunk in grid.strips)}</section>\n"
    )


def _layer_table(
    one: HeatMap[_Cell], scale: Scale | None, grid: Grid[_Cell], kinds: Sequence[str]
) -> str:
    with_sum = kinds == grid.chunks[-1]
    columns, layers = len(kinds) + with_sum, len(grid.by_layer)
    height = "1.375rem" if layers <= 40 else "1.125rem" if layers <= 64 else "0.95rem"
    # On paper fifty layers share a page with the legend; more take a second one.
    printed = max(12, min(18, 640 // (layers + 1) - 1)) if layers <= 50 else 11
    head = "".join(_column(kind) for kind in kinds)
    if with_sum:
        label = '<span class="label">all</span>'
        head += f'<th scope="col" class="sum" data-full="all modules">{label}</th>'
    body: list[str] = []
    for layer, whole in grid.by_layer.items():
        row = "".join(one.cell(scale, grid.cells.get((layer, kind))) for kind in kinds)
        if with_sum:
            row += one.cell(scale, whole, "sum")
        body.append(f'<tr><th scope="row" data-full="layer {layer}">{layer}</th>{row}</tr>\n')
    foot = "".join(one.cell(scale, grid.by_kind[kind]) for kind in kinds)
    if with_sum:
        foot += one.cell(scale, grid.total, "sum")
    return (
        f'<table class="heat n{columns}" style="--n:{columns};--row:{height};'
        f'--printed:{printed}px">\n'
        f'<caption class="unseen">{one.heading}, layer by module. {one.meaning}</caption>\n'
        f'<thead><tr><th class="rows" scope="col"><span class="unseen">layer</span></th>{head}'
        f"</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n"
        f'<tfoot><tr><th scope="row" data-full="all layers">all</th>{foot}</tr></tfoot>\n</table>\n'
    )


def _strip_table(
    one: HeatMap[_Cell], scale: Scale | None, grid: Grid[_Cell], kinds: Sequence[str]
) -> str:
    head = "".join(_column(kind) for kind in kinds)
    body = "".join(one.cell(scale, grid.cells.get((None, kind))) for kind in kinds)
    return (
        f'<table class="heat strip n{len(kinds)}" style="--n:{len(kinds)};--row:1.6rem">\n'
        "<caption>Outside the layers</caption>\n"
        f'<thead><tr><td class="rows"></td>{head}</tr></thead>\n'
        f'<tbody><tr><th scope="row" data-full="outside the layers">'
        f'<span class="unseen">outside the layers</span></th>{body}</tr></tbody>\n</table>\n'
    )


def _column(kind: str) -> str:
    return (
        f'<th scope="col" data-full="{brief(kind, 160)}">'
        f'<span class="label">{name(kind, 26)}</span></th>'
    )


def _legend(one: HeatMap[_Cell], scale: Scale | None, shown: Sequence[_Cell]) -> str:
    parts = ['<div class="legend">']
    if scale is not None:
        labels = scale.labels()
        below, above = _open(one, scale, shown)
        # The sign once, at the end: nine of them would be noise.
        last = "more" if above else f"{labels[-1]}{one.unit.strip()}"
        ticks = "".join(
            f"<span>{tick}</span>" for tick in ("less" if below else labels[0], *labels[1:-1], last)
        )
        shades = "".join(f'<i class="s{scale.shade(step)}"></i>' for step in range(scale.steps))
        long = " long" if sum(map(len, labels)) > 36 else ""
        kind = "logarithmic" if scale.logarithmic else "even"
        parts.append(
            f'<div class="scale{long}" role="img" style="--n:{scale.steps}" '
            f'aria-label="Colour scale in {scale.steps} {kind} steps with boundaries '
            f'{", ".join(labels)}{one.unit}"><div class="swatches">{shades}</div>'
            f'<div class="ticks">{ticks}</div></div>'
        )
    if any(one.value(group) == 0 and one.written(group) for group in shown):
        parts.append(f'<span class="key"><i class="still"></i>{one.still}</span>')
    if any(not math.isfinite(one.value(group)) for group in shown):
        parts.append('<span class="key"><i class="bad"></i>not a finite number</span>')
    parts.append("</div>\n")
    return "".join(parts)


def _open(one: HeatMap[_Cell], scale: Scale, shown: Sequence[_Cell]) -> tuple[bool, bool]:
    """Whether some value lies below the first boundary, and above the last."""
    values = [one.value(group) for group in shown]
    finite = [value for value in values if math.isfinite(value) and value > 0]
    return (
        any(value < scale.edges[0] for value in finite),
        any(value > scale.edges[-1] for value in finite),
    )


def _ramp() -> str:
    def variables(ramp: Sequence[tuple[str, str]]) -> str:
        return "".join(f"--s{i}:{fill};--t{i}:{ink};" for i, (fill, ink) in enumerate(ramp))

    classes = "".join(
        f".s{i}{{background-color:var(--s{i});color:var(--t{i})}}" for i in range(len(LIGHT))
    )
    return (
        f":root{{{variables(LIGHT)}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}\n{classes}\n"
    )


def _chunks(kinds: list[str], most: int) -> list[list[str]]:
    return [kinds[i : i + most] for i in range(0, len(kinds), most)]
