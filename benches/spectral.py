"""The spectral engine beside torch: every figure in one run, in turns.

    python benches/spectral.py                 all of it, into docs/results/spectral.md and .json
    python benches/spectral.py --only top      some rows, shown and not saved
    python benches/spectral.py --quick         small matrices: does the bench work?

torch has the f32 delta in memory; reasonvec reads two bf16 checkpoints from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import peers
import shapes
import table
import torch
from measure import ratio, run
from rich.console import Console
from safetensors.torch import load_file, save_file
from table import Row
from torch.utils.dlpack import from_dlpack

import reasonvec as rv

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benches" / ".cache" / "spectral"
RESULTS = ROOT / "docs" / "results"
REASONVEC = Path(sysconfig.get_path("scripts")) / "reasonvec"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
MIB = 2**20
NAME = "weight"
ROWS = ("top", "bottom", "large", "noise", "lora")
TOP = {"8960 x 1536": 8, "18944 x 3584": 8}
BOTTOM = ("8960 x 1536", "3584 x 3584")
LARGE = "28672 x 8192"
LAYER = "model.layers.0."

# Anonymous memory before and at most during one decomposition, in a process without torch.
CHILD = """
import sys, threading, time
import reasonvec as rv
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
vector = rv.open(sys.argv[1] + "/p") - rv.open(sys.argv[1] + "/n")
before, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
found = vector.svd(sys.argv[2], rank=int(sys.argv[3]))
done = True
thread.join()
print(max(most, anonymous()) - before)
"""


class Spectral:
    """One run of the bench."""

    def __init__(self, *, quick: bool, rounds: int) -> None:
        self.quick, self.rounds = quick, rounds
        self.seconds: dict[str, list[float]] = {}
        self.console = Console(stderr=True)

    def folder(self, shape: str, rank: int = 8, step: float = 1e-4, seed: int = 0) -> Path:
        """Two bf16 checkpoints of one matrix, a low-rank update apart; made once."""
        rows, columns = self.sides(shape)
        folder = CACHE / f"{rows}x{columns}-{rank}-{step:g}-{seed}"
        if not (folder / "n" / "model.safetensors").exists():
            draw = torch.Generator().manual_seed(seed)
            negative = 0.02 * torch.randn(rows, columns, generator=draw)
            update = torch.randn(rows, rank, generator=draw) @ torch.randn(
                rank, columns, generator=draw
            )
            positive = negative + update * (step / rank**0.5)
            for role, values in (("p", positive), ("n", negative)):
                (folder / role).mkdir(parents=True, exist_ok=True)
                (folder / role / "config.json").write_text("{}")
                save_file({NAME: values.bfloat16()}, folder / role / "model.safetensors")
        return folder

    def sides(self, shape: str) -> tuple[int, int]:
        rows, columns = map(int, shape.split(" x "))
        return (rows // 8, columns // 8) if self.quick else (rows, columns)

    def vector(self, folder: Path) -> rv.Vector:
        return rv.open(folder / "p") - rv.open(folder / "n")

    def delta(self, folder: Path) -> torch.Tensor:
        p, n = (load_file(folder / role / "model.safetensors")[NAME] for role in ("p", "n"))
        return p.float() - n.float()

    def turns(self, *ways: tuple[str, Callable[[], object]], least: int = 1) -> None:
        """Time ways of doing one thing, round by round, after one round that does not count."""
        for _, way in ways:
            way()
        for number in range(max(self.rounds, least)):
            for name, way in ways if number % 2 else ways[::-1]:
                self.console.log(f"round {number + 1}: {name}")
                # The threads of the one before go on spinning for a while.
                time.sleep(0.5)
                start = time.perf_counter()
                way()
                self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def anonymous(self, folder: Path, rank: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder), NAME, str(rank)],
            check=True,
            capture_output=True,
            text=True,
        )
        return int(done.stdout) / MIB

    def top(self) -> Iterator[Row]:
        for shape, rank in TOP.items():
            folder = self.folder(shape, rank)
            vector, delta = self.vector(folder), self.delta(folder)
            ours, theirs = f"top-32 of {shape}", f"torch.svd_lowrank of {shape}"
            self.turns(
                (ours, partial(vector.svd, NAME, rank=32)),
                (theirs, partial(torch.svd_lowrank, delta, q=40, niter=2)),
                # Tenths of a second, which scatter.
                least=15,
            )
            middle, least, most = ratio(self.seconds[theirs], self.seconds[ours])
            detail = f"{least:.2f} to {most:.2f} within a round"
            yield Row(f"{ours}: times faster than torch", middle, "times", 1, 2, True, detail)
            u, s, v = torch.svd_lowrank(delta, q=40, niter=2)
            left = torch.linalg.norm((delta - u[:, :32] * s[:32] @ v[:, :32].T).double()).item()
            found = vector.svd(NAME, rank=32)
            u, s, v = (from_dlpack(x) for x in (found.u, found.s, found.vt))
            own = torch.linalg.norm((delta - (u * s.float()) @ v).double()).item()
            yield Row(f"{ours}: residual over torch's", own / left, "times", 1)
            yield Row(f"{ours}: anonymous memory", self.anonymous(folder, 32), "MiB", 200)

    def bottom(self) -> Iterator[Row]:
        for shape in BOTTOM:
            folder = self.folder(shape)
            vector, delta = self.vector(folder), self.delta(folder)
            ours, theirs = f"bottom-32 of {shape}", f"torch.linalg.svd of {shape}"
            self.turns(
                (ours, partial(vector.svd, NAME, rank=32, which="bottom", double=True)),
                (theirs, partial(torch.linalg.svd, delta, full_matrices=False)),
            )
            middle, least, most = ratio(self.seconds[theirs], self.seconds[ours])
            detail = f"{least:.2f} to {most:.2f} within a round"
            yield Row(f"{ours}: times faster than torch", middle, "times", 2, 4, True, detail)
            found = vector.svd(NAME, rank=32, which="bottom", double=True)
            u, s, v = (from_dlpack(x) for x in (found.u, found.s, found.vt))
            exact = torch.linalg.svd(delta.double(), full_matrices=False)
            part = exact.U[:, -32:] * exact.S[-32:] @ exact.Vh[-32:]
            off = torch.linalg.norm((u * s) @ v - part) / torch.linalg.norm(part)
            yield Row(f"{ours}: dropped part off by, in 1e-10", off.item() * 1e10, "times", 1)

    def lora(self) -> Iterator[Row]:
        cache = ROOT / "benches" / ".cache"
        family = shapes.small(cache) if self.quick else shapes.qwen_1_5b(cache)
        p, n, out = family.rl, family.sft, CACHE / "lora"
        extract = peers.mergekit(cache).with_name("mergekit-extract-lora")
        models = ("--model", p, "--base-model", n, "--max-rank", "32")
        theirs: list[str | Path] = [extract, *models, "--out-path", out / "theirs"]
        sides: list[str | Path] = ["--from", p, n, "--out", out / "ours"]
        ours: list[str | Path] = [REASONVEC, "to-lora", *sides, "--rank", "32", "--overwrite"]
        name, peer = "to-lora of rank 32", "mergekit-extract-lora of rank 32"
        # mergekit once, because it takes minutes; ours around it, after one that does not count.
        run(ours)
        for number in range(2 * self.rounds + 1):
            title, command = (peer, theirs) if number == self.rounds else (name, ours)
            self.console.log(title)
            start = time.perf_counter()
            run(command, OFFLINE)
            self.seconds.setdefault(title, []).append(time.perf_counter() - start)
        (theirs_took,) = self.seconds[peer]
        least, *_, most = sorted(theirs_took / own for own in self.seconds[name])
        middle, detail = theirs_took / median(self.seconds[name]), f"[{least:.1f} to {most:.1f}]"
        yield Row(f"{name}: times faster than mergekit", middle, "times", 15, 30, True, detail)
        excess = [residuals(p, n, out / part) for part in ("ours", "theirs")]
        peers_worst = max(excess[1].values())
        yield Row(
            f"{name}: greatest residual over the optimal",
            max(excess[0].values()),
            "times",
            1.01,
            detail=f"of {len(excess[0])} matrices of a layer; mergekit's {peers_worst:.6f}",
        )

    def large(self) -> Iterator[Row]:
        folder = self.folder(LARGE, 16)
        yield Row(f"top-64 of {LARGE}: anonymous memory", self.anonymous(folder, 64), "MiB", 400)

    def noise(self) -> Iterator[Row]:
        right, closer, cases = 0, 0, 0
        shape = "2048 x 1024"
        for rank in (4, 8, 16, 32, 64):
            for step in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4):
                folder = self.folder(shape, rank, step, seed=rank)
                rows, columns = self.sides(shape)
                draw = torch.Generator().manual_seed(rank)
                torch.randn(rows, columns, generator=draw)
                update = torch.randn(rows, rank, generator=draw) @ torch.randn(
                    rank, columns, generator=draw
                )
                delta = self.delta(folder)
                found = self.vector(folder).svd(NAME, rank="auto")
                u, s, v = (from_dlpack(x) for x in (found.u, found.s, found.vt))
                near = [
                    torch.nn.functional.cosine_similarity(x.flatten(), update.flatten(), dim=0)
                    for x in ((u * s.float()) @ v, delta)
                ]
                cases += 1
                right += abs(found.rank - rank) <= 0.1 * rank
                closer += bool(near[0] > near[1])
                self.console.log(f"rank {rank}, step {step:g}: found {found.rank}, {near}")
        yield Row("noise-floor rank within 10 %", 100 * right / cases, "%", 95, 100, True)
        yield Row("closer to the true update", 100 * closer / cases, "%", 100, None, True)


def residuals(p: Path, n: Path, adapter: Path) -> dict[str, float]:
    """Of the first layer's matrices, what an adapter leaves over what the best of rank 32 does."""
    factors = load_file(adapter / "adapter_model.safetensors")
    positive, negative = rv.open(p), rv.open(n)
    found = {}
    for name in positive:
        part = "base_model.model." + name.removesuffix(".weight")
        if not name.startswith(LAYER) or f"{part}.lora_A.weight" not in factors:
            continue
        delta = from_dlpack(positive[name]).double() - from_dlpack(negative[name]).double()
        a, b = (factors[f"{part}.lora_{side}.weight"].double() for side in "AB")
        config = json.loads((adapter / "adapter_config.json").read_text())
        short = name.removesuffix(".weight").rpartition(".")[2]
        rank, alpha = a.shape[0], float(config["lora_alpha"])
        for pattern, scale in config.get("alpha_pattern", {}).items():
            alpha = float(scale) if name.removesuffix(".weight").endswith(pattern) else alpha
        left = torch.linalg.norm(delta - (b @ a) * (alpha / rank)).item()
        s = torch.linalg.svdvals(delta)
        found[short] = left / torch.linalg.norm(s[32:]).item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=ROWS, help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="sides of an eighth")
    asked = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    bench = Spectral(quick=asked.quick, rounds=1 if asked.quick else asked.rounds)
    rows: list[Row] = []
    for name in asked.only or ROWS:
        rows += getattr(bench, name)()
        # Again after each part: mergekit takes minutes, and a run that is cut keeps the rest.
        if not asked.quick and not asked.only:
            save(rows, bench)
    table.show(rows, bench.seconds)


def save(rows: list[Row], bench: Spectral) -> None:
    facts: dict[str, object] = {
        "machine": table.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rounds": bench.rounds,
    }
    notes = "torch has the delta in memory; reasonvec reads two checkpoints from the page cache."
    title = "The spectral engine beside torch"
    table.save(RESULTS, "spectral", title, notes, facts, rows, bench.seconds)


if __name__ == "__main__":
    main()
