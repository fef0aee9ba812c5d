"""The commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reasonvec import __version__
from reasonvec.cli.console import (
    Budget,
    Exclude,
    FromPair,
    Include,
    Json,
    Overwrite,
    PairCommand,
    Quiet,
    Sync,
    Threads,
    emit,
    guarded,
    pairs,
    progress,
    run_options,
)
from reasonvec.run import DEFAULT_BUDGET

if TYPE_CHECKING:
    from reasonvec.algebra import Vector
    from reasonvec.apply import ApplyOptions

__all__ = ["app", "main"]

app = typer.Typer(
    name="reasonvec",
    help="Capabilities of language models as vectors in weight space.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class EncodingName(StrEnum):
    auto = "auto"
    dense = "dense"
    sparse = "sparse"


class VocabName(StrEnum):
    strict = "strict"
    skip = "skip"
    match_tokens = "match-tokens"


class MissingName(StrEnum):
    error = "error"
    skip = "skip"


class DtypeName(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class DigestChoice(StrEnum):
    xxh3 = "xxh3-128"
    blake3 = "blake3"
    none = "none"


class ControlName(StrEnum):
    random = "random"
    reverse = "reverse"
    shuffle = "shuffle"


Digest = Annotated[
    DigestChoice,
    typer.Option("--digest", help="xxh3-128 detects damage, blake3 forgery too; none, neither."),
]
Vocab = Annotated[
    VocabName, typer.Option("--vocab", help="What to do with embeddings and head if vocabularies differ.")
]
Missing = Annotated[
    MissingName, typer.Option("--missing", help="Whether a tensor that one side lacks is an error.")
]
MapPrefix = Annotated[
    list[str] | None,
    typer.Option(
        "--map-prefix", metavar="A=B", help="Target names that begin with A read the vector's under B."
    ),
]


def _version(*, value: bool) -> None:
    if value:
        typer.echo(f"reasonvec {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    positive: Annotated[Path, typer.Argument(metavar="P", help="The donor that has the capability.")],
    negative: Annotated[Path, typer.Argument(metavar="N", help="Its twin without it.")],
    target: Annotated[Path | None, typer.Argument(metavar="[T]", help="The model to get it.")] = None,
    vocab: Vocab = VocabName.strict,
    missing: Missing = MissingName.error,
    map_prefix: MapPrefix = None,
    threads: Threads = 0,
    memory_budget: Budget = DEFAULT_BUDGET,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do these checkpoints fit together, and how close are they? Every problem at once."""
    from reasonvec import open as open_point
    from reasonvec.check import check as run
    from reasonvec.cli.show import show_check

    with guarded(), progress("checking", quiet=quiet or as_json) as tell:
        points = [open_point(path) for path in (positive, negative, target) if path is not None]
        report = run(
            *points,
            vocab=vocab.value,
            missing=missing.value,
            map_prefix=_prefixes(map_prefix),
            **run_options(threads, memory_budget, tell),
        )
    emit(report.as_json(), lambda: show_check(report), as_json=as_json, quiet=quiet)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def extract(
    positive: Annotated[Path, typer.Argument(metavar="P", help="The donor that has the capability.")],
    negative: Annotated[Path, typer.Argument(metavar="N", help="Its twin without it.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The vector's folder.")],
    encoding: Annotated[EncodingName, typer.Option("--encoding", help="How tensors are stored.")] = EncodingName.auto,
    include: Include = None,
    exclude: Exclude = None,
    digest: Digest = DigestChoice.xxh3,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and infinity pass.")] = False,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    memory_budget: Budget = DEFAULT_BUDGET,
    sync: Sync = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the vector P - N, exactly: negative + vector == positive, checked bit for bit."""
    from reasonvec import open as open_point
    from reasonvec.cli.show import show_extract

    with guarded(), progress("extracting", quiet=quiet or as_json) as tell:
        vector = _where(open_point(positive) - open_point(negative), include, exclude)
        report = vector.save(
            out,
            encoding=encoding.value,
            digest=digest.value,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            sync=sync,
            **run_options(threads, memory_budget, tell),
        )
    emit(report.as_json(), lambda: show_extract(report), as_json=as_json, quiet=quiet)
    raise typer.Exit(1 if report.exact is False else 0)


@app.command(cls=PairCommand)
def apply(
    vectors: Annotated[list[Path] | None, typer.Argument(metavar="[V]...", help="Vector folders.")] = None,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="T", help="The target; it is never changed.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new checkpoint's folder.")],
    from_pairs: FromPair = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            "--alpha", "-a", metavar="A",
            help="Times each vector, in the order of V... and --from; negative subtracts.", show_default="1",
        ),
    ] = None,
    alpha_for: Annotated[
        list[str] | None,
        typer.Option("--alpha-for", metavar="REGEX=VALUE", help="Another alpha for tensors whose name this finds."),
    ] = None,
    layer_ramp: Annotated[
        str | None,
        typer.Option("--layer-ramp", metavar="A:B", help="Times A in the first layer to B in the last."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    control: Annotated[
        ControlName | None, typer.Option("--control", help="A control experiment instead of the vectors.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**64 - 1, help="For --control.")] = 0,
    vocab: Vocab = VocabName.strict,
    missing: Missing = MissingName.error,
    map_prefix: MapPrefix = None,
    out_dtype: Annotated[DtypeName | None, typer.Option("--out-dtype", help="The target's by default.")] = None,
    chat_template_from: Annotated[
        Path | None, typer.Option("--chat-template-from", metavar="DIR", help="Take this folder's chat template.")
    ] = None,
    digest: Digest = DigestChoice.xxh3,
    keep_undo: Annotated[
        bool, typer.Option("--keep-undo", help="Store the exact way back beside the output.")
    ] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and infinity pass.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen, and every problem; write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    memory_budget: Budget = DEFAULT_BUDGET,
    sync: Sync = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add vectors to a target, in one pass, and write the result with a record of how it came to be."""
    from reasonvec import open as open_point
    from reasonvec.cli.show import show_apply, show_plan

    with guarded():
        options: ApplyOptions = {
            "vocab": vocab.value,
            "missing": missing.value,
            "map_prefix": _prefixes(map_prefix),
            "digest": digest.value,
            "keep_undo": keep_undo,
            "allow_nonfinite": allow_nonfinite,
            "resume": resume,
            "overwrite": overwrite,
            "sync": sync,
        }
        options.update(run_options(threads, memory_budget))  # type: ignore[typeddict-item]
        if out_dtype is not None:
            options["out_dtype"] = out_dtype.value
        if chat_template_from is not None:
            options["chat_template_from"] = chat_template_from
        vector = _scaled(_vectors(vectors, from_pairs), alpha)
        if alpha_for:
            vector = vector.alpha_for(dict(_rule(rule) for rule in alpha_for))
        if layer_ramp is not None:
            vector = vector.ramp(*_ramp(layer_ramp))
        vector = _where(vector, include, exclude)
        if control is not None:
            vector = vector.control(control.value, seed=seed)
        with progress("applying", quiet=quiet or as_json or dry_run) as tell:
            if tell is not None:
                options["progress"] = tell
            plan = (open_point(to) + vector).plan(out, **options)
            report = None if dry_run else plan.run()
    if report is None:
        emit(plan.as_json(), lambda: show_plan(plan), as_json=as_json, quiet=quiet)
        raise typer.Exit(1 if plan.errors else 0)
    emit(report.as_json(), lambda: show_apply(report), as_json=as_json, quiet=quiet)


@app.command()
def undo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An output of apply.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="ORIG", help="Where to put the target.")],
    source: Annotated[
        Path | None, typer.Option("--source", metavar="T", help="Where the target is now, if it has moved.")
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    memory_budget: Budget = DEFAULT_BUDGET,
    sync: Sync = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give back the original target of an output, bit for bit."""
    from reasonvec.cli.show import show_undo
    from reasonvec.undo import UndoOptions
    from reasonvec.undo import undo as run

    with guarded(), progress("undoing", quiet=quiet or as_json) as tell:
        options: UndoOptions = {"overwrite": overwrite, "sync": sync}
        options.update(run_options(threads, memory_budget, tell))  # type: ignore[typeddict-item]
        if source is not None:
            options["source"] = source
        report = run(folder, out, options)
    emit(report.as_json(), lambda: show_undo(report), as_json=as_json, quiet=quiet)


@app.command(cls=PairCommand)
def inspect(
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="A vector or a checkpoint.")] = None,
    from_pairs: FromPair = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="One self-contained page with heat maps.")
    ] = None,
    threads: Threads = 0,
    memory_budget: Budget = DEFAULT_BUDGET,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Norms, sparsity and largest changes, by layer and module."""
    from reasonvec import open as open_point
    from reasonvec.cli.show import show_inspection
    from reasonvec.folders import is_vector

    with guarded(), progress("inspecting", quiet=quiet or as_json) as tell:
        options = run_options(threads, memory_budget, tell)
        if path is not None and not from_pairs and not is_vector(path):
            report = open_point(path).inspect(**options)
        else:
            report = _vectors([path] if path is not None else None, from_pairs, only=1).inspect(**options)
        if html is not None:
            from reasonvec._reasonvec import write_whole
            from reasonvec.page import inspection_page

            write_whole(html, inspection_page(report).encode(), sync=False)
    emit(report.as_json(), lambda: show_inspection(report, html), as_json=as_json, quiet=quiet)


@app.command(cls=PairCommand)
def compare(
    vectors: Annotated[list[Path] | None, typer.Argument(metavar="[V] [W]", help="Vector folders.")] = None,
    from_pairs: FromPair = None,
    threads: Threads = 0,
    memory_budget: Budget = DEFAULT_BUDGET,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cosine, sign agreement and overlap of two vectors, by layer and module."""
    from reasonvec.cli.show import show_comparison

    with guarded(), progress("comparing", quiet=quiet or as_json) as tell:
        first, second = _each(vectors, from_pairs, only=2)
        report = first.compare(second, **run_options(threads, memory_budget, tell))
    emit(report.as_json(), lambda: show_comparison(report), as_json=as_json, quiet=quiet)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An output of apply, or a vector.")],
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Are the bytes still those that were written? Digests against reasonvec.json."""
    from reasonvec.cli.show import show_verify
    from reasonvec.verify import verify as run

    with guarded(), progress("verifying", quiet=quiet or as_json) as tell:
        report = run(folder, **run_options(threads, tell=tell))
    emit(report.as_json(), lambda: show_verify(report), as_json=as_json, quiet=quiet)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A")],
    second: Annotated[Path, typer.Argument(metavar="B")],
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Exact counts of the elements that differ between two checkpoints."""
    from reasonvec.cli.show import show_diff
    from reasonvec.verify import diff as run

    with guarded(), progress("comparing", quiet=quiet or as_json) as tell:
        report = run(first, second, **run_options(threads, tell=tell))
    emit(report.as_json(), lambda: show_diff(report), as_json=as_json, quiet=quiet)
    raise typer.Exit(0 if report.same else 1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to make it.")] = Path("reasonvec-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite/--no-overwrite", help="Replace an earlier demo.")] = True,
) -> None:
    """Make a small family of checkpoints, and run check, extract, inspect, apply and verify on it."""
    from reasonvec.cli.demo import run

    with guarded():
        run(folder, overwrite=overwrite)


def _where(vector: Vector, include: list[str] | None, exclude: list[str] | None) -> Vector:
    return vector.where(include=include or (), exclude=exclude or ()) if include or exclude else vector


def _each(vectors: list[Path] | None, from_pairs: list[str] | None, *, only: int | None = None) -> list[Vector]:
    from reasonvec import load
    from reasonvec import open as open_point

    differences = [(open_point(p), open_point(n)) for p, n in pairs(from_pairs)]
    found = [load(path) for path in vectors or []] + [p - n for p, n in differences]
    if not found or (only is not None and len(found) != only):
        wanted = {None: "at least one vector", 1: "one vector", 2: "two vectors"}[only]
        message = f"expected {wanted} (a folder, or --from POSITIVE NEGATIVE), found {len(found)}"
        raise typer.BadParameter(message)
    return found


def _vectors(vectors: list[Path] | None, from_pairs: list[str] | None, *, only: int | None = None) -> Vector:
    return _scaled(_each(vectors, from_pairs, only=only), None)


def _scaled(vectors: list[Vector] | Vector, alphas: list[float] | None) -> Vector:
    from reasonvec.algebra import Vector as Sum

    each = [Sum([term]) for term in vectors.terms] if isinstance(vectors, Sum) else vectors
    given = alphas or []
    if len(given) > len(each):
        message = f"--alpha was given {len(given)} times for {len(each)} vectors"
        raise typer.BadParameter(message)
    scaled = [a * v for a, v in zip(given, each, strict=False)] + each[len(given) :]
    return Sum([term for vector in scaled for term in vector.terms])


def _prefixes(values: list[str] | None) -> list[tuple[str, str]]:
    found = []
    for value in values or []:
        target, equals, vector = value.partition("=")
        if not equals:
            message = f"--map-prefix takes A=B, found {value!r}"
            raise typer.BadParameter(message)
        found.append((target, vector))
    return found


def _rule(text: str) -> tuple[str, float]:
    regex, equals, value = text.rpartition("=")
    try:
        return regex, float(value) if equals else float("nope")
    except ValueError:
        message = f"--alpha-for takes REGEX=VALUE, found {text!r}"
        raise typer.BadParameter(message) from None


def _ramp(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError:
        message = f"--layer-ramp takes A:B, two numbers, found {text!r}"
        raise typer.BadParameter(message) from None


def main() -> None:
    """The program `reasonvec`."""
    app()
