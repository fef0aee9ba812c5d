"""Our merges are mergekit's, element by element, or docs/methods/differences.md says why not.

Both programs run the same file: `reasonvec merge`, and mergekit from PyPI in an environment of its
own. Only outputs are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from mergekit_peer import (
    HOME,
    PYTHON,
    VERSION,
    Family,
    Mergekit,
    Recipe,
    Tensors,
    Value,
    make_models,
)
from numpy.typing import NDArray
from shards import read_checkpoint

import reasonvec as rv
from reasonvec import reference as ref
from reasonvec.json_values import Json
from reasonvec.merging.method import Numerics
from reasonvec.merging.methods import METHODS
from reasonvec.reference import Dtype, Work

pytestmark = [
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason=f"no mergekit {VERSION} at {HOME}: `make agreement` installs it, "
        "REASONVEC_MERGEKIT names another",
    ),
    pytest.mark.timeout(600),
]

ARCHITECTURES = ["llama", "qwen2", "mixtral", "gemma"]
MIXED: list[Dtype] = ["BF16", "F16", "F32", "BF16"]


class Both:
    """The two programs, for one recipe after another."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.peer = Mergekit(scratch / "mergekit.log")
        self.count = 0

    def merge(
        self, recipe: Recipe, family: Family, numerics: Numerics = "default"
    ) -> tuple[Tensors, Tensors]:
        """What both make of a recipe: ours, mergekit's."""
        return self.run(recipe.config(family), numerics, recipe.seed or 0)

    def run(
        self, config: object, numerics: Numerics = "default", seed: int = 0
    ) -> tuple[Tensors, Tensors]:
        """What both make of a file."""
        self.count += 1
        file = self.scratch / f"{self.count:04}.yml"
        file.write_text(json.dumps(config))  # JSON is YAML.
        ours, theirs = file.with_suffix(".ours"), file.with_suffix(".theirs")
        rv.read_config(file, strict=True).save(
            ours, numerics=numerics, seed=seed, sync=False, card=False
        )
        problem = self.peer.merge(config, theirs, random_seed=seed)
        assert problem is None, f"{config}: {problem}"
        return read_checkpoint(ours), read_checkpoint(theirs)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """Both programs, ready."""
    found = Both(tmp_path_factory.mktemp("merges"))
    yield found
    found.peer.close()


# The comparison


class Agreement(NamedTuple):
    """How far two outputs are from each other."""

    elements: int
    apart: int
    """Elements that are further apart than they may be, and not `undecided`."""
    undecided: int
    """Elements that are as far apart, but could have been chosen by either."""

    @property
    def share(self) -> float:
        """The share of elements that are near."""
        return 1 - self.apart / self.elements


def ordinals(bits: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """Places on the line of all numbers of a format: neighbours differ by one, both zeros are 0."""
    width = 8 * bits.dtype.itemsize - 1
    size = bits.astype(np.int64) & ((1 << width) - 1)
    return np.where(bits >> bits.dtype.type(width) == 1, -size, size)


def units(recipe: Recipe, family: Family, name: str, dtype: Dtype = "F32") -> NDArray[np.float64]:
    """One unit in the last place of a format at the largest operand of every element."""
    sizes = [np.abs(family.values(i, name)) for i in {*recipe.models, recipe.base or 0}]
    _, exponent = np.frexp(np.maximum.reduce(sizes).astype(np.float64))
    return np.ldexp(1.0, exponent - {"BF16": 8, "F16": 11, "F32": 24}[dtype])


def spread(recipe: Recipe, family: Family, name: str) -> list[Work]:
    """What a method that keeps the largest of something orders its elements by."""
    assert recipe.base is not None
    base = family.values(recipe.base, name)
    models = [family.values(i, name) for i in recipe.models]
    moves = ref.tasks(models, base, None if recipe.dtype == "F32" else recipe.dtype)
    if recipe.method != "sce":
        return [np.abs(d) for d in moves]
    mean = (sum(moves[1:], moves[0]) / np.float32(len(moves))).astype(np.float32)
    return [np.sum([(d - mean) ** 2 for d in moves], 0, dtype=np.float32)]


def undecided(recipe: Recipe, family: Family, name: str) -> NDArray[np.bool_]:
    """Elements as large as the last that stays, or the first that goes: any of them may be taken.

    We take those with the lowest index, mergekit others.
    """
    found = np.zeros(family.values(0, name).size, np.bool_)
    if recipe.method not in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce"):
        return found
    each = recipe.each or [{}] * len(recipe.models)
    for place, size in enumerate(spread(recipe, family, name)):
        said = {"density": 1.0, "gamma": 0.01, "select_topk": 1.0, **recipe.parameters}
        density, gamma, topk = (
            {**said, **each[place]}[k] for k in ("density", "gamma", "select_topk")
        )
        assert isinstance(density, float)
        assert isinstance(gamma, float)
        assert isinstance(topk, float)
        n, first = size.size, 0
        if recipe.method == "sce":
            kept = n if topk >= 1 else int(topk * np.count_nonzero(size))
        else:
            kept = n if density >= 1 else int(density * n)
            first = 0 if recipe.method == "ties" else min(int(gamma * n), n - kept)
        ordered = np.sort(size)[::-1]
        for edge in (first, first + kept):
            if 0 < edge < n and np.isclose(ordered[edge - 1], ordered[edge], rtol=1e-6, atol=0):
                found |= np.isclose(size, ordered[edge], rtol=1e-6, atol=0)
    return found


def swing(
    recipe: Recipe, family: Family, name: str, free: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """How far the choice among the `undecided` may carry every other element.

    The weights of sce are sums of squares over the chosen elements, divided by their total.
    """
    assert recipe.base is not None
    base = family.values(recipe.base, name).astype(np.float64)
    moves = np.stack([family.values(i, name) - base for i in recipe.models])
    squares = (moves**2).sum(0)
    share = 2 * squares[free].sum() / max(squares.sum() - squares[free].sum(), 1e-300)
    return np.asarray(share * np.abs(moves).sum(0))


def compare(recipe: Recipe, family: Family, ours: Tensors, theirs: Tensors) -> Agreement:
    """Every tensor of a recipe: elements of 16 bits may be one unit in the last place apart.

    F32 outputs may be sixteen units of the largest operand apart: F32 is also the format in which
    both compute. Orders of operations differ, and so do coefficients, whose norms and products are
    F32 there and F64 here.
    """
    assert set(theirs) == set(ours)
    elements = apart = open_ = 0
    for name, tensor in theirs.items():
        if recipe.parameters.get("nuslerp_row_wise") and len(tensor.shape) > 2:
            continue  # Its vectors run across the experts: see docs/methods/differences.md.
        mine = ours[name]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
        if recipe.output == "F32":
            a, b = (ref.widen(x.bits, "F32", "F64") for x in (mine, tensor))
            far = np.abs(a - b) > 16 * units(recipe, family, name)
        else:
            far = np.abs(ordinals(mine.bits) - ordinals(tensor.bits)) > 1
        free = undecided(recipe, family, name)
        if recipe.method == "sce" and free.any():
            a, b = (ref.widen(x.bits, recipe.output, "F64") for x in (mine, tensor))
            room = units(recipe, family, name, recipe.output) + swing(recipe, family, name, free)
            far &= np.abs(a - b) > room
        elements += far.size
        apart += int(np.count_nonzero(far & ~free))
        open_ += int(np.count_nonzero(far & free))
    return Agreement(elements, apart, open_)


def agree(
    both: Both, name: str, recipe: Recipe, family: Family, numerics: Numerics = "default"
) -> None:
    """Runs both, and asks for 99.99 % of the elements."""
    found = compare(recipe, family, *both.merge(recipe, family, numerics))
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
def test_every_method_agrees(architecture: str, both: Both, tmp_path: Path) -> None:
    """Models of mixed formats, computed in float32, written as bfloat16: 99.99 % within one ulp."""
    family = make_models(tmp_path, architecture, MIXED)
    for name, recipe in RECIPES.items():
        agree(both, name, replace(recipe, out_dtype="BF16"), family)


@pytest.mark.parametrize("out", ["F16", "F32"])
def test_every_method_agrees_in_other_formats(out: Dtype, both: Both, tmp_path: Path) -> None:
    """F32 models written as float16 and float32."""
    family = make_models(tmp_path, "llama", ["F32"] * 4, seed=1)
    for name, recipe in RECIPES.items():
        agree(both, name, replace(recipe, out_dtype=out), family)


WEIGHT = st.floats(0.05, 2.0).map(lambda x: round(x, 3))
# At least an element of the smallest tensor, which has 16: see docs/methods/differences.md.
SHARE = st.floats(0.063, 1.0).map(lambda x: round(x, 3))


@st.composite
def drawn(draw: st.DrawFn) -> tuple[str, Recipe]:
    """A recipe with other weights, densities and parameters, for F32 work."""
    name = draw(st.sampled_from(sorted(RECIPES)))
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
    return name, replace(recipe, each=each, parameters=common)


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@example(  # One chosen element of many equal ones moves the weights of all of them.
    ("sce", replace(RECIPES["sce"], parameters={"select_topk": 0.9843885438589128})),
    ["BF16"] * 4,
    "F16",
    "mixtral",
    199878958,
)
@given(
    drawn(),
    st.lists(st.sampled_from(["BF16", "F16", "F32"]), min_size=4, max_size=4),
    st.sampled_from(["BF16", "F16"]),
    st.sampled_from(ARCHITECTURES),
    st.integers(0, 2**32),
)
def test_any_parameters_agree(
    both: Both,
    tmp_path_factory: pytest.TempPathFactory,
    recipe: tuple[str, Recipe],
    dtypes: list[Dtype],
    out: Dtype,
    architecture: str,
    seed: int,
) -> None:
    """Any weights, densities, thresholds, formats and models."""
    family = make_models(tmp_path_factory.mktemp("drawn"), architecture, dtypes, seed)
    agree(both, recipe[0], replace(recipe[1], out_dtype=out), family)


def test_task_arithmetic_is_equal_in_f32(both: Both, tmp_path: Path) -> None:
    """With its numerics the order of operations is mergekit's, and so is every bit."""
    family = make_models(tmp_path, "llama", ["F32"] * 4, seed=1)
    for name in ("task_arithmetic", "task_arithmetic mean"):
        ours, theirs = both.merge(RECIPES[name], family, "mergekit")
        assert ours == theirs, name


@pytest.mark.parametrize("work", ["BF16", "F16"])
def test_work_in_16_bits(work: Dtype, both: Both, tmp_path: Path) -> None:
    """With ``dtype: bfloat16`` mergekit rounds after every step. With its numerics we do the same
    where steps are known; elsewhere we round once, and are within four units of the largest
    operand."""
    family = make_models(tmp_path, "llama", [work] * 4, seed=1)
    for name, recipe in RECIPES.items():
        if METHODS[recipe.method].stepwise:
            agree(both, name, replace(recipe, dtype=work), family, "mergekit")
    for name in ("linear", "slerp", "nuslerp", "karcher", "model_stock", "nearswap"):
        recipe = replace(RECIPES[name], dtype=work)
        ours, theirs = both.merge(recipe, family)
        for key in theirs:
            a, b = (ref.widen(x[key].bits, work, "F64") for x in (ours, theirs))
            far = np.abs(a - b) > 4 * units(recipe, family, key, work)
            assert np.count_nonzero(far) <= 1 + 0.0005 * far.size, (name, key)


@pytest.mark.parametrize("numerics", ["default", "mergekit"])
def test_what_counts_as_zero(numerics: Numerics, both: Both, tmp_path: Path) -> None:
    """Tiny updates: mergekit weighs them alike in sce, and takes them for no direction in
    model_stock; we do so with its numerics only."""
    family = make_models(tmp_path, "llama", ["F32"] * 4, steps=(2e-5, 4e-5, 8e-5))
    for name in ("sce", "sce all", "model_stock", "model_stock rows"):
        recipe = replace(RECIPES[name], out_dtype="F32")
        ours, theirs = both.merge(recipe, family, numerics)
        apart = 0
        for key, tensor in theirs.items():
            base, *found = (
                ref.widen(x.bits, "F32", "F64") for x in (family.tensors[0][key], ours[key], tensor)
            )
            a, b = (x - base for x in found)
            apart += int(np.count_nonzero((np.abs(a - b) > 1e-6) & ~undecided(recipe, family, key)))
        elements = sum(x.bits.size for x in theirs.values())
        if numerics == "mergekit":
            assert apart <= 1e-4 * elements, name
        elif name != "model_stock":  # Most tensors are long enough, taken as a whole.
            assert apart > 0.1 * elements, name


def test_random_methods_agree_but_for_the_dice(both: Both, tmp_path: Path) -> None:
    """Given the elements that mergekit kept, our sum is its output; and it keeps as many as we do.

    One model, whose every element moved, so that a kept element shows.
    """
    family = make_models(tmp_path, "llama", ["F32"] * 2, moved=1.0)
    for method, epsilon in (
        ("dare_linear", 0.0),
        ("dare_ties", 0.0),
        ("della", 0.2),
        ("della_linear", 0.2),
    ):
        for density in (0.3, 0.7):
            each = (
                weighted(0.6, density=density)
                if not epsilon
                else weighted(0.6, density=density, epsilon=epsilon)
            )
            recipe = Recipe(method, [1], 0, {}, each, seed=7)
            ours, theirs = both.merge(recipe, family, "mergekit")
            assert_same_but_for_the_dice(recipe, family, ours, theirs, density, epsilon)


def assert_same_but_for_the_dice(
    recipe: Recipe,
    family: Family,
    ours: Tensors,
    theirs: Tensors,
    density: float,
    epsilon: float,
) -> None:
    """The sum, by the mask that an output shows; and the size of that mask, above and below."""
    normalize = recipe.method == "della"
    hits, expected, variance = np.zeros((2, 2)), np.zeros((2, 1)), np.zeros((2, 1))
    for name in theirs:
        base, model = family.values(0, name), family.values(1, name)
        (d,) = ref.tasks([model], base)
        shape = family.shape(name)
        columns = shape[-1] if len(shape) > 1 else d.size
        chance = ref.della_probabilities(d, columns, density, epsilon)
        large = chance > density
        for program, tensor in enumerate((ours[name], theirs[name])):
            merged = ref.widen(tensor.bits, "F32")
            kept = merged != base
            scale = ref.rescaled(d, kept, density, "l1")
            u = ref.consensus([d], [kept], [0.6], [scale], False, normalize)
            # mergekit's sum of magnitudes is F32, so its factor is not ours to the last place.
            bound = 4 * units(recipe, family, name) + 1e-5 * np.abs(u)
            assert (np.abs(base + u - merged) <= bound).all(), (recipe, name, program)
            for half, members in enumerate((large, ~large)):
                hits[half, program] += np.count_nonzero(kept & members)
        for half, members in enumerate((large, ~large)):
            expected[half] += chance[members].sum()
            variance[half] += (chance * (1 - chance))[members].sum()
    assert (np.abs(hits - expected) < 5 * np.sqrt(variance) + 1).all(), (recipe, hits, expected)


def test_arcee_fusion_agrees_but_at_its_threshold(both: Both, tmp_path: Path) -> None:
    """The same elements but for 0.1 %, by divergences in F32; the smaller the updates, the more of
    a divergence in F32 is rounding, and the more elements are chosen by it."""
    shares = []
    for step in (0.02, 0.001):
        family = make_models(tmp_path / str(step), "llama", ["F32"] * 2, moved=1.0, steps=[step])
        recipe = Recipe("arcee_fusion", [1], 0)
        ours, theirs = both.merge(recipe, family)
        shares.append(compare(recipe, family, ours, theirs).share)
        for name, tensor in theirs.items():
            merged, unit = ref.widen(tensor.bits, "F32"), units(recipe, family, name)
            far = [np.abs(merged - family.values(i, name)) > unit for i in (0, 1)]
            assert not (far[0] & far[1]).any(), name
    assert shares[0] >= 0.999
    assert 0.9 < shares[1] < shares[0]


# What files mean


def source(model: int, layers: tuple[int, int] | None = None, **parameters: object) -> Json:
    """An entry of `models` or `sources`."""
    found: Json = {"model": model}
    if layers is not None:
        found["layer_range"] = list(layers)
    return found | ({"parameters": parameters} if parameters else {})


def part(*sources: Json, **parameters: object) -> Json:
    """A slice."""
    return {"sources": list(sources)} | ({"parameters": parameters} if parameters else {})


def sliced(*parts: Json) -> Json:
    return {"slices": list(parts)}


def of(*models: Json) -> Json:
    return {"models": list(models)}


BOTH_LAYERS, FIRST, SECOND = (0, 2), (0, 1), (1, 2)
FILTERS = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
MEANINGS: dict[str, tuple[str, int | None, Json, Json]] = {
    "layers stacked": (
        "passthrough", None, {},
        sliced(part(source(1, BOTH_LAYERS)), part(source(2, SECOND)), part(source(3, FIRST))),
    ),
    "layers scaled by name": (
        "passthrough", None, {},
        sliced(
            part(source(1, BOTH_LAYERS)),
            part(source(1, BOTH_LAYERS, scale=[{"filter": "o_proj", "value": 0.0}, {"value": 0.5}])),
        ),
    ),
    "filters with gradients": (
        "slerp", 1, {"t": FILTERS}, sliced(part(source(1, BOTH_LAYERS), source(2, BOTH_LAYERS))),
    ),
    "gradients of slices of one layer": (
        "slerp", 1, {"t": 0.5},
        sliced(
            part(source(1, FIRST), source(2, FIRST), t=0.2),
            part(source(1, SECOND), source(2, SECOND), t=[0.6, 0.9]),
        ),
    ),
    "source before slice before all": (
        "linear", None, {"weight": 0.5},
        sliced(
            part(source(1, FIRST, weight=0.9), source(2, FIRST), weight=0.3),
            part(source(1, SECOND), source(2, SECOND, weight=[0.2, 0.8])),
        ),
    ),
    "gradients over a model": (
        "linear", None, {},
        of(
            source(1, weight=[0.1, 0.9]),
            source(2, weight=[{"filter": "mlp", "value": [1.0, 0.25, 0.5]}, {"value": 0.7}]),
        ),
    ),
    "a star fits all": (
        "task_arithmetic", 0,
        {"weight": [{"filter": "mlp", "value": [0.1, 0.9]}, {"filter": "*", "value": 0.4}]},
        of(source(1), source(2, weight=0.2)),
    ),
    "a filter that fits nowhere": (
        "task_arithmetic", 0, {"weight": 0.6},
        of(source(1, weight=[{"filter": "mlp", "value": 0.3}]), source(2)),
    ),
    "a module": (
        "linear", None, {},
        {"modules": {"default": sliced(part(source(1, BOTH_LAYERS, weight=0.2), source(2, BOTH_LAYERS, weight=0.5)))}},
    ),
    "densities over layers": (
        "ties", 0, {"normalize": True, "int8_mask": True},
        of(
            source(1, density=[1, 0.7, 0.1], weight=1.0),
            source(2, density=0.5, weight=[0, 0.3, 0.7, 1]),
            source(3, density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
        ),
    ),
    "a base that is listed": (
        "ties", 0, {}, of(source(0), source(1, density=0.5, weight=0.5), source(2, weight=0.5)),
    ),
    "a base that is one model more": ("karcher", 0, {}, of(source(1), source(2))),
    "other layers of another model": (
        "linear", None, {},
        sliced(
            part(source(1, FIRST, weight=0.5), source(2, SECOND, weight=0.25)),
            part(source(1, SECOND, weight=0.5), source(2, FIRST, weight=0.75)),
        ),
    ),
}  # fmt: skip
"""Method, base, parameters and the rest of a file, by what it says."""


def folders_in(value: object, folders: Sequence[Path]) -> object:
    """The same, with folders in place of the numbers of models."""
    if isinstance(value, list):
        return [folders_in(entry, folders) for entry in value]
    if isinstance(value, dict):
        found = {key: folders_in(entry, folders) for key, entry in value.items()}
        if isinstance(value.get("model"), int):
            found["model"] = str(folders[value["model"]])
        return found
    return value


@pytest.mark.parametrize("meaning", MEANINGS)
def test_a_file_means_the_same(meaning: str, both: Both, tmp_path: Path) -> None:
    """Slices, modules, gradients, filters, precedence, the base."""
    family = make_models(tmp_path, "llama", ["F32"] * 4, seed=9)
    method, base, parameters, rest = MEANINGS[meaning]
    config: Json = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}
    config |= {"parameters": parameters} | rest
    if base is not None:
        config["base_model"] = str(family.folders[base])
    ours, theirs = both.run(folders_in(config, family.folders))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        mine = ours[name]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
        assert (np.abs(ordinals(mine.bits) - ordinals(tensor.bits)) <= 1).all(), name
