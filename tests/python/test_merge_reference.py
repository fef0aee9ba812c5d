"""Every merge method of the core gives the bits of `reasonvec.reference`, through real files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shards import Stored, read_shard, stored, write_checkpoint

import reasonvec as rv
from reasonvec import _reasonvec as core
from reasonvec import reference as ref
from reasonvec.reference import Dtype, Work

SHAPES: dict[str, tuple[int, ...]] = {"matrix": (83, 129), "norm": (77,), "large": (2, 140_000)}
WEIGHTS = [0.5, 0.3, -0.2]
DENSITY = [0.2, 0.5, 0.7]
SEED = 11
Update = Callable[[list[Work], Work, int, str], Work]

EVEN = {"normalize": True, "lambda": 0.7}
W2 = WEIGHTS[:2]
CASES: dict[str, tuple[dict[str, object], bool, int, Update]] = {
    "slerp": ({"kind": "slerp", "t": 0.3}, False, 2, lambda x, b, c, n: ref.slerp(x[0], x[1], 0.3)),
    "nuslerp": (
        {"kind": "nuslerp", "row_wise": False, "flatten": True}, True, 2,
        lambda x, b, c, n: ref.nuslerp(x, W2, c, b),
    ),
    "nuslerp rows": (
        {"kind": "nuslerp", "row_wise": True, "flatten": False}, False, 2,
        lambda x, b, c, n: ref.nuslerp(x, W2, c, None, False, True),
    ),
    "nuslerp columns": (
        {"kind": "nuslerp", "row_wise": False, "flatten": False}, True, 2,
        lambda x, b, c, n: ref.nuslerp(x, W2, c, b, False, False),
    ),
    "multislerp": (
        {"kind": "multislerp", "normalize_weights": True, "eps": 1e-8}, True, 3,
        lambda x, b, c, n: ref.multislerp(x, WEIGHTS, b),
    ),
    "karcher": (
        {"kind": "karcher", "max_iter": 10, "tol": 1e-5}, False, 3,
        lambda x, b, c, n: ref.karcher(x),
    ),
    "model_stock": (
        {"kind": "model_stock", "filter_wise": False}, True, 3,
        lambda x, b, c, n: ref.model_stock(x, b, c),
    ),
    "model_stock rows": (
        {"kind": "model_stock", "filter_wise": True}, True, 3,
        lambda x, b, c, n: ref.model_stock(x, b, c, True),
    ),
    "model_stock floor": (
        {"kind": "model_stock", "filter_wise": True, "floor": 1e-3}, True, 3,
        lambda x, b, c, n: ref.model_stock(x, b, c, True, 1e-3),
    ),
    "ties": (
        {"kind": "ties", "density": DENSITY} | EVEN, True, 3,
        lambda x, b, c, n: ref.ties(x, b, WEIGHTS, DENSITY, True, 0.7),
    ),
    "sce": (
        {"kind": "sce", "select_topk": 0.4, "lambda": 1.0}, True, 3,
        lambda x, b, c, n: ref.sce(x, b, 0.4),
    ),
    "sce all": (
        {"kind": "sce", "select_topk": 1.0, "lambda": 1.0}, True, 3,
        lambda x, b, c, n: ref.sce(x, b),
    ),
    "sce floor": (
        {"kind": "sce", "select_topk": 0.4, "lambda": 1.0, "floor": 1.0}, True, 3,
        lambda x, b, c, n: ref.sce(x, b, 0.4, 1.0, 1.0),
    ),
    "ram": (
        {"kind": "ram", "plus": False, "epsilon": 0.002, "r": 0.1, "alpha": 0.2}, True, 3,
        lambda x, b, c, n: ref.ram(x, b, False, 0.002),
    ),
    "ram plus": (
        {"kind": "ram", "plus": True, "epsilon": 0.002, "r": 0.5, "alpha": 2.0}, True, 3,
        lambda x, b, c, n: ref.ram(x, b, True, 0.002, 0.5, 2.0),
    ),
    "nearswap": (
        {"kind": "nearswap", "t": 0.003}, False, 2,
        lambda x, b, c, n: ref.nearswap(x[0], x[1], 0.003),
    ),
    "arcee_fusion": (
        {"kind": "arcee_fusion"}, True, 1, lambda x, b, c, n: ref.arcee_fusion(x[0], b, c)
    ),
}  # fmt: skip
# Two models have kernels of their own.
for elect, normalize in ((False, False), (False, True), (True, False), (True, True)):
    rest = {"normalize": normalize, "lambda": 0.7}
    CASES[f"breadcrumbs of two {elect} {normalize}"] = (
        {"kind": "breadcrumbs", "density": DENSITY[:2], "gamma": [0.01] * 2, "consensus": elect}
        | rest,
        True, 2,
        lambda x, b, c, n, e=elect, m=normalize: ref.breadcrumbs(
            x, b, W2, DENSITY[:2], [0.01] * 2, e, m, 0.7
        ),
    )  # fmt: skip
    CASES[f"dare of two {elect} {normalize}"] = (
        {"kind": "dare", "density": [0.2, 1.0], "seed": SEED, "consensus": elect} | rest,
        True, 2,
        lambda x, b, c, n, e=elect, m=normalize: ref.dare(
            x, b, W2, [0.2, 1.0], SEED, n, e, m, "density", 0.7
        ),
    )  # fmt: skip
    CASES[f"della of two {elect} {normalize}"] = (
        {"kind": "della", "density": DENSITY[:2], "epsilon": [0.1] * 2, "seed": SEED}
        | {"consensus": elect} | rest,
        True, 2,
        lambda x, b, c, n, e=elect, m=normalize: ref.della(
            x, b, W2, DENSITY[:2], [0.1] * 2, SEED, n, c, e, m, "density", 0.7
        ),
    )  # fmt: skip
for normalize in (False, True):
    CASES[f"ties of two {normalize}"] = (
        {"kind": "ties", "density": DENSITY[:2], "normalize": normalize, "lambda": 0.7}, True, 2,
        lambda x, b, c, n, m=normalize: ref.ties(x, b, W2, DENSITY[:2], m, 0.7),
    )  # fmt: skip
CASES["model_stock of two"] = (
    {"kind": "model_stock", "filter_wise": False}, True, 2,
    lambda x, b, c, n: ref.model_stock(x, b, c),
)  # fmt: skip
CASES["sce of two"] = (
    {"kind": "sce", "select_topk": 0.4, "lambda": 1.0}, True, 2,
    lambda x, b, c, n: ref.sce(x, b, 0.4),
)  # fmt: skip
for elect in (False, True):
    for rescale in ("none", "density", "l1"):
        CASES[f"dare {elect} {rescale}"] = (
            {"kind": "dare", "density": DENSITY, "seed": SEED, "rescale": rescale, "consensus": elect}
            | EVEN,
            True, 3,
            lambda x, b, c, n, e=elect, r=rescale: ref.dare(
                x, b, WEIGHTS, DENSITY, SEED, n, e, True, r, 0.7
            ),
        )  # fmt: skip
        CASES[f"della {elect} {rescale}"] = (
            {"kind": "della", "density": DENSITY, "epsilon": [0.1] * 3, "seed": SEED}
            | {"rescale": rescale, "consensus": elect} | EVEN,
            True, 3,
            lambda x, b, c, n, e=elect, r=rescale: ref.della(
                x, b, WEIGHTS, DENSITY, [0.1] * 3, SEED, n, c, e, True, r, 0.7
            ),
        )  # fmt: skip
    CASES[f"breadcrumbs {elect}"] = (
        {"kind": "breadcrumbs", "density": DENSITY, "gamma": [0.01] * 3, "consensus": elect} | EVEN,
        True, 3,
        lambda x, b, c, n, e=elect: ref.breadcrumbs(x, b, WEIGHTS, DENSITY, [0.01] * 3, e, True, 0.7),
    )  # fmt: skip


def tensors_of(model: int, dtype: Dtype) -> dict[str, Stored]:
    tensors = {}
    for name, shape in SHAPES.items():
        start = np.random.default_rng(len(name)).normal(size=shape) * 0.05
        own = np.random.default_rng(100 * model + len(name))
        moved = own.normal(size=shape) * 0.004 * (own.random(shape) < 0.8)
        bits = ref.narrow((start + (moved if model else 0.0)).ravel(), dtype)
        tensors[name] = stored(dtype, bits, shape)
    return tensors


def merge(
    folders: Sequence[Path],
    out: Path,
    method: dict[str, object],
    base: bool,
    models: int,
    dtype: Dtype,
    steps: Dtype | None = None,
) -> dict[str, Stored]:
    out.mkdir()
    tensors = [
        {
            "name": name,
            "dtype": dtype,
            "shape": shape,
            "target": {"operand": 0, "name": name} if base else None,
            "terms": [
                {"coefficient": WEIGHTS[i], "source": {"tensor": {"operand": i + 1, "name": name}}}
                for i in range(models)
            ],
            "method": method,
            "steps": steps,
        }
        for name, shape in SHAPES.items()
    ]
    plan = {
        "out": str(out),
        "shards": [{"file": "model.safetensors", "tensors": tensors}],
        "threads": 2,
        "memory_budget": 64 << 20,
        "sync": False,
    }
    core.apply(json.dumps(plan), [core.Checkpoint(folder) for folder in folders])
    return read_shard(out / "model.safetensors")


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_every_method_has_the_bits_of_the_reference(dtype: Dtype, tmp_path: Path) -> None:
    """Weights of both signs, equal magnitudes (BF16), rows beyond a block, vectors, every option."""
    tensors = [tensors_of(model, dtype) for model in range(4)]
    folders = [write_checkpoint(tmp_path / str(i), t) for i, t in enumerate(tensors)]
    work = ref.work_dtype(dtype)
    wrong = []
    for place, (case, (method, base, models, update)) in enumerate(CASES.items()):
        found = merge(folders, tmp_path / f"out{place}", method, base, models, dtype)
        for name, shape in SHAPES.items():
            values = [ref.widen(t[name].bits, dtype, work) for t in tensors]
            columns = shape[-1] if len(shape) > 1 else values[0].size
            u = update(values[1 : models + 1], values[0], columns, name)
            anchor = tensors[0][name].bits if base else None
            bits = ref.merged(u, dtype, anchor, dtype)
            apart = int(np.count_nonzero(bits != found[name].bits))
            if apart:
                wrong.append(f"{case}, {name}: {apart} of {bits.size}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", ["karcher", "model_stock", "model_stock rows", "multislerp"])
def test_models_that_cancel_each_other(case: str, tmp_path: Path) -> None:
    """Two opposite models and one that is zero: no direction means anything, and nothing is NaN."""
    own = {name: tensor.bits for name, tensor in tensors_of(1, "F32").items()}
    zero = {name: np.zeros_like(bits) for name, bits in own.items()}
    opposite = {name: bits ^ np.uint32(1 << 31) for name, bits in own.items()}
    sides = [zero, own, opposite, zero]
    folders = [
        write_checkpoint(tmp_path / str(i), {n: stored("F32", side[n], SHAPES[n]) for n in SHAPES})
        for i, side in enumerate(sides)
    ]
    method, base, models, update = CASES[case]
    found = merge(folders, tmp_path / "out", method, base, models, "F32")
    for name, shape in SHAPES.items():
        values = [ref.widen(side[name], "F32", "F32") for side in sides]
        columns = shape[-1] if len(shape) > 1 else values[0].size
        u = update(values[1 : models + 1], values[0], columns, name)
        bits = ref.merged(u, "F32", zero[name] if base else None, "F32")
        assert np.isfinite(ref.widen(bits, "F32", "F32")).all()
        assert np.array_equal(bits, found[name].bits)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("steps", ["BF16", "F16"])
def test_rounded_steps_have_the_bits_of_the_reference(
    steps: Dtype, dtype: Dtype, tmp_path: Path
) -> None:
    """Every method that rounds its steps, of models of that format and of another."""
    tensors = [tensors_of(model, dtype) for model in range(4)]
    folders = [write_checkpoint(tmp_path / str(i), t) for i, t in enumerate(tensors)]
    wrong = []
    for kind in ("ties", "dare", "della", "breadcrumbs"):
        for elect in (False, True):
            method: dict[str, object] = {"kind": kind, "density": DENSITY, "seed": SEED} | EVEN
            if kind == "della":
                method["epsilon"] = [0.1] * 3
            if kind in ("ties", "breadcrumbs"):
                del method["seed"]
            if kind == "breadcrumbs":
                method["gamma"] = [0.01] * 3
            if kind != "ties":
                method["consensus"] = elect
            found = merge(folders, tmp_path / f"{kind}{elect}", method, True, 3, dtype, steps)
            for name, shape in SHAPES.items():
                base, *models = (ref.widen(t[name].bits, dtype, "F32") for t in tensors)
                columns = shape[-1] if len(shape) > 1 else base.size
                common = (True, "density", 0.7, steps)
                if kind == "ties":
                    u = ref.ties(models, base, WEIGHTS, DENSITY, True, 0.7, steps)
                elif kind == "breadcrumbs":
                    gamma = [0.01] * 3
                    u = ref.breadcrumbs(
                        models, base, WEIGHTS, DENSITY, gamma, elect, True, 0.7, steps
                    )
                elif kind == "dare":
                    u = ref.dare(models, base, WEIGHTS, DENSITY, SEED, name, elect, *common)
                else:
                    u = ref.della(
                        models,
                        base,
                        WEIGHTS,
                        DENSITY,
                        [0.1] * 3,
                        SEED,
                        name,
                        columns,
                        elect,
                        *common,
                    )
                bits = ref.merged(u, dtype, tensors[0][name].bits, dtype)
                apart = int(np.count_nonzero(bits != found[name].bits))
                if apart:
                    wrong.append(f"{kind}, elect {elect}, {name}: {apart} of {bits.size}")
    assert not wrong, "\n".join(wrong)


def test_steps_that_cannot_be_rounded(tmp_path: Path) -> None:
    """Only the methods that weigh what stays of task vectors have steps."""
    folders = [write_checkpoint(tmp_path / str(i), tensors_of(i, "F32")) for i in range(4)]
    with pytest.raises(rv.MismatchError, match="steps of this method"):
        merge(folders, tmp_path / "out", {"kind": "karcher"}, False, 3, "F32", "BF16")


def test_quartiles_of_a_handful_of_elements(tmp_path: Path) -> None:
    """`arcee_fusion` of tensors whose first quartile is their smallest importance, or near it."""
    shapes = [(1,), (2,), (3,), (4,), (5,), (1, 2), (2, 1), (2, 2), (3, 1), (2, 3)]
    rng = np.random.default_rng(0)
    values = {
        name: {
            f"{i}": rng.standard_normal(shapes[i % len(shapes)]).astype(np.float32)
            for i in range(20 * len(shapes))
        }
        for name in ("base", "model")
    }
    for name, tensors in values.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    base, model = (rv.open(tmp_path / name) for name in values)
    rv.arcee_fusion(base, model).save(tmp_path / "out", sync=False)
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, b in values["base"].items():
        u = ref.arcee_fusion(values["model"][name].ravel(), b.ravel(), b.shape[-1])
        wanted = np.where(u == 0, b.ravel(), b.ravel() + u)
        assert out[name].ravel().tobytes() == wanted.tobytes(), (name, b.shape)
