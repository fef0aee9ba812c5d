"""Encodings: how a vector lies in its file (docs/format.md), and what its digests are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from reasonvec.reference.formats import (
    NAN,
    Bits,
    Mask,
    Stored,
    Work,
    as_f32,
    as_work,
    narrow,
    widen,
    work_of,
)
from reasonvec.reference.measures import BLOCK
from reasonvec.reference.update import NOT_WIDE, Wide

__all__ = [
    "ESCAPE",
    "Codec",
    "Encoding",
    "Part",
    "Parts",
    "decode",
    "encode",
    "encode_dense",
    "encode_sparse",
    "encode_wide",
    "entry",
    "exact_in_bf16",
    "tensor_digest",
]

Encoding = Literal["zero", "dense", "sparse"]
Codec = Literal["U8", "BF16", "F32", "F64"]
_S = TypeVar("_S", np.bool_, np.uint8, np.uint16, np.uint32, np.uint64, np.float32, np.float64)
ESCAPE = 255
"""The U8 code that means: the value is the next entry of ``escapes``."""


class Part(NamedTuple):
    """One entry of the safetensors file: its format, and its array (BF16 as uint16 patterns)."""

    dtype: str
    data: Stored


Parts: TypeAlias = dict[str, Part]


def entry(name: str, encoding: Encoding, part: str) -> str:
    """The name of a part in the safetensors file; dense values have the tensor's own.

    >>> entry("lm_head.weight", "sparse", "bitmap")
    'lm_head.weight:bitmap'
    """
    return name if (encoding, part) == ("dense", "values") else f"{name}:{part}"


def exact_in_bf16(v: Work) -> Mask:
    """Whether each element [n] is a finite BF16 number. NaN is not: its bits mean "escape"."""
    return np.asarray(np.isfinite(v) & (widen(narrow(v, "BF16"), "BF16", work_of(v)) == v))


def encode_dense(v: Work, shape: Sequence[int], codec: Codec) -> Parts:
    """Every value [n] in the tensor's shape: as BF16 if F32 and exact in it, or as it is."""
    return {"values": Part(codec, _stored(v, codec).reshape(shape))}


def encode_sparse(v: Work, codec: Codec, palette: NDArray[np.float32] | None = None) -> Parts:
    """One bit per element [n], and a value for every set bit.

    U8 values are places in ``palette`` [<= 255]; BF16 are the values that are exact in it; F32 and
    F64 are the values. What U8 and BF16 cannot say, ``escapes`` says. ``starts`` counts what lies
    before each block, so that a reader can begin at any of them.
    """
    moved = v != 0
    values = v[moved]
    escaped = np.zeros(values.size, np.bool_)
    parts = {"bitmap": Part("U8", _pad(np.packbits(moved, bitorder="little"), 8))}
    if codec == "U8":
        if palette is None or not 0 < palette.size <= ESCAPE:
            raise ValueError("U8 values need a palette of 1 to 255 entries")
        codes = _codes(_single(values), palette)
        escaped = codes == ESCAPE
        parts["values"] = Part("U8", _pad(codes, 8))
        parts["palette"] = Part("F32", palette)
    elif codec == "BF16":
        escaped = ~exact_in_bf16(values)
        bits = narrow(_single(values), "BF16").astype(np.uint16)
        bits[escaped] = NAN["BF16"]
        parts["values"] = Part("BF16", _pad(bits, 4))
    elif codec == "F32":
        parts["values"] = Part("F32", _pad(_single(values), 2))
    else:
        parts["values"] = Part("F64", _stored(values, "F64"))
    if escaped.any():
        parts["escapes"] = Part("F32", _pad(_single(values[escaped]), 2))
    escapes = moved.copy()
    escapes[moved] = escaped
    parts["starts"] = Part("U64", np.stack([_starts(moved), _starts(escapes)], axis=1))
    return parts


def encode_wide(wide: Wide, n: int) -> Parts:
    """Second parts of n elements: places in their blocks, values, and counts before each block."""
    if not wide.at.size:
        return {}
    listed = np.zeros(n, np.bool_)
    listed[wide.at] = True
    return {
        "wide_at": Part("U32", _pad((wide.at % BLOCK).astype(np.uint32), 2)),
        "wide_lo": Part("F64", wide.lo),
        "wide_starts": Part("U64", _starts(listed)),
    }


def encode(
    v: Work,
    shape: Sequence[int],
    encoding: Encoding,
    codec: Codec = "F32",
    palette: NDArray[np.float32] | None = None,
    wide: Wide = NOT_WIDE,
) -> Parts:
    """The parts of one tensor [n]. ValueError if encoding or codec cannot hold it exactly."""
    if encoding == "zero":
        if v.any() or wide.at.size:
            raise ValueError("some elements moved, and the zero encoding stores nothing")
        return {}
    dense = encoding == "dense"
    parts = encode_dense(v, shape, codec) if dense else encode_sparse(v, codec, palette)
    return parts | encode_wide(wide, v.size)


def decode(encoding: Encoding, parts: Parts, n: int) -> tuple[Work, Wide]:
    """The values [n] of any encoding, F64 if stored so and else F32, and the second parts."""
    if encoding == "zero":
        return np.zeros(n, np.float32), NOT_WIDE
    if encoding == "dense":
        return _read(parts["values"]), _read_wide(parts)
    moved = np.unpackbits(_array(parts["bitmap"], np.uint8), bitorder="little")[:n] == 1
    count = np.count_nonzero(moved)
    values = _read(parts["values"], parts.get("palette"))[:count]
    escaped = _is_escape(parts["values"])[:count]
    if escaped.any():
        values[escaped] = _array(parts["escapes"], np.float32)[: np.count_nonzero(escaped)]
    v = as_work(np.zeros(n), work_of(values))
    v[moved] = values
    return v, _read_wide(parts)


def _read(part: Part, palette: Part | None = None) -> Work:
    if palette is not None:
        codes = _array(part, np.uint8)
        return _array(palette, np.float32)[np.where(codes == ESCAPE, 0, codes)]
    if part.dtype == "BF16":
        return widen(_array(part, np.uint16), "BF16")
    return _array(part, np.float64) if part.dtype == "F64" else _array(part, np.float32).copy()


def _is_escape(part: Part) -> Mask:
    escape = {"U8": ESCAPE, "BF16": NAN["BF16"]}.get(part.dtype)
    return np.zeros(part.data.size, np.bool_) if escape is None else np.asarray(part.data == escape)


def _read_wide(parts: Parts) -> Wide:
    if "wide_at" not in parts:
        return NOT_WIDE
    starts = _array(parts["wide_starts"], np.uint64).astype(np.int64)
    block = np.repeat(np.arange(starts.size - 1), np.diff(starts))
    at = _array(parts["wide_at"], np.uint32)[: block.size].astype(np.int64)
    return Wide(block * BLOCK + at, _array(parts["wide_lo"], np.float64))


def _array(part: Part, kind: type[_S]) -> NDArray[_S]:
    return np.asarray(part.data, kind).ravel()


def _pad(data: NDArray[_S], multiple: int) -> NDArray[_S]:
    # Padded parts end on eight bytes, so that whatever follows them in the file can be aligned.
    padded = np.zeros(-(-data.size // multiple) * multiple, data.dtype)
    padded[: data.size] = data
    return padded


def _stored(v: Work, codec: Codec) -> Work | Bits:
    if codec == "BF16" and v.dtype == np.float32 and exact_in_bf16(v).all():
        return narrow(v, "BF16")
    if codec != work_of(v):
        raise ValueError(f"{codec} does not hold these {v.dtype} values exactly")
    return v


def _single(values: Work) -> NDArray[np.float32]:
    if values.dtype != np.float32:
        raise ValueError("sparse values of an F64 tensor are stored as F64")
    return as_f32(values)


def _codes(values: NDArray[np.float32], palette: NDArray[np.float32]) -> NDArray[np.uint8]:
    # Compared as bit patterns, so that even NaN would find itself.
    wanted, known = values.view(np.uint32), palette.view(np.uint32)
    order = np.argsort(known, kind="stable")
    at = order[np.minimum(np.searchsorted(known[order], wanted), known.size - 1)]
    return np.where(known[at] == wanted, at, ESCAPE).astype(np.uint8)


def _starts(flags: Mask) -> NDArray[np.uint64]:
    blocks = -(-flags.size // BLOCK)
    counts = _pad(flags, BLOCK).reshape(blocks, BLOCK).sum(axis=1)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)


def tensor_digest(data: bytes, itemsize: int, hash_bytes: Callable[[bytes], bytes]) -> str:
    """The hash, in lower-case hex, of the hashes of the blocks of ``data``.

    A block is BLOCK elements, the last one what is left; so any thread can hash any block while it
    passes by. No data, no blocks: the hash of nothing. A file that is not safetensors is a tensor
    of one-byte elements. ``hash_bytes`` is XXH3-128 (seed 0, 16 bytes, big-endian) or BLAKE3 (32).

    >>> import hashlib
    >>> sha = lambda data: hashlib.sha256(data).digest()
    >>> tensor_digest(b"abc", 1, sha) == sha(sha(b"abc")).hex()
    True
    """
    step = BLOCK * itemsize
    blocks = [data[i : i + step] for i in range(0, len(data), step)]
    return hash_bytes(b"".join(map(hash_bytes, blocks))).hex()
