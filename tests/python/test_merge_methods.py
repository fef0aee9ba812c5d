"""Every merge method of the core against its formula in plain NumPy, in float64, on tiny checkpoints;
and one output for every SIMD level, thread count, budget and kind of window."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray
from shards import Stored, contents, read_shard, stored, write_checkpoint

import reasonvec as rv
from reasonvec import _reasonvec as core
from reasonvec import reference as ref

Array: TypeAlias = NDArray[np.float64]
Formula: TypeAlias = Callable[[list[Array], Array], Array]
"""Models and base, each [rows, columns], to the merged tensor."""

SHAPES: dict[str, tuple[int, ...]] = {"matrix": (331, 257), "norm": (77,), "large": (2, 140_000)}
WEIGHTS = [0.5, 0.3, 0.7]
DENSITY = [0.2, 0.5, 0.7]


def _tensors(model: int) -> dict[str, Stored]:
    tensors = {}
    for name, shape in SHAPES.items():
        base = np.random.default_rng(len(name)).normal(size=shape) * 0.05
        own = np.random.default_rng(100 * model + len(name))
        moved = own.normal(size=shape) * 0.004 * (own.random(shape) < 0.8)
        tensors[name] = stored("F32", (base + (moved if model else 0.0)).astype(np.float32))
    return tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base (0) and three models."""
    root = tmp_path_factory.mktemp("models")
    return [write_checkpoint(root / str(i), _tensors(i)) for i in range(4)]


def _merge(
    folders: Sequence[Path],
    out: Path,
    method: dict[str, object],
    *,
    base: bool,
    models: int,
    names: Sequence[str] = tuple(SHAPES),
    **how: int,
) -> list[dict[str, object]]:
    """Merges the first so many models, and gives the core's report."""
    out.mkdir(exist_ok=True)

    def ref(operand: int, name: str) -> dict[str, object]:
        return {"operand": operand, "name": name}

    tensors = [
        {
            "name": name,
            "dtype": "F32",
            "shape": SHAPES[name],
            "target": ref(0, name) if base else None,
            "terms": [
                {"coefficient": WEIGHTS[i], "source": {"tensor": ref(i + 1, name)}}
                for i in range(models)
            ],
            "method": method,
        }
        for name in names
    ]
    plan = {
        "out": str(out),
        "shards": [{"file": "model.safetensors", "tensors": tensors}],
        "threads": 2,
        "memory_budget": 64 << 20,
        "sync": False,
    }
    operands = [core.Checkpoint(folder) for folder in folders]
    rows: list[dict[str, object]] = json.loads(core.apply(json.dumps(plan | how), operands))
    return rows


def _flat_top(d: Array, k: int, first: int = 0) -> NDArray[np.bool_]:
    mask = np.zeros(d.size, np.bool_)
    mask[np.argsort(-np.abs(d).ravel(), kind="stable")[first : first + k]] = True
    return mask.reshape(d.shape)


def _consensus(parts: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    positive = np.sum(parts, axis=0) >= 0
    counts = [np.where(positive, part > 0, part < 0) for part in parts]
    total = sum((part * c for part, c in zip(parts, counts, strict=True)), np.zeros_like(parts[0]))
    share = sum((w * c for w, c in zip(weights, counts, strict=True)), np.zeros_like(parts[0]))
    return total / np.where(share == 0, 1.0, share) if normalize else total


def _slerp(a: Array, b: Array, t: float) -> Array:
    q = np.arccos(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    mixed: Array = (np.sin((1 - t) * q) * a + np.sin(t * q) * b) / np.sin(q)
    return mixed


def slerp(x: list[Array], _: Array) -> Array:
    return _slerp(x[0], x[1], 0.3)


def nuslerp_rows(x: list[Array], base: Array) -> Array:
    t = 0.3 / 0.8
    rows = [_slerp(a, b, t) for a, b in zip(x[0] - base, x[1] - base, strict=True)]
    return base + np.array(rows)


def multislerp(x: list[Array], base: Array) -> Array:
    d = [m - base for m in x]
    w = np.array(WEIGHTS) / sum(WEIGHTS)
    mean = sum((wi * di / np.linalg.norm(di) for wi, di in zip(w, d, strict=True)), 0 * base)
    size = sum(wi * np.linalg.norm(di) for wi, di in zip(w, d, strict=True))
    found: Array = base + mean / np.linalg.norm(mean) * size
    return found


def karcher(x: list[Array], _: Array) -> Array:
    units = [m / np.linalg.norm(m) for m in x]
    mean = np.mean(units, axis=0)
    mean /= np.linalg.norm(mean)
    for _step in range(10):
        tangent = np.zeros_like(mean)
        for unit in units:
            q = np.arccos(np.clip(np.sum(mean * unit), -1, 1))
            tangent += (unit - np.cos(q) * mean) * (q / np.sin(q)) / len(units)
        length = np.linalg.norm(tangent)
        if length < 1e-5:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * tangent
        mean /= np.linalg.norm(mean)
    found: Array = mean * np.mean([np.linalg.norm(m) for m in x])
    return found


def model_stock(x: list[Array], base: Array) -> Array:
    d = [(m - base).ravel() for m in x]
    pairs = [(0, 1), (0, 2), (1, 2)]
    c = np.mean([d[i] @ d[j] / np.linalg.norm(d[i]) / np.linalg.norm(d[j]) for i, j in pairs])
    t = 3 * c / (1 + 2 * c)
    merged: Array = t * np.mean(x, axis=0) + (1 - t) * base
    return merged


def ties(x: list[Array], base: Array) -> Array:
    d = [m - base for m in x]
    parts = [
        w * np.where(_flat_top(v, int(k * v.size)), v, 0)
        for w, v, k in zip(WEIGHTS, d, DENSITY, strict=True)
    ]
    return base + 0.9 * _consensus(parts, WEIGHTS, True)


def breadcrumbs(x: list[Array], base: Array) -> Array:
    out = base.copy()
    for w, m, share in zip(WEIGHTS, x, DENSITY, strict=True):
        d = m - base
        out += w * np.where(_flat_top(d, int(share * d.size), int(0.1 * d.size)), d, 0)
    return out


def sce(x: list[Array], base: Array) -> Array:
    d = np.array([m - base for m in x])
    spread = d.astype(np.float64).var(axis=0)
    kept = _flat_top(spread, int(0.4 * np.count_nonzero(spread)))
    d = d * kept
    w = (d**2).sum(axis=(1, 2))
    w /= w.sum()
    positive = d.sum(axis=0) >= 0
    counts = np.where(positive, d > 0, d < 0)
    share = (w[:, None, None] * counts).sum(axis=0)
    total = (w[:, None, None] * d * counts).sum(axis=0)
    found: Array = base + total / np.where(share == 0, 1.0, share)
    return found


def ram(x: list[Array], base: Array) -> Array:
    d = np.array([m - base for m in x])
    moved = np.abs(d) > 1e-5
    count = moved.sum(axis=0)
    u = np.zeros_like(base)
    for v, mine in zip(d, moved, strict=True):
        alone = (mine & (count == 1)).sum()
        shared = mine.sum() - alone
        factor = 1 + 0.1 * np.clip(shared / alone, 0, 0.2)
        u += np.where(mine, np.where(count == 1, factor, 1.0) * v, 0)
    found: Array = base + u / np.maximum(count, 1)
    return found


def nearswap(x: list[Array], _: Array) -> Array:
    a, b = x
    with np.errstate(divide="ignore"):
        w = np.clip(0.001 / np.abs(a - b), 0, 1)
    return np.where(a == b, a, w * b + (1 - w) * a)


def arcee_fusion(x: list[Array], base: Array) -> Array:
    d = x[0] - base

    def logarithm(v: Array) -> Array:
        shifted = v - v.max(axis=1, keepdims=True)
        found: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return found

    p, q = logarithm(x[0]), logarithm(base)
    divergence = (np.exp(p) * (p - q)).sum(axis=1, keepdims=True)
    importance = np.abs(d) * divergence
    first, median, third = np.quantile(importance, [0.25, 0.5, 0.75])
    return base + np.where(importance >= median + 1.5 * (third - first), d, 0)


def spectral(update: Callable[..., Array], **options: object) -> Formula:
    """A method on singular vectors, as the reference has it."""

    def merged(x: list[Array], base: Array) -> Array:
        return base + update([m - base for m in x], WEIGHTS, **options)

    return merged


class Case(NamedTuple):
    """A method as a plan has it, what it computes, and on which tensors."""

    method: dict[str, object]
    base: bool
    models: int
    formula: Formula | None
    names: tuple[str, ...] = tuple(SHAPES)


MATRICES = ("matrix", "large")


EPSILON = [0.1, 0.1, 0.2]
CASES = {
    "slerp": Case({"kind": "slerp", "t": 0.3}, False, 2, slerp),
    "nuslerp": Case({"kind": "nuslerp", "flatten": False, "row_wise": True}, True, 2, nuslerp_rows),
    "nuslerp_columns": Case({"kind": "nuslerp", "flatten": False}, True, 2, None),
    "multislerp": Case({"kind": "multislerp"}, True, 3, multislerp),
    "karcher": Case({"kind": "karcher"}, False, 3, karcher),
    "model_stock": Case({"kind": "model_stock"}, True, 3, model_stock),
    "model_stock_rows": Case({"kind": "model_stock", "filter_wise": True}, True, 3, None),
    "ties": Case({"kind": "ties", "density": DENSITY, "lambda": 0.9}, True, 3, ties),
    "dare": Case({"kind": "dare", "density": DENSITY, "seed": 3}, True, 3, None),
    "dare_ties": Case(
        {"kind": "dare", "density": DENSITY, "consensus": True, "rescale": "l1"}, True, 3, None
    ),
    "della": Case(
        {"kind": "della", "density": DENSITY, "epsilon": EPSILON, "rescale": "l1"}, True, 3, None
    ),
    "breadcrumbs": Case(
        {"kind": "breadcrumbs", "density": DENSITY, "gamma": [0.1] * 3}, True, 3, breadcrumbs
    ),
    "sce": Case({"kind": "sce", "select_topk": 0.4}, True, 3, sce),
    "ram": Case({"kind": "ram", "plus": True}, True, 3, ram),
    "nearswap": Case({"kind": "nearswap", "t": 0.001}, False, 2, nearswap),
    "arcee_fusion": Case({"kind": "arcee_fusion"}, True, 1, arcee_fusion),
    "iso_c": Case({"kind": "iso_c"}, True, 3, spectral(ref.iso_c), MATRICES),
    "iso_cts": Case({"kind": "iso_cts"}, True, 3, spectral(ref.iso_cts), MATRICES),
    "tsv_m": Case({"kind": "tsv_m"}, True, 3, spectral(ref.tsv_m), MATRICES),
    "star": Case({"kind": "star"}, True, 3, spectral(ref.star), MATRICES),
    "boost": Case(
        {"kind": "boost", "beta": 0.05}, True, 3, spectral(ref.boost, beta=0.05), MATRICES
    ),
    "knots": Case(
        {"kind": "knots", "density": DENSITY},
        True,
        3,
        spectral(ref.knots, density=DENSITY),
        MATRICES,
    ),
}


def _numbers(tensor: Stored) -> Array:
    values = np.frombuffer(tensor.data, np.float32).astype(np.float64)
    return values.reshape(tensor.shape if len(tensor.shape) > 1 else (1, -1))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.formula])
def test_a_method_computes_its_formula(name: str, folders: list[Path], tmp_path: Path) -> None:
    """Within the rounding of float32, except for elements that lie on a threshold."""
    method, base, models, formula, names = CASES[name]
    assert formula is not None
    rows = _merge(folders, tmp_path / "out", method, base=base, models=models, names=names)
    found = read_shard(tmp_path / "out" / "model.safetensors")
    assert [row["name"] for row in rows] == list(names)
    inputs = [read_shard(folder / "model.safetensors") for folder in folders]
    for tensor, value in found.items():
        x = [_numbers(inputs[i + 1][tensor]) for i in range(models)]
        wanted = formula(x, _numbers(inputs[0][tensor]))
        near = np.isclose(_numbers(value), wanted, rtol=1e-5, atol=2e-7)
        assert np.count_nonzero(~near) <= 1e-4 * near.size, (name, tensor)


@pytest.mark.parametrize("elect", [False, True])
def test_dare_keeps_its_share_and_its_mean(
    elect: bool, folders: list[Path], tmp_path: Path
) -> None:
    """As many elements as the density says, the same ones for the same seed, others for another."""
    inputs = [read_shard(folder / "model.safetensors") for folder in folders]
    d = _numbers(inputs[1]["large"]) - _numbers(inputs[0]["large"])

    def kept(seed: int, rescale: str) -> Array:
        method: dict[str, object] = {
            "kind": "dare",
            "density": [0.3],
            "seed": seed,
            "rescale": rescale,
            "consensus": elect,
            "lambda": 2.0,  # undoes the weight of the first model
        }
        _merge(folders, tmp_path / "out", method, base=True, models=1)
        found = read_shard(tmp_path / "out" / "model.safetensors")
        return _numbers(found["large"]) - _numbers(inputs[0]["large"])

    u = kept(1, "density")
    moved = d != 0
    share = np.count_nonzero(u[moved]) / np.count_nonzero(moved)
    assert abs(share - 0.3) < 0.005
    stays = u != 0
    np.testing.assert_allclose(u[stays], d[stays] / 0.3, rtol=1e-4, atol=1e-7)
    assert np.array_equal(kept(1, "density"), u)
    assert not np.array_equal(kept(2, "density") != 0, stays)
    assert abs(np.abs(kept(1, "l1")).sum() / np.abs(d).sum() - 1) < 1e-4
    np.testing.assert_allclose(kept(1, "none")[stays], d[stays], rtol=1e-3, atol=1e-7)


def test_della_keeps_the_large_more_often(folders: list[Path], tmp_path: Path) -> None:
    """The largest half of a row as often as density + epsilon / 2 says, the smallest as - says."""
    method: dict[str, object] = {
        "kind": "della",
        "density": [0.5],
        "epsilon": [0.3],
        "seed": 8,
        "rescale": "none",
        "consensus": False,
    }
    _merge(folders, tmp_path / "out", method, base=True, models=1)
    inputs = [read_shard(folder / "model.safetensors")["large"] for folder in folders[:2]]
    base = _numbers(inputs[0])
    d = np.abs(_numbers(inputs[1]) - base)
    found = read_shard(tmp_path / "out" / "model.safetensors")["large"]
    stays = _numbers(found) != base
    rank = np.argsort(np.argsort(-d, axis=1), axis=1) / d.shape[1]
    for low, high in ((0.0, 0.25), (0.25, 0.5)):
        some = (rank >= low) & (rank < high)
        wanted = 0.8 - 0.6 * (low + high) / 2
        assert abs(stays[some].mean() - wanted) < 0.01


@pytest.mark.parametrize("name", CASES)
def test_a_method_gives_one_output(
    name: str, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte and every digest, whatever the settings."""
    method, base, models, _, names = CASES[name]

    def run(**how: int) -> tuple[object, dict[str, bytes]]:
        rows = _merge(
            folders, tmp_path / "out", method, base=base, models=models, names=names, **how
        )
        journal = tmp_path / "out" / ".reasonvec-journal"
        journal.unlink(missing_ok=True)
        return rows, contents(tmp_path / "out")

    first = run(threads=1, memory_budget=16 << 20)
    for level in rv.simd_levels():
        monkeypatch.setenv("REASONVEC_SIMD", level)
        assert run(threads=2, memory_budget=64 << 20) == first, level
        assert run(threads=8, memory_budget=1) == first, level
    monkeypatch.setenv("REASONVEC_IO", "map")
    assert run(threads=3, memory_budget=1 << 30) == first


def test_a_report_has_the_digests_of_all_inputs(folders: list[Path], tmp_path: Path) -> None:
    """Base first, then the models in their order: what a linear merge of them reports too."""
    method = CASES["ties"].method
    rows = _merge(folders, tmp_path / "out", method, base=True, models=3)
    linear = _merge(folders, tmp_path / "sum", {"kind": "linear"}, base=True, models=3)
    assert [row["inputs"] for row in rows] == [row["inputs"] for row in linear]
    for row in rows:
        inputs = row["inputs"]
        assert isinstance(inputs, list)
        assert [operand for operand, _, _ in inputs] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("method", "base", "words"),
    [
        ({"kind": "ties", "density": [0.5]}, True, "1 numbers for density, but 2 models"),
        ({"kind": "ties", "density": [0.5, 0.5]}, False, "ties needs a base model"),
        ({"kind": "ties", "density": [0.5, -1]}, True, "share from 0 to 1"),
        ({"kind": "karcher"}, True, "has no base model"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    method: dict[str, object], base: bool, words: str, folders: list[Path], tmp_path: Path
) -> None:
    """Before anything is written, with a message that says what."""
    with pytest.raises(rv.MismatchError, match=words):
        _merge(folders, tmp_path / "out", method, base=base, models=2)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "method", [{"kind": "tise"}, {"kind": "slerp", "t": 0.5, "tt": 1}, {"kind": "slerp"}]
)
def test_an_unknown_method_or_field_is_refused(
    method: dict[str, object], folders: list[Path], tmp_path: Path
) -> None:
    """Nothing is ignored."""
    with pytest.raises(rv.ReasonvecError, match=r"unknown (variant|field)|missing field"):
        _merge(folders, tmp_path / "out", method, base=False, models=2)
