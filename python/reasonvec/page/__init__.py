"""`inspect --html`: one self-contained page about a vector or a checkpoint.

It reads with no script and no network, on a phone, on paper, in light and dark. Every string in it
that came from a file is escaped, and a content policy names the one script that may run by its
hash, so that even a hole in the escaping would not execute: checkpoints come from strangers.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from importlib import resources

from reasonvec.inspection import GroupMeasure, Inspection, TensorMeasure
from reasonvec.page.heat_map import heat_maps, heat_style
from reasonvec.page.markup import brief, name, quoted, whole_name
from reasonvec.wording import count, magnitude, percent, place, short_count, size

__all__ = ["inspection_page"]

# What needs two places of the grid that a row becomes on a phone.
_WIDE = frozenset({"Shape", "Largest change", "Largest value", "Held as"})


def inspection_page(report: Inspection) -> str:
    """The whole page as HTML text, the same bytes for the same report.

    Write it as UTF-8; every string of the report can be written, lone surrogates included.
    """
    script = _resource("page.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    title = brief(report.title, 200)
    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="referrer" content="no-referrer">\n',
            f"<title>{title}</title>\n<style>\n{_resource('page.css')}",
            f"{heat_style(report)}</style>\n</head>\n<body>\n",
            _opening(report),
            _provenance(report),
            heat_maps(report),
            _largest_section(report),
            _kinds_section(report),
            _closing(report),
            f"<script>{script}</script>\n</body>\n</html>\n",
        )
    )


def _opening(report: Inspection) -> str:
    total = report.totals()
    vector = report.what == "vector"
    what = "Reasoning vector, P &minus; N" if vector else "Checkpoint"
    share = percent(total.moved, total.elements) if total.elements else "0"
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
    rows = "".join(
        f'<div><dt>{label}</dt><dd class="figure">{figure}</dd><dd class="note">{note}</dd></div>\n'
        for label, figure, note in figures
    )
    return (
        f'<header>\n<p class="kicker">{what}</p>\n'
        f"<h1>{brief(report.title, 200)}</h1>"
        f'\n<p class="lead">{lead}</p>\n</header>\n'
        f'<dl class="totals">\n{rows}</dl>\n<main>\n'
    )


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
    vector = report.what == "vector"
    moved, largest = ("Moved", "Largest change") if vector else ("Not zero", "Largest value")
    # An extra column that holds nothing would cost the others their room.
    with_encoding = any(row.encoding is not None for row in rows)
    total = report.totals().norm
    longest = rows[0].norm
    body: list[str] = []
    for rank, row in enumerate(rows, start=1):
        share = _energy(row.norm, total)
        spot = "" if row.max_at is None else f" <small>at {place(row.max_at, row.shape)}</small>"
        cells = [
            ("Shape", _shape(row)),
            ("Norm", f"{magnitude(row.norm)}{_part(row.norm, longest)}"),
            ("Part of norm²", share),
            ("rms", magnitude(row.rms)),
            (moved, f"{percent(row.moved, row.elements) if row.elements else '0'} %"),
            (largest, f"{magnitude(row.max)}{spot}"),
        ]
        if with_encoding:
            stored = "" if row.stored_bytes is None else f" <small>{size(row.stored_bytes)}</small>"
            cells.append(("Held as", f"{brief(row.encoding or '', 12)}{stored}"))
        body.append(
            f'<tr role="row"><td role="cell" class="rank">{rank}</td>'
            f'<th role="rowheader" scope="row" class="text"{whole_name(row.name)}>'
            f"{name(row.name)}</th>{_cells(cells)}</tr>\n"
        )
    extra = ("Held as",) if with_encoding else ()
    titles = ("Shape", "Norm", "Part of norm²", "rms", moved, largest, *extra)
    return (
        '<section class="sheet">\n<h2>Largest tensors</h2>\n'
        f'<table class="figures" role="table">\n<caption>The first {len(rows)} by norm; the bar '
        'compares each with the first.</caption>\n<thead role="rowgroup"><tr role="row">'
        '<th role="columnheader" scope="col" class="rank"><span class="unseen">rank</span></th>'
        '<th role="columnheader" scope="col" class="text">Tensor</th>'
        f"{_titles(titles)}</tr></thead>\n"
        f'<tbody role="rowgroup">\n{"".join(body)}</tbody>\n</table>\n</section>\n'
    )


def _kinds_section(report: Inspection) -> str:
    groups = report.by_kind()
    if not groups:
        return ""
    vector = report.what == "vector"
    moved, largest = ("Moved", "Largest change") if vector else ("Not zero", "Largest value")
    total = report.totals()

    def figures(group: GroupMeasure) -> list[tuple[str, str]]:
        stored = "" if group.stored_bytes is None else size(group.stored_bytes)
        per = group.bytes_per_parameter
        return [
            ("Tensors", count(group.tensors)),
            ("Parameters", short_count(group.elements)),
            (moved, f"{percent(group.moved, group.elements) if group.elements else '0'} %"),
            ("Norm", magnitude(group.norm)),
            ("Part of norm²", _energy(group.norm, total.norm)),
            ("rms", magnitude(group.rms)),
            (largest, magnitude(group.max)),
            ("Stored", stored),
            ("Bytes / param", "" if per is None else f"{per:.3f}"),
        ]

    body = "".join(
        f'<tr role="row"><th role="rowheader" scope="row" class="text"{whole_name(kind)}>'
        f"{name(kind)}</th>{_cells(figures(groups[kind]))}</tr>\n"
        for kind in groups
    )
    titles = [label for label, _ in figures(total)]
    return (
        '<section class="sheet">\n<h2>By kind of module</h2>\n'
        '<table class="figures" role="table">\n<caption class="unseen">Sums over all tensors of '
        'a kind</caption>\n<thead role="rowgroup"><tr role="row">'
        f'<th role="columnheader" scope="col" class="text">Kind</th>{_titles(titles)}'
        f'</tr></thead>\n<tbody role="rowgroup">\n{body}</tbody>\n'
        '<tfoot role="rowgroup"><tr role="row"><th role="rowheader" scope="row" class="text">'
        f"all</th>{_cells(figures(total))}</tr></tfoot>\n</table>\n</section>\n"
    )


def _closing(report: Inspection) -> str:
    about = (
        "the change of every element, positive minus negative donor"
        if report.what == "vector"
        else "the value of every element"
    )
    return (
        f"</main>\n<footer><p>Made by reasonvec. The measures are of {about}. rms is the norm over "
        "the square root of the number of elements; norms of several tensors add in quadrature, so "
        "the parts of norm² add to 100 %.</p></footer>\n"
    )


def _titles(titles: Iterable[str]) -> str:
    return "".join(f'<th role="columnheader" scope="col">{title}</th>' for title in titles)


def _cells(cells: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f'<td role="cell" data-label="{label}"{" class=wide" if label in _WIDE else ""}>{value}'
        "</td>"
        for label, value in cells
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


def _resource(name: str) -> str:
    return resources.files("reasonvec.page").joinpath(name).read_text(encoding="utf-8")
