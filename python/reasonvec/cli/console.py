"""What every command shares: options, progress, output for people and for machines, exit codes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from reasonvec.errors import ReasonvecError
from reasonvec.run import Progress, RunOptions
from reasonvec.wording import legible

__all__ = [
    "DIGEST",
    "INPUT",
    "emit",
    "fail",
    "guarded",
    "output_options",
    "placing_options",
    "progress",
    "ranking_options",
    "run_options",
    "running_options",
    "selecting_options",
    "vector_sources",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

INPUT = click.Path(path_type=Path)
DIGEST = click.Choice(["xxh3-128", "blake3", "none"])


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _size(context: click.Context, parameter: click.Parameter, text: str) -> int:
    """Bytes from "64MiB", "1G", "500MB" or "1048576"; units are binary, as for memory."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None:
        message = f"expected a size such as 64MiB or 1GiB, found {text!r}"
        raise click.BadParameter(message, context, parameter)
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size >= 1 << 63:
        message = f"expected a size that some memory has, found {text!r}"
        raise click.BadParameter(message, context, parameter)
    return size


def _rank(context: click.Context, parameter: click.Parameter, text: str) -> int | str:
    """A number of triplets, or "auto"."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        message = f"expected auto, or 1 or more, found {text!r}"
        raise click.BadParameter(message, context, parameter)
    return int(text)


_FROM = click.option(
    "--from",
    "pairs",
    type=(INPUT, INPUT),
    multiple=True,
    metavar="P N",
    help="The difference of two checkpoints in place of a vector; nothing is written in between.",
)
_BASE = click.option(
    "--base",
    type=INPUT,
    metavar="B",
    help="The checkpoint that the adapters among V were trained on.  [default: the one that "
    "adapter_config.json names, if it is a folder here]",
)
_RANK = click.option(
    "--rank",
    callback=_rank,
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="Triplets of each matrix; auto takes those above the noise of storing it.",
)
_ENERGY = click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="In place of --rank: the fewest triplets with this share of the sum of squares.",
)
_INCLUDE = click.option(
    "--include",
    multiple=True,
    metavar="REGEX",
    help="Only tensors whose name this finds; repeatable.",
)
_EXCLUDE = click.option(
    "--exclude", multiple=True, metavar="REGEX", help="No tensor whose name this finds; repeatable."
)
_VOCAB = click.option(
    "--vocab",
    type=click.Choice(["strict", "skip", "match-tokens"]),
    default="strict",
    show_default=True,
    help="What to do with embeddings and head if vocabularies differ.",
)
_MISSING = click.option(
    "--missing",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="What a tensor is that one side lacks.",
)
_MAP_PREFIX = click.option(
    "--map-prefix",
    multiple=True,
    metavar="A=B",
    help="Target names that begin with A read the vector's under B; repeatable.",
)
_THREADS = click.option(
    "--threads",
    "-j",
    type=click.IntRange(min=0),
    default=0,
    help="Workers.  [default: one per processor]",
)
_MEMORY_BUDGET = click.option(
    "--memory-budget",
    callback=_size,
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    help="Memory that the workers may hold together.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
_QUIET = click.option("--quiet", "-q", is_flag=True, help="Print errors only.")


def vector_sources(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """`--from P N`, repeatable: a difference where a vector may stand; `--base`, for adapters."""
    return _FROM(_BASE(command))


def ranking_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """`--rank`, `--energy`."""
    return _RANK(_ENERGY(command))


def selecting_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """`--include`, `--exclude`."""
    return _INCLUDE(_EXCLUDE(command))


def placing_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """How a vector is laid onto a target."""
    return _VOCAB(_MISSING(_MAP_PREFIX(command)))


def running_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """How a pass is run."""
    return _THREADS(_MEMORY_BUDGET(command))


def output_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """`--json`, `--quiet`."""
    return _JSON(_QUIET(command))


def run_options(threads: int, memory_budget: int, tell: Progress | None) -> RunOptions:
    """The keywords that every pass takes."""
    return {"threads": threads, "memory_budget": memory_budget, "progress": tell}


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
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

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


def emit(
    value: Callable[[], Mapping[str, object]],
    show: Callable[[], None],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """The result: JSON, or what ``show`` prints, or nothing."""
    if as_json:
        json.dump(_finite(value()), sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    elif not quiet:
        show()


def _finite(value: object) -> object:
    """Null where there is no number, because JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def fail(message: str) -> None:
    """An error, on standard error."""
    message = "\n".join(map(legible, message.split("\n")))
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)


@contextmanager
def guarded() -> Iterator[None]:
    """Errors of input and of use end with code 2 and one message, Ctrl-C with 130."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
        raise SystemExit(2) from None
    except ReasonvecError as error:
        fail(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        fail(str(error) or "interrupted")
        raise SystemExit(130) from None
