"""Every merge method beside mergekit's: one recipe file, both programs, in turns.

    python benches/merges.py                    all of it, into docs/results/merges.md and .json
    python benches/merges.py --only ties        some methods, shown and not saved
    python benches/merges.py --quick            a small family and no mergekit: does the bench work?

The recipe is the same YAML for both. Base and models are those of compare.py. mergekit runs once
per method, because its slower methods take minutes; ours several times, around it.
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import peers
import shapes
import table
from measure import Turn, peak_anonymous, timed
from rich.console import Console
from table import Row

from reasonvec.family import Family

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "benches" / ".cache"
OUTPUTS = CACHE / "outputs"
RESULTS = ROOT / "docs" / "results"
REASONVEC = Path(sysconfig.get_path("scripts")) / "reasonvec"
MIB = 2**20
NOTES = """\
Made by `python benches/merges.py` (`make bench`). The same YAML is run by `reasonvec merge` and by
`mergekit-yaml`, two models and a base of Qwen2 shapes in bf16, from and to the page cache, neither
waiting for the disk (`--no-sync`). Times are of whole commands; ours are medians of rounds before
and after mergekit's one. Memory is anonymous memory at its greatest. Memory for the output
is touched beforehand; inputs are read from disk once, and stay mapped by the bench
(benches/measure.py says why)."""


@dataclass(frozen=True)
class Method:
    """A recipe: its name in the YAML, whether the base is a base or a model, its parameters."""

    name: str
    models: str
    parameters: str = ""
    base: bool = True
    bar: float | None = 8.0
    aim: float | None = None


_BOTH = "weight: 0.5"
_DENSE = "weight: 0.5, density: 0.5"
# What takes mergekit minutes and 9 GB of memory comes last: machines are slow for a while after it.
METHODS = {
    method.name: method
    for method in (
        Method("task_arithmetic", _BOTH, bar=None),
        Method("slerp", "", "t: 0.3"),
        Method("model_stock", ""),
        Method("karcher", "", base=False),
        Method("arcee_fusion", ""),
        Method("dare_ties", _DENSE),
        Method("ties", _DENSE, bar=50.0, aim=100.0),
        Method("breadcrumbs", f"{_DENSE}, gamma: 0.01"),
        Method("della", f"{_DENSE}, epsilon: 0.15"),
        Method("sce", _BOTH, "select_topk: 0.5"),
    )
}
_PAIRS = ("slerp", "arcee_fusion")  # One model beside the base.


def recipe(method: Method, family: Family, folder: Path) -> Path:
    models = [family.rl] if method.name in _PAIRS else [family.rl, family.instruct]
    lines = [f"merge_method: {method.name}"]
    if method.base:
        lines.append(f"base_model: {family.sft}")
    if method.name in _PAIRS:
        models = [family.sft, *models]
    lines.append("models:")
    for model in models:
        lines.append(f"  - model: {model}")
        if method.models and model != family.sft:
            lines.append(f"    parameters: {{{method.models}}}")
    if method.parameters:
        lines.append(f"parameters: {{{method.parameters}}}")
    lines.append("dtype: bfloat16")
    path = folder / f"{method.name}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


class Bench:
    """The two programs on one family."""

    def __init__(self, quick: bool, rounds: int) -> None:
        self.quick = quick
        self.rounds = rounds
        self.family = shapes.small(CACHE) if quick else shapes.qwen_1_5b(CACHE)
        self.seconds: dict[str, list[float]] = {}

    def turn(self, method: Method, family: Family | None = None) -> Turn:
        of = family or self.family
        output = OUTPUTS / "merge"
        path = recipe(method, of, OUTPUTS)
        command: list[str | Path] = [REASONVEC, "merge", path, output, "--no-sync", "-q"]
        inputs = [] if family else [of.sft, of.rl, of.instruct]
        return Turn(method.name, command, inputs, output)

    def peer(self, method: Method) -> Turn:
        path = recipe(method, self.family, OUTPUTS)
        return peers.merge(peers.mergekit(CACHE), path, OUTPUTS / "merge", self.turn(method).inputs)

    def times(self, method: Method) -> Iterator[Row]:
        ours = self.seconds.setdefault(method.name, [])
        ours += (timed(self.turn(method)) for _ in range(self.rounds))
        if not self.quick:
            theirs = [timed(self.peer(method))]
            self.seconds[f"{method.name}, mergekit"] = theirs
            ours += (timed(self.turn(method)) for _ in range(self.rounds))
            figure = f"{method.name}: mergekit against reasonvec"
            value = median(theirs) / median(ours)
            detail = f"[{min(theirs) / max(ours):.1f} to {max(theirs) / min(ours):.1f}]"
            yield Row(figure, value, "times", method.bar, method.aim, True, detail)
        if method.name == "ties" and "task_arithmetic" in self.seconds:
            value = median(ours) / median(self.seconds["task_arithmetic"])
            yield Row("ties against our own task arithmetic", value, "times", bar=3.0)

    def memory(self, method: Method) -> Iterator[Row]:
        peak = peak_anonymous(self.turn(method)) / MIB
        yield Row(f"{method.name}: peak anonymous memory", peak, "MiB", bar=160)
        if not self.quick:
            peak = peak_anonymous(self.turn(method, shapes.holes_7b(CACHE))) / MIB
            yield Row(f"{method.name}: the same, 7B shapes", peak, "MiB", bar=160)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=METHODS, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=2, help="of ours, before mergekit and after")
    parser.add_argument("--quick", action="store_true", help="a small family and no mergekit")
    arguments = parser.parse_args()
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.quick, 1 if arguments.quick else arguments.rounds)
    rows: list[Row] = []
    with Console(stderr=True).status("") as status:
        # Memory behind all times: 7B shapes may drive the inputs out of the page cache.
        for step in (bench.times, bench.memory):
            for name in arguments.only or METHODS:
                status.update(name)
                rows += step(METHODS[name])
                # Each time: mergekit takes minutes, and a run that is cut keeps what it has.
                if not arguments.only and not arguments.quick:
                    save(rows, bench)
    shutil.rmtree(OUTPUTS)
    table.show(rows, bench.seconds)


def save(rows: list[Row], bench: Bench) -> None:
    facts = {"machine": table.machine(), "shapes": "Qwen2.5-1.5B (and 7B for memory)"}
    table.save(
        RESULTS, "merges", "Merge methods beside mergekit", NOTES, facts, rows, bench.seconds
    )


if __name__ == "__main__":
    main()
