"""Sums of squares and products of numbers whose products F32 has no room for."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shards import read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec import reference as ref
from reasonvec.measure import Quantities, measure
from reasonvec.merging.merge import Merge
from reasonvec.reference import MICRO
from reasonvec.terms import Operands, leaf_layout, vector_quantity

F32 = NDArray[np.float32]
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=12)
# Of 2: from where only subnormal F32 are left to where the largest are near.
EXPONENTS = st.integers(-140, 120)
SIZE = MICRO + 77


def vector(exponent: int, seed: int, size: int = SIZE, share: float = 0.9) -> F32:
    """Numbers of one size, some of them zero; those of the last MICRO are of another size."""
    dice = np.random.default_rng(seed)
    x = dice.normal(size=size) * (dice.random(size) < share)
    x[MICRO:] *= 2.0**-20
    return np.ldexp(x, exponent).astype(np.float32)


def exact_dot(a: F32, b: F32) -> float:
    return math.fsum(a.astype(np.float64) * b.astype(np.float64))


@given(EXPONENTS, EXPONENTS)
@example(-100, -100)
@example(100, 100)
def test_fixed_dot_is_right_at_every_scale(first: int, second: int) -> None:
    """Against exact sums, and to within what F32 keeps of each product."""
    a, b = vector(first, 1), vector(second, 2)
    for x, y in ((a, a), (b, b), (a, b)):
        size = math.sqrt(exact_dot(x, x)) * math.sqrt(exact_dot(y, y))
        assert ref.fixed_dot(x, y) == pytest.approx(exact_dot(x, y), abs=1e-6 * size, rel=0)


def test_fixed_dot_of_what_is_not_finite_is_not_a_number() -> None:
    """Made again it is what it was."""
    for x in (math.inf, math.nan):
        assert not math.isfinite(ref.fixed_dot(np.float32([x, 1.0]), np.float32([1.0, 2.0])))
    assert ref.fixed_dot(np.float32([1e30, 0.0]), np.float32([0.0, 1e30])) == 0.0


def write(folder: Path, **models: F32) -> dict[str, Path]:
    return {
        name: write_checkpoint(folder / name, {"w": stored("F32", x.view(np.uint32))})
        for name, x in models.items()
    }


@PROPERTY
@given(EXPONENTS, EXPONENTS, st.sampled_from([1, 63, SIZE]))
@example(-100, 100, SIZE)
@example(-120, -120, SIZE)
@example(100, 90, SIZE)
def test_the_core_gives_the_sums_of_the_reference(first: int, second: int, size: int) -> None:
    """Norms in manifests, products that are measured, rounding reports: every bit, every level."""
    zero = np.zeros(size, np.float32)
    a, b = vector(first, 3, size), vector(second, 4, size, share=0.2)
    with tempfile.TemporaryDirectory() as place:
        at = write(Path(place), zero=zero, a=a, b=b)
        for level in rv.simd_levels():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("REASONVEC_SIMD", level)
                vectors = [rv.open(at[name]) - rv.open(at["zero"]) for name in "ab"]
                for name, v, x in zip("ab", vectors, (a, b), strict=True):
                    out = Path(place) / f"{level}-{name}"
                    v.save(out, sync=False)
                    (row,) = rv.load(out).inspect().tensors
                    assert row.norm == ref.extent(x).norm
                operands = Operands()
                layout = leaf_layout(vectors[0].terms[0].leaf)
                parts = [vector_quantity(v, layout, operands)[0]["w"] for v in vectors]
                (found,) = measure([Quantities("w", size, parts)], operands, {})
                assert found.gram == [[ref.fixed_dot(x, y) for y in (a, b)] for x in (a, b)]
                for name, t, u in (("a", a, b), ("b", b, a)):
                    other = vectors["ba".index(name)]
                    saved = (rv.open(at[name]) + other).save(
                        Path(place) / f"{level}-sum-{name}", sync=False
                    )
                    bits = t.view(np.uint32)
                    out_bits = ref.finish(bits, "F32", u, "F32")
                    wanted = ref.rounding(bits, "F32", u, out_bits, "F32")
                    (tensor,) = saved.tensors
                    assert tensor.rounding is not None
                    for key in ("intended", "realised", "dot", "updated", "lost"):
                        assert getattr(tensor.rounding, key) == getattr(wanted, key), key


METHODS: dict[str, Callable[[rv.Point, rv.Point, rv.Point], Merge]] = {
    "slerp": lambda base, a, b: rv.slerp(a, b, t=0.3),
    "nuslerp": lambda base, a, b: rv.nuslerp({a: 1.0, b: 2.0}),
    "nuslerp columns": lambda base, a, b: rv.nuslerp({a: 1.0, b: 2.0}, along="columns"),
    "nuslerp rows": lambda base, a, b: rv.nuslerp({a: 1.0, b: 2.0}, along="rows"),
    "karcher": lambda base, a, b: rv.karcher([a, b]),
    "model_stock": lambda base, a, b: rv.model_stock(base, [a, b]),
    "model_stock rows": lambda base, a, b: rv.model_stock(base, [a, b], filter_wise=True),
    "sce": lambda base, a, b: rv.sce(base, [a, b]),
}


@pytest.mark.parametrize("exponent", [-100, 80])
@pytest.mark.parametrize("method", METHODS)
def test_merges_do_not_depend_on_the_size_of_the_models(
    method: str, exponent: int, tmp_path: Path
) -> None:
    """Models times a power of two give the merge times that power, to what F32 keeps."""
    shape = (60, 100)
    dice = np.random.default_rng(5)
    start = dice.normal(size=shape)
    models = [start, start + dice.normal(size=shape), start + 0.5 * dice.normal(size=shape)]

    def merged(power: int) -> NDArray[np.float64]:
        folders = []
        for i, model in enumerate(models):
            bits = np.ldexp(model, power).astype(np.float32).view(np.uint32)
            folder = tmp_path / f"{power}-{i}"
            folders.append(write_checkpoint(folder, {"w.weight": stored("F32", bits, shape)}))
        out = tmp_path / f"{power}-out"
        METHODS[method](*(rv.open(folder) for folder in folders)).save(out, sync=False)
        bits = read_checkpoint(out)["w.weight"].bits
        return np.ldexp(ref.widen(bits, "F32", "F64"), -power)

    usual, extreme = merged(0), merged(exponent)
    assert np.linalg.norm(extreme - usual) < 1e-6 * np.linalg.norm(usual)
    mean = 0.5 * (models[1] + models[2]).ravel()
    assert np.linalg.norm(usual - mean) > 0.01 * np.linalg.norm(mean)
