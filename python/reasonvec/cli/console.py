"""What every command does: progress, output for people and for machines, exit codes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import click

from reasonvec.errors import ReasonvecError
from reasonvec.run import DEFAULT_BUDGET, Progress, RunOptions
from reasonvec.wording import legible

__all__ = ["Session", "fail", "guarded"]


@dataclass(slots=True)
class Session:
    """How a command runs and answers: the values of the options that all of them have."""

    threads: int = 0
    memory_budget: int = DEFAULT_BUDGET
    as_json: bool = False
    quiet: bool = False

    @property
    def silent(self) -> bool:
        """Whether people are told nothing besides the result."""
        return self.quiet or self.as_json

    @contextmanager
    def running(self, label: str, *, bar: bool = True) -> Iterator[RunOptions]:
        """The keywords of a pass, `guarded`, under a bar of progress."""
        with guarded(), _progress(label, quiet=self.silent or not bar) as tell:
            yield {
                "threads": self.threads,
                "memory_budget": self.memory_budget,
                "progress": tell,
            }

    def emit(self, value: Callable[[], Mapping[str, object]], show: Callable[[], None]) -> None:
        """The result: JSON, or what ``show`` prints, or nothing."""
        if self.as_json:
            json.dump(_finite(value()), sys.stdout, indent=2, allow_nan=False)
            sys.stdout.write("\n")
        elif not self.quiet:
            show()


@contextmanager
def _progress(label: str, *, quiet: bool) -> Iterator[Progress | None]:
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
