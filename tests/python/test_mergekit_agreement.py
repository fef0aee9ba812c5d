"""Our merges are mergekit's, element by element, or docs/methods/differences.md says why not.

mergekit runs; its outputs are compared. Models are small, but every one has dozens of tensors, so one
run says much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mergekit_peer import (
    HOME,
    PYTHON,
    VERSION,
    Family,
    Recipe,
    Tensors,
    Value,
    make_models,
    mergekit,
    packed,
)
from numpy.typing import NDArray

from reasonvec import reference as ref
from reasonvec.reference import Bits, Dtype, Work

pytestmark = [
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason=f"no mergekit {VERSION} at {HOME}: `make bench` installs it, REASONVEC_MERGEKIT names another",
    ),
    pytest.mark.timeout(900),
]

ARCHITECTURES = ["llama", "qwen2", "mixtral", "gemma"]
MIXED: list[Dtype] = ["BF16", "F16", "F32", "BF16"]
ELECTING = {"dare_ties", "della", "breadcrumbs_ties"}
NORMALIZED = {"linear", "ties", "della"}
Merge: TypeAlias = Callable[[Recipe, Family, str], Bits]


# Ours: the reference, until a recipe goes through `reasonvec merge`.


def numbers(recipe: Recipe, key: str, default: float) -> list[float]:
    """A parameter of every model: its own, else the recipe's, else the default."""
    common = recipe.parameters.get(key, default)
    each = recipe.each or [{}] * len(recipe.models)
    found = [own.get(key, common) for own in each]
    return [float(x) for x in found if not isinstance(x, list)]


def number(recipe: Recipe, key: str, default: float) -> float:
    """A parameter of the whole recipe."""
    value = recipe.parameters.get(key, default)
    assert not isinstance(value, list)
    return float(value)


def flag(recipe: Recipe, key: str, default: bool) -> bool:
    return bool(recipe.parameters.get(key, default))


def update(recipe: Recipe, family: Family, name: str) -> Work:
    """The update of one tensor by the reference, mergekit's names for everything."""
    method = recipe.method
    models = [family.values(i, name) for i in recipe.models]
    base = None if recipe.base is None else family.values(recipe.base, name)
    shape = family.shape(name)
    columns = shape[-1] if len(shape) > 1 else models[0].size
    weights = numbers(recipe, "weight", 1.0)
    density, gamma = numbers(recipe, "density", 1.0), numbers(recipe, "gamma", 0.01)
    normalize = flag(recipe, "normalize", method in NORMALIZED)
    scale = number(recipe, "lambda", 1.0)
    if method == "linear":
        return ref.linear(models, weights, normalize)
    if method == "passthrough":
        return ref.passthrough(models[0], number(recipe, "scale", 1.0))
    if method == "slerp":
        return ref.slerp(models[0], models[1], number(recipe, "t", 0.5))
    if method == "nearswap":
        assert base is not None
        return ref.nearswap(base, models[-1], number(recipe, "t", 0.0))
    if method == "karcher":
        steps = int(number(recipe, "max_iter", 10))
        return ref.karcher(models, steps, number(recipe, "tol", 1e-5))
    if method == "nuslerp":
        flat = flag(recipe, "nuslerp_flatten", True)
        # Its "row-wise" are the columns: see docs/methods/differences.md.
        rows = not flag(recipe, "nuslerp_row_wise", False)
        return ref.nuslerp(models, weights, columns, base, flat, rows)
    if method == "multislerp":
        return ref.multislerp(models, weights, base, flag(recipe, "normalize_weights", True))
    assert base is not None
    if method == "task_arithmetic":
        return ref.task_arithmetic(models, base, weights, normalize, scale)
    if method == "ties":
        return ref.ties(models, base, weights, density, normalize, scale)
    if method in ("breadcrumbs", "breadcrumbs_ties"):
        elect = method in ELECTING
        return ref.breadcrumbs(models, base, weights, density, gamma, elect, normalize, scale)
    if method == "model_stock":
        return ref.model_stock(models, base, columns, flag(recipe, "filter_wise", False))
    if method == "sce":
        return ref.sce(models, base, number(recipe, "select_topk", 1.0))
    if method in ("ram", "ramplus_tl"):
        bounds = [
            number(recipe, key, default)
            for key, default in (("epsilon", 1e-5), ("r", 0.1), ("alpha", 0.2))
        ]
        return ref.ram(models, base, method == "ramplus_tl", *bounds)
    assert method == "arcee_fusion", method
    return ref.arcee_fusion(models[0], base, columns)


ON_BASE = {
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "model_stock",
    "sce",
    "ram",
}
ON_BASE |= {"ramplus_tl", "arcee_fusion"}


def ours(recipe: Recipe, family: Family, name: str) -> Bits:
    """A merged tensor of ours."""
    u = update(recipe, family, name)
    over = recipe.method in ON_BASE or recipe.method in ("nuslerp", "multislerp")
    if recipe.base is None or not over:
        return ref.merged(u, recipe.output)
    tensor = family.tensors[recipe.base][name]
    return ref.merged(u, recipe.output, tensor.bits, tensor.dtype)


# The comparison


class Agreement(NamedTuple):
    """How far two outputs are from each other."""

    elements: int
    apart: int
    """Elements too far apart, and not `undecided`."""
    largest: float
    """The largest distance of these."""

    @property
    def share(self) -> float:
        """The share of elements that are near."""
        return 1 - self.apart / self.elements


def ordinals(bits: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """Places on the line of all numbers of a format: neighbours differ by one, both zeros are 0."""
    width = 8 * bits.dtype.itemsize - 1
    size = bits.astype(np.int64) & ((1 << width) - 1)
    return np.where(bits >> bits.dtype.type(width) == 1, -size, size)


def units(recipe: Recipe, family: Family, name: str) -> NDArray[np.float64]:
    """One unit in the last place of the working format at the largest operand of every element."""
    digits = {"BF16": 8, "F16": 11, "F32": 24}[recipe.dtype]
    sizes = [np.abs(family.values(i, name)) for i in {*recipe.models, recipe.base or 0}]
    _, exponent = np.frexp(np.maximum.reduce(sizes).astype(np.float64))
    return np.ldexp(1.0, exponent - digits)


def undecided(recipe: Recipe, family: Family, name: str) -> NDArray[np.bool_]:
    """Elements as large as the last that stays, or the first that goes: any of them may be taken.

    We take those with the lowest index, torch.topk others.
    """
    found = np.zeros(family.values(0, name).size, np.bool_)
    if recipe.base is None or recipe.method not in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        return found
    shares, most = numbers(recipe, "density", 1.0), numbers(recipe, "gamma", 0.01)
    for i, share, top in zip(recipe.models, shares, most, strict=True):
        size = np.abs(family.values(i, name) - family.values(recipe.base, name))
        n, k = size.size, int(share * size.size)
        first = 0 if recipe.method == "ties" else min(int(top * n), n - k)
        ordered = np.sort(size)[::-1]
        for edge in (first, first + k):
            if 0 < edge < n and ordered[edge - 1] == ordered[edge]:
                found |= size == ordered[edge]
    return found


def compare(recipe: Recipe, family: Family, theirs: Tensors, merge: Merge = ours) -> Agreement:
    """Every tensor of a recipe: elements of 16 bits may be one unit in the last place apart.

    F32 outputs may be sixteen units of the largest operand apart: F32 is also the format in which
    both compute. Orders of operations differ, and so do coefficients, whose norms and products are
    F32 there and F64 here.
    """
    elements = apart = 0
    largest = 0.0
    for name, tensor in theirs.items():
        if recipe.parameters.get("nuslerp_row_wise") and len(tensor.shape) > 2:
            continue  # Its vectors run across the experts: see docs/methods/differences.md.
        assert tensor.dtype == recipe.output, name
        assert tensor.shape == family.shape(name)
        bits = merge(recipe, family, name)
        a, b = (ref.widen(x, recipe.output, "F32").astype(np.float64) for x in (bits, tensor.bits))
        if recipe.output == "F32":
            far = np.abs(a - b) > 16 * units(recipe, family, name)
        else:
            far = np.abs(ordinals(bits) - ordinals(tensor.bits)) > 1
        far &= ~undecided(recipe, family, name)
        elements += far.size
        apart += int(np.count_nonzero(far))
        largest = max(largest, float(np.abs(a - b)[far].max(initial=0.0)))
    assert set(theirs) == set(family.tensors[0])
    return Agreement(elements, apart, largest)


def agree(recipes: dict[str, Recipe], family: Family, scratch: Path) -> None:
    """Runs all of them, and asks for 99.99 % of the elements of each."""
    results = mergekit(list(recipes.values()), family, scratch)
    if any("block_sparse_moe" in name for name in family.tensors[0]):
        family = packed(family)
    for (name, recipe), theirs in zip(recipes.items(), results, strict=True):
        assert not isinstance(theirs, str), f"{name}: {theirs}"
        found = compare(recipe, family, theirs)
        assert found.share >= 0.9999, f"{name}, {recipe}: {found}"


# The recipes


def weighted(*weights: float, **others: float) -> list[dict[str, Value]]:
    return [{"weight": weight, **others} for weight in weights]


WEIGHTS = weighted(0.5, 0.3, -0.4)
TRIMMED: list[dict[str, Value]] = [
    {"weight": 0.5, "density": 0.5},
    {"weight": 0.3, "density": 0.37},
    {"weight": -0.4, "density": 0.8},
]
THREE = [1, 2, 3]
RECIPES = {
    "linear": Recipe("linear", THREE, each=WEIGHTS),
    "linear sum": Recipe("linear", THREE, None, {"normalize": False}, WEIGHTS),
    "passthrough": Recipe("passthrough", [1], None, {"scale": 0.7}),
    "passthrough copy": Recipe("passthrough", [1]),
    "slerp": Recipe("slerp", [0, 1], 0, {"t": 0.3}),
    "slerp ends": Recipe("slerp", [0, 1], 0, {"t": 1.0}),
    "nuslerp": Recipe("nuslerp", [1, 2], None, {}, weighted(0.7, 0.4)),
    "nuslerp base": Recipe("nuslerp", [1, 2], 0, {}, weighted(0.7, 0.4)),
    "nuslerp rows": Recipe("nuslerp", [1, 2], None, {"nuslerp_flatten": False}, weighted(0.7, 0.4)),
    "nuslerp columns": Recipe(
        "nuslerp",
        [1, 2],
        0,
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        weighted(0.7, 0.4),
    ),
    "multislerp": Recipe("multislerp", THREE, each=weighted(0.5, 0.3, 0.4)),
    "multislerp base": Recipe("multislerp", THREE, 0, {}, weighted(0.5, 0.3, -0.2)),
    "multislerp sum": Recipe(
        "multislerp", THREE, None, {"normalize_weights": False}, weighted(0.5, 0.3, 0.4)
    ),
    "karcher": Recipe("karcher", THREE),
    "karcher one step": Recipe("karcher", THREE, None, {"max_iter": 1}),
    "model_stock": Recipe("model_stock", THREE, 0),
    "model_stock rows": Recipe("model_stock", THREE, 0, {"filter_wise": True}),
    "task_arithmetic": Recipe("task_arithmetic", THREE, 0, {"lambda": 0.7}, WEIGHTS),
    "task_arithmetic mean": Recipe("task_arithmetic", THREE, 0, {"normalize": True}, WEIGHTS),
    "ties": Recipe("ties", THREE, 0, {}, TRIMMED),
    "ties sum": Recipe("ties", THREE, 0, {"normalize": False, "lambda": 0.7}, TRIMMED),
    "breadcrumbs": Recipe("breadcrumbs", THREE, 0, {"gamma": 0.05}, TRIMMED),
    "breadcrumbs_ties": Recipe("breadcrumbs_ties", THREE, 0, {"lambda": 0.7}, TRIMMED),
    "sce": Recipe("sce", THREE, 0, {"select_topk": 0.4}),
    "sce all": Recipe("sce", THREE, 0),
    "ram": Recipe("ram", THREE, 0, {"epsilon": 0.02}),
    "ramplus_tl": Recipe("ramplus_tl", THREE, 0, {"epsilon": 0.02, "r": 0.5, "alpha": 2.0}),
    "nearswap": Recipe("nearswap", [1], 0, {"t": 0.01}),
}
"""Every method with a formula, every parameter that changes it. `arcee_fusion` is apart."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_method_agrees(architecture: str, tmp_path: Path) -> None:
    """Models of mixed formats, computed in float32, written as bfloat16: 99.99 % within one ulp."""
    family = make_models(tmp_path, architecture, MIXED)
    recipes = {name: replace(recipe, out_dtype="BF16") for name, recipe in RECIPES.items()}
    agree(recipes, family, tmp_path / "out")


@pytest.mark.parametrize("out", ["F16", "F32"])
def test_every_method_agrees_in_other_formats(out: Dtype, tmp_path: Path) -> None:
    """F32 models written as float16 and float32."""
    family = make_models(tmp_path, "llama", ["F32"] * 4, seed=1)
    recipes = {name: replace(recipe, out_dtype=out) for name, recipe in RECIPES.items()}
    agree(recipes, family, tmp_path / "out")


WEIGHT = st.floats(0.05, 2.0).map(lambda x: round(x, 3))
SHARE = st.floats(0.05, 1.0).map(lambda x: round(x, 3))


@st.composite
def drawn(draw: st.DrawFn, name: str) -> Recipe:
    """A recipe with other weights, densities and parameters, for F32 work."""
    recipe = RECIPES[name]
    each: list[dict[str, Value]] = []
    for own in recipe.each:
        each.append({key: draw(SHARE if key == "density" else WEIGHT) for key in own})
    common = dict(recipe.parameters)
    for key in {"t", "select_topk"} & set(common):
        common[key] = draw(st.floats(0.0, 1.0))
    if "gamma" in common:
        common["gamma"] = draw(st.floats(0.0, 0.2))
    if recipe.method == "nearswap":
        common["t"] = draw(st.floats(0.0, 0.05))
    if "epsilon" in common:
        common["epsilon"] = draw(st.floats(0.0, 0.05))
    return replace(recipe, each=each, parameters=common)


@settings(
    max_examples=2,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    st.fixed_dictionaries({name: drawn(name) for name in RECIPES}),
    st.lists(st.sampled_from(["BF16", "F16", "F32"]), min_size=4, max_size=4),
    st.sampled_from(["BF16", "F16"]),
    st.sampled_from(ARCHITECTURES),
    st.integers(0, 2**32),
)
def test_any_parameters_agree(
    tmp_path_factory: pytest.TempPathFactory,
    recipes: dict[str, Recipe],
    dtypes: list[Dtype],
    out: Dtype,
    architecture: str,
    seed: int,
) -> None:
    """Any weights, densities, thresholds, formats and models."""
    folder = tmp_path_factory.mktemp("drawn")
    family = make_models(folder, architecture, dtypes, seed)
    asked = {name: replace(recipe, out_dtype=out) for name, recipe in recipes.items()}
    agree(asked, family, folder / "out")


def test_bfloat16_work_differs_by_its_own_rounding(tmp_path: Path) -> None:
    """With ``dtype: bfloat16`` mergekit rounds after every step; we round once.

    Then the sums without a division by what is left are within four units of the largest operand,
    except where another mask was chosen from rounded magnitudes.
    """
    family = make_models(tmp_path, "llama", ["BF16"] * 4, seed=1)
    sums = ["linear", "slerp", "nuslerp", "karcher", "model_stock", "task_arithmetic", "nearswap"]
    recipes = [replace(RECIPES[name], dtype="BF16") for name in sums]
    for recipe, theirs in zip(recipes, mergekit(recipes, family, tmp_path / "out"), strict=True):
        assert not isinstance(theirs, str), theirs
        for name, tensor in theirs.items():
            a = ref.widen(ours(recipe, family, name), "BF16").astype(np.float64)
            b = ref.widen(tensor.bits, "BF16").astype(np.float64)
            far = np.abs(a - b) > 4 * units(recipe, family, name)
            assert np.mean(far) < 0.0005, (recipe.method, name)


def test_random_methods_agree_but_for_the_dice(tmp_path: Path) -> None:
    """Given the elements that mergekit kept, our sum is its output; and it keeps as many as we do.

    One model, whose every element moved, so that a kept element shows. L1 rescale is its numerics.
    """
    family = make_models(tmp_path, "llama", ["F32"] * 2, moved=1.0)
    recipes = [
        Recipe(method, [1], 0, {}, weighted(0.6, density=density, epsilon=epsilon), seed=7)
        for method, epsilon in (
            ("dare_linear", 0.0),
            ("dare_ties", 0.0),
            ("della", 0.2),
            ("della_linear", 0.2),
        )
        for density in (0.3, 0.7)
    ]
    for recipe, theirs in zip(recipes, mergekit(recipes, family, tmp_path / "out"), strict=True):
        assert not isinstance(theirs, str), theirs
        assert_same_but_for_the_dice(recipe, family, theirs)


def assert_same_but_for_the_dice(recipe: Recipe, family: Family, theirs: Tensors) -> None:
    """The sum, by the mask that the output shows; and the size of that mask, above and below."""
    (density,), (epsilon,) = numbers(recipe, "density", 1.0), numbers(recipe, "epsilon", 0.0)
    elect, normalize = recipe.method in ELECTING, recipe.method == "della"
    hits, expected, variance = np.zeros(2), np.zeros(2), np.zeros(2)
    for name, tensor in theirs.items():
        base, model = family.values(0, name), family.values(1, name)
        merged = ref.widen(tensor.bits, "F32")
        kept = merged != base
        (d,) = ref.tasks([model], base)
        scale = ref.rescaled(d, kept, density, "l1")
        u = ref.consensus([d], [kept], [0.6], [scale], elect, normalize)
        # Its sum of magnitudes is F32, so the factor is not ours to the last place.
        bound = 4 * units(recipe, family, name) + 1e-5 * np.abs(u)
        assert (np.abs(base + u - merged) <= bound).all(), (recipe, name)
        shape = family.shape(name)
        columns = shape[-1] if len(shape) > 1 else d.size
        chance = ref.della_probabilities(d, columns, density, epsilon)
        large = chance > density
        for half, members in enumerate((large, ~large)):
            hits[half] += np.count_nonzero(kept & members)
            expected[half] += chance[members].sum()
            variance[half] += (chance * (1 - chance))[members].sum()
    assert (np.abs(hits - expected) < 5 * np.sqrt(variance) + 1).all(), (recipe, hits, expected)


def test_arcee_fusion_agrees_but_at_its_threshold(tmp_path: Path) -> None:
    """The same elements but for 0.05 %: its divergences are F32, and its quantiles are not exact."""
    family = make_models(tmp_path, "llama", ["F32"] * 2)
    recipe = Recipe("arcee_fusion", [1], 0)
    (theirs,) = mergekit([recipe], family, tmp_path / "out")
    assert not isinstance(theirs, str), theirs
    assert compare(recipe, family, theirs).share >= 0.9995
    for name, tensor in theirs.items():
        merged, unit = ref.widen(tensor.bits, "F32"), units(recipe, family, name)
        far = [np.abs(merged - family.values(i, name)) > unit for i in (0, 1)]
        assert not (far[0] & far[1]).any(), name
