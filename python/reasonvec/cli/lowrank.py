"""What has a rank: compress, from-lora, to-lora, spectrum, factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from reasonvec import _reasonvec as core
from reasonvec import open as open_point
from reasonvec.cli.console import Session
from reasonvec.cli.operands import Pairs, opened, operands, selected, total
from reasonvec.cli.options import (
    INPUT,
    digest_option,
    dry_run_option,
    html_option,
    out_option,
    overwrite_option,
    ranking_options,
    seed_option,
    selecting_options,
    session_options,
    sync_option,
    vector_sources,
)

if TYPE_CHECKING:
    from reasonvec.run import DigestName

__all__ = ["compress", "factors", "from_lora", "spectrum", "to_lora"]


@click.command()
@click.argument("vectors", type=INPUT, metavar="[V]...", nargs=-1)
@vector_sources
@out_option("W", "The new folder.")
@ranking_options
@click.option("--rescale", is_flag=True, help="Stretch every matrix to the norm that it had.")
@dry_run_option
@selecting_options
@digest_option
@overwrite_option
@sync_option
@session_options
def compress(
    session: Session,
    vectors: Sequence[Path],
    pairs: Pairs,
    base: Path | None,
    out: Path,
    rank: int | Literal["auto"],
    energy: float | None,
    include: Sequence[str],
    exclude: Sequence[str],
    digest: DigestName,
    *,
    rescale: bool,
    dry_run: bool,
    overwrite: bool,
    sync: bool,
) -> None:
    """Write the sum of the vectors with every matrix as the product of two thin ones.

    What has no rank to cut (biases, norms, embeddings, head) is kept exactly, and so is a matrix
    that its factors would not make smaller.
    """
    from reasonvec.cli.show import show_compress, show_factors_plan

    wanted = rank if energy is None else energy
    with session.running("compressing", bar=not dry_run) as options:
        vector = selected(total(operands(vectors, pairs, base), []), include, exclude)
        if dry_run:
            plan = vector.plan_compress(rank=wanted, **options)
        else:
            report = vector.compress(
                out,
                rank=wanted,
                rescale=rescale,
                digest=digest,
                overwrite=overwrite,
                sync=sync,
                **options,
            )
    if dry_run:
        session.emit(plan.as_json, lambda: show_factors_plan(plan))
        return
    session.emit(report.as_json, lambda: show_compress(report))


@click.command("from-lora")
@click.argument("folder", type=INPUT, metavar="DIR")
@click.option("--base", type=INPUT, metavar="B", help="The checkpoint that it was trained on.")
@out_option("V", "The vector's folder.")
@digest_option
@overwrite_option
@sync_option
@session_options
def from_lora(
    session: Session,
    folder: Path,
    base: Path | None,
    out: Path,
    digest: DigestName,
    *,
    overwrite: bool,
    sync: bool,
) -> None:
    """Write the LoRA adapter DIR as a vector, with its own factors, bit for bit."""
    from reasonvec import adapter
    from reasonvec.cli.show import show_compress
    from reasonvec.lowrank import from_lora as run

    with session.running("writing") as options:
        report = run(
            adapter(folder, None if base is None else open_point(base)),
            out,
            digest=digest,
            overwrite=overwrite,
            sync=sync,
            **options,
        )
    session.emit(report.as_json, lambda: show_compress(report))


@click.command("to-lora")
@click.argument("vectors", type=INPUT, metavar="[V]...", nargs=-1)
@vector_sources
@out_option("DIR", "The adapter's folder.")
@ranking_options
@click.option(
    "--base-model",
    metavar="NAME",
    help="The base that the adapter names, a folder or a hub repository.  [default: the negative "
    "donor]",
)
@dry_run_option
@selecting_options
@overwrite_option
@sync_option
@session_options
def to_lora(
    session: Session,
    vectors: Sequence[Path],
    pairs: Pairs,
    base: Path | None,
    out: Path,
    rank: int | Literal["auto"],
    energy: float | None,
    base_model: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    dry_run: bool,
    overwrite: bool,
    sync: bool,
) -> None:
    """Write the sum of the vectors as a LoRA adapter for PEFT, and say what it cannot carry."""
    from reasonvec.cli.show import show_factors_plan, show_lora

    wanted = rank if energy is None else energy
    with session.running("exporting", bar=not dry_run) as options:
        vector = selected(total(operands(vectors, pairs, base), []), include, exclude)
        if dry_run:
            plan = vector.plan_lora(rank=wanted, **options)
        else:
            report = vector.to_lora(
                out, rank=wanted, base=base_model, overwrite=overwrite, sync=sync, **options
            )
    if dry_run:
        session.emit(plan.as_json, lambda: show_factors_plan(plan))
        return
    session.emit(report.as_json, lambda: show_lora(report))


@click.command()
@click.argument("path", type=INPUT, metavar="[PATH]", required=False)
@vector_sources
@html_option("One self-contained page with plots.")
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Singular values of a matrix; all of them where more than these exceed the floor.",
)
@click.option("--all-values", is_flag=True, help="Every singular value (slow for large matrices).")
@seed_option("For the signs of the noise floor.")
@session_options
def spectrum(
    session: Session,
    path: Path | None,
    pairs: Pairs,
    base: Path | None,
    html: Path | None,
    count: int,
    seed: int,
    *,
    all_values: bool,
) -> None:
    """Singular values of a vector or a checkpoint against the noise floor, by layer and module."""
    from reasonvec.cli.show import show_spectra

    with session.running("decomposing") as options:
        report = opened(path, pairs, base).spectrum(
            count=None if all_values else count,
            seed=seed,
            **options,
        )
        if html is not None:
            from reasonvec.page import spectrum_page

            core.write_whole(html, spectrum_page(report).encode(), sync=False)
    session.emit(report.as_json, lambda: show_spectra(report, html))


@click.command()
@click.argument("model", type=INPUT, metavar="MODEL")
@out_option("FILE", "The factor file.")
@click.option("--rank", type=click.IntRange(min=1), required=True, help="Triplets of each matrix.")
@click.option(
    "--which",
    type=click.Choice(["bottom", "top", "both"]),
    default="bottom",
    show_default=True,
    help="The smallest, exact (KaSA, MiLoRA), or the largest (PiSSA).",
)
@selecting_options
@seed_option("For the random matrix of the largest.")
@session_options
def factors(
    session: Session,
    model: Path,
    out: Path,
    rank: int,
    which: Literal["bottom", "top", "both"],
    include: Sequence[str],
    exclude: Sequence[str],
    seed: int,
) -> None:
    """The largest or smallest singular triplets of MODEL's matrices, for adapters to start from.

    What FILE has already, of the same tensors at the same rank, is kept. Embeddings, head, norms
    and routers are left out unless --include finds them.
    """
    from reasonvec.cli.show import show_factors
    from reasonvec.factor_cache import write_factors

    made: set[str] = set()
    with session.running("factoring") as options:
        written = write_factors(
            open_point(model),
            out,
            rank=rank,
            which=which,
            include=include,
            exclude=exclude,
            seed=seed,
            tell=made.add,
            **options,
        )
    report = {"file": str(out), "made": len(made), "tensors": written.rows}
    session.emit(lambda: report, lambda: show_factors(written, len(made)))
