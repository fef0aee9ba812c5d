"""Time and memory of other programs, measured from outside."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from statistics import median

_SAMPLE_SECONDS = 0.002
_READ_BYTES = 8 << 20
_HELD_BYTES = 8 << 30


@dataclass(frozen=True)
class Turn:
    """A command to time, which reads `inputs` and writes the folder `output`."""

    name: str
    command: Sequence[str | Path]
    inputs: Sequence[Path]
    output: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def in_turns(
    turns: Sequence[Turn], rounds: Mapping[str, int], report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of every turn, taken round by round, so that a disturbance hits them all alike.

    A turn takes part in the first `rounds[name]` rounds. Each round has an order of its own, the
    same in every run, because what a turn leaves behind in memory is paid by the one after it.
    """
    seconds: dict[str, list[float]] = {turn.name: [] for turn in turns}
    for number in range(max((rounds[turn.name] for turn in turns), default=0)):
        for turn in Random(number).sample(turns, len(turns)):
            if number < rounds[turn.name]:
                report(f"round {number + 1}: {turn.name}")
                seconds[turn.name].append(timed(turn))
    return seconds


def timed(turn: Turn) -> float:
    """Wall seconds of one run, with inputs in the page cache and no earlier output to write.

    A virtual machine hands memory that stays free back to its host within a second, and the first
    use of it afterwards costs many times as much; so memory for the output is touched first and
    held until the command starts.
    """
    _remove(turn.output)
    os.sync()
    with _held_memory():
        _warm(turn.inputs)
    start = time.perf_counter()
    run(turn.command, turn.environment)
    return time.perf_counter() - start


def run(command: Sequence[str | Path], environment: Mapping[str, str] = {}) -> str:
    """What `command` printed. Raises `RuntimeError` with what it said if it failed."""
    # Packages that pip installs are compiled once, not at every start.
    compiled = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, env={**compiled, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{_words(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def peak_anonymous(turn: Turn) -> int:
    """Most bytes of anonymous memory that a run and its children held at once, sampled every 2 ms.

    Mapped file pages do not count: the kernel takes them back whenever it likes. Linux only.
    """
    _remove(turn.output)
    _warm(turn.inputs)
    environment = {**os.environ, **turn.environment}
    peak = 0
    with subprocess.Popen(turn.command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(_SAMPLE_SECONDS)
    _remove(turn.output)
    if process.returncode:
        raise RuntimeError(f"{_words(turn.command)} ended with {process.returncode}")
    if not peak:
        raise RuntimeError(
            "anonymous memory is read from /proc/PID/status, which this system does not have"
        )
    return peak


def import_seconds(module: str) -> float:
    """Wall seconds of an import statement in a fresh interpreter."""
    clock = f"from time import perf_counter as t; s = t(); import {module}; print(t() - s)"
    return float(run([sys.executable, "-c", clock]))


def ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians, and the least and the greatest ratio within one round."""
    within = [a / b for a, b in zip(seconds, base, strict=False)]
    return median(seconds) / median(base), min(within), max(within)


def _anonymous(pid: int) -> int:
    """RssAnon of a process and its descendants, in bytes; one that has ended counts as nothing."""
    folder = Path("/proc", str(pid))
    try:
        status = (folder / "status").read_text()
        children = [int(child) for task in (folder / "task").iterdir() for child in _children(task)]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next(
        (
            int(line.split()[1]) * 1024
            for line in status.splitlines()
            if line.startswith("RssAnon:")
        ),
        0,
    )
    return own + sum(map(_anonymous, children))


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _warm(folders: Sequence[Path]) -> None:
    """Reads all files of some folders."""
    buffer = bytearray(_READ_BYTES)
    for folder in folders:
        for path in folder.iterdir():
            _forget(path)
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
            _keep_cached(path)


@cache
def _forget(path: Path) -> None:
    """Takes a file out of the page cache, once: it is read as after a start of the machine.

    How the cache holds a file, in large pages or small ones, is else what earlier programs left.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@cache
def _keep_cached(path: Path) -> mmap.mmap | None:
    """Maps a file, for as long as this process lives.

    A machine that takes back a page cache that lies unused for seconds leaves alone what is mapped.
    """
    if not path.stat().st_size:
        return None
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for at in range(0, len(mapped), mmap.PAGESIZE):
        mapped[at]
    return mapped


@contextmanager
def _held_memory() -> Iterator[None]:
    """Holds more memory than any output here takes, every page of it touched."""
    with mmap.mmap(-1, _HELD_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, _HELD_BYTES, mmap.PAGESIZE):
            memory[at] = 1
        yield


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _words(command: Sequence[str | Path]) -> str:
    return " ".join(map(str, command))
