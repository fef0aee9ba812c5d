"""How a pass is run, as opposed to what it computes: nothing here changes a byte of any output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias, TypedDict

__all__ = ["DEFAULT_BUDGET", "DigestName", "Progress", "RunOptions", "settings", "steps"]

Progress: TypeAlias = Callable[[int, int], object]
DigestName: TypeAlias = Literal["xxh3-128", "blake3", "none"]
DEFAULT_BUDGET = 64 << 20


class RunOptions(TypedDict, total=False):
    """Keywords that every pass takes."""

    threads: int
    """Workers; 0 (the default) for one per processor."""
    memory_budget: int
    """Bytes that the workers may hold together, 64 MiB by default."""
    progress: Progress | None
    """Called about twenty times a second with (bytes done, bytes in all)."""


def settings(options: RunOptions, *, sync: bool = True, resume: bool = False) -> dict[str, object]:
    """The part of a core plan that says how to run."""
    return {
        "threads": options.get("threads", 0),
        "memory_budget": options.get("memory_budget", DEFAULT_BUDGET),
        "sync": sync,
        "resume": resume,
    }


def steps(options: RunOptions, weights: Sequence[int]) -> Iterator[RunOptions]:
    """Options for one call of the core after the other, whose progress is told as one.

    ``weights`` say how much work each is. The bar never goes back, though a call may learn on its
    way that there is more to do.
    """
    tell = options.get("progress")
    whole, before, furthest = sum(weights), 0, 0
    for weight in weights:
        if tell is None:
            yield options
            continue

        def told(done: int, expected: int, start: int = before, part: int = weight) -> None:
            nonlocal furthest
            furthest = max(furthest, start + part * done // max(expected, done, 1))
            tell(furthest, whole)

        yield {**options, "progress": told}
        before += weight
