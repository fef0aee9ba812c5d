"""The encodings of a vector, and the page that describes them, run as printed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize

from reasonvec import reference as ref
from reasonvec.reference import BLOCK, Codec, Encoding, Parts, Wide, Work

PATIENT = settings(deadline=None)
FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"

Reader: TypeAlias = Callable[[Path], dict[str, tuple[Work, NDArray[np.int64], NDArray[np.float64]]]]


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


# Encodings


def codecs(v: Work) -> list[tuple[Encoding, Codec]]:
    """Every way to store a vector."""
    if v.dtype == np.float64:
        return [("dense", "F64"), ("sparse", "F64")]
    ways: list[tuple[Encoding, Codec]] = [
        ("sparse", "U8"), ("sparse", "BF16"), ("sparse", "F32"), ("dense", "F32"), ("dense", "BF16")
    ]  # fmt: skip
    return ways if ref.exact_in_bf16(v).all() else ways[:-1]


def assert_same(got: tuple[Work, Wide], v: Work, wide: Wide, encoding: Encoding) -> None:
    unsigned = np.uint32 if v.dtype == np.float32 else np.uint64
    # Sparse vectors leave zeros out, and with them their signs.
    expected = v + v.dtype.type(0) if encoding == "sparse" else v
    assert got[0].dtype == v.dtype
    np.testing.assert_array_equal(got[0].view(unsigned), expected.view(unsigned))
    np.testing.assert_array_equal(got[1].at, wide.at)
    np.testing.assert_array_equal(got[1].lo.view(np.uint64), wide.lo.view(np.uint64))


SMALL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-9, -(2.0**-140), 1.0 + 2.0**-20, 3e38])


@PATIENT
@given(
    st.lists(SMALL | st.floats(width=32, allow_nan=False)),
    st.sets(SMALL.filter(bool), min_size=1),
    st.data(),
)
def test_every_encoding_gives_the_vector_back(
    values: list[float], palette: set[float], data: st.DataObject
) -> None:
    """Encode then decode is the identity for every codec, palette and set of second parts."""
    at = data.draw(st.sets(st.integers(0, len(values) - 1))) if values else set()
    wide = Wide(np.array(sorted(at), np.int64), np.array([-0.0, 1e-300, 3.0] * 99)[: len(at)])
    for v in (np.array(values, np.float32), np.array(values, np.float64)):
        for encoding, codec in codecs(v):
            colours = f32(*palette) if codec == "U8" else None
            parts = ref.encode(v, [v.size], encoding, codec, colours, wide)
            assert_same(ref.decode(encoding, parts, v.size), v, wide, encoding)


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 70])
def test_encodings_cross_blocks(n: int) -> None:
    """Whole, partial and several blocks come back, with escapes and second parts in each."""
    v, wide = long_vector(n)
    for encoding, codec in codecs(v):
        palette = np.unique(v)[:200] if codec == "U8" else None
        parts = ref.encode(v, [n], encoding, codec, palette, wide)
        assert_same(ref.decode(encoding, parts, n), v, wide, encoding)


def long_vector(n: int) -> tuple[NDArray[np.float32], Wide]:
    rng = np.random.default_rng(n)
    v = (rng.integers(1, 300, n) * 2.0**-12 * (rng.random(n) < 0.12)).astype(np.float32)
    v[rng.integers(0, n, 50)] = 1.0 + 2.0**-20
    at = np.unique(np.append(rng.integers(0, n, 20), [0, n - 1]))
    return v, Wide(at, rng.normal(size=at.size))


@pytest.mark.parametrize("codec", ["U8", "BF16"])
def test_starts_let_a_reader_begin_at_any_block(codec: Codec) -> None:
    """One block decoded alone, from the counts in its rows of starts, is that block."""
    n = 2 * BLOCK + 70
    v, _ = long_vector(n)
    palette = np.unique(v)[:200] if codec == "U8" else None
    parts = ref.encode_sparse(v, codec, palette)
    starts = parts["starts"].data.astype(np.int64)
    for b in range(3):
        (v0, e0), (v1, e1) = starts[b], starts[b + 1]
        alone = dict(parts)
        for part, span in (
            ("bitmap", slice(b * BLOCK // 8, (b + 1) * BLOCK // 8)),
            ("values", slice(v0, v1)),
            ("escapes", slice(e0, e1)),
        ):
            alone[part] = ref.Part(parts[part].dtype, parts[part].data[span])
        expected = v[b * BLOCK : (b + 1) * BLOCK]
        np.testing.assert_array_equal(ref.decode("sparse", alone, expected.size)[0], expected)


@PATIENT
@given(st.lists(SMALL, min_size=1, max_size=40))
def test_parts_end_on_eight_bytes(values: list[float]) -> None:
    """Every part but dense values and palettes has a length that keeps its successor aligned."""
    v = np.array(values, np.float32)
    wide = Wide(np.array([v.size - 1]), np.array([0.5]))
    for codec in ("U8", "BF16", "F32"):
        palette = f32(1.0, -1.0, 0.5) if codec == "U8" else None
        for name, part in ref.encode(v, [v.size], "sparse", codec, palette, wide).items():
            assert part.data.nbytes % 8 == 0 or name == "palette"


def test_encode_refuses_what_it_would_have_to_round() -> None:
    """A codec, palette or encoding that cannot hold a vector exactly is an error."""
    fine, double = f32(1.0 + 2.0**-20), np.array([1.0])
    cases: list[tuple[Work, Encoding, Codec]] = [
        (fine, "dense", "BF16"), (fine, "zero", "F32"), (double, "dense", "BF16"),
        (double, "sparse", "BF16"), (fine, "sparse", "F64"), (fine, "sparse", "U8"),
    ]  # fmt: skip
    for v, encoding, codec in cases:
        with pytest.raises(ValueError, match=r".+"):
            ref.encode(v, [1], encoding, codec)


# The pages


def write_vector(folder: Path, tensors: dict[str, tuple[list[int], Encoding, Parts]]) -> None:
    """A vector folder by the words of docs/format.md: two shards, and only what a reader needs."""
    entries: Parts = {}
    rows: list[dict[str, object]] = []
    for name, (shape, encoding, parts) in tensors.items():
        row: dict[str, object] = {"name": name, "shape": shape, "encoding": encoding}
        row["elements"] = math.prod(shape)
        row["parts"] = {part: {"entry": ref.entry(name, encoding, part)} for part in parts}
        rows.append(row)
        entries |= {ref.entry(name, encoding, part): parts[part] for part in parts}
    (folder / "vector_config.json").write_text(json.dumps({"format": 1, "tensors": rows}))
    weight_map: dict[str, str] = {}
    for shard in range(2):
        file = f"vector_model-{shard + 1:05}-of-00002.safetensors"
        inside = dict(list(entries.items())[shard::2])
        (folder / file).write_bytes(safetensors_bytes(inside))
        weight_map |= dict.fromkeys(inside, file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "vector_model.safetensors.index.json").write_text(index)


def safetensors_bytes(entries: Parts) -> bytes:
    """What safetensors.serialize makes of parts; it reads addresses, so the arrays must live."""
    names = {"U8": "uint8", "BF16": "bfloat16", "U32": "uint32", "U64": "uint64"}
    names |= {"F32": "float32", "F64": "float64"}
    specs = {
        entry: TensorSpec(
            dtype=names[part.dtype],
            shape=list(part.data.shape),
            data_ptr=part.data.ctypes.data,
            data_len=part.data.nbytes,
        )
        for entry, part in entries.items()
    }
    return bytes(serialize(specs))


def page_reader() -> Reader:
    """``read_vector`` of the Python block in docs/format.md."""
    block = re.search(r"```python\n(.*?)```", FORMAT_PAGE.read_text("utf-8"), re.DOTALL)
    assert block is not None
    scope: dict[str, object] = {}
    exec(block[1], scope)  # running the page is the point
    return cast(Reader, scope["read_vector"])


def test_the_reader_in_the_format_page_reads_every_encoding(tmp_path: Path) -> None:
    """The code of docs/format.md, run as printed, reads every form that a tensor can have."""
    v, wide = long_vector(BLOCK + 70)
    short = f32(0.0, 1.5, -0.0, -2.0, 1.0, 0.5)
    nothing = ref.NOT_WIDE
    cases: dict[str, tuple[Work, Wide, list[int], Encoding, Codec]] = {
        "zero": (f32(0.0, 0.0), nothing, [2], "zero", "F32"),
        "empty": (f32(), nothing, [0, 3], "zero", "F32"),
        "dense bf16": (short, nothing, [2, 3], "dense", "BF16"),
        "dense f32": (v, wide, [v.size], "dense", "F32"),
        "dense f64": (np.array([0.1]), nothing, [], "dense", "F64"),
        "palette": (v, wide, [v.size], "sparse", "U8"),
        "short palette": (short, nothing, [3, 2], "sparse", "U8"),
        "bf16": (v, wide, [v.size], "sparse", "BF16"),
        "f32": (v, nothing, [v.size], "sparse", "F32"),
        "f64": (np.array([0.0, 0.1]), nothing, [2], "sparse", "F64"),
        "only a sign": (f32(0.0, 0.0), Wide(np.array([1]), np.array([-0.0])), [2], "sparse", "F32"),
    }
    tensors = {}
    for name, (values, second, shape, encoding, codec) in cases.items():
        palette = np.unique(values)[:200].astype(np.float32) if codec == "U8" else None
        tensors[name] = (
            shape,
            encoding,
            ref.encode(values, shape, encoding, codec, palette, second),
        )
    write_vector(tmp_path, tensors)
    read = page_reader()(tmp_path)
    assert list(read) == list(cases)
    for name, (values, second, shape, encoding, _) in cases.items():
        hi, at, lo = read[name]
        assert hi.shape == tuple(shape)
        assert_same((cast(Work, hi.ravel()), Wide(at, lo)), values, second, encoding)


def test_a_read_vector_rebuilds_the_positive_donor(tmp_path: Path) -> None:
    """Extract, encode, write, read with the page's code, add by its rules: the donor's bits."""
    rng = np.random.default_rng(8)
    n = ref.narrow(rng.normal(size=5000).astype(np.float32), "BF16")
    p = n.copy()
    p[::7] = ref.narrow(rng.normal(size=p[::7].size).astype(np.float32) * 1e-9, "BF16")
    p[5], n[5] = 0x8000, 0x0000
    found = ref.extract(p, "BF16", n, "BF16")
    parts = ref.encode(found.values, [50, 100], "sparse", "BF16", None, found.wide)
    write_vector(tmp_path, {"w": ([50, 100], "sparse", parts)})
    hi, at, lo = page_reader()(tmp_path)["w"]
    assert found.inexact == 0
    assert at.size > 0
    rebuilt = ref.finish(n, "BF16", cast(Work, hi.ravel()), "BF16", Wide(at, lo))
    np.testing.assert_array_equal(rebuilt, p)
