"""The spectral engine against NumPy: triplets, spectra, noise floors, one digest on any machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Literal

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import reasonvec as rv
from reasonvec import _reasonvec as core
from reasonvec.cli.app import main
from reasonvec.reference import spectral as reference
from reasonvec.run import settings

Array = NDArray[np.float64]
NAME = "model.layers.0.mlp.up_proj.weight"


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest even, as bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: NDArray[np.uint16]) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def write(path: Path, tensors: dict[str, tuple[str, NDArray[np.generic]]]) -> rv.Checkpoint:
    """A checkpoint of these arrays in these formats."""
    path.mkdir(parents=True, exist_ok=True)
    header, blobs, at = {}, [], 0
    for name, (dtype, array) in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [at, at + len(blob)],
        }
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(blobs)
    )
    (path / "config.json").write_text("{}")
    return rv.open(path)


def pair(
    path: Path, rows: int, columns: int, rank: int, step: float, seed: int = 0
) -> tuple[rv.Vector, Array, Array]:
    """Two bf16 checkpoints, the second moved by a low-rank update: the vector, its elements, and
    the update before rounding."""
    draw = np.random.default_rng(seed)
    w = (0.02 * draw.standard_normal((rows, columns))).astype(np.float32)
    update = draw.standard_normal((rows, rank)) @ draw.standard_normal((rank, columns))
    update *= step / np.sqrt(rank)
    negative, positive = bf16(w), bf16((w + update).astype(np.float32))
    p = write(path / "p", {NAME: ("BF16", positive)})
    n = write(path / "n", {NAME: ("BF16", negative)})
    return p - n, widened(positive) - widened(negative), update


def single(path: Path, a: Array) -> rv.Checkpoint:
    return write(path, {NAME: ("F32", a.astype(np.float32))})


def rebuilt(found: object) -> Array:
    u, s, vt = (np.asarray(getattr(found, part), dtype=np.float64) for part in ("u", "s", "vt"))
    return (u * s) @ vt


SHAPES = [(700, 300), (200, 520), (300, 300), (90, 40), (1, 7), (7, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_top_is_nearly_the_best_of_its_rank(tmp_path: Path, shape: tuple[int, int]) -> None:
    vector, a, _ = pair(tmp_path, *shape, rank=3, step=1e-4)
    found = vector.svd(NAME, rank=12)
    u, s, vt = np.asarray(found.u), np.asarray(found.s), np.asarray(found.vt)
    rank = min(12, *shape)
    assert found.rank == rank
    assert u.shape == (shape[0], rank)
    assert vt.shape == (rank, shape[1])
    values = np.linalg.svd(a, compute_uv=False)
    best = np.sqrt((values[rank:] ** 2).sum())
    left = np.linalg.norm(a - rebuilt(found))
    assert left <= 1.01 * best + 1e-6 * np.linalg.norm(a)
    assert found.residual == pytest.approx(left, rel=1e-4, abs=1e-6 * float(values[0]))
    assert found.norm == pytest.approx(np.linalg.norm(a), rel=1e-7)
    assert (s <= values[:rank] * (1 + 1e-6)).all()
    filled = s > 1e-6 * s[0]
    assert np.abs(u.T @ u - np.eye(rank))[np.ix_(filled, filled)].max() < 2e-6
    assert np.abs(vt @ vt.T - np.eye(rank)).max() < 2e-6


def test_top_of_a_steep_spectrum_is_exact_far_down(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    left = np.linalg.qr(draw.standard_normal((600, 400)))[0]
    right = np.linalg.qr(draw.standard_normal((400, 400)))[0]
    values = 10.0 ** -(np.arange(400) / 8)
    model = single(tmp_path, (left * values) @ right.T)
    stored = np.asarray(model[NAME], dtype=np.float64)
    exact = np.linalg.svd(stored, compute_uv=False)
    found = np.asarray(model.svd(NAME, rank=30).s)
    assert found == pytest.approx(exact[:30], rel=2e-3)
    assert found[:12] == pytest.approx(exact[:12], rel=1e-5)


def test_a_matrix_of_low_rank_is_found_whole_and_zero_is_zero(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    a = draw.standard_normal((400, 5)) @ draw.standard_normal((5, 350))
    found = single(tmp_path / "low", a).svd(NAME, rank=16)
    assert np.linalg.norm(rebuilt(found) - a) < 1e-5 * np.linalg.norm(a)
    assert (np.asarray(found.s)[5:] < 1e-5 * np.asarray(found.s)[0]).all()
    zero = single(tmp_path / "zero", np.zeros((300, 280))).svd(NAME, rank=4)
    assert not np.asarray(zero.s).any()
    assert np.isfinite(np.asarray(zero.u)).all()
    assert single(tmp_path / "none", np.zeros((300, 280))).svd(NAME, rank="auto").rank == 0


def test_the_engine_is_as_good_as_its_reference(tmp_path: Path) -> None:
    vector, a, _ = pair(tmp_path, 900, 400, rank=6, step=1e-4)
    draw = np.random.default_rng(0)
    _, s, _ = reference.krylov(a, draw.standard_normal((400, 16)), 32, depth=6)
    held = (np.asarray(vector.svd(NAME, rank=32).s) ** 2).sum()
    assert held == pytest.approx((s**2).sum(), rel=2e-3)


def test_rank_by_energy_and_by_error(tmp_path: Path) -> None:
    vector, a, _ = pair(tmp_path, 400, 160, rank=5, step=2e-4)
    values = np.linalg.svd(a, compute_uv=False)
    shares = np.cumsum(values**2) / (values**2).sum()
    for energy in (0.3, 0.8, 0.97, 1.0):
        found = vector.svd(NAME, energy=energy)
        assert found.rank >= np.searchsorted(shares, energy - 1e-9) + 1 - 1
        assert 1 - (found.residual / found.norm) ** 2 >= energy - 1e-6
    found = vector.svd(NAME, error=0.5)
    assert found.residual <= 0.5 * found.norm
    assert found.rank <= np.searchsorted(shares, 0.75) + 2
    with pytest.raises(ValueError, match="one of"):
        vector.svd(NAME, rank=3, energy=0.5)
    with pytest.raises(ValueError, match="share"):
        vector.svd(NAME, energy=1.5)


@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (900, 860), (90, 40)])
def test_bottom_is_the_exact_dropped_part(tmp_path: Path, shape: tuple[int, int]) -> None:
    vector, a, _ = pair(tmp_path, *shape, rank=6, step=1e-4)
    rank = 8
    found = vector.svd(NAME, rank=rank, which="bottom", double=True)
    wanted = reference.bottom(a, rank)
    assert np.linalg.norm(rebuilt(found) - wanted) <= 1e-10 * np.linalg.norm(wanted)
    values = np.linalg.svd(a, compute_uv=False)
    assert np.asarray(found.s) == pytest.approx(values[-rank:], rel=1e-9)
    rounded = vector.svd(NAME, rank=rank, which="bottom")
    assert np.linalg.norm(rebuilt(rounded) - wanted) <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_bottom_of_a_matrix_of_low_rank_is_its_rounding(tmp_path: Path, scale: float) -> None:
    draw = np.random.default_rng(3)
    a = draw.standard_normal((700, 5)) @ draw.standard_normal((5, 660)) * scale
    found = single(tmp_path, a).svd(NAME, rank=12, which="bottom", double=True)
    v = np.asarray(found.vt).T
    stored = a.astype(np.float32).astype(np.float64)
    # Rounding to f32 is what the small values are made of; squares cannot tell them apart.
    assert np.linalg.norm(stored @ v) <= 1e-8 * np.linalg.norm(stored)
    assert v.T @ v == pytest.approx(np.eye(12), abs=1e-11)


@pytest.mark.parametrize("shape", [(1300, 700), (700, 1300)])
def test_spectrum_of_all_values(tmp_path: Path, shape: tuple[int, int]) -> None:
    vector, a, _ = pair(tmp_path, *shape, rank=6, step=1e-4)
    (row,) = vector.spectrum(count=None).tensors
    values = np.linalg.svd(a, compute_uv=False)
    assert row.complete
    assert np.array(row.values) == pytest.approx(values, rel=1e-8)
    assert row.rank == 6
    assert row.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)


def test_the_floor_is_that_of_the_same_signs(tmp_path: Path) -> None:
    vector, a, _ = pair(tmp_path, 300, 110, rank=4, step=1e-4)
    (row,) = vector.spectrum(seed=3).tensors
    assert row.floor == pytest.approx(reference.noise_floor(a, NAME, 3), rel=1e-9)
    large, b, _ = pair(tmp_path / "large", 900, 500, rank=4, step=1e-4)
    (row,) = large.spectrum().tensors
    exact = reference.noise_floor(b, NAME)
    assert 0.985 * exact <= row.floor <= exact * (1 + 1e-6)


@pytest.mark.parametrize("step", [1e-5, 5e-5, 2e-4])
@pytest.mark.parametrize("rank", [4, 16])
def test_rank_by_noise_floor_is_the_true_rank(tmp_path: Path, rank: int, step: float) -> None:
    vector, a, update = pair(tmp_path, 1024, 768, rank, step, seed=rank)
    found = vector.svd(NAME, rank="auto")
    assert abs(found.rank - rank) <= 0.1 * rank
    assert found.floor is not None

    def cosine(x: Array) -> float:
        return float((x * update).sum() / np.linalg.norm(x) / np.linalg.norm(update))

    assert cosine(rebuilt(found)) > cosine(a)


def test_stacks_are_taken_by_number_and_other_shapes_refused(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    stack = draw.standard_normal((3, 50, 40)).astype(np.float32)
    tensors: dict[str, tuple[str, NDArray[np.generic]]] = {
        "experts": ("F32", stack),
        "bias": ("F32", stack[0, 0]),
    }
    model = write(tmp_path, tensors)
    for number in range(3):
        found = model.svd("experts", rank=40, number=number)
        assert rebuilt(found) == pytest.approx(stack[number].astype(np.float64), abs=1e-5)
    for name, number in (("experts", None), ("bias", None), ("missing", None)):
        with pytest.raises(rv.MismatchError, match=name):
            model.svd(name, rank=2, number=number)
    with pytest.raises(rv.MismatchError, match="no matrix 3"):
        model.svd("experts", rank=2, number=3)
    report = model.spectrum()
    assert [row.name for row in report.tensors] == [f"experts[{i}]" for i in range(3)]
    assert report.skipped == ("bias",)


def test_numbers_that_make_no_sense_are_told(tmp_path: Path) -> None:
    """They never reach the core, whose numbers have no sign and end."""
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(9, 7)).astype(np.float32)
    stack = generator.normal(size=(2, 9, 7)).astype(np.float32)
    point = write(tmp_path / "m", {"w.weight": ("F32", matrix), "e": ("F32", stack)})
    for rank in (0, -1, True):
        with pytest.raises(ValueError, match="rank is a number of singular values from 1 on"):
            point.svd("w.weight", rank)
        with pytest.raises(ValueError, match="rank is a number of singular values from 1 on"):
            rv.write_factors(point, tmp_path / "f.safetensors", rank=rank)
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match="seed is a whole number from 0"):
            point.svd("w.weight", 2, seed=seed)
        with pytest.raises(ValueError, match="seed is a whole number from 0"):
            point.spectrum(seed=seed)
    for count in (0, -3):
        with pytest.raises(ValueError, match="count is a number of singular values from 1 on"):
            point.spectrum(count=count)
    for number in (-1, 2):
        with pytest.raises(rv.MismatchError, match=f"no matrix {number}; it is a stack of 2"):
            point.svd("e", 2, number=number)
    assert point.svd("w.weight", 1 << 64).rank == 7
    assert len(point.spectrum(count=1 << 64).tensors[0].values) == 7


@pytest.mark.parametrize("shape", [(256, 224), (224, 300), (40, 12)])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("F32", 1e-22),
        ("F32", 1e-30),
        ("F32", 1e-40),
        ("F32", 1e18),
        ("F32", 1e36),
        ("F64", 1e-60),
        ("F64", 1e-170),
        ("F64", 1e-310),
        ("F64", 1e100),
    ],
)
def test_any_scale_is_decomposed_as_scale_one(
    tmp_path: Path, shape: tuple[int, int], dtype: Literal["F32", "F64"], scale: float
) -> None:
    draw = np.random.default_rng(1)
    a = draw.standard_normal((shape[0], 4)) @ draw.standard_normal((4, shape[1]))
    a = (a + 0.05 * draw.standard_normal(shape)) * scale
    stored = a.astype(np.float32 if dtype == "F32" else np.float64)
    model = write(tmp_path, {NAME: (dtype, stored)})
    a = stored.astype(np.float64)
    # At one, so that NumPy has no trouble with it.
    unit = a / scale
    values = np.linalg.svd(unit, compute_uv=False)
    top = model.svd(NAME, rank=8)
    assert np.asarray(top.s) / scale == pytest.approx(values[:8], rel=1e-3)
    left = unit - (np.asarray(top.u, float) * (np.asarray(top.s) / scale)) @ np.asarray(top.vt)
    assert np.linalg.norm(left) <= 1.01 * np.sqrt((values[8:] ** 2).sum())
    assert top.residual / scale == pytest.approx(np.linalg.norm(left), rel=1e-3)
    noise = model.svd(NAME, rank="auto")
    assert noise.floor is not None
    assert values[4] < noise.floor / scale < values[0]
    assert noise.rank == (values > noise.floor / scale).sum()
    assert model.svd(NAME, energy=0.9).rank == 1 + int(
        np.searchsorted(np.cumsum(values**2), 0.9 * (values**2).sum())
    )
    bottom = model.svd(NAME, rank=3, which="bottom")
    assert np.asarray(bottom.s) / scale == pytest.approx(values[-3:], rel=1e-4)
    (row,) = model.spectrum(count=None).tensors
    assert np.asarray(row.values) / scale == pytest.approx(values, rel=1e-4)


def test_a_power_of_two_changes_no_bit_but_the_values(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    a = draw.standard_normal((260, 230))
    # Between 1 and 2 at most, which is where numbers of unusual size are brought.
    a = (a / (0.6 * np.abs(a).max())).astype(np.float32)
    usual = write(tmp_path / "a", {NAME: ("F32", a)}).svd(NAME, rank=5)
    for power in (-70, 90):
        found = write(tmp_path / f"{power}", {NAME: ("F32", np.ldexp(a, power))}).svd(NAME, rank=5)
        assert np.asarray(found.u).tobytes() == np.asarray(usual.u).tobytes()
        assert np.asarray(found.vt).tobytes() == np.asarray(usual.vt).tobytes()
        assert (np.asarray(found.s) == np.ldexp(np.asarray(usual.s), power)).all()
        assert found.residual == np.ldexp(usual.residual, power)


def test_what_f64_does_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    model = write(tmp_path, {NAME: ("F64", 1e160 * draw.standard_normal((250, 230)))})
    for find in (
        lambda: model.svd(NAME, rank=4),
        lambda: model.svd(NAME, rank=4, which="bottom"),
        lambda: model.spectrum(count=None),
    ):
        with pytest.raises(rv.MismatchError, match=NAME):
            find()


def test_no_triplets_are_refused(tmp_path: Path) -> None:
    single(tmp_path, np.ones((250, 230)))
    handle = core.Checkpoint(tmp_path)
    plan: dict[str, object] = {
        "name": NAME,
        "shape": [250, 230],
        "seed": 0,
        "settings": settings({}),
    }
    plan["terms"] = [{"coefficient": 1.0, "source": {"tensor": {"operand": 0, "name": NAME}}}]
    for which in ("top", "bottom"):
        request = json.dumps(plan | {"rank": {"fixed": 0}, "which": which})
        with pytest.raises(rv.ReasonvecError, match="at least 1"):
            core.svd(request, [handle], None, False)
    with pytest.raises(rv.ReasonvecError, match="at least 1"):
        core.spectrum(json.dumps(plan | {"count": 0, "floor": False}), [handle], None)


def test_nan_is_named(tmp_path: Path) -> None:
    for shape in ((300, 260), (260, 300)):
        a = np.ones(shape)
        a[7, 5] = np.nan
        model = single(tmp_path / str(shape[0]), a)
        index = str(7 * shape[1] + 5)
        with pytest.raises(rv.NonFiniteError, match=index):
            model.svd(NAME, rank=2)
        with pytest.raises(rv.NonFiniteError, match=index):
            model.svd(NAME, rank=2, which="bottom")


def test_stored_vectors_and_sums_give_what_the_differences_give(tmp_path: Path) -> None:
    vector, a, _ = pair(tmp_path, 700, 400, rank=4, step=1e-4)
    vector.save(tmp_path / "v")
    stored = rv.load(tmp_path / "v")
    once, again = vector.svd(NAME, rank=8), stored.svd(NAME, rank=8)
    assert bytes(memoryview(once.u)) == bytes(memoryview(again.u))
    both = (vector + 0.5 * stored).svd(NAME, rank=8)
    assert np.asarray(both.s) == pytest.approx(1.5 * np.asarray(once.s), rel=1e-5)
    assert np.linalg.norm(1.5 * a) == pytest.approx(both.norm, rel=1e-6)


SCRIPT = """
import hashlib, sys
import reasonvec as rv
vector = rv.open(sys.argv[1] + "/p") - rv.open(sys.argv[1] + "/n")
digest = hashlib.sha256()
for threads, budget in ((1, 64 << 20), (2, 1 << 20), (3, 64 << 20)):
    run = {"threads": threads, "memory_budget": budget}
    here = hashlib.sha256()
    for which, rank in (("top", 20), ("bottom", 6), ("top", "auto")):
        found = vector.svd(sys.argv[2], rank=rank, which=which, **run)
        for part in (found.u, found.s, found.vt):
            here.update(bytes(memoryview(part)))
        here.update(repr((found.residual, found.floor)).encode())
    print(here.hexdigest())
"""


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="only Linux counts the bytes that a process reads"
)
def test_a_wide_matrix_in_blocks_is_not_decoded_for_every_few_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triplets of the smaller side read a block that is stored sparsely for hundreds of columns at
    a time, and give the bits of the difference."""
    draw = np.random.default_rng(3)
    n = draw.normal(size=(64, 4096)).astype(np.float32)
    p = n + draw.normal(size=n.shape).astype(np.float32) * (draw.random(n.shape) < 0.1)
    positive, negative = (
        write(tmp_path / name, {NAME: ("F32", x.astype(np.float32))})
        for name, x in (("p", p), ("n", n))
    )
    (positive - negative).save(tmp_path / "sparse", encoding="sparse")
    wanted = (positive - negative).svd(NAME, rank=4, which="bottom")
    monkeypatch.setenv("REASONVEC_IO", "read")
    vector = rv.load(tmp_path / "sparse")

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    found = vector.svd(NAME, rank=4, which="bottom")
    stored = (tmp_path / "sparse" / "vector_model.safetensors").stat().st_size
    assert 2 <= (read() - before) / stored < 2 * 4096 / 384 + 8
    for part in ("u", "s", "vt"):
        assert bytes(memoryview(getattr(found, part))) == bytes(memoryview(getattr(wanted, part)))


@pytest.mark.parametrize("shape", [(1000, 700), (300, 800)])
def test_one_digest(tmp_path: Path, shape: tuple[int, int]) -> None:
    pair(tmp_path, *shape, rank=5, step=1e-4)
    levels: Sequence[str] = rv.simd_levels()
    digests = set()
    for level in levels:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), NAME],
            env=os.environ | {"REASONVEC_SIMD": level},
            check=True,
            capture_output=True,
            text=True,
        )
        digests |= set(done.stdout.split())
    assert len(digests) == 1


def test_factors_are_written_looked_up_and_checked(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    q = draw.standard_normal((60, 40)).astype(np.float32)
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")
    tensors: dict[str, tuple[str, NDArray[np.generic]]] = {
        names[0]: ("F32", q),
        names[1]: ("F32", q[:, :30].copy()),
        "model.embed_tokens.weight": ("F32", q),
        "model.norm.weight": ("F32", q[0]),
    }
    model = write(tmp_path / "m", tensors)
    made = rv.write_factors(model, tmp_path / "f.safetensors", rank=5, which="both")
    assert sorted(made) == sorted(names)
    parts = {k: np.asarray(v, dtype=np.float64) for k, v in made[names[0]].items()}
    dropped = (parts["bottom.u"] * parts["bottom.s"]) @ parts["bottom.vt"]
    assert dropped == pytest.approx(reference.bottom(q.astype(np.float64), 5), abs=1e-5)
    values = np.linalg.svd(q.astype(np.float64), compute_uv=False)
    assert parts["top.s"] == pytest.approx(values[:5], rel=1e-5)
    made.check(model)
    tensors[names[0]] = ("F32", 2 * q)
    with pytest.raises(rv.DamageError, match="q_proj"):
        made.check(write(tmp_path / "other", tensors))
    only = rv.write_factors(model, tmp_path / "g.safetensors", rank=99, include=["up_proj"])
    assert list(only) == [names[1]]
    assert only.rows[names[1]]["rank"] == 30
    with pytest.raises(rv.MismatchError, match="no matrix"):
        rv.write_factors(model, tmp_path / "h.safetensors", rank=2, include=["nothing"])
    with pytest.raises(rv.FormatError, match="no factor file"):
        rv.factors(tmp_path / "m" / "model.safetensors")


def test_a_point_is_decomposed_with_its_vectors(tmp_path: Path) -> None:
    vector, a, _ = pair(tmp_path, 200, 120, rank=4, step=1e-3)
    other = single(tmp_path / "other", np.random.default_rng(8).standard_normal((200, 120)))
    t = np.asarray(other[NAME], dtype=np.float64)
    found = (other + 3.0 * vector).svd(NAME, rank=120)
    assert np.asarray(found.s) == pytest.approx(
        np.linalg.svd(t + 3.0 * a, compute_uv=False), rel=1e-3
    )
    assert rebuilt(found) == pytest.approx(t + 3.0 * a, abs=1e-5)
    assert found.squares == pytest.approx(float(((t + 3.0 * a) ** 2).sum()), rel=1e-6)
    (row,) = (other + vector).spectrum(count=None).tensors
    assert np.array(row.values) == pytest.approx(np.linalg.svd(t + a, compute_uv=False), rel=1e-5)


PEAK = """
import sys, threading, time
import reasonvec as rv
from reasonvec.memory import anonymous_bytes
vector = rv.open(sys.argv[1] + "/p") - rv.open(sys.argv[1] + "/n")
options = {"rank": int(sys.argv[3]), "which": sys.argv[4]}
vector.svd(sys.argv[2], rank=1)
before, most, done = anonymous_bytes(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous_bytes())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
vector.svd(sys.argv[2], **options)
done = True
thread.join()
print(most - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what memory is held")
@pytest.mark.parametrize(("which", "rank"), [("top", 64), ("bottom", 16)])
def test_memory_is_as_predicted(tmp_path: Path, which: Literal["top", "bottom"], rank: int) -> None:
    rows, columns = (12000, 1500) if which == "top" else (1500, 1200)
    pair(tmp_path, rows, columns, 8, 1e-4)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), NAME, str(rank), which],
        check=True,
        capture_output=True,
        text=True,
    )
    plan = {"rows": rows, "columns": columns, "rank": {"fixed": rank}, "which": which}
    least, most = core.svd_memory(json.dumps(plan | {"settings": settings({})}))
    assert least == most
    # What the allocator keeps between calls is not counted, so much less would be no surprise.
    assert 0.3 * most < int(done.stdout) < 1.05 * most + (4 << 20)


def test_dry_runs_predict_and_write_nothing(tmp_path: Path) -> None:
    vector, _, _ = pair(tmp_path, 700, 300, 4, 1e-4)
    plan = vector.plan_compress(rank=8)
    assert set(plan.memory) == {NAME}
    assert plan.memory == vector.plan_lora(rank=8).memory
    least, most = vector.plan_compress().memory[NAME]
    assert least <= plan.memory[NAME][0] <= most
    with pytest.raises(rv.MismatchError):
        vector.plan_lora(rank=0)
    sources = ["--from", str(tmp_path / "p"), str(tmp_path / "n"), "--rank", "8", "--dry-run"]
    for command in ("compress", "to-lora"):
        out = tmp_path / command
        done = CliRunner().invoke(main, [command, *sources, "--out", str(out), "--json"])
        assert done.exit_code == 0, done.output
        said = json.loads(done.output)
        assert said["matrices"][NAME] == list(plan.memory[NAME])
        assert said["peak_memory"][0] > plan.memory[NAME][0]
        assert not out.exists()


def test_progress_goes_forward_over_all_matrices(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    vector, _, _ = pair(tmp_path, 700, 300, 4, 1e-4)
    vector.to_lora(tmp_path / "a", rank="auto", progress=lambda *now: told.append(now))
    assert told == sorted(told)
    done, whole = told[-1]
    assert done == whole > 0
    assert {total for _, total in told} == {whole}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
@pytest.mark.parametrize("what", ["spectrum(count=None)", f"svd({NAME!r}, 400, which='bottom')"])
def test_an_interrupt_stops_a_long_decomposition(tmp_path: Path, what: str) -> None:
    pair(tmp_path, 2400, 2400, 4, 1e-4)
    code = (
        "import reasonvec as rv, signal, sys\n"
        # Whoever starts the tests in the background may have them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "vector = rv.open(sys.argv[1] + '/p') - rv.open(sys.argv[1] + '/n')\n"
        "print('ready', flush=True)\n"
        f"vector.{what}"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(1.5)
        assert child.poll() is None, "it was over before it was interrupted"
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert "KeyboardInterrupt" in said
        assert time.monotonic() - start < 20
