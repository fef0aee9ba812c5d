"""Vectors made, laid on models, and taken back: check, extract, apply, undo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from reasonvec import open as open_point
from reasonvec.cli.console import Session
from reasonvec.cli.operands import Pairs, operands, prefixes, selected, total
from reasonvec.cli.options import (
    INPUT,
    digest_option,
    dry_run_option,
    nonfinite_option,
    out_dtype_option,
    out_option,
    overwrite_option,
    placing_options,
    resume_option,
    seed_option,
    selecting_options,
    session_options,
    sync_option,
    vector_sources,
)

if TYPE_CHECKING:
    from reasonvec.apply import OutDtype
    from reasonvec.compat.alignment import MissingPolicy
    from reasonvec.compat.rows import VocabPolicy
    from reasonvec.extract import Encoding
    from reasonvec.run import DigestName

__all__ = ["apply", "check", "extract", "undo"]


@click.command()
@click.argument("positive", type=INPUT, metavar="P")
@click.argument("negative", type=INPUT, metavar="N")
@click.argument("target", type=INPUT, metavar="[T]", required=False)
@placing_options
@session_options
def check(
    session: Session,
    positive: Path,
    negative: Path,
    target: Path | None,
    vocab: VocabPolicy,
    missing: MissingPolicy,
    map_prefix: Sequence[str],
) -> None:
    """Do the donors P and N, and the target T, fit together, and how close are they?

    Every problem at once; exit code 1 if they are incompatible.
    """
    from reasonvec.check import check as run
    from reasonvec.cli.show import show_check

    with session.running("checking") as options:
        report = run(
            open_point(positive),
            open_point(negative),
            open_point(target) if target is not None else None,
            vocab=vocab,
            missing=missing,
            map_prefix=prefixes(map_prefix),
            **options,
        )
    session.emit(report.as_json, lambda: show_check(report))
    raise SystemExit(0 if report.ok else 1)


@click.command()
@click.argument("positive", type=INPUT, metavar="P")
@click.argument("negative", type=INPUT, metavar="N")
@out_option("DIR", "The vector's folder.")
@click.option(
    "--encoding",
    type=click.Choice(["auto", "dense", "sparse"]),
    default="auto",
    show_default=True,
    help="How tensors are stored; auto takes the fewest bytes.",
)
@selecting_options
@digest_option
@nonfinite_option
@overwrite_option
@sync_option
@session_options
def extract(
    session: Session,
    positive: Path,
    negative: Path,
    out: Path,
    encoding: Encoding,
    include: Sequence[str],
    exclude: Sequence[str],
    digest: DigestName,
    *,
    allow_nonfinite: bool,
    overwrite: bool,
    sync: bool,
) -> None:
    """Write the vector P - N, exactly: negative + vector == positive is checked bit for bit."""
    from reasonvec.cli.show import show_extract

    with session.running("extracting") as options:
        vector = selected(open_point(positive) - open_point(negative), include, exclude)
        report = vector.save(
            out,
            encoding=encoding,
            digest=digest,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            sync=sync,
            **options,
        )
    session.emit(report.as_json, lambda: show_extract(report))
    raise SystemExit(1 if report.exact is False else 0)


@click.command()
@click.argument("vectors", type=INPUT, metavar="[V]...", nargs=-1)
@vector_sources
@click.option(
    "--to", type=INPUT, required=True, metavar="T", help="The target; it is never changed."
)
@out_option("DIR", "The new checkpoint's folder.")
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
@seed_option("For --control.")
@placing_options
@out_dtype_option("The target's by default.")
@click.option(
    "--chat-template-from", type=INPUT, metavar="DIR", help="Take this folder's chat template."
)
@digest_option
@click.option("--keep-undo", is_flag=True, help="Store the exact way back beside the output.")
@nonfinite_option
@dry_run_option
@resume_option
@overwrite_option
@sync_option
@session_options
def apply(
    session: Session,
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
    *,
    keep_undo: bool,
    allow_nonfinite: bool,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    sync: bool,
) -> None:
    """Add vectors to the target T in one pass, and write the result with a record of its making."""
    with session.running("applying", bar=not dry_run) as options:
        vector = total(operands(vectors, pairs, base), alpha)
        if alpha_for:
            vector = vector.alpha_for(dict(_rule(rule) for rule in alpha_for))
        if layer_ramp is not None:
            vector = vector.ramp(*_ramp(layer_ramp))
        vector = selected(vector, include, exclude)
        if control is not None:
            vector = vector.control(control, seed=seed)
        plan = (open_point(to) + vector).plan(
            out,
            vocab=vocab,
            missing=missing,
            map_prefix=prefixes(map_prefix),
            out_dtype=out_dtype,
            chat_template_from=chat_template_from,
            digest=digest,
            keep_undo=keep_undo,
            allow_nonfinite=allow_nonfinite,
            resume=resume,
            overwrite=overwrite,
            sync=sync,
            **options,
        )
        report = None if dry_run else plan.run()

    def show() -> None:
        from reasonvec.cli.show import show_apply, show_plan

        show_plan(plan) if report is None else show_apply(report)

    session.emit(plan.as_json if report is None else report.as_json, show)
    raise SystemExit(1 if report is None and plan.errors else 0)


@click.command()
@click.argument("folder", type=INPUT, metavar="DIR")
@out_option("ORIG", "Where to put the target.")
@click.option("--source", type=INPUT, metavar="T", help="Where the target is now, if it has moved.")
@overwrite_option
@sync_option
@session_options
def undo(
    session: Session,
    folder: Path,
    out: Path,
    source: Path | None,
    *,
    overwrite: bool,
    sync: bool,
) -> None:
    """Give back the original target of DIR, an output of apply, bit for bit."""
    from reasonvec.cli.show import show_undo
    from reasonvec.undo import undo as run

    with session.running("undoing") as options:
        report = run(
            folder,
            out,
            source=source,
            overwrite=overwrite,
            sync=sync,
            **options,
        )
    session.emit(report.as_json, lambda: show_undo(report))


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
