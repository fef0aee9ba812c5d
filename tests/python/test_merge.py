"""Merges from Python: lazy, planned from headers, written as every other point is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from models import make_models, tensors_of
from safetensors.numpy import save_file

import reasonvec as rv
from reasonvec.merging.parameters import Conditions, Place, evaluate, gradient, setting
from reasonvec.verify import verify

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("place")) / "models"


@pytest.fixture
def base(place: Path) -> rv.Checkpoint:
    return rv.open(place / "base")


@pytest.fixture
def sft(place: Path) -> rv.Checkpoint:
    return rv.open(place / "sft")


@pytest.fixture
def rl(place: Path) -> rv.Checkpoint:
    return rv.open(place / "rl")


@pytest.fixture
def instruct(place: Path) -> rv.Checkpoint:
    return rv.open(place / "instruct")


def f64(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def copied(source: Path, target: Path, **changes: object) -> Path:
    """A checkpoint with tensors added, replaced, or (None) left out, and fields of its config."""
    shutil.copytree(source, target)
    tensors = tensors_of(source)
    for path in target.glob("*.safetensors*"):
        path.unlink()
    config = json.loads((target / "config.json").read_text())
    for name, value in changes.items():
        if isinstance(value, np.ndarray):
            tensors[name] = value
        elif value is None:
            del tensors[name]
        else:
            config[name] = value
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def only(plan: object, kind: str) -> str:
    """The one message of a kind among the errors of a plan."""
    found = [p.message for p in plan.errors if p.kind == kind]  # type: ignore[attr-defined]
    assert len(found) == 1, plan.errors  # type: ignore[attr-defined]
    return found[0]


# ---- values


def test_task_arithmetic_is_base_plus_scaled_differences(
    place: Path, tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, instruct: rv.Checkpoint
) -> None:
    merge = rv.task_arithmetic(
        base, {rl: 0.5, instruct: {r"mlp": 1.5, r"up_proj": 0.0}}, lambda_=0.5
    )
    # Where no expression fits, a weight has no value, which is said.
    assert "has no weight" in only(merge.plan(tmp_path / "x"), "parameter")
    merge = rv.task_arithmetic(
        base, {rl: 0.5, instruct: {"": 1.0, r"mlp": 1.5, r"up_proj": 0.0}}, lambda_=0.5
    )
    report = merge.save(tmp_path / "out", out_dtype="float32")
    made, b, r, i = (
        tensors_of(p) for p in (tmp_path / "out", *(place / n for n in ("base", "rl", "instruct")))
    )
    for name, value in made.items():
        w = 0.0 if "up_proj" in name else 1.5 if "mlp" in name else 1.0
        expected = (
            f64(b[name])
            + 0.25 * (f64(r[name]) - f64(b[name]))
            + 0.5 * w * (f64(i[name]) - f64(b[name]))
        )
        assert np.allclose(f64(value), expected, rtol=1e-6, atol=1e-9), name
    assert report.rounding.updated > 0


def test_task_arithmetic_agrees_with_the_algebra(
    tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, sft: rv.Checkpoint
) -> None:
    rv.task_arithmetic(base, {rl: 0.3, sft: 0.6}).save(tmp_path / "a")
    (base + 0.3 * (rl - base) + 0.6 * (sft - base)).save(tmp_path / "b")
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all((a[name] == b[name]).all() for name in b)


def test_lines_grow_with_depth(tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint) -> None:
    plan = rv.lines(base, [rl], alpha=0.2, beta=0.6).plan(tmp_path / "x")
    found = {t.name: t.coefficients[0] for t in plan.tensors}
    assert [found[UP.format(i)] for i in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found["model.embed_tokens.weight"] == pytest.approx(0.2)
    assert found["model.norm.weight"] == found["lm_head.weight"] == pytest.approx(0.8)


def test_a_copy_is_a_copy_and_a_scale_is_by_name(
    place: Path, tmp_path: Path, sft: rv.Checkpoint
) -> None:
    merge = rv.passthrough(sft, scale=lambda name: 0.0 if name.endswith("o_proj.weight") else 1.0)
    report = merge.save(tmp_path / "out")
    made, source = tensors_of(tmp_path / "out"), tensors_of(place / "sft")
    for name, value in made.items():
        expected = source[name] * 0 if name.endswith("o_proj.weight") else source[name]
        assert (value == expected).all(), name
    actions = {t.name: t.action for t in report.tensors}
    assert actions[UP.format(0)] == "copy"
    assert actions["model.layers.0.self_attn.o_proj.weight"] == "merge"


def test_a_model_may_be_a_sum_where_the_method_is_linear(
    place: Path,
    tmp_path: Path,
    base: rv.Checkpoint,
    sft: rv.Checkpoint,
    rl: rv.Checkpoint,
    instruct: rv.Checkpoint,
) -> None:
    moved = instruct + 0.5 * (rl - sft)
    rv.linear({moved: 0.5, base: 0.5}).save(tmp_path / "out", out_dtype="float32")
    made = tensors_of(tmp_path / "out")
    i, r, s, b = (tensors_of(place / n) for n in ("instruct", "rl", "sft", "base"))
    for name, value in made.items():
        expected = 0.5 * (f64(i[name]) + 0.5 * (f64(r[name]) - f64(s[name]))) + 0.5 * f64(b[name])
        assert np.allclose(f64(value), expected, rtol=1e-6, atol=1e-9), name


def test_a_sum_is_written_first_where_the_method_is_not_linear(
    tmp_path: Path,
    base: rv.Checkpoint,
    sft: rv.Checkpoint,
    rl: rv.Checkpoint,
    instruct: rv.Checkpoint,
) -> None:
    moved = instruct + 0.5 * (rl - sft)
    plan = rv.ties(base, {moved: 1.0, rl: 0.5}, density=0.5).plan(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told = [p.message for p in plan.problems if p.kind == "stage"]
    assert len(told) == 1
    report = plan.run()
    assert verify(tmp_path / "out").ok
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    moved.save(tmp_path / "moved", out_dtype="float32")
    again = rv.ties(base, {rv.open(tmp_path / "moved"): 1.0, rl: 0.5}, density=0.5)
    digests = {t.name: t.digest for t in again.save(tmp_path / "again").tensors}
    assert {t.name: t.digest for t in report.tensors} == digests
    record = json.loads((tmp_path / "out/reasonvec.json").read_text())
    assert [i["kind"] for i in record["inputs"]].count("stage") == 1
    # What the stage was made of has its digests too.
    by_path = {Path(i["path"]).name: i["tensors"] for i in record["inputs"]}
    assert UP.format(1) in by_path["instruct"]


def test_what_is_written_first_is_not_rounded(
    place: Path, tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint
) -> None:
    make_adapter(tmp_path / "lora")
    adapted = base + rv.adapter(tmp_path / "lora", base=base)
    adapted.save(tmp_path / "adapted", out_dtype="float32")
    scaled = {name: np.float32(0.3) * value for name, value in _floats(place / "base").items()}
    for number, (first, expected) in enumerate(
        ((rv.passthrough(base, scale=0.3), scaled), (adapted, _floats(tmp_path / "adapted")))
    ):
        out = tmp_path / str(number)
        rv.ties(first, {rl: 1.0}, lambda_=0.0).save(out, out_dtype="float32", sync=False)
        for name, value in tensors_of(out).items():
            assert np.allclose(value, expected[name], rtol=2.0**-22, atol=0), name


def _floats(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32) for name, value in tensors_of(folder).items()}


def test_merges_inside_merges_are_what_they_are_one_by_one(
    tmp_path: Path, base: rv.Checkpoint, sft: rv.Checkpoint, rl: rv.Checkpoint
) -> None:
    def outer(inner: rv.Merge | rv.Point) -> rv.Merge:
        return rv.model_stock(base, [inner, sft])

    between = rv.slerp(sft, rl, t=[0.0, 0.5, 1.0])
    between.save(tmp_path / "between")
    one = outer(between).save(tmp_path / "one")
    two = outer(rv.open(tmp_path / "between")).save(tmp_path / "two")
    assert {t.name: t.digest for t in one.tensors} == {t.name: t.digest for t in two.tensors}


def test_a_stage_that_fails_leaves_nothing(
    place: Path, tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint
) -> None:
    weight = tensors_of(place / "sft")[UP.format(1)].copy()
    weight[3, 5] = np.inf
    bad = rv.open(copied(place / "sft", tmp_path / "bad", **{UP.format(1): weight}))
    merge = rv.ties(base, {rv.slerp(rl, bad, t=0.5): 1.0})
    with pytest.raises(rv.NonFiniteError):
        merge.save(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    merge = rv.ties(base, {rv.slerp(rl, base, t=0.5): 1.0})
    (tmp_path / "out/.reasonvec-stages/0").mkdir(parents=True)  # of a run that was killed
    (tmp_path / "out/.reasonvec-stages/0/model.safetensors").write_bytes(b"half")
    merge.save(tmp_path / "out")
    assert verify(tmp_path / "out").ok
    assert not (tmp_path / "out/.reasonvec-stages").exists()


# ---- adapters


def make_adapter(folder: Path, rank: int = 3, **config: object) -> Path:
    """A LoRA adapter for two matrices of the models."""
    noise = np.random.default_rng(11)
    folder.mkdir()
    shapes = {"model.layers.1.mlp.up_proj": (48, 32), "model.layers.2.self_attn.q_proj": (32, 32)}
    tensors = {}
    for module, (rows, columns) in shapes.items():
        at = f"base_model.model.{module}"
        tensors[f"{at}.lora_A.weight"] = noise.standard_normal((rank, columns), np.float32)
        tensors[f"{at}.lora_B.weight"] = noise.standard_normal((rows, rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 6} | config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def test_adapters_in_references(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "lora")
    monkeypatch.chdir(place)
    config = tmp_path / "config.yml"
    text = (
        "merge_method: {}\nbase_model: base\nmodels:\n- model: sft+{}/lora\n"
        "  parameters: {{weight: 0.5}}\ndtype: float32\n"
    )
    config.write_text(text.format("task_arithmetic", tmp_path.as_posix()))
    rv.read_config(config).save(tmp_path / "sum")
    made, b, s = tensors_of(tmp_path / "sum"), tensors_of(place / "base"), tensors_of(place / "sft")
    factors = {
        name.removeprefix("base_model.model."): f64(value)
        for name, value in _load(tmp_path / "lora/adapter_model.safetensors").items()
    }
    for name, value in made.items():
        model = f64(s[name])
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in factors:
            model = (
                model + 2 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
            )
        assert np.allclose(
            f64(value), f64(b[name]) + 0.5 * (model - f64(b[name])), rtol=1e-5, atol=1e-5
        ), name
    # A method that is no weighted sum reads the adapted tensor as one, with nothing written.
    config.write_text(text.format("ties", tmp_path.as_posix()))
    plan = rv.read_config(config).plan(tmp_path / "ties")
    assert plan.stages is None
    row = next(t for t in rows(plan) if t["name"] == UP.format(1))
    assert "adapted" in row["terms"][0]["source"]  # type: ignore[index]
    plan.run()
    # Density 1, one model: base + (x - B), whatever the weight.
    made = tensors_of(tmp_path / "ties")
    module = "model.layers.1.mlp.up_proj"
    expected = (
        f64(s[UP.format(1)])
        + 2 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
    )
    assert np.allclose(f64(made[UP.format(1)]), expected, rtol=1e-5, atol=1e-5)


def _load(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "only LORA is read"),
        ({"r": 4}, "rank 4"),
    ],
)
def test_adapters_that_are_no_sum_are_refused(
    place: Path, tmp_path: Path, config: dict[str, object], said: str
) -> None:
    make_adapter(tmp_path / "lora", **config)
    path = tmp_path / "config.yml"
    path.write_text(
        f"merge_method: passthrough\nmodels: [{{model: '{place.as_posix()}/sft+{tmp_path.as_posix()}/lora'}}]\n"
    )
    plan = rv.read_config(path).plan(tmp_path / "out")
    assert any(said in p.message for p in plan.errors)
    assert not (tmp_path / "out").exists()


def test_stacks_repeat_layers(
    place: Path, tmp_path: Path, sft: rv.Checkpoint, rl: rv.Checkpoint
) -> None:
    report = rv.stack([(sft, range(2)), (rl, (0, 2)), (sft, (0, 4))]).save(
        tmp_path / "out", shard_size=50_000
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 8
    made, s, r = tensors_of(tmp_path / "out"), tensors_of(place / "sft"), tensors_of(place / "rl")
    for layer, (source, number) in enumerate(
        [(s, 0), (s, 1), (r, 0), (r, 1), (s, 0), (s, 1), (s, 2), (s, 3)]
    ):
        assert (made[UP.format(layer)] == source[UP.format(number)]).all()
    assert report.recipe == "passthrough(sft [0:2], rl [0:2], sft [0:4])"
    with pytest.raises(rv.ReasonvecError, match="leaves layers out"):
        rv.stack([(sft, range(0, 4, 2))])


# ---- what a method asks of the core


@pytest.mark.parametrize(
    ("name", "models", "keywords", "expected"),
    [
        ("ties", True, {"density": 0.2}, {"kind": "ties", "density": [0.2, 0.2], "normalize": True, "lambda": 1.0}),
        ("dare_ties", True, {"density": 0.3}, {"kind": "dare", "density": [0.3, 0.3], "seed": 5, "rescale": "density", "consensus": True, "normalize": False, "lambda": 1.0}),
        ("dare_linear", True, {"rescale": False}, {"kind": "dare", "density": [1.0, 1.0], "seed": 5, "rescale": "none", "consensus": False, "normalize": False, "lambda": 1.0}),
        ("della", True, {"epsilon": 0.1, "density": 0.5}, {"kind": "della", "density": [0.5, 0.5], "epsilon": [0.1, 0.1], "seed": 5, "rescale": "density", "consensus": True, "normalize": True, "lambda": 1.0}),
        ("della_linear", True, {"density": 0.5}, {"kind": "della", "density": [0.5, 0.5], "epsilon": [0.15, 0.15], "seed": 5, "rescale": "density", "consensus": False, "normalize": False, "lambda": 1.0}),
        ("breadcrumbs", True, {"density": 0.9, "gamma": 0.02}, {"kind": "breadcrumbs", "density": [0.9, 0.9], "gamma": [0.02, 0.02], "consensus": False, "normalize": False, "lambda": 1.0}),
        ("breadcrumbs_ties", True, {"lambda_": 2}, {"kind": "breadcrumbs", "density": [1.0, 1.0], "gamma": [0.01, 0.01], "consensus": True, "normalize": False, "lambda": 2.0}),
        ("sce", False, {"select_topk": 0.3}, {"kind": "sce", "select_topk": 0.3, "lambda": 1.0}),
        ("ram", False, {}, {"kind": "ram", "plus": False, "epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
        ("ramplus_tl", False, {"r": 0.3}, {"kind": "ram", "plus": True, "epsilon": 1e-5, "r": 0.3, "alpha": 0.2}),
        ("model_stock", False, {"filter_wise": True}, {"kind": "model_stock", "filter_wise": True}),
    ],
)  # fmt: skip
def test_plans_with_a_base(
    name: str,
    models: bool,
    keywords: dict[str, object],
    expected: object,
    tmp_path: Path,
    base: rv.Checkpoint,
    rl: rv.Checkpoint,
    instruct: rv.Checkpoint,
) -> None:
    merge = getattr(rv, name)(
        base, {rl: 0.5, instruct: 0.25} if models else [rl, instruct], **keywords
    )
    plan = merge.plan(tmp_path / "x", seed=5)
    assert not plan.errors
    row = next(t for t in rows(plan) if t["name"] == UP.format(1))
    assert row["method"] == expected
    assert row["target"] == {"operand": number(plan, "base"), "name": UP.format(1)}
    weights = [0.5, 0.25] if models else [1.0, 1.0]
    assert [(t["coefficient"], t["source"]["tensor"]["operand"]) for t in row["terms"]] == [
        (w, number(plan, n)) for w, n in zip(weights, ("rl", "instruct"), strict=True)
    ]


def test_plans_without_a_target(
    tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, instruct: rv.Checkpoint
) -> None:
    for merge, kind, names in (
        (rv.slerp(base, rl, t=0.3), {"kind": "slerp", "t": 0.3}, ["base", "rl"]),
        (rv.nearswap(rl, base, t=0.01), {"kind": "nearswap", "t": 0.01}, ["rl", "base"]),
        (
            rv.karcher([rl, base, instruct]),
            {"kind": "karcher", "max_iter": 10, "tol": 1e-5},
            ["rl", "base", "instruct"],
        ),
        (
            rv.nuslerp({rl: 1, base: 2}),
            {"kind": "nuslerp", "row_wise": True, "flatten": True},
            ["rl", "base"],
        ),
        (
            rv.multislerp({rl: 1, base: 2}),
            {"kind": "multislerp", "normalize_weights": True, "eps": 1e-8},
            ["rl", "base"],
        ),
    ):
        plan = merge.plan(tmp_path / "x")
        row = rows(plan)[5]
        assert row["method"] == kind
        assert row["target"] is None
        assert [t["source"]["tensor"]["operand"] for t in row["terms"]] == [
            number(plan, n) for n in names
        ]
    plan = rv.nuslerp({rl: 1, instruct: 2}, base=base, along="rows").plan(tmp_path / "x")
    assert rows(plan)[5]["target"]["operand"] == number(plan, "base")
    plan = rv.arcee_fusion(base, rl).plan(tmp_path / "x")
    assert rows(plan)[5]["method"] == {"kind": "arcee_fusion"}
    assert rows(plan)[5]["target"]["operand"] == number(plan, "base")


def rows(plan: object) -> list[dict[str, object]]:
    shards = plan.core_plan["shards"]  # type: ignore[attr-defined]
    return [tensor for shard in shards for tensor in shard["tensors"]]


def number(plan: object, name: str) -> int:
    folders = plan.operands.folders  # type: ignore[attr-defined]
    return [folder.path.name for folder in folders].index(name)


def test_densities_by_model_by_layer_and_by_name(
    tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, instruct: rv.Checkpoint
) -> None:
    merge = rv.ties(
        base, {rl: 0.5, instruct: 0.5}, density={rl: [0.1, 0.7], instruct: {"mlp": 0.4}}
    )
    found = {t["name"]: t["method"]["density"] for t in rows(merge.plan(tmp_path / "x"))}  # type: ignore[index]
    assert found[UP.format(0)] == pytest.approx([0.1, 0.4])
    assert found[UP.format(3)] == pytest.approx([0.7, 0.4])
    assert found["model.layers.2.self_attn.q_proj.weight"] == pytest.approx([0.5, 1.0])
    with pytest.raises(rv.ReasonvecError, match="none of the models"):
        rv.ties(base, {rl: 1.0}, density={instruct: 0.5})
    with pytest.raises(rv.ReasonvecError, match="epsilon is one for all models"):
        rv.ram(base, [rl, instruct], epsilon={rl: 0.5})  # type: ignore[dict-item]


def test_numerics_of_mergekit(tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint) -> None:
    plan = rv.dare_ties(base, {rl: 0.3}, density=0.5).plan(tmp_path / "x", numerics="mergekit")
    assert rows(plan)[5]["method"]["rescale"] == "l1"  # type: ignore[index]
    assert rows(plan)[5]["terms"][0]["coefficient"] == 0.30078125  # type: ignore[index]
    assert rows(plan)[5]["steps"] == "BF16"
    plan = rv.task_arithmetic(base, {rl: 0.3}).plan(tmp_path / "y", numerics="mergekit")
    assert rows(plan)[5]["method"]["density"] == [1.0]  # type: ignore[index]
    # Slerp is solved in float64, and rounds once whatever the numerics.
    assert (
        "steps" not in rows(rv.slerp(base, rl, t=0.5).plan(tmp_path / "z", numerics="mergekit"))[5]
    )


# ---- parameters


def test_parameters_are_evaluated_narrowest_first() -> None:
    place = Place("model.layers.1.mlp.up_proj.weight", 0.25)
    assert gradient([0.0, 1.0, 0.0], 0.25) == 0.5
    assert gradient([3.0], 1.0) == 3.0
    rules = Conditions((("mlp", 2.0), (None, (1.0, 5.0))))
    assert rules(place) == 2.0
    assert rules(Place("norm", 0.25)) == 2.0
    assert evaluate([None, setting({"attn": 1.0}, "w"), rules], place, 9.0) == 2.0
    assert evaluate([setting({"attn": 1.0}, "w")], place, 9.0) == 9.0
    assert evaluate([setting({"mlp": 1.0, "up": [4.0, 8.0]}, "w")], place, 9.0) == 5.0


@pytest.mark.parametrize("value", ["0.5", float("nan"), [], [1.0, "a"], {"a": None}, None])
def test_parameters_that_are_no_numbers(
    value: object, base: rv.Checkpoint, rl: rv.Checkpoint
) -> None:
    with pytest.raises(rv.ReasonvecError, match="expected a finite number"):
        rv.linear({base: 1.0, rl: value})  # type: ignore[dict-item]


# ---- algebra


def test_weights_beyond_all_numbers(
    tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, sft: rv.Checkpoint
) -> None:
    huge = {rl: 1e308, sft: 1e308}
    for merge, found in (
        (rv.linear(huge), "sum to inf"),
        (rv.linear({rl: 1e308, sft: -1e308}), "sum to 0"),
        (rv.linear({rl: 1.0, sft: -1.0 + 2.0**-53}, normalize=False), None),
        (rv.linear({rl: 1e300, base: -1e300, sft: 1e-300}), "a coefficient of inf"),
        (rv.task_arithmetic(base, {rl: 1e200}, lambda_=1e200), "a coefficient of inf"),
        (rv.nuslerp(huge), "too large to be added up"),
        (rv.multislerp(huge), "too large to be added up"),
        (rv.ties(base, huge), "too large to be added up"),
    ):
        errors = merge.plan(tmp_path / "out").errors
        if found is None:
            assert not errors
        else:
            assert [e.kind for e in errors] == ["parameter"]
            assert found in errors[0].message


def test_a_merge_is_a_point_that_stands_alone(base: rv.Checkpoint, rl: rv.Checkpoint) -> None:
    merge, vector = rv.slerp(base, rl, t=0.5), rl - base
    for wrong, said in (
        (lambda: merge + vector, "save the merge and add the vector to it"),
        (lambda: merge - base, "open the folder with rv.open"),
        (lambda: 2 * merge, "rv.linear"),
        (lambda: merge + merge, "open the folder with rv.open"),
    ):
        with pytest.raises(TypeError, match=said.replace("(", r"\(")):
            wrong()
    with pytest.raises(TypeError, match="expected a model"):
        rv.linear(["base", "rl"])  # type: ignore[list-item]
    with pytest.raises(rv.ReasonvecError, match="takes no weights"):
        rv.sce(base, {rl: 1.0})  # type: ignore[arg-type]
    with pytest.raises(rv.ReasonvecError, match="expected all, rows or columns"):
        rv.nuslerp([base, rl], along="cols")  # type: ignore[arg-type]


def test_importing_stays_light(tmp_path: Path) -> None:
    script = "import reasonvec, sys; print(sorted({'yaml', 'numpy', 'torch', 'rich'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert done.stdout.strip() == "[]"


# ---- what does not fit


def test_quantised_models_are_refused_before_they_are_read(
    place: Path, tmp_path: Path, base: rv.Checkpoint
) -> None:
    weight = tensors_of(place / "rl")[UP.format(0)]
    fp8 = copied(
        place / "rl", tmp_path / "fp8", **{UP.format(0): weight.astype(ml_dtypes.float8_e4m3fn)}
    )
    message = only(rv.ties(base, {rv.open(fp8): 1.0}).plan(tmp_path / "x"), "quantised")
    assert str(fp8) in message
    assert "F8_E4M3" in message
    said = copied(place / "rl", tmp_path / "gptq", quantization_config={"quant_method": "gptq"})
    message = only(rv.linear({base: 1.0, rv.open(said): 1.0}).plan(tmp_path / "x"), "quantised")
    assert "gptq" in message


def test_missing_and_surplus_tensors(place: Path, tmp_path: Path, base: rv.Checkpoint) -> None:
    less = rv.open(copied(place / "rl", tmp_path / "less", **{UP.format(2): None}))
    merge = rv.task_arithmetic(base, {less: 1.0})
    message = only(merge.plan(tmp_path / "x"), "missing")
    assert f"less: has no {UP.format(2)}" in message
    merge.save(tmp_path / "kept", missing="skip")
    assert (
        tensors_of(tmp_path / "kept")[UP.format(2)] == tensors_of(place / "base")[UP.format(2)]
    ).all()
    more = rv.open(copied(place / "rl", tmp_path / "more", extra=np.zeros(3, np.float32)))
    assert "extra has no place: base lacks it" in only(
        rv.linear({base: 1.0, more: 1.0}).plan(tmp_path / "x"), "unused"
    )


def test_shapes_vocabularies_and_heads_that_differ(
    place: Path, tmp_path: Path, base: rv.Checkpoint
) -> None:
    tensors = tensors_of(place / "rl")
    other = rv.open(
        copied(place / "rl", tmp_path / "other", **{UP.format(0): tensors[UP.format(0)][:-1]})
    )
    assert "[47, 32], expected [48, 32]" in only(
        rv.linear({base: 1.0, other: 1.0}).plan(tmp_path / "x"), "shape"
    )
    short = {name: tensors[name][:300] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    cut = rv.open(copied(place / "rl", tmp_path / "cut", vocab_size=300, **short))
    found = [
        p for p in rv.linear({base: 1.0, cut: 1.0}).plan(tmp_path / "x").errors if p.kind == "vocab"
    ]
    assert len(found) == 2
    assert "300 rows, expected 320" in found[0].message
    assert "tokenizer_source" in found[0].message
    tied = rv.open(
        copied(
            place / "rl", tmp_path / "tied", tie_word_embeddings=True, **{"lm_head.weight": None}
        )
    )
    assert "tied ties its head to its embeddings, base has a head of its own" in only(
        rv.linear({base: 1.0, tied: 1.0}).plan(tmp_path / "x"), "tied"
    )


def test_integers_pass_if_they_are_equal(place: Path, tmp_path: Path) -> None:
    steps = np.arange(4)
    a = rv.open(copied(place / "sft", tmp_path / "a", **{"steps.count": steps}))
    b = rv.open(copied(place / "rl", tmp_path / "b", **{"steps.count": steps}))
    rv.linear({a: 0.5, b: 0.5}).save(tmp_path / "out")
    assert (tensors_of(tmp_path / "out")["steps.count"] == steps).all()
    c = rv.open(copied(place / "rl", tmp_path / "c", **{"steps.count": steps + 1}))
    with pytest.raises(rv.MismatchError, match=r"steps\.count"):
        rv.linear({a: 0.5, c: 0.5}).save(tmp_path / "worse")


def test_non_finite_input_names_its_tensor(
    place: Path, tmp_path: Path, base: rv.Checkpoint
) -> None:
    weight = tensors_of(place / "rl")[UP.format(1)].copy()
    weight[3, 5] = np.nan
    bad = rv.open(copied(place / "rl", tmp_path / "bad", **{UP.format(1): weight}))
    with pytest.raises(rv.NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        rv.linear({base: 0.5, bad: 0.5}).save(tmp_path / "out")
    assert not (tmp_path / "out/reasonvec.json").exists()


def test_a_run_never_writes_into_its_inputs(
    place: Path, base: rv.Checkpoint, rl: rv.Checkpoint
) -> None:
    with pytest.raises(rv.ReasonvecError, match="is an input of this run"):
        rv.linear({base: 0.5, rl: 0.5}).save(place / "rl", overwrite=True)


# ---- architectures by name


def test_experts_and_towers_are_matched_by_name(place: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(3)

    def model(folder: str) -> Path:
        target = tmp_path / folder
        target.mkdir()
        shapes = {
            "model.language_model.embed_tokens.weight": (16, 8),
            "model.language_model.norm.weight": (8,),
            "lm_head.weight": (16, 8),
            "model.visual.blocks.0.attn.qkv.weight": (24, 8),
            "model.visual.blocks.5.attn.qkv.weight": (24, 8),
        }
        for layer in range(3):
            at = f"model.language_model.layers.{layer}"
            shapes[f"{at}.mlp.experts.gate_up_proj"] = (4, 8, 12)
            shapes[f"{at}.mlp.gate.weight"] = (4, 8)
            shapes[f"{at}.linear_attn.A_log"] = (4,)
        tensors = {name: noise.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        save_file(tensors, target / "model.safetensors")
        config = {
            "model_type": "made_up",
            "text_config": {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"]},
        }
        (target / "config.json").write_text(json.dumps(config))
        return target

    a, b = model("a"), model("b")
    rv.linear({rv.open(a): [1.0, 0.0], rv.open(b): [0.0, 1.0]}).save(tmp_path / "out")
    made, x, y = tensors_of(tmp_path / "out"), tensors_of(a), tensors_of(b)
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert np.allclose(made[name], (x[name] + y[name]) / 2, atol=1e-6)
    # A tower has a depth of its own.
    assert (
        made["model.visual.blocks.5.attn.qkv.weight"] == y["model.visual.blocks.5.attn.qkv.weight"]
    ).all()
    rv.stack([(rv.open(a), (0, 2)), (rv.open(b), (1, 3))]).save(tmp_path / "deep")
    deep = tensors_of(tmp_path / "deep")
    assert (
        deep["model.language_model.layers.3.mlp.gate.weight"]
        == y["model.language_model.layers.2.mlp.gate.weight"]
    ).all()
    assert "model.visual.blocks.5.attn.qkv.weight" in deep
    text = json.loads((tmp_path / "deep/config.json").read_text())["text_config"]
    assert text == {"num_hidden_layers": 4, "layer_types": ["x", "y", "y", "z"]}


# ---- determinism and resuming


def test_bytes_do_not_depend_on_how_a_run_is_run(
    tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, sft: rv.Checkpoint
) -> None:
    merge = rv.task_arithmetic(base, {rl: 0.3, sft: [0.1, 0.9]})
    digests = []
    for i, (threads, budget, shard) in enumerate(
        [(1, 8 << 20, 50_000), (2, 64 << 20, 10**9), (3, 16 << 20, 100_000)]
    ):
        report = merge.save(
            tmp_path / str(i), threads=threads, memory_budget=budget, shard_size=shard
        )
        digests.append({t.name: t.digest for t in report.tensors})
    assert digests[0] == digests[1] == digests[2]


def test_an_unfinished_merge_is_resumed(
    tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint
) -> None:
    merge = rv.linear({base: 0.5, rl: 0.5})
    merge.save(tmp_path / "whole", shard_size=20_000)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge.save(tmp_path / "cut", shard_size=20_000, threads=1, progress=stop)
    merge.save(tmp_path / "cut", shard_size=20_000, resume=True)
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {p.name for p in (tmp_path / "cut").iterdir()} == names
    for name in names - {"reasonvec.json"}:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_unfinished_merge_with_a_stage_is_resumed(
    tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, sft: rv.Checkpoint
) -> None:
    merge = rv.ties(base, {rv.slerp(rl, sft, t=0.5): 1.0, sft: 0.5}, density=0.5)
    merge.save(tmp_path / "whole", shard_size=20_000)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for name in ("cut", "other"):
        with pytest.raises(KeyboardInterrupt):
            merge.save(tmp_path / name, shard_size=20_000, threads=1, progress=stop)
    merge.save(tmp_path / "cut", shard_size=20_000, resume=True)
    merge.save(tmp_path / "other", shard_size=20_000, overwrite=True)
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    for folder in ("cut", "other"):
        assert {p.name for p in (tmp_path / folder).iterdir()} == names
        for name in names - {"reasonvec.json"}:
            made = (tmp_path / folder / name).read_bytes()
            assert made == (tmp_path / "whole" / name).read_bytes()


def test_the_extra_head_of_a_tied_model(place: Path, tmp_path: Path) -> None:
    table = tensors_of(place / "sft")["model.embed_tokens.weight"]
    extra = {"lm_head.weight": table, "tie_word_embeddings": True}
    a = rv.open(copied(place / "sft", tmp_path / "a", **extra))
    b = rv.open(
        copied(place / "sft", tmp_path / "b", tie_word_embeddings=True, **{"lm_head.weight": None})
    )
    rv.linear({a: 0.5, b: 0.5}).save(tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    wrong = rv.open(copied(place / "sft", tmp_path / "c", tie_word_embeddings=True))
    with pytest.raises(rv.MismatchError, match="the two differ"):
        rv.linear({wrong: 0.5, b: 0.5}).save(tmp_path / "worse")


@pytest.mark.parametrize("kind", ["slerp", "ties", "dare_ties", "sce"])
def test_methods_that_look_first_give_the_same_bytes(
    kind: str, tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, sft: rv.Checkpoint
) -> None:
    merges = {
        "slerp": rv.slerp(rl, sft, t=0.5),
        "ties": rv.ties(base, {rl: 0.5, sft: 0.5}, density=0.3),
        "dare_ties": rv.dare_ties(base, {rl: 0.5, sft: 0.5}, density=0.3),
        "sce": rv.sce(base, [rl, sft], select_topk=0.5),
    }
    digests = []
    for i, (threads, budget) in enumerate([(1, 8 << 20), (3, 64 << 20)]):
        report = merges[kind].save(
            tmp_path / str(i), threads=threads, memory_budget=budget, shard_size=10**5 * (i + 1)
        )
        digests.append({t.name: t.digest for t in report.tensors})
    assert digests[0] == digests[1]
    base_digests = {t.name: t.digest for t in (base + 0 * (rl - sft)).save(tmp_path / "b").tensors}
    assert digests[0][UP.format(1)] != base_digests[UP.format(1)]


# ---- methods in Python


def test_a_method_in_python_streams_and_is_rounded_once(
    place: Path, tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint, sft: rv.Checkpoint
) -> None:
    seen: list[int] = []

    @rv.method
    def larger(models: list[np.ndarray], base: np.ndarray, *, scale: float) -> np.ndarray:
        seen.append(len(base))
        a, b = (model - base for model in models)
        return base + np.float32(scale) * np.where(np.abs(a) > np.abs(b), a, b)

    merge = larger([rl, sft], base=base, scale={"": 0.5, "mlp": [1.0, 2.0]})
    report = merge.save(tmp_path / "out")
    assert report.recipe.startswith("larger(base base, rl, sft, scale")
    assert verify(tmp_path / "out").ok
    assert max(seen) <= 1 << 18
    made, x, y, b = (
        tensors_of(p) for p in (tmp_path / "out", *(place / n for n in ("rl", "sft", "base")))
    )
    for name, value in made.items():
        one, two, zero = (t[name].astype(np.float32) for t in (x, y, b))
        scale = 0.5
        if "mlp" in name:
            scale = 1 + int(name.split(".")[2]) / 3
        p, q = one - zero, two - zero
        expected = zero + np.float32(scale) * np.where(np.abs(p) > np.abs(q), p, q)
        assert (value == expected.astype(value.dtype)).all(), name
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]


def test_a_method_in_python_that_makes_no_tile(
    tmp_path: Path, base: rv.Checkpoint, rl: rv.Checkpoint
) -> None:
    short = rv.method(lambda models, base: models[0][:-1])
    with pytest.raises(rv.ReasonvecError, match="expected an array of"):
        short([rl, base]).save(tmp_path / "out")
    for dtype in ("complex64", "object"):
        unreal = rv.method(lambda models, base, dtype=dtype: models[0].astype(dtype))
        with pytest.raises(rv.ReasonvecError, match=f"expected real numbers, found .*{dtype}"):
            unreal([rl, base]).save(tmp_path / "out")
    wild = rv.method(lambda models, base: models[0] * np.float32(np.inf))
    with pytest.raises(rv.NonFiniteError, match="is not finite"):
        wild([rl, base]).save(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
