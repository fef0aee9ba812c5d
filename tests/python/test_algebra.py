"""The typed algebra: which expressions there are, what they are worth; and they read nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from shards import Stored, read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec.family import Family, sparse_shapes

Floats = NDArray[np.float32]

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    EMBED: (6, 4),
    Q0: (4, 4),
    Q1: (4, 4),
    NORM: (4,),
    HEAD: (6, 4),
}
CONFIG: dict[str, object] = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 4,
    "tie_word_embeddings": False,
    "vocab_size": 6,
}


def point(folder: Path, seed: int) -> rv.Checkpoint:
    """A checkpoint of small integers in float32: sums of them are exact, whatever their order."""
    dice = np.random.default_rng(seed)
    tensors = {
        name: stored("F32", dice.integers(-64, 64, shape).astype(np.float32))
        for name, shape in SHAPES.items()
    }
    return rv.open(write_checkpoint(folder, tensors, config=CONFIG))


@pytest.fixture
def a(tmp_path: Path) -> rv.Checkpoint:
    return point(tmp_path / "a", 1)


@pytest.fixture
def b(tmp_path: Path) -> rv.Checkpoint:
    return point(tmp_path / "b", 2)


@pytest.fixture
def c(tmp_path: Path) -> rv.Checkpoint:
    return point(tmp_path / "c", 3)


def floats(tensors: dict[str, Stored]) -> dict[str, Floats]:
    return {name: np.frombuffer(t.data, np.float32).reshape(t.shape) for name, t in tensors.items()}


def values(where: rv.Point, folder: Path) -> dict[str, Floats]:
    """What a point is worth: saved, and read without the code under test."""
    where.save(folder, sync=False)
    return floats(read_checkpoint(folder))


def on_disk(where: rv.Checkpoint) -> dict[str, Floats]:
    return floats(read_checkpoint(where.base.path))


# -- types


def test_types_of_expressions(a: rv.Checkpoint, b: rv.Checkpoint, c: rv.Checkpoint) -> None:
    v, w = a - b, c - b
    vectors = [v, v + w, v - w, -v, 2 * v, v * 2, 0.5 * v, v / 4, a - a, (a + v) - (b + w)]
    assert [type(x) for x in vectors] == [rv.Vector] * len(vectors)
    points = [a + v, v + a, a - v, (a + v) + w, rv.lerp(a, b, 0.5), rv.mean(a, b, c)]
    assert [type(x) for x in points] == [rv.Point] * len(points)
    assert type(a) is rv.Checkpoint
    assert isinstance(a, rv.Point)


def test_two_points_have_no_sum(a: rv.Checkpoint, b: rv.Checkpoint, c: rv.Checkpoint) -> None:
    for left, right in ((a, b), (a + (b - c), b), (a, b + (a - c))):
        with pytest.raises(TypeError) as caught:
            left + right  # type: ignore[operator]
        assert "rv.mean" in str(caught.value)
        assert "rv.lerp" in str(caught.value)
        assert str(left) in str(caught.value)


@pytest.mark.parametrize("scale", [2, 0.5, np.float64(0.5), np.float32(0.5), True])
def test_a_point_has_no_multiples(a: rv.Checkpoint, scale: float) -> None:
    for expression in (lambda: scale * a, lambda: a * scale):
        with pytest.raises(TypeError) as caught:
            expression()
        assert "rv.mean" in str(caught.value)
        assert "rv.lerp" in str(caught.value)


def test_other_nonsense_is_a_type_error(a: rv.Checkpoint, b: rv.Checkpoint) -> None:
    v = a - b
    for nonsense in (
        lambda: v + 1,
        lambda: 1 + v,
        lambda: v - 1,
        lambda: v - a,
        lambda: v * v,
        lambda: v * "2",
        lambda: v / v,
        lambda: 1 / v,
        lambda: a + 1,
        lambda: a - 1,
        lambda: a / 2,
        lambda: -a,  # type: ignore[operator]
        lambda: sum([a, b]),  # type: ignore[list-item]
    ):
        with pytest.raises(TypeError):
            nonsense()


def test_numpy_scalars_scale_vectors(a: rv.Checkpoint, b: rv.Checkpoint) -> None:
    for scale in (np.float64(0.5), np.float32(0.5), np.float16(0.5)):
        assert str(scale * (a - b)) == str((a - b) * scale) == "0.5 * (a - b)"


def test_expressions_are_immutable(a: rv.Checkpoint, b: rv.Checkpoint) -> None:
    v = a - b
    before = str(v)
    _ = (2 * v, -v, v + v, v.ramp(0, 1), v.where(include=["q"]), v.control("random"), a + v)
    assert str(v) == before
    with pytest.raises(AttributeError):
        v.extra = 1  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        v.terms[0].control = None  # type: ignore[misc]


# -- values


def test_analogy(a: rv.Checkpoint, b: rv.Checkpoint, c: rv.Checkpoint, tmp_path: Path) -> None:
    x, y, z = on_disk(a), on_disk(b), on_disk(c)
    for name, found in values(c + (b - a), tmp_path / "out").items():
        np.testing.assert_array_equal(found, z[name] + (y[name] - x[name]))
    for name, found in values(c - 0.5 * (b - a), tmp_path / "minus").items():
        np.testing.assert_array_equal(found, z[name] - 0.5 * (y[name] - x[name]))


def test_a_point_minus_a_point_with_vectors(
    a: rv.Checkpoint, b: rv.Checkpoint, c: rv.Checkpoint, tmp_path: Path
) -> None:
    """(A + v) - (B + w) is A - B + v - w."""
    x, y, z = on_disk(a), on_disk(b), on_disk(c)
    v, w = c - a, c - b
    found = values(a + ((a + v) - (b + 0.5 * w)), tmp_path / "out")
    for name in SHAPES:
        v_, w_ = z[name] - x[name], z[name] - y[name]
        np.testing.assert_array_equal(found[name], x[name] + (x[name] - y[name] + v_ - 0.5 * w_))


def test_a_common_base_falls_out(a: rv.Checkpoint, b: rv.Checkpoint) -> None:
    v = b - a
    assert str((a + v) - a) == str(v)
    again = rv.open(a.base.path)
    assert str((a + v) - again) == str(v)
    assert str(a - again) == "0"


def test_lerp_and_mean(
    a: rv.Checkpoint, b: rv.Checkpoint, c: rv.Checkpoint, tmp_path: Path
) -> None:
    x, y, z = on_disk(a), on_disk(b), on_disk(c)
    quarter = values(rv.lerp(a, b, 0.25), tmp_path / "lerp")
    half = values(rv.mean(a, b), tmp_path / "mean")
    third = values(rv.mean(a, b, c), tmp_path / "third")
    for name in SHAPES:
        np.testing.assert_array_equal(quarter[name], 0.75 * x[name] + 0.25 * y[name])
        np.testing.assert_array_equal(half[name], (x[name] + y[name]) / 2)
        np.testing.assert_allclose(
            third[name], (x[name] + y[name] + z[name]) / 3, rtol=1e-5, atol=1e-5
        )


def test_ends_of_lerp_and_mean_of_one(a: rv.Checkpoint, b: rv.Checkpoint, tmp_path: Path) -> None:
    for where, same in ((rv.lerp(a, b, 0), a), (rv.lerp(a, b, 1), b), (rv.mean(a), a)):
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        for name, found in values(where, folder).items():
            np.testing.assert_array_equal(found, on_disk(same)[name])


def test_alpha_for_replaces_the_scaling_so_far(
    a: rv.Checkpoint, b: rv.Checkpoint, tmp_path: Path
) -> None:
    x, y = on_disk(a), on_disk(b)
    v = 0.5 * (b - a)
    found = values(a + v.alpha_for({"q_proj": 2, r"layers\.1\.": 0.25}), tmp_path / "out")
    for name, alpha in {EMBED: 0.5, Q0: 2.0, Q1: 0.25, NORM: 0.5, HEAD: 0.5}.items():
        np.testing.assert_array_equal(found[name], x[name] + alpha * (y[name] - x[name]))
    # What comes after multiplies again.
    found = values(a + 0.5 * v.alpha_for({"q_proj": 2}), tmp_path / "after")
    for name, alpha in {EMBED: 0.25, Q0: 1.0, Q1: 1.0}.items():
        np.testing.assert_array_equal(found[name], x[name] + alpha * (y[name] - x[name]))


def test_ramp(a: rv.Checkpoint, b: rv.Checkpoint, tmp_path: Path) -> None:
    x, y = on_disk(a), on_disk(b)
    found = values(a + 2 * (b - a).ramp(0.25, 0.75), tmp_path / "out")
    for name, alpha in {EMBED: 0.5, Q0: 0.5, Q1: 1.5, NORM: 1.5, HEAD: 1.5}.items():
        np.testing.assert_array_equal(found[name], x[name] + alpha * (y[name] - x[name]))


def test_ramp_over_layers() -> None:
    from reasonvec.coefficients import Ramp, coefficient

    factors = (Ramp(0.0, 1.0),)
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(5)]
    assert [coefficient(factors, name, 5) for name in names] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert coefficient((Ramp(0.3, 0.9),), names[0], 1) == 0.3


def test_where(a: rv.Checkpoint, b: rv.Checkpoint, tmp_path: Path) -> None:
    x, y = on_disk(a), on_disk(b)
    v = b - a
    chosen = {
        "include": (v.where(include=["q_proj", "norm"]), {Q0, Q1, NORM}),
        "exclude": (v.where(exclude=["q_proj", "norm"]), {EMBED, HEAD}),
        "both": (v.where(include=["layers"], exclude=[r"\.1\."]), {Q0}),
        "all": (v.where(), set(SHAPES)),
        "none": (v.where(include=["nothing"]), set()),
    }
    for label, (vector, names) in chosen.items():
        found = values(a + vector, tmp_path / label)
        for name in SHAPES:
            np.testing.assert_array_equal(found[name], (y if name in names else x)[name])


def test_map(a: rv.Checkpoint, b: rv.Checkpoint, tmp_path: Path) -> None:
    x, y = on_disk(a), on_disk(b)

    def by_length(name: str) -> float:
        return float(len(name))

    v = (b - a).map(by_length)
    assert str(v) == "by_length(name) * (b - a)"
    found = values(a + v, tmp_path / "out")
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], x[name] + len(name) * (y[name] - x[name]))


def test_control(a: rv.Checkpoint, b: rv.Checkpoint, tmp_path: Path) -> None:
    x, y = on_disk(a), on_disk(b)
    v = b - a
    assert str(v.control("reverse")) == str(-v)
    shuffled = values(a + v.control("shuffle", seed=3), tmp_path / "shuffle")
    noisy = values(a + v.control("random", seed=3), tmp_path / "random")
    again = values(a + v.control("random", seed=3), tmp_path / "again")
    other = values(a + v.control("random", seed=4), tmp_path / "other")
    for name in SHAPES:
        u = y[name] - x[name]
        np.testing.assert_array_equal(
            np.sort(shuffled[name] - x[name], axis=None), np.sort(u, axis=None)
        )
        noise = noisy[name] - x[name]
        assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(u), rel=1e-4)
        np.testing.assert_array_equal(noisy[name], again[name])
        assert (noisy[name] != other[name]).any()
    assert (shuffled[EMBED] != y[EMBED]).any()


def test_an_empty_vector_adds_nothing(a: rv.Checkpoint, tmp_path: Path) -> None:
    for name, found in values(a + (a - a), tmp_path / "out").items():
        np.testing.assert_array_equal(found, on_disk(a)[name])


def test_an_empty_vector_has_nothing_to_tell(a: rv.Checkpoint, tmp_path: Path) -> None:
    empty = a - a
    for use in (
        lambda: empty.save(tmp_path / "out"),
        lambda: empty.inspect(),
        lambda: empty.compare(empty),
    ):
        with pytest.raises(rv.MismatchError, match="a point minus itself"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf")])
def test_a_coefficient_is_a_finite_number(
    a: rv.Checkpoint, b: rv.Checkpoint, tmp_path: Path, alpha: float
) -> None:
    v = b - a
    for vector in (
        alpha * v,
        v.ramp(0, alpha),
        v.alpha_for({"q_proj": alpha}),
        v.map(lambda _: alpha),
    ):
        with pytest.raises(rv.ReasonvecError, match=r"coefficient of .* finite"):
            (a + vector).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stored_vector_is_the_difference(
    a: rv.Checkpoint, b: rv.Checkpoint, c: rv.Checkpoint, tmp_path: Path
) -> None:
    (b - a).save(tmp_path / "v", sync=False)
    v = rv.load(tmp_path / "v")
    one, other = (
        values(c + 0.3 * v, tmp_path / "stored"),
        values(c + 0.3 * (b - a), tmp_path / "live"),
    )
    for name in SHAPES:
        np.testing.assert_array_equal(one[name], other[name])


# -- what an expression says of itself


def test_recipes(a: rv.Checkpoint, b: rv.Checkpoint, c: rv.Checkpoint, tmp_path: Path) -> None:
    v = b - a
    v.save(tmp_path / "v", sync=False)
    stored_vector = rv.load(tmp_path / "v")
    assert str(a) == "a"
    assert repr(a + v) == "Point(a + (b - a))"
    assert repr(0.8 * stored_vector) == "Vector(0.8 * v)"
    assert str(c + 0.8 * stored_vector - v) == "c + 0.8 * v + -1 * (b - a)"
    assert str(v.ramp(0, 1).where(include=["q"])) == "(b - a).ramp(0, 1).where(include=['q'])"
    assert str(v.where(exclude=["q"])) == "(b - a).where(exclude=['q'])"
    assert str(v.alpha_for({"norm": 0.5})) == "(b - a).alpha_for({'norm': 0.5})"
    assert str(2 * v.control("random", seed=7)) == "2 * random((b - a), seed=7)"
    assert str(a - a) == "0"
    assert str(a + (a - a)) == "a"


def test_the_recipe_is_recorded(
    a: rv.Checkpoint, b: rv.Checkpoint, c: rv.Checkpoint, tmp_path: Path
) -> None:
    report = (c + 0.8 * (b - a)).save(tmp_path / "out", sync=False)
    manifest = json.loads((tmp_path / "out" / "reasonvec.json").read_bytes())
    assert manifest["recipe"] == report.recipe == "c + 0.8 * (b - a)"
    assert [term["text"] for term in manifest["terms"]] == ["0.8 * (b - a)"]


# -- doors


def test_open_and_load_tell_points_from_vectors(
    a: rv.Checkpoint, b: rv.Checkpoint, tmp_path: Path
) -> None:
    (b - a).save(tmp_path / "v", sync=False)
    with pytest.raises(rv.FormatError, match=r"rv\.load"):
        rv.open(tmp_path / "v")
    with pytest.raises(rv.FormatError, match=r"rv\.open"):
        rv.load(a.base.path)
    with pytest.raises(OSError, match="nowhere"):
        rv.open(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere"):
        rv.load(tmp_path / "nowhere")


def test_a_regular_expression_that_is_none(a: rv.Checkpoint, b: rv.Checkpoint) -> None:
    for use in (
        lambda: (a - b).where(include=["("]),
        lambda: (a - b).where(exclude=["["]),
        lambda: (a - b).alpha_for({"*": 1}),
    ):
        with pytest.raises(rv.ReasonvecError, match="no regular expression"):
            use()


def test_a_checkpoint_is_a_mapping(a: rv.Checkpoint) -> None:
    assert set(a) == set(SHAPES)
    assert len(a) == len(SHAPES)
    assert NORM in a
    assert "nothing" not in a
    assert a[NORM].shape == (4,)
    assert a[NORM].dtype == "F32"
    assert a.get("nothing") is None
    with pytest.raises(KeyError):
        a["nothing"]


# -- laziness


def test_nothing_is_read(tmp_path: Path) -> None:
    """Shapes of 7B parameters as holes: headers take no time, whatever is behind them."""
    family = sparse_shapes(tmp_path)
    start = time.perf_counter()
    reason = rv.open(family.rl) - rv.open(family.sft)
    where = rv.open(family.instruct) + 0.8 * reason.ramp(0.5, 1).where(exclude=["norm"])
    made = time.perf_counter() - start
    assert len(rv.open(family.rl)) > 300
    assert str(where).startswith("instruct + 0.8 *")
    assert made < 0.5, f"{made:.2f} s to open three checkpoints"
    plan = where.plan(tmp_path / "out")
    taken = time.perf_counter() - start
    assert plan.read_bytes > 3 * plan.written_bytes * 0.9 > 30e9
    assert taken < 5, f"{taken:.2f} s to plan from headers"
    assert not (tmp_path / "out").exists()


def test_expressions_survive_what_they_were_made_of(family: Family) -> None:
    """Handles are kept by the expression itself."""
    norm = (rv.open(family.rl) - rv.open(family.sft)).inspect().totals().norm
    assert norm > 0


def test_import_is_light() -> None:
    """Neither torch nor transformers nor numpy, nor what only the command line needs."""
    code = (
        "import sys, reasonvec as rv; rv.open, rv.load;"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'click', 'safetensors'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_out_of_range_is_refused_at_once(tmp_path: Path, seed: int) -> None:
    """By name and range, when the control is made and not when it is drawn."""
    vector = point(tmp_path / "a", 1) - point(tmp_path / "b", 2)
    with pytest.raises(rv.ReasonvecError, match=rf"seed: expected .*, found {seed}"):
        vector.control("random", seed=seed)
