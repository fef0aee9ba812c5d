"""What is there, and is it still: inspect, compare, verify, diff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from reasonvec import _reasonvec as core
from reasonvec.cli.console import Session
from reasonvec.cli.operands import Pairs, opened, operands
from reasonvec.cli.options import (
    INPUT,
    html_option,
    session_options,
    vector_sources,
)

__all__ = ["compare", "diff", "inspect", "verify"]


@click.command()
@click.argument("path", type=INPUT, metavar="[PATH]", required=False)
@vector_sources
@html_option("One self-contained page with heat maps.")
@session_options
def inspect(
    session: Session,
    path: Path | None,
    pairs: Pairs,
    base: Path | None,
    html: Path | None,
) -> None:
    """Norms, sparsity and largest changes of a vector or a checkpoint, by layer and module."""
    from reasonvec.cli.show import show_inspection

    with session.running("inspecting") as options:
        report = opened(path, pairs, base).inspect(**options)
        if html is not None:
            from reasonvec.page import inspection_page

            core.write_whole(html, inspection_page(report).encode(), sync=False)
    session.emit(report.as_json, lambda: show_inspection(report, html))


@click.command()
@click.argument("vectors", type=INPUT, metavar="[V] [W]", nargs=-1)
@vector_sources
@session_options
def compare(
    session: Session,
    vectors: Sequence[Path],
    pairs: Pairs,
    base: Path | None,
) -> None:
    """Cosine, sign agreement and overlap of the vectors V and W, by layer and module."""
    from reasonvec.cli.show import show_comparison

    with session.running("comparing") as options:
        first, second = operands(vectors, pairs, base, only=2)
        report = first.compare(second, **options)
    session.emit(report.as_json, lambda: show_comparison(report))


@click.command()
@click.argument("folder", type=INPUT, metavar="DIR")
@session_options
def verify(session: Session, folder: Path) -> None:
    """Are the bytes of DIR, an output of apply or a vector, still those that were written?"""
    from reasonvec.cli.show import show_verify
    from reasonvec.verify import verify as run

    with session.running("verifying") as options:
        report = run(folder, **options)
    session.emit(report.as_json, lambda: show_verify(report))
    raise SystemExit(0 if report.ok else 1)


@click.command()
@click.argument("first", type=INPUT, metavar="A")
@click.argument("second", type=INPUT, metavar="B")
@session_options
def diff(session: Session, first: Path, second: Path) -> None:
    """Exact counts of the elements that differ between the checkpoints A and B."""
    from reasonvec.cli.show import show_diff
    from reasonvec.verify import diff as run

    with session.running("comparing") as options:
        report = run(first, second, **options)
    session.emit(report.as_json, lambda: show_diff(report))
    raise SystemExit(0 if report.same else 1)
