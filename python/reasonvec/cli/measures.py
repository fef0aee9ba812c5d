"""What is there, and is it still: inspect, compare, verify, diff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from reasonvec.cli.console import emit, guarded, progress
from reasonvec.cli.options import (
    INPUT,
    Pairs,
    opened,
    operands,
    output_options,
    run_options,
    running_options,
    vector_sources,
)

__all__ = ["compare", "diff", "inspect", "verify"]


@click.command()
@click.argument("path", type=INPUT, metavar="[PATH]", required=False)
@vector_sources
@click.option("--html", type=INPUT, metavar="FILE", help="One self-contained page with heat maps.")
@running_options
@output_options
def inspect(
    path: Path | None,
    pairs: Pairs,
    base: Path | None,
    html: Path | None,
    threads: int,
    memory_budget: int,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Norms, sparsity and largest changes of a vector or a checkpoint, by layer and module."""
    from reasonvec.cli.show import show_inspection

    with guarded(), progress("inspecting", quiet=quiet or as_json) as tell:
        report = opened(path, pairs, base).inspect(**run_options(threads, memory_budget, tell))
        if html is not None:
            from reasonvec._reasonvec import write_whole
            from reasonvec.page import inspection_page

            write_whole(html, inspection_page(report).encode(), sync=False)
    emit(report.as_json, lambda: show_inspection(report, html), as_json=as_json, quiet=quiet)


@click.command()
@click.argument("vectors", type=INPUT, metavar="[V] [W]", nargs=-1)
@vector_sources
@running_options
@output_options
def compare(
    vectors: Sequence[Path],
    pairs: Pairs,
    base: Path | None,
    threads: int,
    memory_budget: int,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Cosine, sign agreement and overlap of the vectors V and W, by layer and module."""
    from reasonvec.cli.show import show_comparison

    with guarded(), progress("comparing", quiet=quiet or as_json) as tell:
        first, second = operands(vectors, pairs, base, only=2)
        report = first.compare(second, **run_options(threads, memory_budget, tell))
    emit(report.as_json, lambda: show_comparison(report), as_json=as_json, quiet=quiet)


@click.command()
@click.argument("folder", type=INPUT, metavar="DIR")
@running_options
@output_options
def verify(folder: Path, threads: int, memory_budget: int, *, as_json: bool, quiet: bool) -> None:
    """Are the bytes of DIR, an output of apply or a vector, still those that were written?"""
    from reasonvec.cli.show import show_verify
    from reasonvec.verify import verify as run

    with guarded(), progress("verifying", quiet=quiet or as_json) as tell:
        report = run(folder, **run_options(threads, memory_budget, tell))
    emit(report.as_json, lambda: show_verify(report), as_json=as_json, quiet=quiet)
    raise SystemExit(0 if report.ok else 1)


@click.command()
@click.argument("first", type=INPUT, metavar="A")
@click.argument("second", type=INPUT, metavar="B")
@running_options
@output_options
def diff(
    first: Path, second: Path, threads: int, memory_budget: int, *, as_json: bool, quiet: bool
) -> None:
    """Exact counts of the elements that differ between the checkpoints A and B."""
    from reasonvec.cli.show import show_diff
    from reasonvec.verify import diff as run

    with guarded(), progress("comparing", quiet=quiet or as_json) as tell:
        report = run(first, second, **run_options(threads, memory_budget, tell))
    emit(report.as_json, lambda: show_diff(report), as_json=as_json, quiet=quiet)
    raise SystemExit(0 if report.same else 1)
