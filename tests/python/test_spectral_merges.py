"""Merges on singular vectors: the core against the papers' formulas with NumPy's own SVD."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pytest
from models import make_models, tensors_of
from numpy.typing import NDArray
from safetensors.numpy import save_file
from shards import Stored, read_shard, stored, write_checkpoint

import reasonvec as rv
from reasonvec import _reasonvec as core
from reasonvec import reference as ref
from reasonvec.reference import Dtype
from reasonvec.verify import verify

Array: TypeAlias = NDArray[np.float64]
Update: TypeAlias = Callable[[list[Array], list[float]], Array]
WEIGHTS = [0.5, 0.3, 0.7]
SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (290, 50),
    "wide": (50, 290),
    "square": (60, 60),
    "column": (30, 1),
    "experts": (3, 20, 14),
}


class Case(NamedTuple):
    """A method as a plan has it, and its update in the reference."""

    method: dict[str, object]
    update: Update


CASES = {
    "iso_c": Case({"kind": "iso_c", "lambda": 0.9}, lambda d, w: ref.iso_c(d, w, 0.9)),
    "iso_cts": Case({"kind": "iso_cts"}, lambda d, w: ref.iso_cts(d, w)),
    "iso_cts half": Case(
        {"kind": "iso_cts", "common": 0.5, "lambda": 0.9}, lambda d, w: ref.iso_cts(d, w, 0.5, 0.9)
    ),
    "iso_cts none": Case({"kind": "iso_cts", "common": 0}, lambda d, w: ref.iso_cts(d, w, 0.0)),
    "tsv_m": Case({"kind": "tsv_m"}, lambda d, w: ref.tsv_m(d, w)),
    "tsv_m low": Case(
        {"kind": "tsv_m", "rank": 0.1, "lambda": 0.9}, lambda d, w: ref.tsv_m(d, w, 0.1, 0.9)
    ),
    "star": Case({"kind": "star"}, lambda d, w: ref.star(d, w)),
    "star rank": Case(
        {"kind": "star", "rank": 5, "lambda": 0.9}, lambda d, w: ref.star(d, w, rank=5, scale=0.9)
    ),
    "boost": Case({"kind": "boost"}, lambda d, w: ref.boost(d, w)),
    "boost much": Case(
        {"kind": "boost", "beta": 0.6, "lambda": 0.9}, lambda d, w: ref.boost(d, w, 0.6, 0.9)
    ),
    "knots": Case({"kind": "knots", "density": [1, 1, 1]}, lambda d, w: ref.knots(d, w, [1, 1, 1])),
    "knots trimmed": Case(
        {"kind": "knots", "density": [0.2, 0.5, 0.7], "normalize": False, "lambda": 0.9},
        lambda d, w: ref.knots(d, w, [0.2, 0.5, 0.7], normalize=False, scale=0.9),
    ),
    "knots linear": Case(
        {"kind": "knots", "density": [1, 1, 1], "elect": False, "normalize": False},
        lambda d, w: ref.spectral_sum(d, w),
    ),
}


def base_of(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(len(shape)).normal(size=shape) * 0.05


def task_of(model: int, shape: tuple[int, ...], rank: int | None) -> Array:
    """What a model learned: of full rank, or of a low one."""
    dice = np.random.default_rng(100 * model + shape[-1])
    if rank is None:
        return dice.normal(size=shape) * 0.004
    left = dice.normal(size=(*shape[:-1], rank))
    right = dice.normal(size=(*shape[:-2], rank, shape[-1]))
    return (left * np.linspace(1, 2, rank)) @ right * 0.002


def write(root: Path, dtype: Dtype, rank: int | None = None) -> list[Path]:
    """The base (0) and three models."""
    folders = []
    for model in range(4):
        tensors = {}
        for name, shape in SHAPES.items():
            # Values on a grid, so that differences of F32 are exact and low ranks stay low.
            own = task_of(model, shape, rank) if model else np.zeros(shape)
            base = np.zeros(shape) if rank else base_of(shape)
            bits = ref.narrow((base + own).ravel(), dtype)
            tensors[name] = stored(dtype, bits, shape)
        folders.append(write_checkpoint(root / str(model), tensors))
    return folders


def merge(
    folders: Sequence[Path],
    out: Path,
    method: dict[str, object],
    dtype: Dtype = "F32",
    weights: Sequence[float] = WEIGHTS,
    **how: object,
) -> dict[str, Stored]:
    out.mkdir(exist_ok=True)
    tensors = [
        {
            "name": name,
            "dtype": dtype,
            "shape": shape,
            "target": {"operand": 0, "name": name},
            "terms": [
                {"coefficient": w, "source": {"tensor": {"operand": i + 1, "name": name}}}
                for i, w in enumerate(weights)
            ],
            "method": method,
        }
        for name, shape in SHAPES.items()
    ]
    plan: dict[str, object] = {
        "out": str(out),
        "shards": [{"file": "model.safetensors", "tensors": tensors}],
        "threads": 2,
        "memory_budget": 64 << 20,
        "sync": False,
    }
    core.apply(json.dumps(plan | how), [core.Checkpoint(folder) for folder in folders])
    return read_shard(out / "model.safetensors")


def numbers(tensor: Stored, dtype: Dtype) -> Array:
    return ref.widen(tensor.bits, dtype, "F64").astype(np.float64).reshape(tensor.shape)


def expected(folders: Sequence[Path], dtype: Dtype, update: Update) -> dict[str, Array]:
    """Updates from task vectors as the core reads them: rounded to the work type."""
    work = np.float64 if dtype == "F64" else np.float32
    stored_tensors = [read_shard(folder / "model.safetensors") for folder in folders]
    found = {}
    for name, shape in SHAPES.items():
        x = [numbers(t[name], dtype).astype(work) for t in stored_tensors]
        d = [(m - x[0]).astype(np.float64) for m in x[1:]]
        if len(shape) == 3:
            found[name] = np.array([update(list(e), WEIGHTS) for e in zip(*d, strict=True)])
        else:
            found[name] = update(d, WEIGHTS)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_method_is_the_papers_formula(case: str, tmp_path: Path) -> None:
    """In F64, where nothing is rounded: within 1e-6 of the largest element. What is left is the
    square of the condition, because the core takes singular values from Gram matrices."""
    method, update = CASES[case]
    folders = write(tmp_path, "F64")
    found = merge(folders, tmp_path / "out", method, "F64")
    base = read_shard(folders[0] / "model.safetensors")
    for name, wanted in expected(folders, "F64", update).items():
        made = numbers(found[name], "F64") - numbers(base[name], "F64")
        off = np.abs(made - wanted).max() / np.abs(wanted).max()
        assert off < 1e-6, (name, off)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("case", CASES)
def test_a_method_is_rounded_once(case: str, dtype: Dtype, tmp_path: Path) -> None:
    """In the formats of checkpoints: what base plus the reference's update rounds to, but for
    elements whose sum lies at the edge between two numbers."""
    method, update = CASES[case]
    folders = write(tmp_path, dtype)
    found = merge(folders, tmp_path / "out", method, dtype)
    base = read_shard(folders[0] / "model.safetensors")
    apart = total = 0
    for name, wanted in expected(folders, dtype, update).items():
        u = wanted.astype(np.float32).ravel()
        bits = ref.merged(u, dtype, base[name].bits, dtype)
        made, near = (ref.widen(b, dtype, "F32") for b in (found[name].bits, bits))
        np.testing.assert_allclose(made, near, rtol=2**-7 if dtype == "BF16" else 2**-21, atol=1e-8)
        apart += int(np.count_nonzero(bits != found[name].bits))
        total += bits.size
    assert apart < 0.02 * total


@pytest.mark.parametrize("case", [c for c in CASES if c not in {"star rank"}])
def test_low_ranks_stay_low(case: str, tmp_path: Path) -> None:
    """Task vectors of rank 3: no method makes anything of directions that nobody moved."""
    method, update = CASES[case]
    folders = write(tmp_path, "F64", rank=3)
    found = merge(folders, tmp_path / "out", method, "F64")
    for name, wanted in expected(folders, "F64", update).items():
        made = numbers(found[name], "F64")
        assert np.abs(made - wanted).max() < 1e-6 * np.abs(wanted).max(), name
        for matrix in made.reshape(-1, *made.shape[-2:]):
            s = np.linalg.svd(matrix, compute_uv=False)
            assert int((s > 1e-6 * s[0]).sum()) <= 9


def test_iso_c_has_one_singular_value(tmp_path: Path) -> None:
    """All of them are the mean of those of the sum."""
    folders = write(tmp_path, "F64")
    found = merge(folders, tmp_path / "out", {"kind": "iso_c"}, "F64")
    base = read_shard(folders[0] / "model.safetensors")
    sums = expected(folders, "F64", ref.spectral_sum)
    for name in ("tall", "wide", "square"):
        update = numbers(found[name], "F64") - numbers(base[name], "F64")
        mean = np.linalg.svd(sums[name], compute_uv=False).mean()
        np.testing.assert_allclose(np.linalg.svd(update, compute_uv=False), mean, rtol=1e-6)


def test_star_keeps_the_nuclear_norm(tmp_path: Path) -> None:
    """Of a single model with weight 1, at a lower rank."""
    folders = write(tmp_path, "F64")
    found = merge(folders, tmp_path / "out", {"kind": "star"}, "F64", [1.0])
    stored_tensors = [read_shard(f / "model.safetensors")["tall"] for f in folders[:2]]
    base, model = (numbers(t, "F64") for t in stored_tensors)
    before, after = (
        np.linalg.svd(x - base, compute_uv=False) for x in (model, numbers(found["tall"], "F64"))
    )
    assert after.sum() == pytest.approx(before.sum(), rel=1e-9)
    assert int((after > 1e-9).sum()) < int((before > 1e-9).sum())


def test_models_that_do_not_differ_change_nothing(tmp_path: Path) -> None:
    """A zero matrix has no directions, and the base keeps its bits."""
    folders = write(tmp_path, "F32")
    same = [folders[0]] * 4
    wanted = read_shard(folders[0] / "model.safetensors")
    for case, (method, _) in CASES.items():
        assert merge(same, tmp_path / "out", method) == wanted, case
        (tmp_path / "out" / ".reasonvec-journal").unlink()


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Also where NaN may pass elsewhere: there is no singular value of it."""
    folders = write(tmp_path, "F32")
    tensors = read_shard(folders[2] / "model.safetensors")
    wild = tensors["wide"].bits.copy()
    wild[12_345] = 0x7FC00000
    tensors["wide"] = stored("F32", wild, SHAPES["wide"])
    write_checkpoint(tmp_path / "wild", tensors)
    folders[2] = tmp_path / "wild"
    for allowed in (False, True):
        with pytest.raises(rv.NonFiniteError, match=r"wide.*12345|12345.*wide") as told:
            merge(folders, tmp_path / "out", {"kind": "tsv_m"}, allow_nonfinite=allowed)
        # Nobody is told to do what was done.
        assert ("--allow-nonfinite" in str(told.value)) is not allowed


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"kind": "tsv_m", "rank": 0.5}, "at most 1 / 3"),
        ({"kind": "star", "rank": 0}, "rank is 0"),
        ({"kind": "star", "eta": 1.5}, "share from 0 to 1"),
        ({"kind": "boost", "beta": -0.1}, "share from 0 to 1"),
        ({"kind": "iso_cts", "common": 2}, "share from 0 to 1"),
        ({"kind": "knots", "density": [1]}, "1 numbers for density, but 3 models"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    method: dict[str, object], words: str, tmp_path: Path
) -> None:
    """Before anything is written."""
    folders = write(tmp_path, "F32")
    with pytest.raises(rv.ReasonvecError, match=words):
        merge(folders, tmp_path / "out", method)
    assert not list((tmp_path / "out").iterdir())


# ---- whole models


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("place")) / "models"


MERGES: dict[str, tuple[Callable[..., rv.Merge], Update, float]] = {
    "tsv_m": (rv.tsv_m, lambda d, w: ref.tsv_m(d, w), 0.5),
    "iso_c": (rv.iso_c, lambda d, w: ref.iso_c(d, w), 0.5),
    "iso_cts": (rv.iso_cts, lambda d, w: ref.iso_cts(d, w), 0.5),
    "star": (rv.star, lambda d, w: ref.star(d, w, scale=0.5), 0.5),
    "subspace_boosting": (rv.subspace_boosting, lambda d, w: ref.boost(d, w), 1.0),
}


def wide(tensors: dict[str, np.ndarray], name: str) -> Array:
    return tensors[name].astype(np.float64)


@pytest.mark.parametrize("method", MERGES)
def test_matrices_by_the_method_and_the_rest_by_the_mean(
    method: str, place: Path, tmp_path: Path
) -> None:
    """Norms, embeddings and the head get the mean of the task vectors (boosting: their sum)."""
    merge_of, update, mean = MERGES[method]
    base, models = rv.open(place / "base"), [rv.open(place / n) for n in ("sft", "instruct")]
    report = merge_of(base, models).save(tmp_path / "out", out_dtype="float32")
    assert report.recipe == f"{method}(base base, sft: weight 1, instruct: weight 1)"
    assert verify(tmp_path / "out").ok
    made, zero, a, b = (
        tensors_of(p) for p in (tmp_path / "out", *(place / n for n in ("base", "sft", "instruct")))
    )
    seen = set()
    for name in made:
        d = [wide(t, name) - wide(zero, name) for t in (a, b)]
        matrix = made[name].ndim == 2 and "embed" not in name and "lm_head" not in name
        wanted = update(d, [1.0, 1.0]) if matrix else mean * (d[0] + d[1])
        found = wide(made, name) - wide(zero, name)
        np.testing.assert_allclose(found, wanted, atol=2e-7 + 1e-5 * np.abs(wanted).max())
        seen.add(matrix)
    assert seen == {True, False}


def test_knots_is_ties_where_there_is_no_matrix(place: Path, tmp_path: Path) -> None:
    """And task arithmetic everywhere, where no signs are elected and nothing is averaged."""
    base, a, b = (rv.open(place / n) for n in ("base", "sft", "instruct"))
    rv.knots(base, {a: 0.5, b: 0.7}, density={a: 0.3, b: 0.6}).save(tmp_path / "knots")
    rv.ties(base, {a: 0.5, b: 0.7}, density={a: 0.3, b: 0.6}).save(tmp_path / "ties")
    knots, ties = tensors_of(tmp_path / "knots"), tensors_of(tmp_path / "ties")
    for name in knots:
        matrix = knots[name].ndim == 2 and "embed" not in name and "lm_head" not in name
        assert (knots[name].tobytes() == ties[name].tobytes()) != matrix, name
    plain = rv.knots(base, {a: 0.5, b: 0.7}, elect=False, normalize=False)
    plain.save(tmp_path / "plain", out_dtype="float32")
    rv.task_arithmetic(base, {a: 0.5, b: 0.7}).save(tmp_path / "sum", out_dtype="float32")
    plain_tensors, sums = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "sum")
    for name in sums:
        np.testing.assert_allclose(plain_tensors[name], sums[name], rtol=1e-5, atol=1e-7)


def test_boosting_on_top_of_ties(place: Path, tmp_path: Path) -> None:
    """The merge inside is the only model: what it changed is raised, in F32 and not as rounded."""
    base, a, b = (rv.open(place / n) for n in ("base", "sft", "instruct"))
    merged = rv.ties(base, {a: 0.5, b: 0.5}, density=0.3)
    rv.subspace_boosting(base, [merged], beta=0.2).save(tmp_path / "out", out_dtype="float32")
    merged.save(tmp_path / "ties", out_dtype="float32")
    made, inner, zero = (
        tensors_of(p) for p in (tmp_path / "out", tmp_path / "ties", place / "base")
    )
    name = "model.layers.1.mlp.up_proj.weight"
    wanted = ref.boost([wide(inner, name) - wide(zero, name)], [1.0], 0.2)
    found = wide(made, name) - wide(zero, name)
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max() + 2e-8)
    s = np.linalg.svd(found, compute_uv=False)
    assert int((s > 1.001 * s[-1]).sum()) < s.size / 2


def test_each_packed_expert_is_a_matrix(place: Path, tmp_path: Path) -> None:
    """A stack [E, m, n] is E merges of [m, n]; biases of experts are averaged."""
    shape, prefix = (4, 12, 8), "model.layers.0.mlp.experts."
    folders = []
    for model in range(3):
        dice = np.random.default_rng(model)
        folder = tmp_path / str(model)
        shutil.copytree(place / "base", folder)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        tensors = tensors_of(place / "base") | {
            f"{prefix}gate_up_proj": dice.normal(size=shape).astype(np.float32),
            f"{prefix}gate_up_proj_bias": dice.normal(size=shape[:2]).astype(np.float32),
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    base, *models = (rv.open(folder) for folder in folders)
    rv.iso_c(base, models).save(tmp_path / "out")
    made, zero, a, b = (tensors_of(p) for p in (tmp_path / "out", *folders))
    name = f"{prefix}gate_up_proj"
    for e in range(4):
        d = [wide(t, name)[e] - wide(zero, name)[e] for t in (a, b)]
        found = wide(made, name)[e] - wide(zero, name)[e]
        np.testing.assert_allclose(found, ref.iso_c(d, [1.0, 1.0]), atol=2e-6)
    name += "_bias"
    np.testing.assert_allclose(made[name], (a[name] + b[name]) / 2, atol=1e-6)


def test_adapters_are_merged_as_models(place: Path, tmp_path: Path) -> None:
    """A model that is a base and a vector is what it would be as a checkpoint."""
    base, a, b = (rv.open(place / n) for n in ("base", "sft", "instruct"))
    moved = base + 0.5 * (a - base)
    moved.save(tmp_path / "moved", out_dtype="float32")
    rv.tsv_m(base, [moved, b]).save(tmp_path / "lazy", out_dtype="float32")
    written = rv.open(tmp_path / "moved")
    rv.tsv_m(base, [written, b]).save(tmp_path / "two", out_dtype="float32")
    lazy, two = tensors_of(tmp_path / "lazy"), tensors_of(tmp_path / "two")
    for name in lazy:
        np.testing.assert_allclose(lazy[name], two[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("merge_of", "words"),
    [
        (lambda base, x: rv.tsv_m(base, x, rank=0.8), "at most 1 / 2"),
        (lambda base, x: rv.star(base, x, rank=1.5), "whole number"),
        (lambda base, x: rv.iso_cts(base, x, common=2), "share from 0 to 1"),
        (lambda base, x: rv.star(base, {x[0]: 1.0, x[1]: -1.0}), "sum to 0"),
        (lambda base, x: rv.knots(base, []), "needs at least 1 model"),
    ],
)
def test_a_merge_that_cannot_be_says_why(
    merge_of: Callable[[rv.Checkpoint, list[rv.Checkpoint]], rv.Merge],
    words: str,
    place: Path,
    tmp_path: Path,
) -> None:
    """From headers alone."""
    base, models = rv.open(place / "base"), [rv.open(place / n) for n in ("sft", "instruct")]
    errors = merge_of(base, models).plan(tmp_path / "out").errors
    assert any(words in p.message for p in errors), errors


def test_memory_is_predicted(place: Path, tmp_path: Path) -> None:
    """More for a method that holds more of the smaller side's squares."""
    base, models = rv.open(place / "base"), [rv.open(place / n) for n in ("sft", "instruct")]
    memory = {
        name: merge_of(base, models).plan(tmp_path / "out").peak_memory
        for name, (merge_of, _, _) in MERGES.items()
    }
    assert memory["tsv_m"] > memory["iso_c"] > 0
