"""One digest for every thread count, memory budget, SIMD level, kind of window and shard layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from shards import contents

import reasonvec as rv
from reasonvec.algebra import Vector
from reasonvec.family import Family, make_family

THREADS = (1, 2, 8)
BUDGETS = (16 << 20, 64 << 20, 1 << 30)

Open: TypeAlias = Callable[[Family, Path], Vector]
SHAPE = {"hidden": 256, "intermediate": 1100, "layers": 1, "vocab": 2100, "with_base": False}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Embeddings of three blocks and matrices of two, all with a short last one, in three shards."""
    return make_family(tmp_path_factory.mktemp("large"), **SHAPE, shard_bytes=1_200_000)


@pytest.fixture(scope="module")
def reason(large: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored vector of `large`."""
    folder = tmp_path_factory.mktemp("stored") / "reason"
    difference(large, folder).save(folder, sync=False)
    return folder


def difference(family: Family, _: Path) -> Vector:
    return rv.open(family.rl) - rv.open(family.sft)


def loaded(_: Family, stored: Path) -> Vector:
    return rv.load(stored)


SUMS: dict[str, Open] = {
    "difference": difference,
    "stored": loaded,
    "both": lambda family, stored: 0.3 * loaded(family, stored) - difference(family, stored),
    "random": lambda family, stored: difference(family, stored).control("random", seed=7),
    "shuffle": lambda family, stored: loaded(family, stored).control("shuffle", seed=7),
    "reverse": lambda family, stored: difference(family, stored).control("reverse"),
}


def every_way(
    patch: pytest.MonkeyPatch,
    run: Callable[[dict[str, int]], dict[str, bytes]],
    *,
    crossed: bool = True,
) -> None:
    """Runs something with all settings, each with each or (not `crossed`) threads along with budgets,
    and asserts that every byte is the same."""
    how = (
        list(itertools.product(THREADS, BUDGETS))
        if crossed
        else list(zip(THREADS, BUDGETS, strict=True))
    )
    first = run({"threads": 1, "memory_budget": BUDGETS[0]})
    for level, (threads, budget) in itertools.product(rv.simd_levels(), how):
        patch.setenv("REASONVEC_SIMD", level)
        assert run({"threads": threads, "memory_budget": budget}) == first, (level, threads, budget)
    assert run({"threads": 8, "memory_budget": 1}) == first
    patch.setenv("REASONVEC_IO", "read")
    for threads, budget in zip(THREADS, BUDGETS, strict=True):
        assert run({"threads": threads, "memory_budget": budget}) == first, (threads, budget)


@pytest.mark.parametrize("kind", SUMS)
def test_apply_gives_one_output(
    kind: str, large: Family, reason: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of a checkpoint folder, manifest and report among them, whatever the settings."""

    def run(options: dict[str, int]) -> dict[str, bytes]:
        point = rv.open(large.instruct) + 0.8 * SUMS[kind](large, reason)
        point.save(tmp_path / "out", sync=False, overwrite=True, **options)
        return contents(tmp_path / "out")

    every_way(monkeypatch, run)


@pytest.mark.parametrize("kind", ["difference", "both", "random", "shuffle"])
def test_extract_gives_one_vector(
    kind: str, large: Family, reason: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of a vector folder, manifest and card among them, whatever the settings."""

    def run(options: dict[str, int]) -> dict[str, bytes]:
        vector = SUMS[kind](large, reason)
        vector.save(tmp_path / "out", sync=False, overwrite=True, **options)
        return contents(tmp_path / "out")

    every_way(monkeypatch, run, crossed=kind == "difference")


@pytest.mark.parametrize("kind", ["both", "random", "shuffle"])
def test_measures_are_the_same_numbers(
    kind: str, large: Family, reason: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, maxima, products and counts, whatever the settings."""

    def run(options: dict[str, int]) -> dict[str, bytes]:
        vector = SUMS[kind](large, reason)
        comparison = vector.compare(loaded(large, reason), **options)
        rows = (1.0 * vector).inspect(**options).tensors
        return {"compare": repr(comparison).encode(), "inspect": repr(rows).encode()}

    every_way(monkeypatch, run, crossed=False)


@pytest.mark.parametrize("shard_bytes", [300_000, 1 << 40])
def test_other_shards_hold_the_same_tensors(
    shard_bytes: int, large: Family, reason: Path, tmp_path: Path
) -> None:
    """Inputs that are cut into other files give the same digest for every tensor."""
    other = make_family(tmp_path / "other", **SHAPE, shard_bytes=shard_bytes)
    difference(other, tmp_path).save(tmp_path / "reason", sync=False)

    def digests(target: Family, donors: Family, stored: Path, name: str) -> dict[str, object]:
        found = {}
        for kind, vector in SUMS.items():
            point = rv.open(target.instruct) + 0.8 * vector(donors, stored)
            report = point.save(tmp_path / f"{name}-{kind}", sync=False)
            found[kind] = {t.name: (t.digest, t.rounding) for t in report.tensors}
        return found

    wanted = digests(large, large, reason, "as-it-was")
    assert digests(other, other, tmp_path / "reason", "all-other") == wanted
    assert digests(large, other, tmp_path / "reason", "other-donors") == wanted
    assert digests(other, large, reason, "other-target") == wanted
