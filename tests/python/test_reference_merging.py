"""The reference of every merge method: against loops that share no code with it, and its laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reasonvec import reference as ref
from reasonvec.reference import Rescale, Work

PATIENT = settings(deadline=None)
COLUMNS = 8
SIZE = 6 * COLUMNS
F32 = NDArray[np.float32]


def vectors(count: int, size: int = SIZE, seed: int = 0) -> list[F32]:
    dice = np.random.default_rng(seed)
    return [dice.normal(size=size).astype(np.float32) for _ in range(count)]


def coarse(count: int, seed: int, size: int = SIZE) -> list[F32]:
    """Vectors of few values, so that magnitudes are often equal, and often zero."""
    dice = np.random.default_rng(seed)
    return [dice.integers(-3, 4, size).astype(np.float32) for _ in range(count)]


SEEDS = st.integers(0, 2**32)
DENSITY = st.floats(0.0, 1.0)

Method = Callable[[Sequence[Work], Work], Work]
METHODS: dict[str, Method] = {
    "linear": lambda x, b: ref.linear(x, [0.5, 0.3]),
    "passthrough": lambda x, b: ref.passthrough(x[0], 0.3),
    "task_arithmetic": lambda x, b: ref.task_arithmetic(x, b, [0.5, 0.3]),
    "slerp": lambda x, b: ref.slerp(x[0], x[1], 0.3),
    "nuslerp": lambda x, b: ref.nuslerp(x, [0.5, 0.3], COLUMNS, b),
    "nuslerp rows": lambda x, b: ref.nuslerp(x, [0.5, 0.3], COLUMNS, b, False, True),
    "nuslerp columns": lambda x, b: ref.nuslerp(x, [0.5, 0.3], COLUMNS, b, False, False),
    "multislerp": lambda x, b: ref.multislerp(x, [0.5, 0.3], b),
    "karcher": lambda x, b: ref.karcher(x),
    "model_stock": lambda x, b: ref.model_stock(x, b, COLUMNS),
    "model_stock rows": lambda x, b: ref.model_stock(x, b, COLUMNS, True),
    "ties": lambda x, b: ref.ties(x, b, [0.5, 0.3], [0.5, 0.4]),
    "dare_linear": lambda x, b: ref.dare(x, b, [0.5, 0.3], [0.5, 0.4], 1, "w", False),
    "dare_ties": lambda x, b: ref.dare(x, b, [0.5, 0.3], [0.5, 0.4], 1, "w", True),
    "dare l1": lambda x, b: ref.dare(x, b, [0.5, 0.3], [0.5, 0.4], 1, "w", True, rescale="l1"),
    "della": lambda x, b: ref.della(
        x, b, [0.5, 0.3], [0.5, 0.4], [0.1, 0.1], 1, "w", COLUMNS, True, True
    ),
    "breadcrumbs": lambda x, b: ref.breadcrumbs(x, b, [0.5, 0.3], [0.5, 0.4], [0.1, 0.1], True),
    "sce": lambda x, b: ref.sce(x, b, 0.4),
    "ram": lambda x, b: ref.ram(x, b, True, 0.3),
    "nearswap": lambda x, b: ref.nearswap(b, x[0], 0.3),
    "arcee_fusion": lambda x, b: ref.arcee_fusion(x[0], b, COLUMNS),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_in_the_format_of_its_inputs(method: str) -> None:
    """F32 in, F32 out; F64 in, F64 out, and near the F32 result; no method changes its inputs."""
    inputs = vectors(3)
    before = [x.copy() for x in inputs]
    single = METHODS[method](inputs[:2], inputs[2])
    np.testing.assert_array_equal(inputs, before)
    doubles = [x.astype(np.float64) for x in inputs]
    double = METHODS[method](doubles[:2], doubles[2])
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    assert single.shape == double.shape == (SIZE,)
    np.testing.assert_allclose(single, double, rtol=1e-5, atol=1e-6)


# Rounding


def test_merged_rounds_once_and_keeps_what_did_not_move() -> None:
    """Base plus update is rounded once; an element without update keeps its bits, -0.0 too."""
    base = ref.narrow(np.float32([-0.0, 1.0, 1.0]), "BF16")
    bits = ref.merged(np.float32([0.0, 0.0, 0.00390625]), "BF16", base, "BF16")
    assert bits.tolist() == [0x8000, 0x3F80, 0x3F80]  # 1 + 2^-8 is half way, and goes to even
    assert ref.merged(np.float32([-0.0]), "BF16").tolist() == [0x8000]


# Linear


def test_linear_is_the_weighted_mean() -> None:
    """Against NumPy's average; and without normalizing, the sum."""
    inputs = vectors(3)
    mean = np.average(np.array(inputs, np.float64), axis=0, weights=[1, 2, 5])
    np.testing.assert_allclose(ref.linear(inputs, [1, 2, 5]), mean, rtol=1e-5, atol=1e-6)
    total = ref.linear(inputs, [1, 2, 5], normalize=False)
    np.testing.assert_allclose(total, 8 * mean, rtol=1e-5, atol=1e-5)


def test_linear_does_not_depend_on_the_size_of_the_weights() -> None:
    """Weights times a power of two give the same bits; a sum of zero is refused."""
    inputs = vectors(2)
    np.testing.assert_array_equal(ref.linear(inputs, [1, 3]), ref.linear(inputs, [4, 12]))
    with pytest.raises(ValueError, match="add up to zero"):
        ref.linear(inputs, [1.0, -1.0])


def test_lines_runs_from_alpha_to_alpha_plus_beta() -> None:
    """First layer alpha, last alpha + beta, and a single layer alpha."""
    assert ref.lines(0, 24, 0.25, 0.5) == 0.25
    assert ref.lines(23, 24, 0.25, 0.5) == 0.75
    assert ref.lines(0, 1, 0.25, 0.5) == 0.25


# Gram


@PATIENT
@given(SEEDS)
def test_slerp_ends_at_its_models(seed: int) -> None:
    """t = 0 is a and t = 1 is b, bit for bit; from b to a is the same way back."""
    a, b = vectors(2, seed=seed)
    np.testing.assert_array_equal(ref.slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(ref.slerp(a, b, 1.0), b)
    there, back = ref.slerp(a, b, 0.25), ref.slerp(b, a, 0.75)
    np.testing.assert_allclose(there, back, rtol=1e-5, atol=1e-6)


def test_slerp_keeps_the_length_and_divides_the_angle() -> None:
    """Between unit vectors the result is one, at t of the angle."""
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64)) for x in vectors(2))
    c = ref.slerp(a, b, 0.3)
    assert np.linalg.norm(c) == pytest.approx(1.0, abs=1e-14)
    assert math.acos(a @ c) == pytest.approx(0.3 * math.acos(a @ b), abs=1e-14)


def test_slerp_of_vectors_on_a_line_is_linear() -> None:
    """Parallel, opposite and equal vectors are interpolated without an angle."""
    a = vectors(1)[0]
    for b in (a, 2 * a, -a):
        np.testing.assert_array_equal(
            ref.slerp(a, b, 0.25), ref.combine([a, b], [0.75, 0.25], "F32")
        )


def test_nuslerp_of_rows_is_slerp_of_each_row() -> None:
    """Rows one by one; columns are the rows of the transpose; flat is slerp; one row is flat."""
    a, b = vectors(2)
    rows = [
        ref.slerp(a[i : i + COLUMNS], b[i : i + COLUMNS], 0.25) for i in range(0, SIZE, COLUMNS)
    ]
    found = ref.nuslerp([a, b], [3.0, 1.0], COLUMNS, flatten=False, row_wise=True)
    np.testing.assert_array_equal(found, np.concatenate(rows))
    columns = ref.nuslerp([a, b], [3.0, 1.0], COLUMNS, flatten=False, row_wise=False)
    turned = [x.reshape(-1, COLUMNS).T.ravel() for x in (a, b)]
    by_row = ref.nuslerp(turned, [3.0, 1.0], SIZE // COLUMNS, flatten=False, row_wise=True)
    np.testing.assert_allclose(columns, by_row.reshape(COLUMNS, -1).T.ravel(), rtol=1e-5, atol=1e-6)
    flat = ref.nuslerp([a, b], [3.0, 1.0], COLUMNS)
    np.testing.assert_array_equal(flat, ref.slerp(a, b, 0.25))
    alone = ref.nuslerp([a, b], [3.0, 1.0], SIZE, flatten=False, row_wise=False)
    np.testing.assert_array_equal(alone, flat)


def test_multislerp_is_the_mean_direction_at_the_mean_length() -> None:
    """Against the plain computation on whole vectors, with and without a base."""
    *models, base = vectors(4)
    weights = [0.5, 0.3, 0.2]
    for origin in (None, base):
        deltas = [x.astype(np.float64) - (0 if origin is None else origin) for x in models]
        norms = [np.linalg.norm(d) for d in deltas]
        mean = sum(w * d / n for w, d, n in zip(weights, deltas, norms, strict=True))
        length = sum(w * n for w, n in zip(weights, norms, strict=True))
        wanted = mean / np.linalg.norm(mean) * length
        found = ref.multislerp(models, weights, origin)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def riemannian_mean(units: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of unit vectors [k, n], by walking on whole vectors."""
    m = units.mean(axis=0)
    m /= np.linalg.norm(m)
    for _ in range(200):
        step = np.zeros_like(m)
        for v in units:
            across = v - (m @ v) * m
            step += math.acos(min(1.0, m @ v)) * across / np.linalg.norm(across)
        step /= len(units)
        length = float(np.linalg.norm(step))
        if length < 1e-14:
            break
        m = math.cos(length) * m + math.sin(length) * step / length
        m /= np.linalg.norm(m)
    return m


@PATIENT
@given(SEEDS, st.integers(2, 5))
def test_karcher_is_the_riemannian_mean(seed: int, count: int) -> None:
    """The iteration on coefficients ends where one on whole vectors does, times the mean norm."""
    common = vectors(1, seed=seed + 1)[0]
    models = [(x + 2 * common).astype(np.float64) for x in vectors(count, seed=seed)]
    units = np.array([x / np.linalg.norm(x) for x in models])
    length = np.mean([np.linalg.norm(x) for x in models])
    found = ref.karcher(models, max_iter=200, tol=1e-13)
    np.testing.assert_allclose(found, riemannian_mean(units) * length, atol=1e-9)


def test_karcher_of_two_is_half_way_and_of_equals_is_the_model() -> None:
    """Two models of one norm: slerp at 0.5. The same model again and again: itself."""
    a, b = vectors(2)
    b = (b * (np.linalg.norm(a) / np.linalg.norm(b))).astype(np.float32)
    np.testing.assert_allclose(ref.karcher([a, b]), ref.slerp(a, b, 0.5), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ref.karcher([a, a, a]), a, rtol=1e-6)


def test_karcher_with_zeros_and_opposites() -> None:
    """Only zeros: zero. A zero shortens the mean; opposites have no mean, and the first leads."""
    a = vectors(1)[0]
    zero = np.zeros_like(a)
    assert not ref.karcher([zero, zero]).any()
    np.testing.assert_allclose(ref.karcher([a, zero]), a / 2, rtol=1e-6)
    np.testing.assert_allclose(ref.karcher([a, -a]), a, rtol=1e-6)


def test_model_stock_is_its_formula() -> None:
    """Whole tensors and rows, against the formula on vectors."""
    *models, base = vectors(4)
    for filter_wise, size in ((False, SIZE), (True, COLUMNS)):
        found = ref.model_stock(models, base, COLUMNS, filter_wise)
        for start in range(0, SIZE, size):
            d = [(x - base)[start : start + size].astype(np.float64) for x in models]
            unit = [x / np.linalg.norm(x) for x in d]
            c = np.mean([unit[0] @ unit[1], unit[0] @ unit[2], unit[1] @ unit[2]])
            wanted = 3 * c / (1 + 2 * c) * np.mean(d, axis=0)
            np.testing.assert_allclose(found[start : start + size], wanted, rtol=1e-4, atol=1e-5)


def test_model_stock_trusts_equal_models_and_not_unrelated_ones() -> None:
    """Equal task vectors: all the way. At right angles: nowhere. Opposite ones: nowhere."""
    base = np.zeros(4, np.float32)
    a, b = np.float32([1, 0, 0, 0]), np.float32([0, 1, 0, 0])
    np.testing.assert_array_equal(ref.model_stock([a, a], base, 4), a)
    for pair in ([a, b], [a, -a]):
        assert not ref.model_stock(pair, base, 4).any()


# Choices


@PATIENT
@given(SEEDS, DENSITY)
def test_largest_takes_exactly_k_and_of_equals_the_first(seed: int, density: float) -> None:
    """Against a sort of (magnitude, index) pairs, on vectors full of equal magnitudes."""
    v = coarse(1, seed)[0]
    ranked = sorted(range(SIZE), key=lambda i: (-abs(float(v[i])), i))
    k = int(density * SIZE)
    assert sorted(ranked[:k]) == np.flatnonzero(ref.largest(v, density)).tolist()
    assert ref.largest(v, 1.0).all()


def test_random_masks_are_functions_of_place_and_names() -> None:
    """A shorter tensor has the same beginning; seed, name and model each change the mask."""
    mask = ref.random_mask(0.3, 5000, 1, "w", 0)
    np.testing.assert_array_equal(ref.random_mask(0.3, 1234, 1, "w", 0), mask[:1234])
    for seed, name, model in ((2, "w", 0), (1, "v", 0), (1, "w", 1)):
        other = ref.random_mask(0.3, 5000, seed, name, model)
        assert 0.52 < np.mean(mask == other) < 0.64  # 0.58 if they know nothing of each other
    assert abs(mask.mean() - 0.3) < 0.03
    assert ref.random_mask(1.0, 999, 1, "w", 0).all()
    assert not ref.random_mask(0.0, 999, 1, "w", 0).any()
    # What stays at a lower density stays at a higher one.
    assert (ref.random_mask(0.5, 5000, 1, "w", 0) >= mask).all()


def test_the_words_of_a_mask() -> None:
    """Element j is word j % 4 of counter j // 4 under the documented key, below floor(p 2^32)."""
    p, seed, name, model = 0.37, 5, "layer.weight", 2
    key = ref.key64(seed ^ ref.splitmix64(model + 1), name, 3)
    mask = ref.random_mask(p, 9, seed, name, model)
    for j in range(9):
        counter = np.array([[j // 4, 0, 0, 0]], np.uint32)
        word = ref.philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))[0, j % 4]
        assert mask[j] == (int(word) < math.floor(p * 2**32))


@PATIENT
@given(SEEDS, st.floats(0.2, 0.8), st.floats(0.0, 0.2))
def test_della_probabilities_follow_the_rank_in_the_row(
    seed: int, density: float, epsilon: float
) -> None:
    """Row by row: mean density, ends density +- epsilon, never higher for a smaller magnitude."""
    v = coarse(1, seed)[0]
    chances = ref.della_probabilities(v, COLUMNS, density, epsilon).reshape(-1, COLUMNS)
    for row, chance in zip(v.reshape(-1, COLUMNS), chances, strict=True):
        ranked = sorted(range(COLUMNS), key=lambda i: (-abs(float(row[i])), i))
        falling = [density + epsilon - 2 * epsilon * r / (COLUMNS - 1) for r in range(COLUMNS)]
        np.testing.assert_allclose(chance[ranked], falling, atol=1e-12)
    assert ref.della_probabilities(v[:3], 1, density, epsilon).tolist() == [density] * 3


# Masked sums


def elected(parts: list[list[float]], weights: list[float], normalize: bool) -> list[float]:
    """Sign election in plain Python: ``parts`` are weighted, and small integers, so exact."""
    out = []
    for j in range(len(parts[0])):
        sign = 1 if sum(part[j] for part in parts) >= 0 else -1
        agree = [i for i, part in enumerate(parts) if part[j] * sign > 0]
        total = sum(parts[i][j] for i in agree)
        count = sum(weights[i] for i in agree)
        out.append(total / count if normalize and agree else total)
    return out


@PATIENT
@given(SEEDS, DENSITY, st.booleans())
def test_ties_is_trim_elect_merge(seed: int, density: float, normalize: bool) -> None:
    """Against a loop over elements; weights are powers of two, so that the loop is exact."""
    *models, base = coarse(4, seed)
    weights = [1.0, 2.0, 0.5]
    parts = []
    for x, w in zip(models, weights, strict=True):
        d = (x - base).tolist()
        ranked = sorted(range(SIZE), key=lambda i: (-abs(d[i]), i))
        stay = set(ranked[: int(density * SIZE)])
        parts.append([w * d[i] if i in stay else 0.0 for i in range(SIZE)])
    found = ref.ties(models, base, weights, [density] * 3, normalize)
    np.testing.assert_array_equal(found, np.float32(elected(parts, weights, normalize)))


def test_ties_of_one_model_is_the_model() -> None:
    """At density 1 and any weight the update is the task vector; without normalizing, weighted."""
    model, base = coarse(2, 0)
    np.testing.assert_array_equal(ref.ties([model], base, [0.5], [1.0]), model - base)
    half = ref.ties([model], base, [0.5], [1.0], normalize=False)
    np.testing.assert_array_equal(half, (model - base) / 2)


def test_weights_that_cancel_divide_nothing() -> None:
    """Weights 1 and -1 whose products agree: the divisor would be 0, and is 1."""
    base = np.zeros(1, np.float32)
    models = [np.float32([2.0]), np.float32([-3.0])]
    assert ref.ties(models, base, [1.0, -1.0], [1.0, 1.0]).tolist() == [5.0]


@pytest.mark.parametrize("elect", [False, True])
def test_density_one_drops_nothing(elect: bool) -> None:
    """DARE, DELLA and breadcrumbs that keep everything are the sums without a mask."""
    *models, base = coarse(3, 3)
    w, one, small = [1.0, 0.5], [1.0, 1.0], [0.1, 0.1]
    everything = [np.ones(SIZE, np.bool_)] * 2
    plain = ref.consensus(ref.tasks(models, base), everything, w, one, elect, False)
    found = [
        ref.dare(models, base, w, one, 1, "w", elect),
        ref.della(models, base, w, one, small, 1, "w", COLUMNS, elect, False),
        ref.breadcrumbs(models, base, w, one, small, elect),
    ]
    for update in found:
        np.testing.assert_array_equal(update, plain)
    if not elect:
        np.testing.assert_array_equal(plain, ref.task_arithmetic(models, base, w))


def test_random_methods_are_right_on_average() -> None:
    """Rescaled by the probability, the mean over many seeds is the task vector: no bias."""
    model, base = vectors(2)
    d = (model - base).astype(np.float64)
    count = 2000
    for epsilon in (None, 0.2):
        total = np.zeros(SIZE)
        for seed in range(count):
            if epsilon is None:
                total += ref.dare([model], base, [1.0], [0.4], seed, "w", False)
            else:
                total += ref.della(
                    [model], base, [1.0], [0.4], [epsilon], seed, "w", COLUMNS, False, False
                )
        # The deviation of one draw is |d| sqrt((1 - p) / p), with p at least 0.2.
        bound = 5 * np.abs(d) * math.sqrt(4 / count)
        assert (np.abs(total / count - d) < bound).all()


@pytest.mark.parametrize(("rescale", "power"), [("none", None), ("l1", 1.0)])
def test_rescale(rescale: Rescale, power: float | None) -> None:
    """L1 restores the sum of magnitudes; none leaves the elements as they are."""
    model, base = vectors(2)
    d = model - base
    u = ref.dare([model], base, [1.0], [0.5], 3, "w", False, rescale=rescale)
    kept = u != 0
    assert 0 < kept.sum() < SIZE
    if power is None:
        np.testing.assert_array_equal(u[kept], d[kept])
    else:
        assert np.abs(u).sum() == pytest.approx(np.abs(d).sum(), rel=1e-5)


@PATIENT
@given(SEEDS, DENSITY, st.floats(0.0, 0.9))
def test_breadcrumbs_keeps_the_middle(seed: int, density: float, gamma: float) -> None:
    """Exactly k elements, after the largest; and without a gamma those of ties."""
    model, base = coarse(2, seed)
    d = model - base
    ranked = sorted(range(SIZE), key=lambda i: (-abs(float(d[i])), i))
    k = SIZE if density >= 1 else int(density * SIZE)
    top = min(int(gamma * SIZE), SIZE - k)
    wanted = np.zeros(SIZE, np.float32)
    middle = ranked[top : top + k]
    wanted[middle] = d[middle]
    found = ref.breadcrumbs([model], base, [1.0], [density], [gamma], False)
    np.testing.assert_array_equal(found, wanted)
    trimmed = ref.ties([model], base, [1.0], [density], normalize=False)
    none = ref.breadcrumbs([model], base, [1.0], [density], [0.0], True)
    np.testing.assert_array_equal(none, trimmed)


@PATIENT
@given(SEEDS, st.floats(0.0, 1.0))
def test_sce_selects_calculates_erases(seed: int, topk: float) -> None:
    """Against a loop in F64 over four models, whose mean is exact."""
    *models, base = coarse(5, seed)
    d = [(x - base).tolist() for x in models]
    spread = [sum((v[j] - sum(u[j] for u in d) / 4) ** 2 for v in d) for j in range(SIZE)]
    ranked = sorted(range(SIZE), key=lambda j: (-spread[j], j))
    moving = sum(s != 0 for s in spread)
    chosen = ranked if topk >= 1 else ranked[: int(topk * moving)]
    energy = [sum(v[j] ** 2 for j in chosen) for v in d]
    wanted = np.zeros(SIZE)
    for j in chosen if sum(energy) else []:
        sign = 1 if sum(v[j] for v in d) >= 0 else -1
        agree = [i for i in range(4) if d[i][j] * sign > 0 and energy[i]]
        if agree:
            weight = sum(energy[i] for i in agree)
            wanted[j] = sum(energy[i] * d[i][j] for i in agree) / weight
    np.testing.assert_allclose(ref.sce(models, base, topk), wanted, rtol=1e-5, atol=1e-6)


@PATIENT
@given(SEEDS, st.booleans())
def test_ram_shares_and_keeps(seed: int, plus: bool) -> None:
    """Against a loop: alone kept (and enlarged, if plus), shared averaged, small ones dropped."""
    *models, base = coarse(4, seed)
    d = [(x - base).tolist() for x in models]
    moved = [[abs(x) > 1.5 for x in v] for v in d]
    count = [sum(m[j] for m in moved) for j in range(SIZE)]
    wanted = np.zeros(SIZE)
    for v, m in zip(d, moved, strict=True):
        shared = sum(m[j] and count[j] > 1 for j in range(SIZE))
        alone = sum(m[j] and count[j] == 1 for j in range(SIZE))
        factor = 1 + 0.5 * min(shared / alone, 2.0) if plus and alone else 1.0
        for j in range(SIZE):
            if m[j]:
                wanted[j] += v[j] * factor if count[j] == 1 else v[j] / count[j]
    found = ref.ram(models, base, plus, 1.5, 0.5, 2.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@PATIENT
@given(SEEDS, st.floats(0.0, 3.0))
def test_nearswap_goes_t_far_at_most(seed: int, t: float) -> None:
    """b where it is near, else t towards it; which is what its usual formula says."""
    a, b = vectors(2, seed=seed)
    found = ref.nearswap(a, b, t)
    near = np.abs(b - a) <= np.float32(t)
    np.testing.assert_array_equal(found[near], b[near])
    weight = np.minimum(t / np.abs(a - b).astype(np.float64), 1.0)
    np.testing.assert_allclose(found, weight * b + (1 - weight) * a, rtol=1e-4, atol=1e-5)


def test_divergences_are_those_of_softmax() -> None:
    """Against the definition in F64, of rows far from each other and near, also of rows too large
    for exp; equal rows have none."""
    a, b = (x.astype(np.float64) for x in vectors(2))
    for shift in (0.0, 5000.0):
        x, y = a.reshape(-1, COLUMNS), b.reshape(-1, COLUMNS)
        p, q = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (y, x))
        wanted = (p * np.log(p / q)).sum(axis=1)
        found = ref.divergences(a + shift, b + shift, COLUMNS)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
        near = a + (b - a) / 64 / np.abs(b - a).max() * 0.99
        p = np.exp(near.reshape(-1, COLUMNS)) / np.exp(near.reshape(-1, COLUMNS)).sum(1)[:, None]
        wanted = (p * np.log(p / (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)))).sum(axis=1)
        found = ref.divergences(a + shift, near + shift, COLUMNS)
        np.testing.assert_allclose(found, wanted, rtol=1e-7)
    assert not ref.divergences(a, a, COLUMNS).any()


def test_quantile_is_linear_between_neighbours() -> None:
    """As NumPy's default, for sizes that divide by four and that do not."""
    for size in (1, 2, 7, 48, 101):
        ordered = np.sort(vectors(1, size)[0])
        for q in (0.0, 0.25, 0.5, 0.75, 1.0):
            wanted = np.quantile(ordered.astype(np.float64), q)
            assert ref.quantile(ordered, q) == pytest.approx(wanted, rel=1e-12)


def test_arcee_fusion_keeps_what_stands_out() -> None:
    """Whole elements of the model or of the base, the most important first; outliers only."""
    base = vectors(1, 640)[0]
    dice = np.random.default_rng(1)
    step = dice.normal(0, 0.01, 640).astype(np.float32)
    step[::40] *= 100
    model = base + step
    u = ref.arcee_fusion(model, base, 64)
    d = model - base
    assert ((u == 0) | (u == d)).all()
    weight = np.repeat(ref.divergences(base, model, 64), 64)
    importance = np.abs(d) * weight
    kept = u != 0
    assert importance[kept].min() > importance[~kept].max()
    assert kept[::40].mean() > 0.6
    assert kept.mean() < 0.3


def test_cast_weights_are_those_of_the_format() -> None:
    """0.1 in BF16 and F16 is what the formats hold; in F32 it is near, in F64 itself."""
    assert ref.cast_weights([0.1, 1.0], "BF16") == [0.10009765625, 1.0]
    assert ref.cast_weights([0.1], "F16") == [float(np.float16(0.1))]
    assert ref.cast_weights([0.1], "F64") == [0.1]


def test_the_exponential_is_right_to_the_last_places() -> None:
    """Against math.exp from 0 to where it would be subnormal; beyond, zero."""
    x = -np.concatenate([np.linspace(0, 1, 2001), np.linspace(1, 707, 5001)])
    from reasonvec.reference.elementary import exp

    wanted = np.array([math.exp(v) for v in x])
    np.testing.assert_allclose(exp(x), wanted, rtol=5e-16)
    assert exp(np.array([0.0, -800.0, -1e308])).tolist() == [1.0, 0.0, 0.0]
