"""What the Python API costs on a small family: `pytest benches`."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import reasonvec as rv
from reasonvec.family import Family, make_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), with_base=False)


def test_open(benchmark: BenchmarkFixture, family: Family) -> None:
    benchmark(rv.open, family.instruct)


def test_plan(benchmark: BenchmarkFixture, family: Family, tmp_path: Path) -> None:
    benchmark(_expression(family).plan, tmp_path / "merged")


def test_save(benchmark: BenchmarkFixture, family: Family, tmp_path: Path) -> None:
    expression = _expression(family)
    outputs = (tmp_path / str(number) for number in itertools.count())
    benchmark(lambda: expression.save(next(outputs)))


def _expression(family: Family) -> rv.Point:
    return rv.open(family.instruct) + 0.8 * (rv.open(family.rl) - rv.open(family.sft))
