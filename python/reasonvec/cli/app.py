"""The commands: a few lines each over the API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from reasonvec import __version__
from reasonvec import open as open_point
from reasonvec.cli.console import (
    DIGEST,
    INPUT,
    emit,
    guarded,
    output_options,
    placing_options,
    progress,
    ranking_options,
    run_options,
    running_options,
    selecting_options,
    vector_sources,
)
from reasonvec.cli.merge import merge

if TYPE_CHECKING:
    from reasonvec.algebra import Vector
    from reasonvec.apply import OutDtype
    from reasonvec.compat.alignment import MissingPolicy
    from reasonvec.compat.rows import VocabPolicy
    from reasonvec.extract import Encoding
    from reasonvec.run import DigestName

__all__ = ["main"]

Pairs = Sequence[tuple[Path, Path]]
_ALLOW = click.option("--allow-nonfinite", is_flag=True, help="Let NaN and infinity pass.")
_DRY = click.option(
    "--dry-run", is_flag=True, help="Say what would happen, and every problem; write nothing."
)
_OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Replace an earlier output of reasonvec in the folder."
)
_SYNC = click.option(
    "--sync/--no-sync",
    default=True,
    show_default=True,
    help="Flush files to the disk before they get their final names.",
)
_DIGEST = click.option(
    "--digest",
    type=DIGEST,
    default="xxh3-128",
    show_default=True,
    help="xxh3-128 detects damage, blake3 forgery too.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="reasonvec")
def main() -> None:
    """Capabilities of language models as vectors in weight space.

    Exit codes: 0, done or yes; 1, the answer is no; 2, wrong use or input.
    """


@main.command()
@click.argument("positive", type=INPUT, metavar="P")
@click.argument("negative", type=INPUT, metavar="N")
@click.argument("target", type=INPUT, metavar="[T]", required=False)
@placing_options
@running_options
@output_options
def check(
    positive: Path,
    negative: Path,
    target: Path | None,
    vocab: VocabPolicy,
    missing: MissingPolicy,
    map_prefix: Sequence[str],
    threads: int,
    memory_budget: int,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do the donors P and N, and the target T, fit together, and how close are they?

    Every problem at once; exit code 1 if they are incompatible.
    """
    from reasonvec.check import check as run
    from reasonvec.cli.show import show_check

    with guarded(), progress("checking", quiet=quiet or as_json) as tell:
        report = run(
            open_point(positive),
            open_point(negative),
            open_point(target) if target is not None else None,
            vocab=vocab,
            missing=missing,
            map_prefix=_prefixes(map_prefix),
            **run_options(threads, memory_budget, tell),
        )
    emit(report.as_json, lambda: show_check(report), as_json=as_json, quiet=quiet)
    raise SystemExit(0 if report.ok else 1)


@main.command()
@click.argument("positive", type=INPUT, metavar="P")
@click.argument("negative", type=INPUT, metavar="N")
@click.option("--out", "-o", type=INPUT, required=True, metavar="DIR", help="The vector's folder.")
@click.option(
    "--encoding",
    type=click.Choice(["auto", "dense", "sparse"]),
    default="auto",
    show_default=True,
    help="How tensors are stored; auto takes the fewest bytes.",
)
@selecting_options
@_DIGEST
@_ALLOW
@_OVERWRITE
@_SYNC
@running_options
@output_options
def extract(
    positive: Path,
    negative: Path,
    out: Path,
    encoding: Encoding,
    include: Sequence[str],
    exclude: Sequence[str],
    digest: DigestName,
    threads: int,
    memory_budget: int,
    *,
    allow_nonfinite: bool,
    overwrite: bool,
    sync: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the vector P - N, exactly: negative + vector == positive is checked bit for bit."""
    from reasonvec.cli.show import show_extract

    with guarded(), progress("extracting", quiet=quiet or as_json) as tell:
        vector = _where(open_point(positive) - open_point(negative), include, exclude)
        report = vector.save(
            out,
            encoding=encoding,
            digest=digest,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            sync=sync,
            **run_options(threads, memory_budget, tell),
        )
    emit(report.as_json, lambda: show_extract(report), as_json=as_json, quiet=quiet)
    raise SystemExit(1 if report.exact is False else 0)


@main.command()
@click.argument("vectors", type=INPUT, metavar="[V]...", nargs=-1)
@vector_sources
@click.option(
    "--to", type=INPUT, required=True, metavar="T", help="The target; it is never changed."
)
@click.option(
    "--out", "-o", type=INPUT, required=True, metavar="DIR", help="The new checkpoint's folder."
)
@click.option(
    "--alpha",
    "-a",
    type=float,
    multiple=True,
    metavar="A",
    help="Times each vector, in the order of V... and then --from; negative subtracts.  "
    "[default: 1]",
)
@click.option(
    "--alpha-for",
    multiple=True,
    metavar="REGEX=VALUE",
    help="Another alpha for tensors whose name this finds; repeatable.",
)
@click.option("--layer-ramp", metavar="A:B", help="Times A in the first layer to B in the last.")
@selecting_options
@click.option(
    "--control",
    type=click.Choice(["random", "reverse", "shuffle"]),
    help="A control in place of the vectors: noise of the same norm, minus the vector, the same "
    "values elsewhere.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="For --control."
)
@placing_options
@click.option(
    "--out-dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="The target's by default.",
)
@click.option(
    "--chat-template-from", type=INPUT, metavar="DIR", help="Take this folder's chat template."
)
@_DIGEST
@click.option("--keep-undo", is_flag=True, help="Store the exact way back beside the output.")
@_ALLOW
@_DRY
@click.option("--resume", is_flag=True, help="Continue an unfinished run.")
@_OVERWRITE
@_SYNC
@running_options
@output_options
def apply(
    vectors: Sequence[Path],
    pairs: Pairs,
    base: Path | None,
    to: Path,
    out: Path,
    alpha: Sequence[float],
    alpha_for: Sequence[str],
    layer_ramp: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    control: Literal["random", "reverse", "shuffle"] | None,
    seed: int,
    vocab: VocabPolicy,
    missing: MissingPolicy,
    map_prefix: Sequence[str],
    out_dtype: OutDtype | None,
    chat_template_from: Path | None,
    digest: DigestName,
    threads: int,
    memory_budget: int,
    *,
    keep_undo: bool,
    allow_nonfinite: bool,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    sync: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Add vectors to the target T in one pass, and write the result with a record of its making."""
    with guarded(), progress("applying", quiet=quiet or as_json or dry_run) as tell:
        vector = _scaled(_each(vectors, pairs, base), alpha)
        if alpha_for:
            vector = vector.alpha_for(dict(_rule(rule) for rule in alpha_for))
        if layer_ramp is not None:
            vector = vector.ramp(*_ramp(layer_ramp))
        vector = _where(vector, include, exclude)
        if control is not None:
            vector = vector.control(control, seed=seed)
        plan = (open_point(to) + vector).plan(
            out,
            vocab=vocab,
            missing=missing,
            map_prefix=_prefixes(map_prefix),
            out_dtype=out_dtype,
            chat_template_from=chat_template_from,
            digest=digest,
            keep_undo=keep_undo,
            allow_nonfinite=allow_nonfinite,
            resume=resume,
            overwrite=overwrite,
            sync=sync,
            **run_options(threads, memory_budget, tell),
        )
        report = None if dry_run else plan.run()

    def show() -> None:
        from reasonvec.cli.show import show_apply, show_plan

        show_plan(plan) if report is None else show_apply(report)

    emit(plan.as_json if report is None else report.as_json, show, as_json=as_json, quiet=quiet)
    raise SystemExit(1 if report is None and plan.errors else 0)


main.add_command(merge)


@main.command()
@click.argument("vectors", type=INPUT, metavar="[V]...", nargs=-1)
@vector_sources
@click.option("--out", "-o", type=INPUT, required=True, metavar="W", help="The new folder.")
@ranking_options
@click.option("--rescale", is_flag=True, help="Stretch every matrix to the norm that it had.")
@_DRY
@selecting_options
@_DIGEST
@_OVERWRITE
@_SYNC
@running_options
@output_options
def compress(
    vectors: Sequence[Path],
    pairs: Pairs,
    base: Path | None,
    out: Path,
    rank: int | Literal["auto"],
    energy: float | None,
    include: Sequence[str],
    exclude: Sequence[str],
    digest: DigestName,
    threads: int,
    memory_budget: int,
    *,
    rescale: bool,
    dry_run: bool,
    overwrite: bool,
    sync: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the sum of the vectors with every matrix as the product of two thin ones.

    What has no rank to cut (biases, norms, embeddings, head) is kept exactly.
    """
    from reasonvec.cli.show import show_compress, show_factors_plan

    wanted = rank if energy is None else energy
    with guarded(), progress("compressing", quiet=quiet or as_json or dry_run) as tell:
        vector = _where(_scaled(_each(vectors, pairs, base), []), include, exclude)
        options = run_options(threads, memory_budget, tell)
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
        emit(plan.as_json, lambda: show_factors_plan(plan), as_json=as_json, quiet=quiet)
        return
    emit(report.as_json, lambda: show_compress(report), as_json=as_json, quiet=quiet)


@main.command("from-lora")
@click.argument("folder", type=INPUT, metavar="DIR")
@click.option("--base", type=INPUT, metavar="B", help="The checkpoint that it was trained on.")
@click.option("--out", "-o", type=INPUT, required=True, metavar="V", help="The vector's folder.")
@_DIGEST
@_OVERWRITE
@_SYNC
@running_options
@output_options
def from_lora(
    folder: Path,
    base: Path | None,
    out: Path,
    digest: DigestName,
    threads: int,
    memory_budget: int,
    *,
    overwrite: bool,
    sync: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the LoRA adapter DIR as a vector, with its own factors."""
    from reasonvec import adapter
    from reasonvec.cli.show import show_compress
    from reasonvec.lowrank import from_lora as run

    with guarded(), progress("writing", quiet=quiet or as_json) as tell:
        report = run(
            adapter(folder, None if base is None else open_point(base)),
            out,
            digest=digest,
            overwrite=overwrite,
            sync=sync,
            **run_options(threads, memory_budget, tell),
        )
    emit(report.as_json, lambda: show_compress(report), as_json=as_json, quiet=quiet)


@main.command("to-lora")
@click.argument("vectors", type=INPUT, metavar="[V]...", nargs=-1)
@vector_sources
@click.option("--out", "-o", type=INPUT, required=True, metavar="DIR", help="The adapter's folder.")
@ranking_options
@click.option(
    "--base-model",
    metavar="NAME",
    help="The base that the adapter names, a folder or a hub repository.  [default: the negative "
    "donor]",
)
@_DRY
@selecting_options
@_OVERWRITE
@_SYNC
@running_options
@output_options
def to_lora(
    vectors: Sequence[Path],
    pairs: Pairs,
    base: Path | None,
    out: Path,
    rank: int | Literal["auto"],
    energy: float | None,
    base_model: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    threads: int,
    memory_budget: int,
    *,
    dry_run: bool,
    overwrite: bool,
    sync: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the sum of the vectors as a LoRA adapter for PEFT, and say what it cannot carry."""
    from reasonvec.cli.show import show_factors_plan, show_lora

    wanted = rank if energy is None else energy
    with guarded(), progress("exporting", quiet=quiet or as_json or dry_run) as tell:
        vector = _where(_scaled(_each(vectors, pairs, base), []), include, exclude)
        options = run_options(threads, memory_budget, tell)
        if dry_run:
            plan = vector.plan_lora(rank=wanted, **options)
        else:
            report = vector.to_lora(
                out, rank=wanted, base=base_model, overwrite=overwrite, sync=sync, **options
            )
    if dry_run:
        emit(plan.as_json, lambda: show_factors_plan(plan), as_json=as_json, quiet=quiet)
        return
    emit(report.as_json, lambda: show_lora(report), as_json=as_json, quiet=quiet)


@main.command()
@click.argument("folder", type=INPUT, metavar="DIR")
@click.option(
    "--out", "-o", type=INPUT, required=True, metavar="ORIG", help="Where to put the target."
)
@click.option("--source", type=INPUT, metavar="T", help="Where the target is now, if it has moved.")
@_OVERWRITE
@_SYNC
@running_options
@output_options
def undo(
    folder: Path,
    out: Path,
    source: Path | None,
    threads: int,
    memory_budget: int,
    *,
    overwrite: bool,
    sync: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Give back the original target of DIR, an output of apply, bit for bit."""
    from reasonvec.cli.show import show_undo
    from reasonvec.undo import undo as run

    with guarded(), progress("undoing", quiet=quiet or as_json) as tell:
        report = run(
            folder,
            out,
            source=source,
            overwrite=overwrite,
            sync=sync,
            **run_options(threads, memory_budget, tell),
        )
    emit(report.as_json, lambda: show_undo(report), as_json=as_json, quiet=quiet)


@main.command()
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
    from reasonvec.adapter import is_adapter
    from reasonvec.cli.show import show_inspection
    from reasonvec.folders import is_vector

    with guarded(), progress("inspecting", quiet=quiet or as_json) as tell:
        options = run_options(threads, memory_budget, tell)
        if path is not None and not pairs and not is_vector(path) and not is_adapter(path):
            report = open_point(path).inspect(**options)
        else:
            report = _each([] if path is None else [path], pairs, base, only=1)[0].inspect(
                **options
            )
        if html is not None:
            from reasonvec._reasonvec import write_whole
            from reasonvec.page import inspection_page

            write_whole(html, inspection_page(report).encode(), sync=False)
    emit(report.as_json, lambda: show_inspection(report, html), as_json=as_json, quiet=quiet)


@main.command()
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
        first, second = _each(vectors, pairs, base, only=2)
        report = first.compare(second, **run_options(threads, memory_budget, tell))
    emit(report.as_json, lambda: show_comparison(report), as_json=as_json, quiet=quiet)


@main.command()
@click.argument("path", type=INPUT, metavar="[PATH]", required=False)
@vector_sources
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--all-values", is_flag=True, help="Every singular value (slow for large matrices).")
@click.option("--seed", type=int, default=0, show_default=True)
@running_options
@output_options
def spectrum(
    path: Path | None,
    pairs: Pairs,
    base: Path | None,
    count: int,
    seed: int,
    threads: int,
    memory_budget: int,
    *,
    all_values: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Singular values of a vector or a checkpoint against the noise floor, by layer and module."""
    from reasonvec.adapter import is_adapter
    from reasonvec.cli.show import show_spectra
    from reasonvec.folders import is_vector

    with guarded(), progress("decomposing", quiet=quiet or as_json) as tell:
        options = run_options(threads, memory_budget, tell)
        many = None if all_values else count
        if path is not None and not pairs and not is_vector(path) and not is_adapter(path):
            report = open_point(path).spectrum(count=many, seed=seed, **options)
        else:
            vector = _each([] if path is None else [path], pairs, base, only=1)[0]
            report = vector.spectrum(count=many, seed=seed, **options)
    emit(report.as_json, lambda: show_spectra(report), as_json=as_json, quiet=quiet)


@main.command()
@click.argument("model", type=INPUT, metavar="MODEL")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE"
)
@click.option("--rank", type=click.IntRange(min=1), required=True, help="Triplets of each matrix.")
@click.option(
    "--which", type=click.Choice(["bottom", "top", "both"]), default="bottom", show_default=True
)
@selecting_options
@click.option("--seed", type=int, default=0, show_default=True)
@running_options
@output_options
def factors(
    model: Path,
    output: Path,
    rank: int,
    which: Literal["bottom", "top", "both"],
    include: Sequence[str],
    exclude: Sequence[str],
    seed: int,
    threads: int,
    memory_budget: int,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """The largest or smallest singular triplets of MODEL's matrices, for adapters to start from."""
    from reasonvec.cli.show import show_factors
    from reasonvec.factors import write_factors

    with guarded(), progress("factoring", quiet=quiet or as_json) as tell:
        written = write_factors(
            open_point(model),
            output,
            rank=rank,
            which=which,
            include=include,
            exclude=exclude,
            seed=seed,
            **run_options(threads, memory_budget, tell),
        )
    report = {"file": str(output), "tensors": written.rows}
    emit(lambda: report, lambda: show_factors(written), as_json=as_json, quiet=quiet)


@main.command()
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


@main.command()
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


@main.command()
@click.argument("folder", type=INPUT, metavar="[DIR]", default="reasonvec-demo")
def demo(folder: Path) -> None:
    """Make a small family of checkpoints, and run the other commands on it."""
    from reasonvec.cli.demo import run

    with guarded():
        run(folder)


def _where(vector: Vector, include: Sequence[str], exclude: Sequence[str]) -> Vector:
    return vector.where(include=include, exclude=exclude) if include or exclude else vector


def _each(
    vectors: Sequence[Path], pairs: Pairs, base: Path | None, *, only: int | None = None
) -> list[Vector]:
    """The vectors of a command line: folders, of vectors or of adapters, then differences."""
    from reasonvec import adapter, load
    from reasonvec.adapter import is_adapter

    found = len(vectors) + len(pairs)
    if not found or (only is not None and found != only):
        wanted = {None: "at least one vector", 1: "one vector", 2: "two vectors"}[only]
        message = f"expected {wanted} (a folder, or --from POSITIVE NEGATIVE), found {found}"
        raise click.UsageError(message)
    point = None if base is None else open_point(base)
    folders = [adapter(path, point) if is_adapter(path) else load(path) for path in vectors]
    return folders + [open_point(p) - open_point(n) for p, n in pairs]


def _scaled(vectors: list[Vector], alphas: Sequence[float]) -> Vector:
    if len(alphas) > len(vectors):
        message = f"--alpha was given {len(alphas)} times for {len(vectors)} vectors"
        raise click.UsageError(message)
    scaled = [a * v for a, v in zip(alphas, vectors, strict=False)] + vectors[len(alphas) :]
    total = scaled[0]
    for vector in scaled[1:]:
        total = total + vector
    return total


def _prefixes(values: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    for value in values:
        target, equals, vector = value.partition("=")
        if not equals:
            message = f"--map-prefix takes A=B, found {value!r}"
            raise click.UsageError(message)
        found.append((target, vector))
    return found


def _rule(text: str) -> tuple[str, float]:
    regex, _, value = text.rpartition("=")
    try:
        if regex:
            return regex, float(value)
    except ValueError:
        pass
    message = f"--alpha-for takes REGEX=VALUE, found {text!r}"
    raise click.UsageError(message)


def _ramp(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError:
        message = f"--layer-ramp takes A:B, two numbers, found {text!r}"
        raise click.UsageError(message) from None
