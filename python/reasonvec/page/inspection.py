"""`inspect --html`: what a vector or a checkpoint holds, as one page."""

from __future__ import annotations

import math

from reasonvec.inspection import GroupMeasure, Inspection, TensorMeasure
from reasonvec.page.document import cells, column_titles, document, opening
from reasonvec.page.heat_map import Grid, HeatMap, heat_maps, heat_style
from reasonvec.page.markup import brief, name, quoted, whole_name
from reasonvec.wording import count, magnitude, percent, place, short_count, size

__all__ = ["inspection_page"]


def inspection_page(report: Inspection) -> str:
    """The whole page as HTML text, the same bytes for the same report.

    Write it as UTF-8; every string of the report can be written, lone surrogates included.
    """
    grid, maps = _grid(report), _maps(report)
    return document(
        report.title,
        (
            _opening(report),
            _provenance(report),
            heat_maps(
                grid,
                maps,
                # All of a checkpoint is "not zero"; of a vector, what moved is the first question.
                first=0 if report.what == "vector" else 1,
                together="take them together",
            ),
            _largest_section(report),
            _kinds_section(report),
        ),
        _closing(report),
        heat_style(grid, maps),
    )


def _grid(report: Inspection) -> Grid[GroupMeasure]:
    inside = tuple(row for row in report.tensors if row.layer is not None)
    # The sums are about the layers alone: an embedding would drown the rest.
    core = Inspection("", "", report.what, inside, None, {})
    return Grid(
        report.by_layer_and_kind(),
        {layer: group for layer, group in core.by_layer().items() if layer is not None},
        core.by_kind(),
        core.totals(),
        # Norms and biases are few and far from the matrices in every measure: a scale that spans
        # both shows nothing of either.
        spanning=[(row.layer, row.kind) for row in report.tensors if len(row.shape) > 1],
    )


def _maps(report: Inspection) -> tuple[HeatMap[GroupMeasure], ...]:
    vector = report.what == "vector"

    def share(group: GroupMeasure) -> str:
        return percent(group.moved, group.elements) if group.elements else ""

    return (
        HeatMap(
            label="Moved" if vector else "Not zero",
            heading="Share that moved" if vector else "Share that is not zero",
            meaning=(
                "Percent of the elements whose value differs between the donors."
                if vector
                else "Percent of the elements that are not zero."
            ),
            unit=" %",
            still="none moved" if vector else "all zero",
            value=lambda group: 100 * group.moved_share,
            written=share,
            cell_px=26,
        ),
        HeatMap(
            label="Norm (rms)",
            heading="Norm, rms per element",
            meaning=(
                "Root mean square of the change, over all elements, moved or not."
                if vector
                else "Root mean square of the values."
            ),
            unit="",
            still="zero",
            value=lambda group: group.rms,
            written=lambda group: magnitude(group.rms, 2) if group.elements else "",
            cell_px=42,
        ),
        HeatMap(
            label="Largest",
            heading="Largest change" if vector else "Largest value",
            meaning=(
                "Largest magnitude by which one element changed."
                if vector
                else "Largest magnitude of one element."
            ),
            unit="",
            still="zero",
            value=lambda group: group.max,
            written=lambda group: magnitude(group.max, 2) if group.elements else "",
            cell_px=42,
        ),
    )


def _opening(report: Inspection) -> str:
    total = report.totals()
    vector = report.what == "vector"
    what = "Reasoning vector, P &minus; N" if vector else "Checkpoint"
    share = percent(total.moved, total.elements)
    if not total.elements:
        lead = "It holds no elements."
    elif vector:
        lead = f"{share} % of {short_count(total.elements)} parameters moved"
        per = total.bytes_per_parameter
        lead += "." if per is None else f"; it takes {per:.2f} bytes a parameter."
    else:
        lead = (
            f"{short_count(total.elements)} parameters in {count(total.tensors)} tensors, "
            f"{share} % of them not zero."
        )
    figures = [
        ("Parameters", short_count(total.elements), f"{count(total.elements)} in all"),
        (
            "Moved" if vector else "Not zero",
            f"{share} %",
            f"{count(total.moved)} elements",
        ),
        ("Norm", magnitude(total.norm), f"{magnitude(total.rms)} rms per element"),
        (
            "Largest change" if vector else "Largest value",
            magnitude(total.max),
            _whereabouts(total.max_in),
        ),
    ]
    if total.stored_bytes is not None:
        figures.append(("Stored", size(total.stored_bytes), f"{count(total.stored_bytes)} bytes"))
    if total.bytes_per_parameter is not None:
        held = ", ".join(f"{count(n)} {brief(e, 40)}" for e, n in report.encodings().items())
        figures.append(("Bytes per parameter", f"{total.bytes_per_parameter:.3f}", held))
    return opening(what, report.title, lead, figures)


def _provenance(report: Inspection) -> str:
    facts = [("path", report.path)]
    if report.recipe is not None:
        facts.append(("recipe", report.recipe))
    digests = {f"{label} digest" for label in report.donors}
    facts.extend((label, value) for label, value in report.donors.items() if label not in digests)
    rows: list[str] = []
    for label, value in facts:
        digest = report.donors.get(f"{label} digest")
        beside = "" if digest is None else f' <small class="quiet">{quoted(digest)}</small>'
        rows.append(f'<dt>{name(label)}</dt><dd class="mono">{quoted(value)}{beside}</dd>\n')
    return (
        '<section class="provenance">\n<h2 class="unseen">Where it came from</h2>\n'
        f'<dl class="facts">\n{"".join(rows)}</dl>\n</section>\n'
    )


def _largest_section(report: Inspection) -> str:
    rows = report.largest()
    if not rows:
        return ""
    moved, largest = _titles(report)
    # An extra column that holds nothing would cost the others their room.
    with_encoding = any(row.encoding is not None for row in rows)
    total = report.totals().norm
    longest = rows[0].norm
    body: list[str] = []
    for rank, row in enumerate(rows, start=1):
        share = _energy(row.norm, total)
        spot = "" if row.max_at is None else f" <small>at {place(row.max_at, row.shape)}</small>"
        figures = [
            ("Shape", _shape(row)),
            ("Norm", f"{magnitude(row.norm)}{_part(row.norm, longest)}"),
            ("Part of norm²", share),
            ("rms", magnitude(row.rms)),
            (moved, f"{percent(row.moved, row.elements)} %"),
            (largest, f"{magnitude(row.max)}{spot}"),
        ]
        if with_encoding:
            stored = "" if row.stored_bytes is None else f" <small>{size(row.stored_bytes)}</small>"
            figures.append(("Held as", f"{brief(row.encoding or '', 12)}{stored}"))
        body.append(
            f'<tr role="row"><td role="cell" class="rank">{rank}</td>'
            f'<th role="rowheader" scope="row" class="text"{whole_name(row.name)}>'
            f"{name(row.name)}</th>{cells(figures)}</tr>\n"
        )
    extra = ("Held as",) if with_encoding else ()
    titles = ("Shape", "Norm", "Part of norm²", "rms", moved, largest, *extra)
    return (
        '<section class="sheet">\n<h2>Largest tensors</h2>\n'
        f'<table class="figures" role="table">\n<caption>The first {len(rows)} by norm; the bar '
        'compares each with the first.</caption>\n<thead role="rowgroup"><tr role="row">'
        '<th role="columnheader" scope="col" class="rank"><span class="unseen">rank</span></th>'
        '<th role="columnheader" scope="col" class="text">Tensor</th>'
        f"{column_titles(titles)}</tr></thead>\n"
        f'<tbody role="rowgroup">\n{"".join(body)}</tbody>\n</table>\n</section>\n'
    )


def _titles(report: Inspection) -> tuple[str, str]:
    """What the counts and the maxima of a report are of."""
    if report.what == "vector":
        return "Moved", "Largest change"
    return "Not zero", "Largest value"


def _kinds_section(report: Inspection) -> str:
    groups = report.by_kind()
    if not groups:
        return ""
    moved, largest = _titles(report)
    total = report.totals()

    def figures(group: GroupMeasure) -> list[tuple[str, str]]:
        stored = "" if group.stored_bytes is None else size(group.stored_bytes)
        per = group.bytes_per_parameter
        return [
            ("Tensors", count(group.tensors)),
            ("Parameters", short_count(group.elements)),
            (moved, f"{percent(group.moved, group.elements)} %"),
            ("Norm", magnitude(group.norm)),
            ("Part of norm²", _energy(group.norm, total.norm)),
            ("rms", magnitude(group.rms)),
            (largest, magnitude(group.max)),
            ("Stored", stored),
            ("Bytes / param", "" if per is None else f"{per:.3f}"),
        ]

    body = "".join(
        f'<tr role="row"><th role="rowheader" scope="row" class="text"{whole_name(kind)}>'
        f"{name(kind)}</th>{cells(figures(groups[kind]))}</tr>\n"
        for kind in groups
    )
    titles = [label for label, _ in figures(total)]
    return (
        '<section class="sheet">\n<h2>By kind of module</h2>\n'
        '<table class="figures" role="table">\n<caption class="unseen">Sums over all tensors of '
        'a kind</caption>\n<thead role="rowgroup"><tr role="row">'
        f'<th role="columnheader" scope="col" class="text">Kind</th>{column_titles(titles)}'
        f'</tr></thead>\n<tbody role="rowgroup">\n{body}</tbody>\n'
        '<tfoot role="rowgroup"><tr role="row"><th role="rowheader" scope="row" class="text">'
        f"all</th>{cells(figures(total))}</tr></tfoot>\n</table>\n</section>\n"
    )


def _closing(report: Inspection) -> str:
    about = (
        "the change of every element, positive minus negative donor"
        if report.what == "vector"
        else "the value of every element"
    )
    return (
        f"The measures are of {about}. rms is the norm over the square root of the number of "
        "elements; norms of several tensors add in quadrature, so the parts of norm² add to 100 %."
    )


def _shape(row: TensorMeasure) -> str:
    # A stranger's shape may have any number of dimensions; no weight has more than six.
    shown = [str(extent) for extent in row.shape[:6]] + ["…"] * (len(row.shape) > 6)
    extents = " &times; ".join(shown) or "scalar"
    return f"{extents} <small>{brief(row.dtype, 12)}</small>"


def _whereabouts(row: TensorMeasure | None) -> str:
    if row is None:
        return ""
    spot = "" if row.max_at is None else f" at {place(row.max_at, row.shape)}"
    return f"{name(row.name)}{spot}"


def _energy(norm: float, total: float) -> str:
    """The part of the squared norm, in percent; nothing where it means nothing."""
    if not (math.isfinite(norm) and math.isfinite(total)) or total == 0:
        return ""
    # The ratio first: the square of a norm may overflow where the ratio cannot.
    part = 100 * (norm / total) ** 2
    return f"{'<0.1' if 0 < part < 0.1 else f'{part:.1f}'} %".replace("<", "&lt;")


def _part(norm: float, longest: float) -> str:
    if not (math.isfinite(norm) and math.isfinite(longest)) or longest == 0:
        return ""
    return f'<i class="part" style="--w:{100 * norm / longest:.1f}%"></i>'
