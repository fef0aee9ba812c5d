"""The checkpoints that are measured, made once and kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from reasonvec.family import Family, make_family, sparse_shapes

SHARD_BYTES = 1_000_000_000


def qwen_1_5b(cache: Path) -> Family:
    """Qwen2.5-1.5B: 3.1 GB a checkpoint, 467 MB of it one tensor."""
    return _cached(
        cache / "qwen2.5-1.5b",
        lambda folder: make_family(
            folder,
            hidden=1536,
            intermediate=8960,
            layers=28,
            heads=12,
            kv_heads=2,
            vocab=151936,
            shard_bytes=SHARD_BYTES,
            with_base=False,
        ),
    )


def holes_7b(cache: Path) -> Family:
    """Qwen2.5-7B, every weight a hole in its file: 15 GB to read, next to nothing on disk."""
    return _cached(cache / "qwen2.5-7b", sparse_shapes)


def small(cache: Path) -> Family:
    """95 million parameters, the largest tensor in 128 blocks, so that every schedule differs."""
    return _cached(
        cache / "small",
        lambda folder: make_family(
            folder,
            hidden=1024,
            intermediate=4096,
            layers=4,
            heads=8,
            vocab=32768,
            shard_bytes=50_000_000,
            with_base=False,
        ),
    )


def _cached(folder: Path, make: Callable[[Path], Family]) -> Family:
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)
    return Family(*(folder / member for member in ("base", "sft", "rl", "instruct")))
