"""What every command shares: options, progress, output for people and for machines, exit codes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from typer.core import TyperCommand

from reasonvec.errors import ReasonvecError
from reasonvec.run import DEFAULT_BUDGET, Progress, RunOptions

__all__ = [
    "Budget",
    "Exclude",
    "FromPair",
    "Include",
    "Json",
    "Overwrite",
    "PairCommand",
    "Quiet",
    "Sync",
    "Threads",
    "emit",
    "fail",
    "guarded",
    "pairs",
    "progress",
    "run_options",
    "size",
]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """Bytes from "64MiB", "1G", "500MB" or "1048576"; units are binary, as for memory."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None:
        message = f"expected a size such as 64MiB or 1GiB, found {text!r}"
        raise typer.BadParameter(message)
    return int(float(found[1]) * _UNITS[found[2].upper()])


_BETWEEN = "\x1f"


class PairCommand(TyperCommand):
    """A command whose `--from` takes two values and may be repeated, which typer cannot say."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        rest = iter(args)
        for arg in rest:
            joined.append(arg)
            if arg == "--from":
                pair = [value for _, value in zip(range(2), rest, strict=False)]
                if len(pair) < 2 or any(value.startswith("--") for value in pair):
                    message = "two checkpoints are needed: --from POSITIVE NEGATIVE"
                    raise typer.BadParameter(message, ctx, param_hint="--from")
                joined.append(_BETWEEN.join(pair))
        return super().parse_args(ctx, joined)


def pairs(values: list[str] | None) -> list[tuple[Path, Path]]:
    """The folders of every `--from`."""
    found = []
    for value in values or []:
        positive, _, negative = value.partition(_BETWEEN)
        found.append((Path(positive), Path(negative)))
    return found


FromPair: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--from", metavar="P N", help="The difference of two checkpoints instead of a vector."),
]
Include: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="REGEX", help="Only tensors whose name this finds; repeatable."),
]
Exclude: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="REGEX", help="No tensor whose name this finds; repeatable."),
]
Threads: TypeAlias = Annotated[
    int, typer.Option("--threads", "-j", min=0, help="Workers; 0 for one per processor.")
]
Budget: TypeAlias = Annotated[
    int,
    typer.Option(
        "--memory-budget",
        parser=size,
        metavar="SIZE",
        help="Memory that the workers may hold together.",
        show_default="64MiB",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Sync: TypeAlias = Annotated[
    bool,
    typer.Option("--sync/--no-sync", help="Flush files to the disk before they get their final names."),
]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output of reasonvec in the folder.")
]


def run_options(threads: int, budget: int = DEFAULT_BUDGET, tell: Progress | None = None) -> RunOptions:
    """The keywords that every pass takes."""
    options: RunOptions = {"threads": threads, "memory_budget": budget}
    if tell is not None:
        options["progress"] = tell
    return options


@contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Progress | None]:
    """A bar on standard error: bytes, rate, time left. Nothing where nobody looks at a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress as Bar,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def emit(value: Mapping[str, object], show: Callable[[], None], *, as_json: bool, quiet: bool) -> None:
    """The result: JSON, or what ``show`` prints, or nothing."""
    if as_json:
        json.dump(value, sys.stdout, indent=2, allow_nan=False, default=str)
        sys.stdout.write("\n")
    elif not quiet:
        show()


def fail(message: str) -> None:
    """An error, on standard error."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    lines = message.splitlines() or [""]
    console.print("error:", style="bold red", end=" ")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


@contextmanager
def guarded() -> Iterator[None]:
    """Errors of input and of use end with code 2 and one message, Ctrl-C with 130."""
    try:
        yield
    except (ReasonvecError, OSError) as error:
        fail(_message(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        fail(str(error) or "interrupted")
        raise typer.Exit(130) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
