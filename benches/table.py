"""The figures of a comparison as a table: for the terminal, for docs/results/, and for machines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

_FORMATS = {"times": "{:.2f} times", "MiB": "{:.0f} MiB", "s": "{:.3f} s", "bytes": "{:.3f} bytes"}
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
)


@dataclass(frozen=True)
class Row:
    """One figure, the bar that it is held to, and the aim beyond it. No bar: for the record."""

    figure: str
    value: float
    unit: str
    bar: float | None = None
    aim: float | None = None
    more_is_better: bool = False
    detail: str = ""

    @property
    def mark(self) -> str:
        if self.bar is None:
            return ""
        if not self._reaches(self.bar):
            return "not met"
        return "met, and the aim" if self.aim is not None and self._reaches(self.aim) else "met"

    def cells(self) -> tuple[str, str, str, str, str, str]:
        return (
            self.figure,
            self._show(self.value),
            self._show(self.bar),
            self._show(self.aim),
            self.mark,
            self.detail,
        )

    def _reaches(self, line: float) -> bool:
        return self.value >= line if self.more_is_better else self.value <= line

    def _show(self, value: float | None) -> str:
        return "" if value is None else _FORMATS.get(self.unit, "{:.0f} " + self.unit).format(value)


_HEAD = ("figure", "measured", "bar", "aim", "", "detail")
_TIMES_HEAD = ("command", "median", "least", "most", "rounds")


def show(rows: Sequence[Row], seconds: Mapping[str, Sequence[float]]) -> None:
    colours = {"not met": "red", "met": "green", "met, and the aim": "bold green", "": "default"}
    table = Table(*_HEAD)
    for row in rows:
        table.add_row(*row.cells(), style=colours[row.mark])
    times = Table(*_TIMES_HEAD)
    for cells in _times(seconds):
        times.add_row(*cells)
    Console().print(table, times)


def save(
    folder: Path,
    name: str,
    title: str,
    notes: str,
    facts: Mapping[str, object],
    rows: Sequence[Row],
    seconds: Mapping[str, Sequence[float]],
) -> None:
    """Write `name`.md, for people, and `name`.json, with every single time, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    about = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    tables = (
        _markdown(_HEAD, (row.cells() for row in rows)),
        _markdown(_TIMES_HEAD, _times(seconds)),
    )
    text = "\n\n".join([f"# {title}", notes, about, *tables])
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    record = {
        **facts,
        "rows": [asdict(row) | {"mark": row.mark} for row in rows],
        "seconds": seconds,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """Cores, memory and vector extensions: what the figures depend on, and no more."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        known = set(Path("/proc/cpuinfo").read_text().split())
    except FileNotFoundError:
        known = set()
    return ", ".join(
        [
            f"{os.cpu_count()} cores",
            f"{memory:.0f} GiB of memory",
            *(flag for flag in _FLAGS if flag in known),
        ]
    )


def _times(seconds: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, ...]]:
    for name, each in seconds.items():
        yield (
            name,
            *(f"{value:.2f} s" for value in (median(each), min(each), max(each))),
            str(len(each)),
        )


def _markdown(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
