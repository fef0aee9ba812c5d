"""reasonvec beside the disk and beside mergekit: every figure in one run, in turns.

    python benches/compare.py                 all of it, into docs/results/compare.md and .json
    python benches/compare.py --only extract  some rows, shown and not saved
    python benches/compare.py --quick         a small family and no mergekit: does the bench work?

The checkpoints, the roofline program and mergekit's virtual environment are made on the first run
and kept in benches/.cache (30 GB at most, outputs and all). Nothing is timed cold: inputs are read
just before each turn.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median

import peers
import shapes
import table
from measure import Turn, import_seconds, in_turns, peak_anonymous, ratio, run, timed
from rich.console import Console
from table import Row

import reasonvec
from reasonvec.family import Family

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benches" / ".cache"
OUTPUTS = CACHE / "outputs"
RESULTS = ROOT / "docs" / "results"
REASONVEC = Path(sysconfig.get_path("scripts")) / "reasonvec"

MIB = 2**20
ALPHA = 0.8
MERGEKIT_ROUNDS = 3  # it takes longer than all the other turns of a round together
THREADS = (1, 2, 8)
BUDGETS = ("16MiB", "64MiB", "1GiB")

NOTES = f"""\
Made by `make bench`. The work is target + {ALPHA} (RL - SFT) on Qwen2 shapes in bf16, by commands
taking turns. Times are of whole commands, the start of the interpreter included, from and to the
page cache; those called *synced* also wait for the disk (fsync), unlike mergekit and cp. Ratios are
of medians, and in brackets the least and the greatest within one round. The roofline
(benches/roofline.rs) reads and writes the same bytes and computes nothing. Memory is anonymous
memory, of the process and its children together, at its greatest. Memory for the output
is touched beforehand; inputs are read from disk once, and stay mapped by the bench
(benches/measure.py says why)."""


class Bench:
    """The programs and the times of one run; what they need is made when it is first asked for."""

    def __init__(self, quick: bool, rounds: int, report: Callable[[str], None]) -> None:
        self.quick = quick
        self.rounds = rounds
        self.report = report
        self.seconds: dict[str, list[float]] = {}

    @cached_property
    def family(self) -> Family:
        self.report("making the family")
        return shapes.small(CACHE) if self.quick else shapes.qwen_1_5b(CACHE)

    @cached_property
    def roofline(self) -> Path:
        self.report("building the roofline")
        build = ["cargo", "bench", "--no-default-features", "--bench", "roofline", "--no-run"]
        messages = run([*build, "--message-format=json", "--manifest-path", ROOT / "Cargo.toml"])
        built = [json.loads(line) for line in messages.splitlines()]
        return next(
            Path(each["executable"])
            for each in built
            if each.get("target", {}).get("name") == "roofline"
        )

    @cached_property
    def vector(self) -> Path:
        """RL - SFT as a vector folder; its size is what the roofline of `extract` writes."""
        self.report("extracting the vector")
        folder = OUTPUTS / "vector"
        shutil.rmtree(folder, ignore_errors=True)
        run(self.extract(folder))
        return folder

    def apply(self, output: Path, *options: str, family: Family | None = None) -> list[str | Path]:
        of = family or self.family
        points: list[str | Path] = ["--from", of.rl, of.sft, "--to", of.instruct]
        return [REASONVEC, "apply", *points, "-o", output, "--alpha", str(ALPHA), "-q", *options]

    def extract(self, output: Path, *options: str) -> list[str | Path]:
        return [REASONVEC, "extract", self.family.rl, self.family.sft, "-o", output, "-q", *options]

    def turn(self, name: str) -> Turn:
        p, n, t = inputs = [self.family.rl, self.family.sft, self.family.instruct]
        output = OUTPUTS / "apply"
        threads = ["--threads", str(os.cpu_count())]
        match name:
            case "mergekit":
                return peers.task_arithmetic(peers.mergekit(CACHE), p, n, t, ALPHA, output)
            case "cat and cp":
                command = _cat_and_cp([p, n, t], t, output)
            case "cat of the donors and cp":
                command = _cat_and_cp([p, n], t, output)
            case "roofline":
                command = [self.roofline, "apply", p, n, t, output, *threads]
            case "roofline, synced":
                command = [self.roofline, "apply", p, n, t, output, *threads, "--sync"]
            case "apply":
                command = self.apply(output, "--no-sync")
            case "apply, synced":
                command = self.apply(output, "--sync")
            case "apply, no digests":
                command = self.apply(output, "--no-sync", "--digest", "none")
            case "roofline of extract":
                output = OUTPUTS / "extract"
                size = sum(path.stat().st_size for path in self.vector.iterdir())
                command = [self.roofline, "extract", p, n, output, "--bytes", str(size), *threads]
                inputs = [p, n]
            case "extract":
                output = OUTPUTS / "extract"
                command = self.extract(output, "--no-sync")
                inputs = [p, n]
            case _:
                raise ValueError(f"no turn is called {name}")
        return Turn(name, command, inputs, output)

    def time(self, names: Sequence[str]) -> None:
        turns = [self.turn(name) for name in names]
        few = min(self.rounds, MERGEKIT_ROUNDS)
        rounds = {name: few if name == "mergekit" else self.rounds for name in names}
        self.seconds = in_turns(turns, rounds, self.report)

    def times(
        self, figure: str, name: str, base: str, bar: float | None = None, aim: float | None = None
    ) -> Row:
        """How many times as long as `base` a turn took."""
        value, least, most = ratio(self.seconds[name], self.seconds[base])
        return Row(figure, value, "times", bar, aim, detail=f"[{least:.2f} to {most:.2f}]")


def _cat_and_cp(read: Sequence[Path], copied: Path, output: Path) -> list[str | Path]:
    shell = (
        'output=$1 copied=$2; shift 2; for folder; do cat "$folder"/*; done > /dev/null; '
        'mkdir "$output"; cp "$copied"/* "$output"'
    )
    return ["sh", "-e", "-c", shell, "sh", output, copied, *read]


def apply_rows(bench: Bench) -> Iterator[Row]:
    yield bench.times("`apply --from` against the roofline", "apply", "roofline", bar=1.6, aim=1.2)
    yield bench.times("the same, both synced", "apply, synced", "roofline, synced")


def mergekit_rows(bench: Bench) -> Iterator[Row]:
    faster = bench.times("mergekit against `apply --from`", "mergekit", "apply", bar=12, aim=25)
    yield replace(faster, more_is_better=True)
    yield bench.times("the same, ours synced", "mergekit", "apply, synced")
    bench.report("peak memory of mergekit")
    peak = peak_anonymous(bench.turn("mergekit"))
    yield Row("peak anonymous memory of mergekit", peak / MIB, "MiB")


def cat_rows(bench: Bench) -> Iterator[Row]:
    figure = "`apply --from` against cat of the inputs and one copy written"
    yield bench.times(figure, "apply", "cat and cp", bar=0.8, aim=0.3)
    figure = "the same, the target read by cp alone"
    yield bench.times(figure, "apply", "cat of the donors and cp")
    yield bench.times("the same, ours synced", "apply, synced", "cat of the donors and cp")


def digest_rows(bench: Bench) -> Iterator[Row]:
    figure = "`apply --from` with digests against without"
    yield bench.times(figure, "apply", "apply, no digests", bar=1.4, aim=1.15)


def extract_rows(bench: Bench) -> Iterator[Row]:
    figure = "`extract` against the roofline of its own bytes"
    yield bench.times(figure, "extract", "roofline of extract", bar=2.0, aim=1.3)


def memory_rows(bench: Bench) -> Iterator[Row]:
    families = {"small": bench.family}
    if not bench.quick:
        families = {"1.5B": bench.family, "7B": shapes.holes_7b(CACHE)}
    output = OUTPUTS / "memory"
    peaks = []
    for size, family in families.items():
        bench.report(f"peak memory, {size} shapes")
        plan = json.loads(run(bench.apply(output, "--dry-run", "--json", family=family)))
        predicted = plan["peak_memory"]
        # The inputs are not warmed: 45 GB of holes would only push everything else out of memory.
        command = bench.apply(output, "--no-sync", family=family)
        peak = peak_anonymous(Turn("memory", command, inputs=[], output=output))
        peaks.append(peak)
        yield Row(f"peak anonymous memory, {size} shapes", peak / MIB, "MiB", bar=160, aim=96)
        figure = f"the same against what --dry-run predicts, {size} shapes"
        detail = f"{predicted / MIB:.0f} MiB predicted"
        yield Row(figure, peak / predicted, "times", bar=1.0, detail=detail)
    yield Row("largest peak against smallest", max(peaks) / min(peaks), "times", bar=1.1)
    bench.report("peak memory of extract")
    peak = peak_anonymous(bench.turn("extract"))
    yield Row("peak anonymous memory of `extract`", peak / MIB, "MiB")


def vector_rows(bench: Bench) -> Iterator[Row]:
    tensors = json.loads((bench.vector / "vector_config.json").read_text())["tensors"]
    elements = sum(tensor["elements"] for tensor in tensors)
    moved = sum(tensor["moved"] for tensor in tensors) / elements
    size = sum(path.stat().st_size for path in bench.vector.iterdir()) / elements
    figure = f"an RL vector with {moved:.1%} of elements moved, a parameter"
    yield Row(figure, size, "bytes", bar=0.40, aim=0.30, detail="all files of its folder")

    bench.report("rebuilding the RL donor")
    rebuilt = OUTPUTS / "rebuilt"
    shutil.rmtree(rebuilt, ignore_errors=True)
    run([REASONVEC, "apply", bench.vector, "--to", bench.family.sft, "-o", rebuilt, "-q"])
    shards = [path.name for path in bench.family.rl.glob("*.safetensors")]
    _, different, missing = filecmp.cmpfiles(bench.family.rl, rebuilt, shards, shallow=False)
    diff: list[str | Path] = [REASONVEC, "diff", rebuilt, bench.family.rl, "-q"]
    answer = subprocess.run(diff, capture_output=True).returncode
    shutil.rmtree(rebuilt)
    detail = f"of {len(shards)}; `reasonvec diff` ended with {answer}"
    count = max(len(different) + len(missing), answer)
    yield Row("shards of SFT + vector that differ from RL", count, "shards", bar=0, detail=detail)


def start_rows(bench: Bench) -> Iterator[Row]:
    bench.report("starting ten times")
    repeats = 1 if bench.quick else 10
    imports = median(import_seconds("reasonvec") for _ in range(repeats))
    yield Row("`import reasonvec`, in a fresh interpreter", imports, "s", bar=0.15)
    helps = Turn("help", [REASONVEC, "--help"], inputs=[], output=OUTPUTS / "none")
    seconds = median(timed(helps) for _ in range(repeats))
    yield Row("`reasonvec --help`, the whole command", seconds, "s", bar=0.4)


def bytes_rows(bench: Bench) -> Iterator[Row]:
    levels = reasonvec.simd_levels()
    family = shapes.small(CACHE)
    digests = set()
    for level, threads, budget in product(levels, THREADS, BUDGETS):
        bench.report(f"output bytes: {level}, {threads} threads, {budget}")
        output = OUTPUTS / "bytes"
        shutil.rmtree(output, ignore_errors=True)
        options = ["--threads", str(threads), "--memory-budget", budget, "--no-sync"]
        run(bench.apply(output, *options, family=family), {"REASONVEC_SIMD": level})
        digest = hashlib.sha256()
        for shard in sorted(output.glob("*.safetensors")):
            digest.update(shard.read_bytes())
        digests.add(digest.hexdigest())
        shutil.rmtree(output)
    detail = f"threads {THREADS} x budgets {BUDGETS} x levels {tuple(levels)}".replace("'", "")
    yield Row("different outputs of one recipe", len(digests), "digests", bar=1, detail=detail)


# Rows by the name that --only takes, each with the turns that it is computed from.
ROWS: dict[str, tuple[Callable[[Bench], Iterator[Row]], tuple[str, ...]]] = {
    "apply": (apply_rows, ("roofline", "apply", "roofline, synced", "apply, synced")),
    "mergekit": (mergekit_rows, ("apply", "apply, synced", "mergekit")),
    "cat": (cat_rows, ("apply", "apply, synced", "cat and cp", "cat of the donors and cp")),
    "digests": (digest_rows, ("apply", "apply, no digests")),
    "extract": (extract_rows, ("roofline of extract", "extract")),
    "vector": (vector_rows, ()),
    "memory": (memory_rows, ()),
    "start": (start_rows, ()),
    "bytes": (bytes_rows, ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=ROWS, metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument(
        "--rounds", type=int, help="of the timed commands (default 7; 1 with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="a small family and no mergekit")
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="where to save (default docs/results, if complete)"
    )
    arguments = parser.parse_args()
    chosen = arguments.only or [name for name in ROWS if name != "mergekit" or not arguments.quick]
    rounds = arguments.rounds or (1 if arguments.quick else 7)
    folder = arguments.save or (None if arguments.only or arguments.quick else RESULTS)

    OUTPUTS.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with Console(stderr=True).status("") as status:
        bench = Bench(arguments.quick, rounds, status.update)
        bench.time(list(dict.fromkeys(turn for name in chosen for turn in ROWS[name][1])))
        rows = [row for name in chosen for row in ROWS[name][0](bench)]
    shutil.rmtree(OUTPUTS)

    table.show(rows, bench.seconds)
    if folder:
        facts = {
            "machine": table.machine(),
            "versions": f"reasonvec {version('reasonvec')}, mergekit {peers.VERSION}",
            "shapes": "small" if arguments.quick else "Qwen2.5-1.5B (and Qwen2.5-7B for memory)",
        }
        title = "Side by side with the disk and with mergekit"
        table.save(folder, "compare", title, NOTES, facts, rows, bench.seconds)


if __name__ == "__main__":
    main()
