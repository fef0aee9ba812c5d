"""The vectors and checkpoints that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click

from reasonvec import open as open_point

if TYPE_CHECKING:
    from reasonvec.algebra import Checkpoint, Vector

__all__ = ["Pairs", "opened", "operands", "prefixes", "selected", "total"]

Pairs: TypeAlias = Sequence[tuple[Path, Path]]


def selected(vector: Vector, include: Sequence[str], exclude: Sequence[str]) -> Vector:
    """What `selecting_options` leave of it."""
    return vector.where(include=include, exclude=exclude) if include or exclude else vector


def operands(
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


def opened(path: Path | None, pairs: Pairs, base: Path | None) -> Vector | Checkpoint:
    """The one thing that a command line names: a checkpoint, or one of `operands`."""
    from reasonvec.adapter import is_adapter
    from reasonvec.folders import is_vector

    if path is not None and not pairs and not is_vector(path) and not is_adapter(path):
        return open_point(path)
    if path is None and not pairs:
        message = "expected a vector, a checkpoint or --from POSITIVE NEGATIVE, found nothing"
        raise click.UsageError(message)
    return operands([] if path is None else [path], pairs, base, only=1)[0]


def total(vectors: list[Vector], alphas: Sequence[float]) -> Vector:
    """Their sum, the first ones times their alphas."""
    if len(alphas) > len(vectors):
        message = f"--alpha was given {len(alphas)} times for {len(vectors)} vectors"
        raise click.UsageError(message)
    scaled = [a * v for a, v in zip(alphas, vectors, strict=False)] + vectors[len(alphas) :]
    summed = scaled[0]
    for vector in scaled[1:]:
        summed = summed + vector
    return summed


def prefixes(values: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of `--map-prefix`."""
    found = []
    for value in values:
        target, equals, vector = value.partition("=")
        if not equals:
            message = f"--map-prefix takes A=B, found {value!r}"
            raise click.UsageError(message)
        found.append((target, vector))
    return found
