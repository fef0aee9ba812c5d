"""The core gives the bits of `reasonvec.reference`, through real files, at every SIMD level."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import blake3
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shards import SIZE, Stored, read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec import reference as ref
from reasonvec.algebra import Vector
from reasonvec.apply import OutDtype
from reasonvec.measure import Measured, Quantities, measure
from reasonvec.reference import BLOCK, MICRO, NOT_WIDE, Bits, Dtype, Wide, Work, WorkDtype
from reasonvec.rounding import Rounding
from reasonvec.terms import Operands, leaf_layout, vector_quantity

FLOATS: list[Dtype] = ["BF16", "F16", "F32", "F64"]
OUT: dict[OutDtype | None, Dtype | None] = {
    None: None, "float32": "F32", "float16": "F16", "bfloat16": "BF16"
}  # fmt: skip
HASHES = {
    "xxh3-128": lambda data: xxhash.xxh3_128_digest(data),
    "blake3": lambda data: blake3.blake3(data).digest(),
}
SMALL_SIZES = (0, 1, 15, 16, 17, MICRO - 1, MICRO, MICRO + 1)
LARGE_SIZES = (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + MICRO + 5)
# A busy machine is not a failure; the smallest failing case is worth its time.
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

Substitute = Literal["random", "shuffle", "reverse"]
Inputs: TypeAlias = dict[str, dict[int, Bits]]


@dataclass(frozen=True)
class Term:
    """A summand: its donors' formats, its coefficient, what stands in its place, how it is stored."""

    positive: Dtype = "BF16"
    negative: Dtype = "BF16"
    alpha: float = 1.0
    control: Substitute | None = None
    encoding: Literal["auto", "dense", "sparse"] | None = None


@dataclass(frozen=True)
class Case:
    """Everything that decides the bits of an output, and some patterns to build the inputs of."""

    target: Dtype
    out: OutDtype | None
    terms: tuple[Term, ...]
    sizes: tuple[int, ...] = SMALL_SIZES
    patterns: tuple[int, ...] = (0, 1 << 63)
    seed: int = 0
    finite: bool = True
    digest: Literal["xxh3-128", "blake3"] = "xxh3-128"


patterns = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=24).map(tuple)
alphas = st.sampled_from([1.0, -1.0, 0.8, 0.1, 1 / 3, 2.0**-30, 5e-324]) | st.floats(-4, 4)
terms = st.builds(
    Term,
    positive=st.sampled_from(FLOATS),
    negative=st.sampled_from(FLOATS),
    alpha=alphas,
    control=st.sampled_from([None, None, None, "random", "shuffle", "reverse"]),
    encoding=st.sampled_from([None, None, "auto", "dense", "sparse"]),
)
cases = st.builds(
    Case,
    target=st.sampled_from(FLOATS),
    out=st.sampled_from([None, None, *OUT]),
    terms=st.lists(terms, min_size=1, max_size=3).map(tuple),
    sizes=st.just(SMALL_SIZES)
    | st.lists(st.integers(1, 40), min_size=1, max_size=2, unique=True).map(tuple),
    patterns=patterns,
    seed=st.integers(0, 2**64 - 1),
    finite=st.booleans(),
    digest=st.sampled_from(["xxh3-128", "blake3"]),
)


@contextmanager
def environment(simd: str, *, read: bool = False) -> Iterator[None]:
    """A SIMD level, and perhaps windows that are read instead of mapped; both are read at each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REASONVEC_SIMD", simd)
        patch.setenv("REASONVEC_IO", "read" if read else "map")
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def ways() -> list[tuple[str, bool]]:
    """Every level with mapped windows, and the best one with windows that are read."""
    levels = rv.simd_levels()
    return [*((level, False) for level in levels), (levels[-1], True)]


def name_of(size: int) -> str:
    return f"w{size}"


def unsigned(dtype: Dtype) -> type[np.unsignedinteger]:
    return {2: np.uint16, 4: np.uint32, 8: np.uint64}[ref.ITEMSIZE[dtype]]


def draw(case: Case, dtype: Dtype, size: int, *place: int) -> Bits:
    """Bit patterns [size]: random ones, ordinary weights, and hypothesis' own at random places."""
    rng = np.random.default_rng([case.seed % 2**63, size, *place])
    width = 8 * ref.ITEMSIZE[dtype]
    kind = unsigned(dtype)
    bits = rng.integers(0, 2**width, size, kind)
    usual = ref.narrow(rng.normal(scale=0.02, size=size), dtype)
    bits = np.where(rng.random(size) < 0.5, usual, bits)
    own = np.array([p >> (64 - width) for p in case.patterns], kind)
    bits = np.where(rng.random(size) < 0.3, own[rng.integers(0, own.size, size)], bits)
    if case.finite:  # below 2 in magnitude, so that no sum overflows
        bits &= kind(2**width - 1 - 2 ** (width - 2))
    return bits.astype(kind)


def donors(case: Case, term: Term, size: int, place: int) -> tuple[Bits, Bits]:
    """A negative donor and a positive one: some of it moved a few last places, some of it anywhere."""
    rng = np.random.default_rng([case.seed % 2**63, size, place, 7])
    n = draw(case, term.negative, size, place, 0)
    p = draw(case, term.positive, size, place, 1)
    if term.positive == term.negative:
        width = 8 * ref.ITEMSIZE[term.positive]
        near = n ^ rng.integers(0, 8, size).astype(n.dtype)
        p = np.where(rng.random(size) < 0.6, n, np.where(rng.random(size) < 0.7, near, p))
        p = np.where(rng.random(size) < 0.05, n ^ n.dtype.type(2 ** (width - 1)), p)
    return n.astype(unsigned(term.negative)), p.astype(unsigned(term.positive))


def inputs_of(case: Case) -> Inputs:
    """The bits of a case's target (t) and donors (p0, n0, ...), by size."""
    bits: Inputs = {"t": {size: draw(case, case.target, size, 0) for size in case.sizes}}
    for i, term in enumerate(case.terms):
        pairs = {size: donors(case, term, size, i + 1) for size in case.sizes}
        bits[f"n{i}"] = {size: n for size, (n, _) in pairs.items()}
        bits[f"p{i}"] = {size: p for size, (_, p) in pairs.items()}
    return bits


def write_inputs(case: Case, bits: Inputs, folder: Path) -> None:
    """A checkpoint for each role, and a folder (v0, ...) for each vector that the case stores."""
    dtypes = {"t": case.target}
    for i, term in enumerate(case.terms):
        dtypes |= {f"n{i}": term.negative, f"p{i}": term.positive}
    for role, tensors in bits.items():
        rows = {name_of(size): stored(dtypes[role], b) for size, b in tensors.items()}
        write_checkpoint(folder / role, rows)
    for i, term in enumerate(case.terms):
        if term.encoding is not None:
            (rv.open(folder / f"p{i}") - rv.open(folder / f"n{i}")).save(
                folder / f"v{i}",
                encoding=term.encoding,
                sync=False,
                allow_nonfinite=not case.finite,
            )


def vector_of(case: Case, folder: Path, i: int) -> Vector:
    """A term as a caller writes it, its files opened now."""
    term = case.terms[i]
    stored_one = term.encoding is not None
    vector = (
        rv.load(folder / f"v{i}")
        if stored_one
        else rv.open(folder / f"p{i}") - rv.open(folder / f"n{i}")
    )
    if term.control is not None:
        vector = vector.control(term.control, seed=case.seed)
    return term.alpha * vector


def value_of(case: Case, bits: Inputs, i: int, size: int, work: WorkDtype) -> tuple[Work, Wide]:
    """What a term gives to one tensor before its coefficient, by the reference."""
    term, p, n = case.terms[i], bits[f"p{i}"][size], bits[f"n{i}"][size]
    wide = NOT_WIDE
    if term.encoding is None:
        v = ref.difference(p, term.positive, n, term.negative, work)
    else:
        v, wide, _ = ref.extract(p, term.positive, n, term.negative)
        v = v.astype(np.float64) if work == "F64" else v
    if term.control == "random":
        return ref.random(v, case.seed, name_of(size)), NOT_WIDE
    if term.control == "shuffle":
        return ref.shuffle(v, case.seed, name_of(size)), NOT_WIDE
    return v, wide


def coefficient_of(term: Term) -> float:
    return -term.alpha if term.control == "reverse" else term.alpha


def formats_of(term: Term, bits: Inputs, i: int, size: int) -> list[Dtype]:
    """The operand formats that decide in what a tensor is combined."""
    if term.encoding is not None:
        v = ref.extract(bits[f"p{i}"][size], term.positive, bits[f"n{i}"][size], term.negative)
        if not v.values.any() and not v.wide.at.size:
            return [term.positive]  # stored as nothing, under the positive donor's format
    return [term.positive, term.negative]


def expected(case: Case, bits: Inputs, size: int) -> tuple[Bits, ref.Rounding | None]:
    """The output of one tensor and its rounding report, by the reference."""
    t, out = bits["t"][size], OUT[case.out] or case.target
    used = [i for i, term in enumerate(case.terms) if term.alpha != 0]
    formats = [f for i in used for f in formats_of(case.terms[i], bits, i, size)]
    work = ref.work_dtype(case.target, out, *formats)
    if not used:
        zero = np.zeros(size, np.float64 if work == "F64" else np.float32)
        return ref.finish(t, case.target, zero, out), None
    found = [value_of(case, bits, i, size, work) for i in used]
    coefs = [coefficient_of(case.terms[i]) for i in used]
    u = ref.combine([v for v, _ in found], coefs, work)
    wide = ref.combine_wide([wide for _, wide in found], coefs)
    result = ref.finish(t, case.target, u, out, wide)
    return result, ref.rounding(t, case.target, u, result, out)


def digest_of(tensor: Stored, algorithm: str) -> str:
    itemsize = SIZE[tensor.dtype]
    return ref.tensor_digest(tensor.data, itemsize, HASHES[algorithm])


def assert_same_sums(found: Rounding | None, wanted: ref.Rounding | None) -> None:
    """Every sum has the same bits, as far as JSON, through which it came, has a word for it."""
    if found is None:  # a copy: nothing was added, or zeros were
        assert wanted is None or wanted == ref.Rounding(0.0, 0.0, 0.0, 0, 0)
        return
    assert wanted is not None
    for key in ("intended", "realised", "dot", "updated", "lost"):
        ours, theirs = getattr(found, key), getattr(wanted, key)
        assert ours == theirs or not (math.isfinite(ours) or math.isfinite(theirs)), key


def check_apply(case: Case, bits: Inputs | None = None) -> None:
    """Runs a case every way, and compares every byte, sum and digest with the reference."""
    bits = inputs_of(case) if bits is None else bits
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(case, bits, folder)
        wanted = {name_of(size): expected(case, bits, size) for size in case.sizes}
        for i, (level, read) in enumerate(ways()):
            out = folder / f"out{i}"
            with environment(level, read=read):
                point = rv.open(folder / "t")
                for k in range(len(case.terms)):
                    point = point + vector_of(case, folder, k)
                report = point.save(
                    out,
                    out_dtype=case.out,
                    digest=case.digest,
                    sync=False,
                    threads=2,
                    allow_nonfinite=not case.finite,
                )
            found = read_checkpoint(out)
            assert list(found) == list(wanted)
            for tensor in report.tensors:
                result, rounding = wanted[tensor.name]
                np.testing.assert_array_equal(found[tensor.name].bits, result, str((level, tensor)))
                assert_same_sums(tensor.rounding, rounding)
                assert tensor.digest == digest_of(found[tensor.name], case.digest)
            check_input_digests(case, folder, out)


def check_input_digests(case: Case, folder: Path, out: Path) -> None:
    """The manifest has the digest of every input tensor that was read element for element."""
    manifest = json.loads((out / "reasonvec.json").read_text())
    assert manifest["digest"] == case.digest
    for row in manifest["inputs"]:
        if row["kind"] == "checkpoint":
            tensors = read_checkpoint(out / row["path"])
            for name, digest in row["tensors"].items():
                assert digest == digest_of(tensors[name], case.digest)
    plain = all(term.control in (None, "reverse") and term.alpha for term in case.terms)
    differences = [i for i, term in enumerate(case.terms) if term.encoding is None]
    if plain:
        listed = {Path(row["path"]).name: row["tensors"] for row in manifest["inputs"]}
        for role in ["t", *(f"{r}{i}" for i in differences for r in "pn")]:
            assert set(listed[role]) == {name_of(size) for size in case.sizes}


@settings(PROPERTY, max_examples=40)
@given(cases)
def test_apply_is_the_reference(case: Case) -> None:
    """Any target, donors, formats, coefficients, controls and stored vectors: the reference's bits."""
    check_apply(case)


@pytest.mark.parametrize("encoding", [None, "dense", "sparse"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_pattern(dtype: Dtype, encoding: Literal["dense", "sparse"] | None) -> None:
    """All 65,536 patterns as target and as donors, against random others, into every format."""
    rng = np.random.default_rng(5)
    every = np.arange(2**16, dtype=np.uint16)
    bits = {"t": {2**16: every}} | {r: {2**16: rng.permutation(every)} for r in ("p0", "n0")}
    for out in OUT:
        term = Term(dtype, dtype, 0.7, None, encoding)
        check_apply(Case(dtype, out, (term,), (2**16,), finite=False), bits)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_finite_16_bit_pattern_in_a_strict_run(dtype: Dtype) -> None:
    """All finite patterns pass without allow_nonfinite, but for those whose own sum overflows."""
    every = np.arange(2**16, dtype=np.uint16)
    finite = every[np.isfinite(ref.widen(every, dtype))]
    p = np.random.default_rng(6).permutation(finite)
    n = p ^ np.uint16(1)
    case = Case(dtype, None, (Term(dtype, dtype, 3.0),), (finite.size,))
    bits = {"t": {finite.size: finite}, "p0": {finite.size: p}, "n0": {finite.size: n}}
    result, _ = expected(case, bits, finite.size)
    over = ~np.isfinite(ref.widen(result, dtype))
    assert over.sum() < 300
    bits["n0"][finite.size] = np.where(over, p, n)
    check_apply(case, bits)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_of_several_blocks(dtype: Dtype) -> None:
    """Sizes around one block and past two: difference, stored vector and both controls that draw."""
    terms = (Term(dtype, dtype, 0.8), Term(dtype, dtype, -0.3, None, "sparse"))
    check_apply(Case(dtype, None, terms, LARGE_SIZES[:3]))
    for control in ("shuffle", "random"):
        check_apply(Case(dtype, None, (Term(dtype, dtype, 0.5, control),), LARGE_SIZES[3:], seed=9))


# Extraction


def expected_vector(case: Case, bits: Inputs, size: int) -> ref.Extracted:
    """A vector as it should be stored: a plain difference tested, a sum as it is."""
    terms = case.terms
    term = terms[0]
    plain = term.encoding is None and term.control in (None, "reverse")
    if len(terms) == 1 and plain and coefficient_of(term) == 1.0:
        return ref.extract(bits["p0"][size], term.positive, bits["n0"][size], term.negative)
    work = ref.work_dtype(*(f for i, t in enumerate(terms) for f in formats_of(t, bits, i, size)))
    found = [value_of(case, bits, i, size, work) for i in range(len(terms))]
    coefs = [coefficient_of(term) for term in terms]
    u = ref.combine([v for v, _ in found], coefs, work)
    return ref.Extracted(u, ref.combine_wide([wide for _, wide in found], coefs), 0)


def same_part(found: Stored, wanted: ref.Part, *, signed: bool) -> bool:
    """The same bits, but that processors disagree about the NaNs that subtracting makes, and that
    a sparse vector, to which `signed` is false, does not keep the signs of its zeros."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.data.shape
    bits = wanted.data.ravel().view(found.bits.dtype)
    same = found.bits == bits
    if wanted.dtype in FLOATS:
        ours, theirs = (ref.widen(b, wanted.dtype, "F64") for b in (found.bits, bits))
        same |= np.isnan(ours) & np.isnan(theirs)
        same |= np.bool_(not signed) & (ours == 0) & (theirs == 0)
    return bool(same.all())


def check_row(
    case: Case, row: dict[str, object], parts: dict[str, Stored], wanted: ref.Extracted
) -> None:
    """One tensor of a vector folder: its parts, their digests, and what its row says."""
    v, wide, inexact = wanted
    encoding = row["encoding"]
    found = {role: parts[part["entry"]] for role, part in row["parts"].items()}
    for role, part in row["parts"].items():
        assert part["entry"] == ref.entry(row["name"], encoding, role)
        assert part["digest"] == digest_of(found[role], case.digest)
    assert row["bytes"] == sum(len(part.data) for part in found.values())
    found.pop("padding", None)
    palette = None
    if "palette" in found:  # a zero may follow, to make the count even
        palette = np.trim_zeros(found.pop("palette").bits.view(np.float32), "b")
        palette = palette if palette.size else np.zeros(1, np.float32)  # only second parts
    codec = found["values"].dtype if "values" in found else "F32"
    made = ref.encode(v, row["shape"], encoding, codec, palette, wide)
    made.pop("palette", None)
    assert set(found) == set(made)
    for role, part in made.items():
        signed = all(term.encoding is None for term in case.terms)
        assert same_part(found[role], part, signed=signed), (row["name"], role)
    size = ref.extent(v)
    assert (row["moved"], row["max_at"]) == (size.moved, size.max_at)
    assert row["norm"] == (size.norm if math.isfinite(size.norm) else None)
    assert row["max"] == (size.max if math.isfinite(size.max) else None)
    assert (row["wide"], row["inexact"], row["elements"]) == (wide.at.size, inexact, v.size)


def check_extract(
    case: Case, encoding: Literal["auto", "dense", "sparse"], bits: Inputs | None = None
) -> None:
    """Saves a sum of vectors every way, and compares all that is stored with the reference."""
    bits = inputs_of(case) if bits is None else bits
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(case, bits, folder)
        for i, (level, read) in enumerate(ways()):
            out = folder / f"out{i}"
            with environment(level, read=read):
                vector = vector_of(case, folder, 0)
                for k in range(1, len(case.terms)):
                    vector = vector + vector_of(case, folder, k)
                vector.save(
                    out,
                    encoding=encoding,
                    digest=case.digest,
                    sync=False,
                    threads=2,
                    allow_nonfinite=not case.finite,
                )
            config = json.loads((out / "vector_config.json").read_text())
            parts = read_checkpoint(out)
            for row, size in zip(config["tensors"], case.sizes, strict=True):
                assert row["dtype"] == case.terms[0].positive
                assert row["encoding"] in ("zero", encoding) or encoding == "auto"
                check_row(case, row, parts, expected_vector(case, bits, size))


@settings(PROPERTY, max_examples=30)
@given(cases, st.sampled_from(["auto", "dense", "sparse"]))
@example(Case("BF16", None, (Term(),)), "auto")
@example(Case("BF16", None, (Term(encoding="sparse"),)), "dense")
def test_extract_is_the_reference(case: Case, encoding: Literal["auto", "dense", "sparse"]) -> None:
    """Parts, digests, norms, maxima and second parts of any sum of vectors: the reference's bits."""
    terms = tuple(replace(t, alpha=t.alpha or 1.0) for t in case.terms)
    check_extract(replace(case, terms=terms), encoding)


@pytest.mark.parametrize("encoding", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_extract_every_16_bit_pattern(
    dtype: Dtype, encoding: Literal["auto", "dense", "sparse"]
) -> None:
    """All 65,536 patterns as both donors."""
    rng = np.random.default_rng(8)
    every = np.arange(2**16, dtype=np.uint16)
    bits = {role: {2**16: rng.permutation(every)} for role in ("t", "p0", "n0")}
    check_extract(Case(dtype, None, (Term(dtype, dtype),), (2**16,), finite=False), encoding, bits)


@pytest.mark.parametrize("dtype", FLOATS)
def test_extract_tensors_of_several_blocks(dtype: Dtype) -> None:
    """Counts before each block, escapes and second parts cross the ends of blocks."""
    for encoding in ("auto", "dense", "sparse"):
        check_extract(Case(dtype, None, (Term(dtype, dtype),), LARGE_SIZES[2:]), encoding)


# Measures


@settings(PROPERTY, max_examples=30)
@given(cases)
@example(Case("BF16", None, (Term(), Term(encoding="sparse"), Term("F32")), (1, *LARGE_SIZES)))
def test_measures_are_the_reference(case: Case) -> None:
    """Products, norms, maxima, overlaps and agreements of any vectors: the reference's bits."""
    case = replace(case, terms=tuple(replace(t, alpha=t.alpha or 1.0) for t in case.terms))
    bits = inputs_of(case)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(case, bits, folder)
        for level, read in ways():
            with environment(level, read=read):
                rows = measured(case, folder)
            for row, size in zip(rows, case.sizes, strict=True):
                check_measured(case, bits, size, row)


def measured(case: Case, folder: Path) -> list[Measured]:
    operands = Operands()
    vectors = [vector_of(case, folder, i) for i in range(len(case.terms))]
    first = leaf_layout(vectors[0].terms[0].leaf)
    quantities = [vector_quantity(vector, first, operands)[0] for vector in vectors]
    tensors = [
        Quantities(name_of(size), size, [q[name_of(size)] for q in quantities])
        for size in case.sizes
    ]
    return measure(tensors, operands, {"threads": 2}, allow_nonfinite=not case.finite)


def check_measured(case: Case, bits: Inputs, size: int, row: Measured) -> None:
    formats = [f for i, t in enumerate(case.terms) for f in formats_of(t, bits, i, size)]
    work = ref.work_dtype(*formats)
    vectors = [
        ref.combine([value_of(case, bits, i, size, work)[0]], [coefficient_of(term)], work)
        for i, term in enumerate(case.terms)
    ]
    for i, a in enumerate(vectors):
        extent = ref.extent(a)
        assert (row.moved[i], row.max_at[i]) == (extent.moved, extent.max_at)
        assert row.max[i] == extent.max or not math.isfinite(extent.max)
        for j, b in enumerate(vectors):
            pair = ref.pair(a, b)
            assert row.gram[i][j] == pair.dot or not math.isfinite(pair.dot)
            assert (row.both[i][j], row.agree[i][j]) == (pair.overlap, pair.agree)


# Rows matched by token


def tokenizer(tokens: list[str]) -> str:
    return json.dumps(
        {"model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}}
    )


@settings(PROPERTY, max_examples=8)
@given(
    st.permutations(range(12)),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from([None, "dense", "sparse"]),
    st.integers(0, 2**32),
)
def test_rows_matched_by_token_are_a_brute_force(
    order: list[int], t_dtype: Dtype, dtype: Dtype, encoding: str | None, seed: int
) -> None:
    """Under match-tokens every row gets the delta of its own token, and no other row changes."""
    width = 30_000  # a run of rows begins and ends inside blocks
    ours, theirs = [f"t{i}" for i in range(2, 12)], [f"t{i}" for i in order]
    case = Case(
        t_dtype,
        None,
        (Term(dtype, dtype, 0.7, None, encoding),),
        (11 * width, 13 * width),
        seed=seed,
    )
    bits = inputs_of(case)
    t, (p, n) = bits["t"][11 * width], (bits[r][13 * width] for r in ("p0", "n0"))
    name = "model.embed_tokens.weight"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for role, data, kind, rows, tokens in (
            ("t", t, t_dtype, 11, ours), ("p", p, dtype, 13, theirs), ("n", n, dtype, 13, theirs),
        ):  # fmt: skip
            write_checkpoint(folder / role, {name: stored(kind, data, (rows, width))})
            (folder / role / "tokenizer.json").write_text(tokenizer(tokens))
        vector = rv.open(folder / "p") - rv.open(folder / "n")
        if encoding is not None:
            vector.save(folder / "v", encoding=encoding, sync=False)
            vector = rv.load(folder / "v")
        found = []
        for i, (level, read) in enumerate(ways()):
            with environment(level, read=read):
                vector = (
                    rv.load(folder / "v")
                    if encoding
                    else rv.open(folder / "p") - rv.open(folder / "n")
                )
                (rv.open(folder / "t") + 0.7 * vector).save(
                    folder / f"out{i}", vocab="match-tokens", sync=False, threads=2
                )
            found.append(read_checkpoint(folder / f"out{i}")[name].bits)
    work = ref.work_dtype(t_dtype, dtype)
    v, wide, _ = ref.extract(p, dtype, n, dtype)
    if encoding is None:
        v, wide = ref.difference(p, dtype, n, dtype, work), NOT_WIDE
    rows = {i: theirs.index(token) for i, token in enumerate(ours) if token in theirs}
    assert len(rows) == 10
    wanted = t.copy()
    for row, source in rows.items():
        here, there = (slice(r * width, (r + 1) * width) for r in (row, source))
        inside = (wide.at >= there.start) & (wide.at < there.stop)
        u = ref.combine([v[there]], [0.7], work)
        part = ref.combine_wide([Wide(wide.at[inside] - there.start, wide.lo[inside])], [0.7])
        wanted[here] = ref.finish(t[here], t_dtype, u, t_dtype, part)
    for result in found:
        np.testing.assert_array_equal(result, wanted)


# What is not finite


@settings(PROPERTY, max_examples=40)
@given(
    st.sampled_from(FLOATS),
    st.sampled_from(["t", "p0", "n0"]),
    st.sampled_from([None, "random", "shuffle"]),
    st.sets(st.integers(0, MICRO + 16), min_size=1, max_size=3),
    st.sampled_from(["nan", "inf", "-inf"]),
)
def test_the_first_number_that_is_not_finite_is_named(
    dtype: Dtype, role: str, control: Substitute | None, places: set[int], value: str
) -> None:
    """Apply, extract and measure refuse a NaN or infinity by its file, tensor and first index."""
    case = Case(dtype, None, (Term(dtype, dtype, 1.0, control),), (5, MICRO + 17))
    bits = inputs_of(case)
    for place in places:
        bits[role][MICRO + 17][place] = ref.narrow(np.array([float(value)]), dtype)[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(case, bits, folder)
        where = (
            f"{folder / role / 'model.safetensors'}: tensor w{MICRO + 17}: element {min(places)} is"
        )
        where = f"{re.escape(where)} -?{value.strip('-')}"
        vector, point = vector_of(case, folder, 0), rv.open(folder / "t")
        with pytest.raises(rv.NonFiniteError, match=f"(?i){where}"):
            (point + vector).save(folder / "out", sync=False)
        assert not list((folder / "out").glob("*.safetensors"))
        if role != "t":
            with pytest.raises(rv.NonFiniteError, match=f"(?i){where}"):
                vector.save(folder / "v", sync=False)
            assert not list((folder / "v").iterdir())
            with pytest.raises(rv.NonFiniteError, match=f"(?i){where}"):
                vector.inspect()


def test_a_sum_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """An overflow of finite inputs is refused too: which element, and what to do about it."""
    case = Case("F16", None, (Term("F16", "F16", 2.0),), (MICRO + 17,))
    bits = inputs_of(case)
    for role, value in (("t", 60000.0), ("p0", 20000.0), ("n0", 10000.0)):
        bits[role][MICRO + 17][MICRO + 3 :] = ref.narrow(np.array([value]), "F16")
    write_inputs(case, bits, tmp_path)
    point = rv.open(tmp_path / "t") + vector_of(case, tmp_path, 0)
    where = re.escape(f"{tmp_path / 't' / 'model.safetensors'}: tensor w{MICRO + 17}")
    with pytest.raises(rv.NonFiniteError, match=f"{where}: element {MICRO + 3} is 80000 .*float32"):
        point.save(tmp_path / "out", sync=False)
    point.save(tmp_path / "long", sync=False, out_dtype="float32")


def test_a_difference_that_does_not_fit_is_no_infinity_in_a_donor(tmp_path: Path) -> None:
    """Two finite bf16 numbers can be too far apart for f32: the message does not blame a file."""
    case = Case("BF16", None, (Term(),), (9,))
    bits = inputs_of(case)
    bits["p0"][9][4], bits["n0"][9][4] = 0x7F7F, 0xFF7F
    write_inputs(case, bits, tmp_path)
    said = "tensor w9: element 4 is inf; after the other donor was subtracted, both of which are finite"
    for run in (
        lambda: vector_of(case, tmp_path, 0).save(tmp_path / "v"),
        lambda: (rv.open(tmp_path / "t") + vector_of(case, tmp_path, 0)).save(tmp_path / "out"),
    ):
        with pytest.raises(rv.NonFiniteError, match=said):
            run()


def test_a_second_part_decides_whether_a_sum_fits(tmp_path: Path) -> None:
    """65520 rounds to infinity in f16, and 65520 - 0.0009 does not: only the whole sum counts."""
    p, n = np.array([0.003], np.float32), np.array([-65519.99609375], np.float32)
    case = Case("F16", None, (Term("F32", "F32", 1.0, None, "sparse"),), (1,))
    bits: Inputs = {
        "t": {1: np.zeros(1, np.uint16)},
        "p0": {1: p.view(np.uint32)},
        "n0": {1: n.view(np.uint32)},
    }
    assert ref.extract(bits["p0"][1], "F32", bits["n0"][1], "F32").values.tolist() == [65520.0]
    check_apply(case, bits)
    write_inputs(case, bits, tmp_path)
    (rv.open(tmp_path / "t") + vector_of(case, tmp_path, 0)).save(tmp_path / "out", sync=False)
    assert ref.widen(read_checkpoint(tmp_path / "out")["w1"].bits, "F16").tolist() == [65504.0]


def test_a_level_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A spelling mistake in REASONVEC_SIMD is no silent fallback: the levels that there are."""
    case = Case("BF16", None, (Term(),), (5,))
    write_inputs(case, inputs_of(case), tmp_path)
    said = f"REASONVEC_SIMD=avx1024: this processor has {', '.join(rv.simd_levels())}"
    with environment("avx1024"):
        for run in (
            lambda: vector_of(case, tmp_path, 0).save(tmp_path / "v"),
            lambda: (rv.open(tmp_path / "t") + vector_of(case, tmp_path, 0)).save(tmp_path / "o"),
            rv.simd_level,
        ):
            with pytest.raises(rv.ReasonvecError, match=said):
                run()
    assert rv.simd_level() == rv.simd_levels()[-1]
