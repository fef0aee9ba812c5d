"""The options that commands share.

A block of options that several commands take is one decorator here; the order in which a command
names the blocks is the order of its help.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import click

from reasonvec.cli.console import Session

__all__ = [
    "INPUT",
    "digest_option",
    "dry_run_option",
    "html_option",
    "missing_option",
    "nonfinite_option",
    "out_dtype_option",
    "out_option",
    "overwrite_option",
    "placing_options",
    "ranking_options",
    "resume_option",
    "seed_option",
    "selecting_options",
    "session_options",
    "sync_option",
    "vector_sources",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

INPUT = click.Path(path_type=Path)

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


def _keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
    """Put an option of every command into the session."""
    setattr(context.ensure_object(Session), str(parameter.name), value)


_pass_session = click.make_pass_decorator(Session, ensure=True)

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
    expose_value=False,
    callback=_keep,
    help="Workers.  [default: one per processor]",
)
_MEMORY_BUDGET = click.option(
    "--memory-budget",
    expose_value=False,
    callback=lambda context, parameter, text: _keep(
        context, parameter, _size(context, parameter, text)
    ),
    metavar="SIZE",
    default="64MiB",
    show_default=True,
    help="Memory that the workers may hold together.",
)
_JSON = click.option(
    "--json",
    "as_json",
    is_flag=True,
    expose_value=False,
    callback=_keep,
    help="One JSON object on standard output.",
)
_QUIET = click.option(
    "--quiet", "-q", is_flag=True, expose_value=False, callback=_keep, help="Print errors only."
)

digest_option = click.option(
    "--digest",
    type=click.Choice(["xxh3-128", "blake3", "none"]),
    default="xxh3-128",
    show_default=True,
    help="xxh3-128 detects damage, blake3 forgery too.",
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would happen, and every problem; write nothing."
)
nonfinite_option = click.option(
    "--allow-nonfinite", is_flag=True, help="Let NaN and infinity pass."
)
overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an earlier output of reasonvec in the folder; it stands until the new one is "
    "whole, so both must fit on the disk.",
)
resume_option = click.option("--resume", is_flag=True, help="Continue an unfinished run.")
sync_option = click.option(
    "--sync/--no-sync",
    default=True,
    show_default=True,
    help="Flush files to the disk before they get their final names.",
)


class _Option(Protocol):
    def __call__(self, command: Callable[_P, _R], /) -> Callable[_P, _R]:
        """The command with the option."""


def out_option(metavar: str, meaning: str) -> _Option:
    """`--out`, `-o`: what is written, and what it is called in the help."""
    return click.option("--out", "-o", type=INPUT, required=True, metavar=metavar, help=meaning)


def out_dtype_option(meaning: str) -> _Option:
    """`--out-dtype`."""
    dtypes = click.Choice(["float32", "float16", "bfloat16"])
    return click.option("--out-dtype", type=dtypes, help=meaning)


def missing_option(meaning: str) -> _Option:
    """`--missing`."""
    return click.option(
        "--missing",
        type=click.Choice(["error", "skip"]),
        default="error",
        show_default=True,
        help=meaning,
    )


def html_option(meaning: str) -> _Option:
    """`--html`."""
    return click.option("--html", type=INPUT, metavar="FILE", help=meaning)


def seed_option(meaning: str, name: str = "--seed") -> _Option:
    """What everything random is drawn from."""
    return click.option(
        name, type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help=meaning
    )


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
    missing = missing_option("What a tensor is that one side lacks.")
    return _VOCAB(missing(_MAP_PREFIX(command)))


def session_options(command: Callable[Concatenate[Session, _P], _R]) -> Callable[_P, _R]:
    """How a command runs and answers; it gets them as its first argument."""
    return _THREADS(_MEMORY_BUDGET(_JSON(_QUIET(_pass_session(command)))))
