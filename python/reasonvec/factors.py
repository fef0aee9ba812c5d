"""The factor cache: leading and trailing singular triplets of a checkpoint's matrices in one file.

KaSA (arXiv 2412.06071) drops the smallest triplets of every weight, PiSSA (2404.02948) starts from
the largest, MiLoRA (2406.09044) from the smallest: all of them recompute what depends on the
checkpoint alone. Here it is computed once, in f64, and kept under the digest of each tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, Unpack

from reasonvec import _reasonvec as core
from reasonvec._reasonvec import Checkpoint as CoreCheckpoint
from reasonvec._reasonvec import Tensor
from reasonvec.algebra import Point
from reasonvec.errors import DamageError, FormatError, MismatchError
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json
from reasonvec.names import kind_of
from reasonvec.run import RunOptions, settings, steps
from reasonvec.spectrum import checkpoint_matrices, svd

__all__ = ["Factors", "Which", "factors", "write_factors"]

Which: TypeAlias = Literal["top", "bottom", "both"]
_FORMAT = "reasonvec-factors-1"
# Embeddings, heads and norms are nobody's adapters.
_NOT = frozenset({"embed", "lm_head", "norm", "router"})


@dataclass(frozen=True, slots=True)
class Factors(Mapping[str, "dict[str, Tensor]"]):
    """A factor file, opened: tensor name to ``{"top.u": [m, r], "top.s": [r], "top.vt": [r, n],
    "bottom.u": ...}``, whichever the file has; what is not looked up is not read."""

    path: Path
    handle: CoreCheckpoint
    rows: dict[str, Json]

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        row = self.rows[name]
        parts = row["parts"]
        if not isinstance(parts, list):
            message = f"{self.path}: {name} has no list of parts; the file is damaged"
            raise FormatError(message)
        return {str(part): self.handle.tensor(f"{name}:{part}") for part in parts}

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def check(self, model: Point) -> None:
        """Compare the digests of the model's tensors with those the factors were made from.

        Raises:
            DamageError: some tensor is another one now.
        """
        names = list(self.rows)
        found = core.digest_tensors(
            model.base.handle, names, "xxh3-128", json.dumps(settings({})), None
        )
        for name, digest in zip(names, found, strict=True):
            if digest != self.rows[name]["digest"]:
                message = (
                    f"{self.path}: the factors of {name} were made from a tensor with the digest "
                    f"{self.rows[name]['digest']}, {model.base.path} has {digest}; make them again "
                    "with `reasonvec factors`"
                )
                raise DamageError(message)


def factors(path: str | os.PathLike[str]) -> Factors:
    """Open a factor file that `write_factors` or ``reasonvec factors`` wrote. Reads headers only.

    Raises:
        FormatError: it is no factor file.
        OSError: it cannot be read.

    Examples:
        >>> import reasonvec as rv
        >>> written = rv.write_factors(rv.open(family.sft), "f.safetensors", rank=4)
        >>> bottom = rv.factors("f.safetensors")["model.layers.0.self_attn.q_proj.weight"]
        >>> bottom["bottom.u"]
        Tensor(F32, [64, 4])
    """
    file = Path(path)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= 100 << 20:
            message = f"{file}: is no safetensors file"
            raise FormatError(message)
        try:
            header = json.loads(opened.read(length))
            metadata = header["__metadata__"]
            if metadata["format"] != _FORMAT:
                raise KeyError("format")
            rows = json.loads(metadata["tensors"])
        except (ValueError, KeyError, TypeError, RecursionError):
            message = f"{file}: is no factor file; make one with `reasonvec factors MODEL -o FILE`"
            raise FormatError(message) from None
    return Factors(file, CoreCheckpoint(file), rows)


def write_factors(
    model: Point,
    path: str | os.PathLike[str],
    *,
    rank: int,
    which: Which = "bottom",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    seed: int = 0,
    tell: Callable[[str], object] = lambda _: None,
    **options: Unpack[RunOptions],
) -> Factors:
    """Write the leading or trailing singular triplets of a checkpoint's matrices.

    Args:
        model: a checkpoint without vectors.
        path: the file; written beside its name and renamed.
        rank: triplets of each matrix, at most its smaller side.
        which: the largest, the smallest (in f64 and stored in F32), or both.
        include: regular expressions; only tensors whose name one of them finds. By default every
            matrix but embeddings, head, routers and norms.
        exclude: regular expressions of tensors to leave out.
        tell: called with the name of each tensor before it is factored.

    Raises:
        MismatchError: the model has vectors added, or nothing is left to factor.
        NonFiniteError: NaN or infinity in a matrix.
        OSError: a file cannot be read or written.
    """
    if model.vector.terms:
        message = f"{model}: factors are those of a checkpoint; save the sum first"
        raise MismatchError(message)
    if rank < 1:
        message = f"rank is a number of triplets from 1 on, not {rank}"
        raise ValueError(message)
    names = _selected(model.base, list(include), list(exclude))
    matrices = checkpoint_matrices(model.base)
    sides: tuple[Literal["top", "bottom"], ...] = ("top", "bottom") if which == "both" else (which,)
    digests = core.digest_tensors(
        model.base.handle, names, "xxh3-128", json.dumps(settings(options)), None
    )
    rows: dict[str, Json] = {}
    header: dict[str, Json] = {}
    at = 0
    for name, digest in zip(names, digests, strict=True):
        m, n = matrices.shapes[name]
        r = min(rank, m, n)
        parts = [f"{side}.{part}" for side in sides for part in ("u", "s", "vt")]
        rows[name] = {"digest": digest, "rank": r, "shape": [m, n], "parts": parts}
        for part in parts:
            shape = {"u": [m, r], "s": [r], "vt": [r, n]}[part.rpartition(".")[2]]
            size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[f"{name}:{part}"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [at, at + size],
            }
            at += size
    metadata = {"format": _FORMAT, "which": which, "seed": str(seed), "tensors": json.dumps(rows)}
    text = json.dumps({"__metadata__": metadata} | header).encode()
    text += b" " * (-len(text) % 8)
    file = Path(path)
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        tasks = [(name, side) for name in names for side in sides]
        sizes = [math.prod(matrices.shapes[name]) for name, _ in tasks]
        runs = steps(options, sizes)
        for name in names:
            tell(name)
            for side in sides:
                found = svd(
                    matrices,
                    name,
                    rule={"fixed": rank},
                    which=side,
                    seed=seed,
                    options=next(runs),
                )
                out.write(memoryview(found.u).cast("B"))
                single = memoryview(found.s)
                out.write(_single(single.tolist()))
                out.write(memoryview(found.vt).cast("B"))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
    return factors(file)


def _single(values: Iterable[float]) -> bytes:
    from array import array

    found = array("f", values)
    if not (b := found.tobytes()) or int.from_bytes(array("H", [1]).tobytes(), "little") == 1:
        return b
    found.byteswap()
    return found.tobytes()


def _selected(folder: CheckpointFolder, include: list[str], exclude: list[str]) -> list[str]:
    matrices = checkpoint_matrices(folder)
    copies = folder.layout.copies()
    names = []
    for name, shape in matrices.shapes.items():
        if len(shape) != 2 or 0 in shape or name in copies:
            continue
        wanted = any(re.search(p, name) for p in include) if include else kind_of(name) not in _NOT
        if wanted and not any(re.search(p, name) for p in exclude):
            names.append(name)
    if not names:
        message = (
            f"{folder.path}: no matrix is left to factor; --include and --exclude are regular "
            "expressions of tensor names"
        )
        raise MismatchError(message)
    return names
