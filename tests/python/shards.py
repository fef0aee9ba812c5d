"""Checkpoints of any tensors, as bit patterns: written and read without the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2,
    "F8_E4M3": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def bits(self) -> NDArray[np.unsignedinteger]:
        """Its bit patterns [n]."""
        return np.frombuffer(self.data, f"<u{SIZE[self.dtype]}")


def stored(dtype: str, bits: NDArray[np.generic], shape: Sequence[int] | None = None) -> Stored:
    """A tensor of bit patterns."""
    assert bits.dtype.itemsize == SIZE[dtype]
    return Stored(dtype, tuple(bits.shape if shape is None else shape), bits.tobytes())


def numbers(dtype: str, seed: int) -> Stored:
    """Finite numbers of every size that a float format has, zeros of both signs among them."""
    size = SIZE[dtype]
    kind = np.dtype(f"<u{size}")
    dice = np.random.default_rng(seed)
    bits = dice.integers(0, 2 ** (8 * size), 4099, dtype=kind)
    mantissa = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}[dtype]
    exponent = {"BF16": 8, "F16": 5, "F32": 8, "F64": 11}[dtype]
    # The highest bit of the exponent goes, so that nothing is infinite and no sum overflows.
    bits &= kind.type((1 << (8 * size)) - 1 - (1 << (mantissa + exponent - 1)))
    bits[:64] = 0
    bits[64:128] = 1 << (8 * size - 1)
    dice.shuffle(bits)
    return stored(dtype, bits)


def write_shard(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """One safetensors file, its tensors in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        end = at + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.data)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Stored],
    *,
    config: Mapping[str, object] | None = None,
    shards: Sequence[Sequence[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint folder: one shard, or the names of the tensors of each of several."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"format": "pt"} if metadata is None else metadata
    if shards is None:
        write_shard(folder / "model.safetensors", tensors, said)
    else:
        files = [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
        for file, names in zip(files, shards, strict=True):
            write_shard(folder / file, {name: tensors[name] for name in names}, said)
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_shard(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors: dict[str, Stored] = {}
    for name, row in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = row["data_offsets"]
            data = content[start + begin : start + end]
            assert len(data) == end - begin, f"{path}: {name} is cut off"
            tensors[name] = Stored(row["dtype"], tuple(row["shape"]), data)
    return tensors


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_shard(path)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path from there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
