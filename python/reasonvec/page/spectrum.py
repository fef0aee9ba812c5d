"""`spectrum --html`: how many directions of every matrix stand out from noise, as one page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reasonvec.inspection import in_order
from reasonvec.page.curves import Curve, Panel, curve_panels, curve_style
from reasonvec.page.document import cells, column_titles, document, opening
from reasonvec.page.heat_map import Grid, HeatMap, heat_maps, heat_style
from reasonvec.page.markup import name, whole_name
from reasonvec.spectrum import Spectra, TensorSpectrum, typical
from reasonvec.wording import count, magnitude

__all__ = ["spectrum_page"]

_Rows = Sequence[TensorSpectrum]
_MOST = 20


def spectrum_page(report: Spectra) -> str:
    """The whole page as HTML text, the same bytes for the same report; write it as UTF-8."""
    grid = _grid(report)
    return document(
        report.title,
        (
            _opening(report),
            heat_maps(grid, _MAPS, first=0, together="are medians over them"),
            _curves(report),
            _kinds_section(report),
            _highest_section(report),
        ),
        _closing(report),
        heat_style(grid, _MAPS) + curve_style(),
    )


_MAPS: tuple[HeatMap[_Rows], ...] = (
    HeatMap(
        label="Rank",
        heading="Rank above the noise floor",
        meaning=(
            "How many singular values are larger than the noise floor: the largest singular value "
            "of the same matrix with random signs."
        ),
        unit="",
        still="nothing above the floor",
        value=lambda rows: typical(row.rank for row in rows),
        written=lambda rows: f"{typical(row.rank for row in rows):g}" if rows else "",
        cell_px=34,
    ),
    HeatMap(
        label="Effective rank",
        heading="Effective rank",
        meaning=(
            "Stable rank, the sum of squared singular values over the largest square: how many "
            "directions as strong as the first would weigh the same. It counts noise too."
        ),
        unit="",
        still="zero matrix",
        value=lambda rows: typical(row.stable_rank for row in rows),
        written=lambda rows: magnitude(typical(row.stable_rank for row in rows), 2) if rows else "",
        cell_px=38,
    ),
    HeatMap(
        label="Share above",
        heading="Share above the noise floor",
        meaning="Percent of the squared norm that the singular values above the floor hold.",
        unit=" %",
        still="nothing above the floor",
        value=lambda rows: 100 * typical(row.energy for row in rows),
        written=lambda rows: _percent(typical(row.energy for row in rows)) if rows else "",
        cell_px=34,
    ),
)


def _grid(report: Spectra) -> Grid[_Rows]:
    inside = [row for row in report.tensors if row.layer is not None]
    pairs = sorted(
        report.grouped(lambda row: (row.layer, row.kind)).items(),
        key=lambda item: (item[0][0] is None, item[0][0] or 0),
    )
    kinds = in_order(row.kind for row in inside)
    return Grid(
        dict(pairs),
        {
            layer: [row for row in inside if row.layer == layer]
            for layer in sorted({row.layer for row in inside if row.layer is not None})
        },
        {kind: [row for row in inside if row.kind == kind] for kind in kinds},
        inside,
        spanning=(),
    )


def _opening(report: Spectra) -> str:
    rows = report.tensors
    what = "Spectrum of a vector" if report.what == "vector" else "Spectrum of a checkpoint"
    if not rows:
        return opening(what, report.title, "It holds no matrices.", [])
    ranks = sorted(row.rank for row in rows)
    middle = typical(ranks)
    norm = math.hypot(*(row.norm for row in rows))
    highest = max(rows, key=lambda row: row.rank)
    share = _energy(rows)
    if ranks[-1] == 0:
        lead = "No matrix has a singular value above its noise floor."
    else:
        many = count(len(rows))
        if ranks[0] == ranks[-1]:
            some = f"All {many} matrices have {ranks[0]} singular value{'s' * (ranks[0] != 1)}"
        elif middle == 0:
            some = f"Half of the {many} matrices or more have no singular value"
        else:
            some = f"Half of the {many} matrices have at most {middle:g} singular values"
        held = f"What stands above holds {_percent(share)} % of the squared norm"
        # Of a weight, what lies below is learned too; of an update it is what storage adds.
        rest = "; the rest looks like noise" if report.what == "vector" else ""
        lead = f"{some} above the noise floor. {held}{rest}."
    figures = [
        ("Matrices", count(len(rows)), f"without {count(len(report.skipped))} of other shapes"),
        ("Rank", f"{middle:g}", f"median; {ranks[0]} to {ranks[-1]}"),
        ("Highest rank", str(highest.rank), name(highest.name)),
        (
            "Effective rank",
            magnitude(typical(row.stable_rank for row in rows)),
            "median of the stable ranks",
        ),
        ("Above the floor", f"{_percent(share)} %", "of the squared norm, all together"),
        ("Norm", magnitude(norm), "of all matrices"),
    ]
    return opening(what, report.title, lead, figures)


def _curves(report: Spectra) -> str:
    groups = report.by_kind()
    panels = [_panel(kind, rows) for kind, rows in groups.items()]
    medians = any(curve.matrices > 1 for panel in panels for curve in panel.curves)
    intro = (
        "Every curve is the spectrum of one layer, over the noise floor of its own matrix: where "
        "it crosses the line at 1&times; is its rank, and the dot marks the last value above. A "
        "steep start that bends into the grey is a low-rank update in noise; a curve that stays "
        "above the line has no few directions to keep."
    )
    if medians:
        intro += " Where a layer has several matrices of a kind (experts), the curve is the median."
    return curve_panels(panels, intro)


def _panel(kind: str, rows: _Rows) -> Panel:
    layers: dict[int | None, list[TensorSpectrum]] = {}
    # A zero matrix has no floor to be measured by.
    for row in rows:
        if row.floor > 0 and row.values:
            layers.setdefault(row.layer, []).append(row)
    ordered = sorted(layers.items(), key=lambda item: (item[0] is None, item[0] or 0))
    curves = tuple(_curve(layer, members) for layer, members in ordered)
    ranks = sorted(row.rank for row in rows)
    floors = sorted(row.floor for row in rows if row.floor > 0)
    note = f"rank {_between(str(ranks[0]), str(ranks[-1]))}"
    if floors:
        note += f", floor {_between(magnitude(floors[0]), magnitude(floors[-1]))}"
    if zeros := len(rows) - sum(map(len, layers.values())):
        note += f", {count(zeros)} of {count(len(rows))} zero"
    return Panel(kind, note, curves)


def _curve(layer: int | None, rows: _Rows) -> Curve:
    length = min(len(row.values) for row in rows)
    values = tuple(typical(row.values[i] / row.floor for row in rows) for i in range(length))
    where = rows[0].name if layer is None else f"layer {layer}"
    rank = f"{typical(row.rank for row in rows):g}"
    said = f"{where}: rank {rank}, largest {values[0]:.3g} times the floor"
    return Curve(layer, values, len(rows), said)


def _kinds_section(report: Spectra) -> str:
    groups = report.by_kind()
    if not groups:
        return ""
    body = "".join(
        f'<tr role="row"><th role="rowheader" scope="row" class="text"{whole_name(kind)}>'
        f"{name(kind)}</th>{cells(_figures(rows))}</tr>\n"
        for kind, rows in groups.items()
    )
    total = _figures(report.tensors)
    return (
        '<section class="sheet">\n<h2>By kind of module</h2>\n'
        '<table class="figures" role="table">\n<caption>Medians over the matrices of a kind'
        '</caption>\n<thead role="rowgroup"><tr role="row">'
        '<th role="columnheader" scope="col" class="text">Kind</th>'
        f"{column_titles(label for label, _ in total)}</tr></thead>\n"
        f'<tbody role="rowgroup">\n{body}</tbody>\n'
        '<tfoot role="rowgroup"><tr role="row"><th role="rowheader" scope="row" class="text">'
        f"all</th>{cells(total)}</tr></tfoot>\n</table>\n</section>\n"
    )


def _figures(rows: _Rows) -> list[tuple[str, str]]:
    ranks = sorted(row.rank for row in rows)
    largest = typical(row.values[0] if row.values else 0.0 for row in rows)
    floor = typical(row.floor for row in rows)
    return [
        ("Matrices", count(len(rows))),
        ("Rank", f"{typical(ranks):g}"),
        ("Range", _between(str(ranks[0]), str(ranks[-1]))),
        ("Effective rank", magnitude(typical(row.stable_rank for row in rows))),
        ("Share above", f"{_percent(_energy(rows))} %"),
        ("Largest value", magnitude(largest)),
        ("Noise floor", magnitude(floor)),
    ]


def _highest_section(report: Spectra) -> str:
    rows = sorted(report.tensors, key=lambda row: (-row.rank, -row.energy, row.name))[:_MOST]
    if not rows:
        return ""
    body: list[str] = []
    for number, row in enumerate(rows, start=1):
        part = 100 * row.rank / rows[0].rank if rows[0].rank else 0.0
        bar = f'<i class="part" style="--w:{part:.1f}%"></i>'
        figures = [
            ("Shape", f"{row.shape[0]} &times; {row.shape[1]}"),
            ("Rank", f"{row.rank}{bar}"),
            ("Effective rank", magnitude(row.stable_rank)),
            ("Share above", f"{_percent(row.energy)} %"),
            ("Largest value", magnitude(row.values[0] if row.values else 0.0)),
            ("Noise floor", magnitude(row.floor)),
        ]
        body.append(
            f'<tr role="row"><td role="cell" class="rank">{number}</td>'
            f'<th role="rowheader" scope="row" class="text"{whole_name(row.name)}>'
            f"{name(row.name)}</th>{cells(figures)}</tr>\n"
        )
    titles = [label for label, _ in figures]
    return (
        '<section class="sheet">\n<h2>Highest ranks</h2>\n'
        f'<table class="figures" role="table">\n<caption>The first {len(rows)} by rank above the '
        "noise floor; the bar compares each with the first.</caption>\n"
        '<thead role="rowgroup"><tr role="row">'
        '<th role="columnheader" scope="col" class="rank"><span class="unseen">place</span></th>'
        '<th role="columnheader" scope="col" class="text">Tensor</th>'
        f"{column_titles(titles)}</tr></thead>\n"
        f'<tbody role="rowgroup">\n{"".join(body)}</tbody>\n</table>\n</section>\n'
    )


def _closing(report: Spectra) -> str:
    skipped = (
        f" Tensors of one dimension or more than three are left out: {count(len(report.skipped))}."
        if report.skipped
        else ""
    )
    return (
        "The noise floor of a matrix is the largest singular value of the same elements with "
        f"random signs, which have no directions in common.{skipped}"
    )


def _energy(rows: _Rows) -> float:
    """The share of the squared norm of all of them that lies above their floors."""
    norm = math.hypot(*(row.norm for row in rows))
    above = math.hypot(*(value for row in rows for value in row.values if value > row.floor))
    # A rounding more than everything is everything.
    return min((above / norm) ** 2, 1.0) if norm > 0 else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.2g}" if share < 0.0995 else f"{100 * share:.0f}"


def _between(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"
