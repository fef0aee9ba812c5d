"""Reports as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from reasonvec.compat.problem import Problem, fold
from reasonvec.names import kind_of
from reasonvec.wording import count, legible, magnitude, percent, short_count, size

if TYPE_CHECKING:
    from rich.console import Console

    from reasonvec.apply import ApplyPlan, ApplyReport
    from reasonvec.check import CheckReport, Distances
    from reasonvec.compare import Comparison, Pair
    from reasonvec.extract import ExtractReport, Row
    from reasonvec.factor_cache import Factors
    from reasonvec.inspection import GroupMeasure, Inspection
    from reasonvec.lora import LeftOut, LoraReport
    from reasonvec.lowrank import CompressReport, FactorsPlan
    from reasonvec.rounding import Rounding
    from reasonvec.spectrum import Spectra, TensorSpectrum
    from reasonvec.undo import UndoReport
    from reasonvec.verify import DiffReport, VerifyReport


# What prints is imported when something is printed: with --quiet or --json nothing is.
@cache
def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, emoji=False)


def escape(text: str) -> str:
    """Strangers' words as they are: no markup, no control characters."""
    from rich.markup import escape

    return escape(legible(text))


def _say(text: str) -> None:
    _console().print(text, soft_wrap=True)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    _console().print(table)


def _number(x: float | None, form: str = ".4f") -> str:
    return "-" if x is None else format(x, form)


def _percent(part: int, whole: int) -> str:
    return f"{percent(part, whole)} %"


def _share(x: float) -> str:
    return f"{100 * x:.1f} %"


def _range(ordered: Sequence[int]) -> str:
    first, last = ordered[0], ordered[-1]
    return str(first) if first == last else f"{first} to {last}"


def _problems(problems: Sequence[Problem]) -> None:
    for problem, times in fold(problems):
        colour = "red" if problem.severity == "error" else "yellow"
        more = f" (and {times - 1} more like it)" if times > 1 else ""
        _say(f"[{colour}]{problem.severity}[/]: {escape(problem.message)}{more}")


def show_check(report: CheckReport) -> None:
    _problems(report.problems)
    if report.total is not None:
        with_target = report.total.target_share is not None
        columns = ["module", "|P-N|/|N|", "moved"]
        columns += ["|T-N|/|N|", "cos(P-N, T-N)", "|P-N|/|T-N|"] if with_target else []

        def cells(name: str, d: Distances) -> list[str]:
            row = [name, _number(d.vector_share, ".2e"), _share(d.moved_share)]
            if with_target:
                row += [
                    _number(d.target_share, ".2e"),
                    _number(d.cosine),
                    _number(d.vector_over_target, ".3g"),
                ]
            return row

        _table(
            columns,
            [*(cells(k, d) for k, d in report.by_kind.items()), cells("total", report.total)],
        )
    if report.same_neurons is not None:
        _say(f"MLP neurons in the same place: {_share(report.same_neurons)} of a sample")
    colour = {"compatible": "green", "doubtful": "yellow", "incompatible": "red"}[report.verdict]
    _say(f"[bold {colour}]{report.verdict}[/]")
    if report.verdict == "doubtful":
        for reason in report.reasons:
            _say(f"  {escape(reason)}")
    if report.verdict == "incompatible" and not any(p.severity == "error" for p in report.problems):
        for reason in report.reasons:
            _say(f"  {escape(reason)}")


def show_extract(report: ExtractReport) -> None:
    _problems(report.warnings)
    rows = []
    for kind, part in report.by_kind().items():
        n, moved = sum(r.elements for r in part), sum(r.moved for r in part)
        stored = sum(r.bytes for r in part)
        norm = sum(r.norm**2 for r in part) ** 0.5
        rows.append(
            [
                kind,
                count(len(part)),
                short_count(n),
                _percent(moved, n),
                magnitude(norm),
                size(stored),
            ]
        )
    n = report.elements
    share = _percent(report.moved, n)
    rows.append(
        [
            "total",
            count(len(report.rows)),
            short_count(n),
            share,
            magnitude(report.norm),
            size(report.bytes),
        ]
    )
    _table(["module", "tensors", "parameters", "moved", "norm", "stored"], rows)
    _say(f"{report.bytes / n if n else 0:.3f} bytes a parameter")
    if report.exact is True:
        _say("[green]exact[/]: negative + vector == positive, bit for bit")
    elif report.exact is False:
        inexact = sum(row.inexact for row in report.rows)
        _say(
            f"[red]not exact[/]: {count(inexact)} elements of F64 tensors are not given back bit "
            "for bit"
        )
    _say(f"written to {escape(str(report.path))}")


def show_compress(report: CompressReport) -> None:
    kinds: dict[str, list[Row]] = {}
    for row in report.rows:
        kinds.setdefault(kind_of(row.name), []).append(row)
    rows = []
    for kind, part in kinds.items():
        ranks = sorted(row.rank or 0 for row in part if row.residual is not None)
        span = _range(ranks) if ranks else "exact"
        left = sum((row.residual or 0.0) ** 2 for row in part) ** 0.5
        norm = sum(row.norm**2 for row in part) ** 0.5
        stored = sum(row.bytes for row in part)
        rows.append([kind, count(len(part)), span, magnitude(norm), magnitude(left), size(stored)])
    total = [magnitude(report.norm), magnitude(report.residual), size(report.bytes)]
    rows.append(["total", count(len(report.rows)), "", *total])
    _table(["module", "tensors", "rank", "norm", "left out", "stored"], rows)
    _say(f"written to {escape(str(report.path))}")


def show_lora(report: LoraReport) -> None:
    ranks = sorted(report.ranks.values())
    _say(
        f"{count(len(ranks))} matrices of rank {_range(ranks)}, "
        f"{count(len(report.biases))} biases, {size(report.bytes)}"
    )
    _say(f"cut off by the ranks: {_share(report.truncated_share)} of the norm")
    if report.left_out:
        rows = [
            [kind, why, count(len(parts)), _share(_norm(parts) / report.norm)]
            for (kind, why), parts in report.by_kind().items()
        ]
        _table(["no place in a LoRA", "why", "tensors", "share of the norm"], rows)
    _say(f"left out in all: {_share(report.left_out_share)} of the norm")
    for warning in report.warnings:
        _say(f"[yellow]warning[/]: {escape(warning)}")
    _say(f"written to {escape(str(report.path))}")


def _norm(parts: Sequence[LeftOut]) -> float:
    return float(sum(part.norm**2 for part in parts) ** 0.5)


def _rounding_cells(name: str, r: Rounding) -> list[str]:
    lost = "-" if r.lost_share is None else _share(r.lost_share)
    return [name, short_count(r.updated), lost, _number(r.cosine), _number(r.norm_ratio)]


def show_apply(report: ApplyReport) -> None:
    _problems(report.warnings)
    kinds = report.by_kind()
    if kinds:
        rows = [_rounding_cells(kind, part) for kind, part in kinds.items()]
        rows.append(_rounding_cells("total", report.rounding))
        _table(["realised change", "updated", "lost to rounding", "cosine", "norm ratio"], rows)
        lost = report.rounding.lost_share
        if lost is not None and lost > 0.25:
            _say(
                "[yellow]many updates were too small for the output's dtype[/]: --out-dtype "
                "float32 keeps them"
            )
    changed = sum(
        1
        for t in report.tensors
        if t.action == "merge" or (t.rounding is not None and t.rounding.updated)
    )
    _say(f"{count(changed)} tensors updated, {count(len(report.tensors) - changed)} as they were")
    _say(f"written to {escape(str(report.path))}")


def show_plan(plan: ApplyPlan) -> None:
    _problems(plan.problems)
    actions: dict[tuple[str, str], int] = {}
    for t in plan.tensors:
        key = (t.action, t.why or "")
        actions[key] = actions.get(key, 0) + 1
    _table(["action", "why", "tensors"], [[a, w, count(n)] for (a, w), n in actions.items()])
    _say(
        f"reads {size(plan.read_bytes)}, writes {size(plan.written_bytes)} "
        f"({size(plan.free_disk)} free), holds at most {size(plan.peak_memory)}"
    )
    errors = plan.errors
    plural = "" if len(errors) == 1 else "s"
    _say(f"[red]would stop: {len(errors)} error{plural}[/]" if errors else "[green]would run[/]")


def show_factors_plan(plan: FactorsPlan) -> None:
    """What a decomposition takes: the matrices by size, then the whole."""
    rows = sorted(plan.memory.items(), key=lambda item: item[1], reverse=True)[:10]

    def span(of: tuple[int, int]) -> str:
        return size(of[0]) if of[0] == of[1] else f"{size(of[0])} to {size(of[1])}"

    _table(["largest matrices", "memory"], [[escape(name), span(of)] for name, of in rows])
    _say(
        f"takes {count(len(plan.memory))} matrices apart, one after the other, at rank {plan.rank};"
        f" {count(plan.others)} other tensors"
    )
    _say(f"holds at most {span(plan.peak_memory)}")


def show_merge_plan(plan: ApplyPlan) -> None:
    """The resolved recipe, tensor by tensor; then what the whole takes, and every problem."""
    for t in plan.tensors:
        # One line each and no table: names are long, and a cut name is no answer.
        said = {} if t.method is None else {k: v for k, v in t.method.items() if k != "kind"}
        values = ", ".join(f"{key}={value}" for key, value in said.items())
        how = "" if t.method is None else f" {t.method['kind']}({values})"
        of = f" of {', '.join(dict.fromkeys(t.inputs))}" if t.inputs else ""
        weights = ", ".join(f"{c:.6g}" for c in t.coefficients)
        # Most methods that are no sum have no weights.
        plain = t.method is not None and set(t.coefficients) == {1.0}
        times = f" times {weights}" if weights and not plain else ""
        why = f" ({t.why})" if t.why else ""
        _say(escape(f"{t.name}: {t.dtype} {t.action}{how}{of}{times}{why}"))
    show_plan(plan)


def show_undo(report: UndoReport) -> None:
    origin = "copied from its source" if report.origin == "source" else "rebuilt from the residual"
    _say(
        f"{count(report.tensors)} tensors {origin}, digests as recorded; written to "
        f"{escape(str(report.path))}"
    )


def show_inspection(report: Inspection, html: Path | None) -> None:
    moved = "moved" if report.what == "vector" else "non-zero"

    def cells(name: str, g: GroupMeasure) -> list[str]:
        return [
            name,
            short_count(g.elements),
            _share(g.moved_share),
            magnitude(g.norm),
            magnitude(g.rms),
            magnitude(g.max),
        ]

    columns = ["", "parameters", moved, "norm", "rms", "largest"]
    kinds = [cells(kind, group) for kind, group in report.by_kind().items()]
    _table(["module", *columns[1:]], [*kinds, cells("total", report.totals())])
    layers = {layer: group for layer, group in report.by_layer().items() if layer is not None}
    if layers:
        _say("")
        _table(
            ["layer", *columns[1:]], [cells(str(layer), group) for layer, group in layers.items()]
        )
    _say("")
    largest = [
        [
            t.name,
            magnitude(t.norm),
            _share(t.moved_share),
            magnitude(t.max),
            "-" if t.max_at is None else count(t.max_at),
        ]
        for t in report.largest(10)
    ]
    _table(["largest tensors", "norm", moved, "largest", "at"], largest)
    if html is not None:
        _say(f"page written to {escape(str(html))}")


def show_comparison(report: Comparison) -> None:
    def cells(name: str, pair: Pair) -> list[str]:
        signs = "-" if pair.sign_agreement is None else _share(pair.sign_agreement)
        overlap = "-" if pair.overlap is None else _share(pair.overlap)
        return [
            name,
            _number(pair.cosine),
            signs,
            overlap,
            magnitude(pair.first_norm),
            magnitude(pair.second_norm),
        ]

    columns = ["cosine", "same sign", "overlap", "norm 1", "norm 2"]
    kinds = [cells(kind, pair) for kind, pair in report.by_kind().items()]
    _table(["module", *columns], [*kinds, cells("total", report.total)])
    layers = [cells(layer, pair) for layer, pair in report.by_layer().items()]
    if layers:
        _say("")
        _table(["layer", *columns], layers)


def show_spectra(report: Spectra, html: Path | None) -> None:
    from reasonvec.spectrum import typical

    def cells(name: str, rows: Sequence[TensorSpectrum]) -> list[str]:
        return [
            name,
            str(len(rows)),
            f"{typical(row.rank for row in rows):g}",
            str(max(row.rank for row in rows)),
            _share(typical(row.energy for row in rows)),
            f"{typical(row.stable_rank for row in rows):.1f}",
            magnitude(typical(row.values[0] if row.values else 0.0 for row in rows)),
            magnitude(typical(row.floor for row in rows)),
        ]

    columns = ["matrices", "rank", "most", "energy", "stable rank", "largest", "noise floor"]
    _say(f"singular values above the noise floor (medians over matrices): {escape(report.title)}")
    _table(["module", *columns], [cells(kind, rows) for kind, rows in report.by_kind().items()])
    layers = [
        cells(str(layer), rows) for layer, rows in report.by_layer().items() if layer is not None
    ]
    if layers:
        _say("")
        _table(["layer", *columns], layers)
    if report.skipped:
        _say(f"left out, of one dimension or more than three: {count(len(report.skipped))} tensors")
    if html is not None:
        _say(f"page written to {escape(str(html))}")


def show_factors(written: Factors, made: int) -> None:
    ranks = sorted(int(str(row["rank"])) for row in written.rows.values())
    there = len(written) - made
    kept = f", {count(there)} of them as they were in the file" if there else ""
    _say(f"{count(len(written))} matrices at rank {_range(ranks)}{kept}")
    _say(f"written to {escape(str(written.path))}, {size(written.path.stat().st_size)}")


def show_verify(report: VerifyReport) -> None:
    for line in report.damage:
        _say(f"[red]damaged[/]: {escape(line)}")
    if report.ok:
        files = f" and {count(report.files)} files" if report.files else ""
        _say(
            f"[green]whole[/]: {count(report.tensors)} tensors{files} have their "
            f"{report.algorithm} digests"
        )


def show_diff(report: DiffReport) -> None:
    rows = []
    for t in report.tensors:
        if t.why is not None:
            rows.append([t.name, "-", "-", t.why])
        elif t.differing:
            rows.append(
                [
                    t.name,
                    count(t.differing),
                    _percent(t.differing, t.elements),
                    f"first at {t.first}",
                ]
            )
    if rows:
        _table(["tensor", "differing", "share", ""], rows)
    share = _percent(report.differing, report.elements)
    if report.same:
        _say(f"[green]the same[/]: {short_count(report.elements)} elements, bit for bit")
    else:
        _say(f"{count(report.differing)} of {count(report.elements)} elements differ ({share})")
