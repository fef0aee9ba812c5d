"""How a pass is run, as opposed to what it computes: nothing here changes a byte of any output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, TypedDict

__all__ = ["DEFAULT_BUDGET", "DigestName", "Progress", "RunOptions", "settings"]

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
