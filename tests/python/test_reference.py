"""The reference is right: every part of it against an oracle that shares no code with it."""

from __future__ import annotations

import hashlib
import math
import struct
from fractions import Fraction
from typing import cast

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reasonvec import reference as ref
from reasonvec.reference import BLOCK, MICRO, Bits, Dtype, Wide, Work

SHORT: list[Dtype] = ["BF16", "F16"]
ALL_16_BITS = np.arange(2**16, dtype=np.uint16)
UINT = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
# A busy machine is not a failure.
PATIENT = settings(deadline=None)


def values_of_16_bits(dtype: Dtype) -> NDArray[np.float64]:
    """All 65,536 values by other means: ml_dtypes for bf16, the struct module for f16."""
    if dtype == "BF16":
        with np.errstate(all="ignore"):
            return np.asarray(ALL_16_BITS.view(ml_dtypes.bfloat16), np.float64)
    return np.array(struct.unpack("<65536e", ALL_16_BITS.astype("<u2").tobytes()))


def nearest_16_bits(x: NDArray[np.float64], dtype: Dtype) -> Bits:
    """The nearest 16-bit pattern by search among the midpoints, which F64 holds exactly."""
    infinity = 0x7F80 if dtype == "BF16" else 0x7C00
    table = values_of_16_bits(dtype)[: infinity + 1]
    table[infinity] = 2 * table[infinity - 1] - table[infinity - 2]
    middle = (table[:-1] + table[1:]) / 2
    index = np.searchsorted(middle, np.abs(x))
    tie = np.isin(np.abs(x), middle) & (index % 2 == 1)
    bits = (index + tie) | np.where(np.signbit(x), 0x8000, 0)
    return np.where(np.isnan(x), ref.NAN[dtype], bits).astype(np.uint16)


def hard_cases(dtype: Dtype) -> NDArray[np.float64]:
    """Every value, every midpoint, and the F64 numbers next to each: where rounding goes wrong."""
    with np.errstate(all="ignore"):
        table = values_of_16_bits(dtype)
        middle = (table[:-1] + table[1:]) / 2
        edges = np.concatenate([table, middle])
        near = [edges, np.nextafter(edges, np.inf), np.nextafter(edges, -np.inf)]
        return np.concatenate(near)


def any_bits(dtype: Dtype, size: int, seed: int = 0) -> Bits:
    bits: Bits = np.random.default_rng(seed).integers(
        0, 2 ** (8 * ref.ITEMSIZE[dtype]), size, UINT[dtype]
    )
    return bits


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


# Formats


@pytest.mark.parametrize("dtype", SHORT)
def test_widen_gives_the_value_of_every_16_bit_pattern(dtype: Dtype) -> None:
    """All 65,536 patterns widen to what ml_dtypes and struct say."""
    for work in ("F32", "F64"):
        np.testing.assert_array_equal(ref.widen(ALL_16_BITS, dtype, work), values_of_16_bits(dtype))


@pytest.mark.parametrize("dtype", SHORT)
def test_narrow_undoes_widen(dtype: Dtype) -> None:
    """All 65,536 patterns come back from both work types, bit for bit; NaN is canonical."""
    expected = np.where(np.isnan(values_of_16_bits(dtype)), ref.NAN[dtype], ALL_16_BITS)
    for work in ("F32", "F64"):
        np.testing.assert_array_equal(
            ref.narrow(ref.widen(ALL_16_BITS, dtype, work), dtype), expected
        )


@pytest.mark.parametrize("dtype", SHORT)
def test_narrow_rounds_f64_once_to_nearest_even(dtype: Dtype) -> None:
    """No double rounding: right at, and one F64 step beside, every midpoint; and on random F64."""
    random = ref.widen(any_bits("F64", 2**17), "F64", "F64").astype(np.float64)
    middling = np.random.default_rng(1).normal(size=2**17) * 2.0 ** np.arange(2**17).__mod__(60)
    for x in (hard_cases(dtype), random, middling):
        np.testing.assert_array_equal(ref.narrow(x, dtype), nearest_16_bits(x, dtype))


@pytest.mark.parametrize("dtype", SHORT)
def test_narrow_rounds_f32_to_nearest_even(dtype: Dtype) -> None:
    """F32 to 16 bits on a million random patterns and around every midpoint, and as ml_dtypes."""
    with np.errstate(all="ignore"):
        single = np.concatenate(
            [hard_cases(dtype).astype(np.float32), any_bits("F32", 2**20).view(np.float32)]
        )
        exact = single.astype(np.float64)
        theirs = single.astype(ml_dtypes.bfloat16).view(np.uint16)
    bits = ref.narrow(single, dtype)
    np.testing.assert_array_equal(bits, nearest_16_bits(exact, dtype))
    if dtype == "BF16":
        number = ~np.isnan(single)
        np.testing.assert_array_equal(bits[number], theirs[number])


@PATIENT
@given(st.floats(allow_nan=False, width=64))
def test_narrow_to_f32_is_the_nearest(x: float) -> None:
    """No F32 is nearer to an F64 than the one chosen, and a tie is even: in exact fractions."""
    bits = int(ref.narrow(np.array([x]), "F32")[0])
    if math.isinf(x) or abs(x) >= float(2**128 - 2**103):
        assert bits & 0x7FFFFFFF == 0x7F800000
        return
    magnitude = bits & 0x7FFFFFFF

    def value(m: int) -> Fraction:
        if m == 0x7F800000:
            return Fraction(2**128)
        return Fraction(struct.unpack("<f", struct.pack("<I", m))[0])

    error = abs(value(magnitude) - Fraction(abs(x)))
    others = [abs(value(m) - Fraction(abs(x))) for m in (magnitude - 1, magnitude + 1) if m >= 0]
    assert error < min(others) or (error == min(others) and bits % 2 == 0)
    assert bits >> 31 == (math.copysign(1.0, x) < 0)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_every_nan_becomes_the_canonical_one(dtype: Dtype) -> None:
    """NaNs of any sign and payload narrow to one pattern."""
    nans = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0xFF800123], np.uint32).view(np.float32)
    for v in (nans, ref.widen(nans.view(np.uint32), "F32", "F64")):
        assert set(ref.narrow(v, dtype).tolist()) == {ref.NAN[dtype]}


def test_f64_cannot_be_combined_in_f32() -> None:
    """Widening an F64 into F32 work is refused, not rounded."""
    with pytest.raises(ValueError, match="F64"):
        ref.widen(np.zeros(1, np.uint64), "F64", "F32")


def test_first_nonfinite_names_the_first() -> None:
    """The index in an error message is the first NaN or infinity, and clean tensors have none."""
    assert ref.first_nonfinite(np.array([0, 0x7F80, 0x7FC0], np.uint16), "BF16") == 1
    assert ref.first_nonfinite(np.array([0, 0x7F7F], np.uint16), "BF16") is None


# Update and rounding


def round_f32(x: float) -> float:
    """One F32 rounding of an F64 result; enough for F32 sums and products (Figueroa 1995)."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


@PATIENT
@given(
    st.lists(
        st.tuples(st.floats(-1e9, 1e9, width=32), st.floats(-100, 100)), min_size=1, max_size=4
    )
)
def test_combine_rounds_every_operation_in_f32(terms: list[tuple[float, float]]) -> None:
    """The update is the scalar loop acc = acc + c * v, each step rounded by other means."""
    acc = None
    for v, c in terms:
        product = round_f32(round_f32(c) * v)
        acc = product if acc is None else round_f32(acc + product)
    got = ref.combine([f32(v) for v, _ in terms], [c for _, c in terms], "F32")
    assert got.dtype == np.float32
    assert float(got[0]) == acc


def test_combine_in_f64_rounds_nothing_to_f32() -> None:
    """With an F64 operand anywhere, coefficients and sums keep their 53 bits."""
    got = ref.combine([np.array([3.0]), f32(7.0)], [0.1, 0.2], "F64")
    assert got.tolist() == [0.1 * 3.0 + 0.2 * 7.0]


@pytest.mark.parametrize("dtype", SHORT)
def test_a_zero_update_keeps_every_bit(dtype: Dtype) -> None:
    """All 65,536 targets survive an update of either zero: -0.0, subnormals, NaN payloads."""
    for zero in (0.0, -0.0):
        u = np.full(2**16, zero, np.float32)
        np.testing.assert_array_equal(ref.finish(ALL_16_BITS, dtype, u, dtype), ALL_16_BITS)


@pytest.mark.parametrize("dtype", SHORT)
def test_a_zero_update_into_another_format_converts_the_target(dtype: Dtype) -> None:
    """With an F32 output a zero update gives the target's values, -0.0 among them."""
    u = np.zeros(2**16, np.float32)
    out = ref.finish(ALL_16_BITS, dtype, u, "F32").view(np.float32)
    np.testing.assert_array_equal(out, values_of_16_bits(dtype))
    np.testing.assert_array_equal(
        np.signbit(out), np.signbit(values_of_16_bits(dtype)) & ~np.isnan(out)
    )


@pytest.mark.parametrize("dtype", SHORT)
def test_finish_adds_in_the_work_type_and_rounds(dtype: Dtype) -> None:
    """All 65,536 targets plus random updates: F32 sum, then the search oracle."""
    t = np.tile(ALL_16_BITS, 4)
    with np.errstate(all="ignore"):
        v = values_of_16_bits(dtype)[np.random.default_rng(2).permutation(t)]
        u = (v * 0.7).astype(np.float32)
        total = values_of_16_bits(dtype)[t].astype(np.float32) + u
        total = total.astype(np.float64)
    moved = u != 0
    out = ref.finish(t, dtype, u, dtype)
    np.testing.assert_array_equal(out[moved], nearest_16_bits(total, dtype)[moved])


def test_second_parts_are_rounded_once_from_f64() -> None:
    """1 + 2^-8 + 2^-40 in bf16 is above the tie; through F32 it would be on it and round down."""
    one = np.array([0x3F80], np.uint16)
    u = f32(2.0**-8)
    assert ref.finish(one, "BF16", u, "BF16").tolist() == [0x3F80]
    wide = Wide(np.array([0]), np.array([2.0**-40]))
    assert ref.finish(one, "BF16", u, "BF16", wide).tolist() == [0x3F81]


def test_second_parts_of_several_terms_add_where_any_term_has_one() -> None:
    """Coefficient times lo, summed at equal indices, the sign of a lone -0.0 kept."""
    a = Wide(np.array([1, 5]), np.array([1.0, -0.0]))
    b = Wide(np.array([0, 1]), np.array([4.0, 8.0]))
    both = ref.combine_wide([a, b], [0.1, -0.5])
    assert both.at.tolist() == [0, 1, 5]
    assert both.lo.tolist() == [-2.0, 0.1 - 4.0, 0.0]
    assert np.signbit(both.lo).tolist() == [True, True, True]


# Sums


def literal_dot(a: list[float], b: list[float]) -> float:
    """The documented order, one product after another, in float64."""
    total = 0.0
    for block in range(0, len(a), BLOCK):
        in_block = 0.0
        for micro in range(block, min(block + BLOCK, len(a)), MICRO):
            lanes = [0.0] * 16
            for group in range(micro, min(micro + MICRO, block + BLOCK, len(a)), 64):
                product = [
                    x * y for x, y in zip(a[group : group + 64], b[group : group + 64], strict=True)
                ]
                product += [0.0] * (64 - len(product))
                for j in range(16):
                    lanes[j] += (product[j] + product[j + 16]) + (product[j + 32] + product[j + 48])
            for half in (8, 4, 2, 1):
                for i in range(half):
                    lanes[i] += lanes[i + half]
            in_block += lanes[0]
        total += in_block
    return total


@pytest.mark.parametrize(
    "n", [0, 1, 15, 17, 65, MICRO - 1, MICRO + 33, BLOCK, 2 * BLOCK + MICRO + 5]
)
def test_fixed_dot_is_its_definition(n: int) -> None:
    """The vectorised sum has the bits of the one-by-one sum, on ends of every kind."""
    a, b = np.random.default_rng(n).normal(size=(2, n)) * 1e2
    total = ref.fixed_dot(a, b)
    assert total == literal_dot(a.tolist(), b.tolist())
    assert total == pytest.approx(math.fsum(a * b), abs=1e-5)


def test_rounding_report_is_its_definition() -> None:
    """Sums and counts of the report against a loop over elements in exact arithmetic."""
    rng = np.random.default_rng(3)
    t = ref.narrow(rng.normal(size=300).astype(np.float32) * 0.02, "BF16")
    u = (rng.normal(size=300) * 1e-4 * (rng.random(300) < 0.3)).astype(np.float32)
    out = ref.finish(t, "BF16", u, "BF16")
    report = ref.rounding(t, "BF16", u, out, "BF16")
    table = values_of_16_bits("BF16").tolist()
    rows = [(float(x), table[o] - table[b]) for x, o, b in zip(u, out, t, strict=True)]
    assert report.intended == pytest.approx(sum(x * x for x, _ in rows), rel=1e-6)
    assert report.realised == pytest.approx(sum(r * r for _, r in rows), rel=1e-6)
    assert report.dot == pytest.approx(sum(x * r for x, r in rows), rel=1e-6)
    assert report.updated == sum(x != 0 for x, _ in rows)
    assert report.lost == sum(x != 0 and r == 0 for x, r in rows)
    assert 0 < report.lost_share < 1
    assert report.norm_ratio == pytest.approx(math.sqrt(report.realised / report.intended))
    assert 0 < report.cosine < 1


def test_rounding_report_of_an_exact_update_is_perfect() -> None:
    """With room in the output, realised is intended: cosine 1, ratio 1, nothing lost."""
    u = f32(1.0, 0.0, -2.0)
    t = np.zeros(3, np.uint16)
    report = ref.rounding(t, "BF16", u, ref.finish(t, "BF16", u, "F32"), "F32")
    assert (report.cosine, report.norm_ratio, report.lost_share) == (1.0, 1.0, 0.0)
    assert math.isnan(ref.Rounding(0.0, 0.0, 0.0, 0, 0).cosine)


# Digests


def test_digest_is_the_hash_of_the_hashes_of_blocks() -> None:
    """Two blocks of two-byte elements and a rest, cut by hand, under XXH3-128."""
    data = np.random.default_rng(4).bytes(2 * BLOCK * 2 + 10)
    cuts = [data[: 2 * BLOCK], data[2 * BLOCK : 4 * BLOCK], data[4 * BLOCK :]]
    by_hand = xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(cut) for cut in cuts))
    assert ref.tensor_digest(data, 2, xxhash.xxh3_128_digest) == by_hand
    assert ref.tensor_digest(data, 1, xxhash.xxh3_128_digest) != by_hand


def test_digest_of_nothing_is_the_hash_of_nothing() -> None:
    """An empty tensor has no blocks, for any hash."""
    nothing = hashlib.sha256(b"")
    assert ref.tensor_digest(b"", 4, lambda b: hashlib.sha256(b).digest()) == nothing.hexdigest()


# Random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    """Philox4x32-10 gives the known answers that Random123 publishes (tests/kat_vectors)."""
    words = [int(word, 16) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    got = ref.philox4x32(np.array([words], np.uint32), (k0, k1))[0]
    assert " ".join(f"{word:08x}" for word in got) == expected


def test_hashes_of_the_key_give_the_published_answers() -> None:
    """splitmix64 after the seed 1234567, and FNV-1a of "foobar", are the published numbers."""
    assert ref.splitmix64(1234567) == 6457827717110365317
    assert ref.splitmix64((1234567 + 0x9E3779B97F4A7C15) % 2**64) == 3203168211198807973
    assert ref.fnv1a64(b"foobar") == 0x85944171F73967E8


def test_keys_differ_by_seed_name_and_use() -> None:
    """No two of seed, tensor name and stream share a key, and non-ASCII names have one."""
    keys = {ref.key64(s, n, u) for s in (0, 1) for n in ("a", "b", "ä") for u in (1, 2)}
    assert len(keys) == 12


def test_words_put_the_low_half_of_the_counter_first() -> None:
    """A counter past 2^32 is (low, high, 0, 0), and a key is (low, high)."""
    counter = np.array([[2, 1, 0, 0]], np.uint32)
    expected = ref.philox4x32(counter, (4, 3))
    np.testing.assert_array_equal(
        ref.words(3 << 32 | 4, np.array([1 << 32 | 2], np.uint64)), expected
    )


def test_normal_is_box_muller_of_the_words() -> None:
    """The polynomials agree with libm's log, sin and cos to 1e-13 on the definition."""
    key = ref.key64(1, "w", 1)
    z = ref.normal(key, np.arange(2000, dtype=np.uint64))
    for j, x in enumerate(ref.words(key, np.arange(1000, dtype=np.uint64)).tolist()):
        u1 = ((x[0] << 20 | x[1] >> 12) + 0.5) * 2.0**-52
        u2 = (x[2] << 20 | x[3] >> 12) * 2.0**-52
        radius, angle = math.sqrt(-2 * math.log(u1)), 2 * math.pi * u2
        assert z[2 * j] == pytest.approx(radius * math.cos(angle), abs=1e-10)
        assert z[2 * j + 1] == pytest.approx(radius * math.sin(angle), abs=1e-10)


def test_normal_depends_on_the_index_alone() -> None:
    """Any slice, in any order and past 2^33, is the same numbers."""
    key = ref.key64(1, "w", 1)
    start = 2**33 - 4
    run = ref.normal(key, np.arange(start, start + 8, dtype=np.uint64))
    some = ref.normal(key, np.array([start + 7, start + 2], np.uint64))
    assert some.tolist() == [run[7], run[2]]


def test_normal_is_normal() -> None:
    """Moments, the distribution function (Kolmogorov-Smirnov) and correlations of 2^18 deviates."""
    n = 2**18
    z = ref.normal(ref.key64(7, "w", 1), np.arange(n, dtype=np.uint64))
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - moment) < 5 * math.sqrt(variance / n)
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in np.sort(z)])
    assert np.abs(cdf - np.arange(1, n + 1) / n).max() < 1.95 / math.sqrt(n)
    for lag in (1, 2):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 5 / math.sqrt(n)


# Controls


def test_reverse_is_the_negative() -> None:
    """Applying -v undoes the direction of v, zeros included."""
    assert ref.reverse(f32(1.5, 0.0, -2.0)).tolist() == [-1.5, 0.0, 2.0]


@pytest.mark.parametrize("work", [np.float32, np.float64])
def test_random_has_the_norm_of_the_vector(work: type[np.float32] | type[np.float64]) -> None:
    """Noise of the same norm, another direction, the same type; another seed, other noise."""
    v = cast(Work, np.random.default_rng(5).normal(size=10_001).astype(work))
    noise = ref.random(v, 0, "w")
    assert noise.dtype == work
    assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(v), rel=1e-6)
    assert abs(ref.pair(v, noise).cosine) < 0.05
    assert not np.array_equal(noise, ref.random(v, 1, "w"))
    assert not ref.random(cast(Work, np.zeros(5, work)), 0, "w").any()


def test_permutation_moves_whole_blocks_and_then_elements() -> None:
    """Every index once; each block comes from one block; the short last one stays in place."""
    n = 3 * BLOCK + 100
    perm = ref.permutation(n, 0, "w")
    np.testing.assert_array_equal(np.sort(perm), np.arange(n))
    blocks = [np.unique(perm[b * BLOCK : (b + 1) * BLOCK] // BLOCK).tolist() for b in range(4)]
    assert sorted(blocks[:3]) == [[0], [1], [2]] != blocks[:3]
    assert blocks[3] == [3]
    assert not np.array_equal(perm[-100:], np.arange(n - 100, n))


def test_permutation_is_uniform() -> None:
    """24 orders of 4 elements come equally often over 4,800 names: chi-squared, 23 degrees."""
    counts: dict[tuple[int, ...], int] = {}
    for name in range(4800):
        order = tuple(ref.permutation(4, 0, str(name)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 55


def test_shuffle_keeps_the_values() -> None:
    """The same values at other places, drawn by the permutation."""
    v = np.arange(1000).astype(np.float32)
    shuffled = ref.shuffle(v, 3, "w")
    assert np.array_equal(np.sort(shuffled), v)
    assert np.array_equal(shuffled, ref.permutation(1000, 3, "w"))
    assert np.count_nonzero(shuffled == v) < 20


# Extraction


def test_extracted_f16_vectors_are_exact() -> None:
    """negative + vector is positive for every finite f16 against random others, in every bit."""
    finite = ALL_16_BITS[np.isfinite(values_of_16_bits("F16"))]
    p = np.tile(finite, 8)
    n = np.random.default_rng(6).permutation(p)
    found = ref.extract(p, "F16", n, "F16")
    assert found.inexact == 0
    np.testing.assert_array_equal(ref.finish(n, "F16", found.values, "F16", found.wide), p)


def test_extracted_bf16_vectors_are_exact() -> None:
    """Every finite bf16 comes back in every bit from any other, unless their f32 difference overflows."""
    p = np.tile(ALL_16_BITS[np.isfinite(values_of_16_bits("BF16"))], 16)
    n = np.random.default_rng(7).permutation(p)
    fits = np.isfinite(ref.difference(p, "BF16", n, "BF16", "F32"))
    p, n = p[fits], n[fits]
    found = ref.extract(p, "BF16", n, "BF16")
    assert found.wide.at.size > 1000
    assert found.inexact == 0
    np.testing.assert_array_equal(ref.finish(n, "BF16", found.values, "BF16", found.wide), p)


@PATIENT
@given(st.lists(st.tuples(*[st.integers(0, 2**16 - 1)] * 2), min_size=1), st.sampled_from(SHORT))
def test_extract_counts_what_it_cannot_give_back(
    pairs: list[tuple[int, int]], dtype: Dtype
) -> None:
    """On any patterns, ``inexact`` is how many numbers negative + vector misses; NaN stays NaN."""
    p, n = np.array(pairs, np.uint16).T.copy()
    found = ref.extract(p, dtype, n, dtype)
    out = ref.finish(n, dtype, found.values, dtype, found.wide)
    nan = np.isnan(values_of_16_bits(dtype)[p])
    assert np.count_nonzero((out != p) & ~nan) == found.inexact
    assert np.isnan(values_of_16_bits(dtype)[out[nan]]).all()


def test_a_zero_that_changes_its_sign_is_a_second_part() -> None:
    """+0.0 to -0.0 and back moves nothing, and is still given back; so is -0.0 from a number."""
    p = np.array([0x8000, 0x0000, 0x8000, 0x0000], np.uint16)
    n = np.array([0x0000, 0x8000, 0x3F80, 0x3F80], np.uint16)
    found = ref.extract(p, "BF16", n, "BF16")
    assert found.wide.at.tolist() == [0, 1, 2]
    assert np.signbit(found.wide.lo).tolist() == [True, False, True]
    assert ref.extent(found.values).moved == 2
    assert np.array_equal(ref.finish(n, "BF16", found.values, "BF16", found.wide), p)


def test_f64_donors_have_no_second_parts() -> None:
    """What F64 cannot give back is counted, and nothing else is."""
    p, n = np.array([1e-30, 1.5]).view(np.uint64), np.array([1.0, 1.0]).view(np.uint64)
    found = ref.extract(p, "F64", n, "F64")
    assert found.values.tolist() == [-1.0, 0.5]
    assert (found.wide.at.size, found.inexact) == (0, 1)


# Statistics

SMALL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-9, -(2.0**-140), 1.0 + 2.0**-20, 3e38])


@PATIENT
@given(st.lists(st.tuples(SMALL, SMALL)))
def test_statistics_are_their_definitions(rows: list[tuple[float, float]]) -> None:
    """Counts, maximum and sums of a vector and of a pair against loops over their elements."""
    rows = [(a if abs(a) < 10 else 9.0, b if abs(b) < 1e15 else 1e15) for a, b in rows]
    a, b = (np.array([row[i] for row in rows], np.float32) for i in (0, 1))
    size = ref.extent(a)
    assert size.moved == sum(x != 0 for x, _ in rows)
    assert size.max == max((abs(x) for x, _ in rows), default=0.0)
    assert size.max_at == next((i for i, (x, _) in enumerate(rows) if abs(x) == size.max > 0), None)
    assert size.norm == pytest.approx(math.sqrt(math.fsum(x * x for x, _ in rows)))
    both = ref.pair(a, b)
    assert both.dot == ref.fixed_dot(a, b)
    assert both.dot == pytest.approx(
        float(np.dot(a.astype(float), b)),
        rel=1e-5,
        abs=1e-6 * (1 + float(np.abs(a) @ np.abs(b).astype(float))),
    )
    assert both.a_squared == ref.fixed_dot(a, a)
    assert both.b_squared == ref.fixed_dot(b, b)
    assert both.overlap == sum(x != 0 and y != 0 for x, y in rows)
    assert both.agree == sum(x * y > 0 or (x * y == 0 and x > 0 and y > 0) for x, y in signs(rows))


def signs(rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(math.copysign(x != 0, x), math.copysign(y != 0, y)) for x, y in rows]
