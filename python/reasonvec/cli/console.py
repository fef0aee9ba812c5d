"""What every command does: progress, output for people and for machines, exit codes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import click

from reasonvec.errors import ReasonvecError
from reasonvec.run import Progress
from reasonvec.wording import legible

__all__ = ["emit", "fail", "guarded", "progress"]


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
