"""The core gives the bits of `reasonvec.reference`, through real files, at every SIMD level."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import blake3
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from shards import SIZE, Stored, read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec import reference as ref
from reasonvec.algebra import Vector
from reasonvec.apply import OutDtype
from reasonvec.reference import BLOCK, MICRO, NOT_WIDE, Bits, Dtype, Wide, Work, WorkDtype
from reasonvec.rounding import Rounding

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
PROPERTY = settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=[HealthCheck.too_slow])

Substitute = Literal["random", "shuffle", "reverse"]


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
    sizes=st.just(SMALL_SIZES) | st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
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


def write_inputs(case: Case, folder: Path) -> dict[str, dict[int, Bits]]:
    """Target (t), donors (p0, n0, ...) and stored vectors (v0, ...) of a case; the bits of the first two."""
    bits: dict[str, dict[int, Bits]] = {"t": {}}
    dtypes = {"t": case.target}
    for i, term in enumerate(case.terms):
        dtypes |= {f"n{i}": term.negative, f"p{i}": term.positive}
        bits |= {f"n{i}": {}, f"p{i}": {}}
    for size in case.sizes:
        bits["t"][size] = draw(case, case.target, size, 0)
        for i, term in enumerate(case.terms):
            bits[f"n{i}"][size], bits[f"p{i}"][size] = donors(case, term, size, i + 1)
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
    return bits


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


def value_of(
    case: Case, bits: dict[str, dict[int, Bits]], i: int, size: int, work: WorkDtype
) -> tuple[Work, Wide]:
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


def expected(
    case: Case, bits: dict[str, dict[int, Bits]], size: int
) -> tuple[Bits, ref.Rounding | None]:
    """The output of one tensor and its rounding report, by the reference."""
    t, out = bits["t"][size], OUT[case.out] or case.target
    used = [i for i, term in enumerate(case.terms) if term.alpha != 0]
    formats = [f for i in used for f in (case.terms[i].positive, case.terms[i].negative)]
    work = ref.work_dtype(case.target, out, *formats)
    if not used:
        zero = np.zeros(size, np.float64 if work == "F64" else np.float32)
        return ref.finish(t, case.target, zero, out), None
    found = [value_of(case, bits, i, size, work) for i in used]
    coefs = [
        -case.terms[i].alpha if case.terms[i].control == "reverse" else case.terms[i].alpha
        for i in used
    ]
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


def check_apply(case: Case) -> None:
    """Runs a case every way, and compares every byte, sum and digest with the reference."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bits = write_inputs(case, folder)
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
