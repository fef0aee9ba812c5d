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
from typing import TYPE_CHECKING, Literal, TypeAlias, Unpack, cast

from reasonvec import _reasonvec as core
from reasonvec._reasonvec import Checkpoint as CoreCheckpoint
from reasonvec._reasonvec import Tensor
from reasonvec.algebra import Point
from reasonvec.errors import DamageError, FormatError, MismatchError
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json
from reasonvec.matrices import point_matrices
from reasonvec.names import kind_of
from reasonvec.run import RunOptions, settings, steps
from reasonvec.svd import Svd, check_seed, rank_rule, svd

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Single: TypeAlias = NDArray[np.float32]

__all__ = ["Factors", "Which", "factors", "write_factors"]

Which: TypeAlias = Literal["top", "bottom", "both"]
Side: TypeAlias = Literal["top", "bottom"]
_FORMAT = "reasonvec-factors-1"
_PARTS = ("u", "s", "vt")
_SIDES: tuple[Side, ...] = ("top", "bottom")
_EVERY_PART = frozenset(f"{side}.{part}" for side in _SIDES for part in _PARTS)
# Embeddings, heads and norms are nobody's adapters.
_NOT = frozenset({"embed", "lm_head", "norm", "router"})


@dataclass(frozen=True, slots=True)
class Factors(Mapping[str, "dict[str, Tensor]"]):
    """A factor file, opened: tensor name to ``{"top.u": [m, r], "top.s": [r], "top.vt": [r, n],
    "bottom.u": ...}``, whichever the file has, in float32; what is not looked up is not read.

    The tensors share the file's bytes. `torch` gives copies of one's own.
    """

    path: Path
    handle: CoreCheckpoint
    rows: dict[str, Json]

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        parts = self.rows[name]["parts"]
        if not isinstance(parts, list):
            raise TypeError
        return {str(part): self.handle.tensor(f"{name}:{part}") for part in parts}

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def torch(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, torch.Tensor]:
        """The factors of a tensor as torch tensors that may be changed, to start an adapter from.

        Args:
            name: of the tensor.
            dtype: float32 by default.
            device: the processor by default.

        Raises:
            KeyError: the file has no factors of it.
        """
        from reasonvec.torch import to_torch

        return {
            part: to_torch(tensor, dtype=dtype, device=device)
            for part, tensor in self[name].items()
        }

    def check(self, model: Point) -> None:
        """Compare the digests of the model's tensors with those the factors were made from.

        Raises:
            DamageError: some tensor is another one now, or is no longer there.
        """
        there = model.base.layout.tensors
        if gone := [name for name in self.rows if name not in there]:
            message = (
                f"{self.path}: has factors of {gone[0]}, which {model.base.path} lacks; make them "
                "again with `reasonvec factors`"
            )
            raise DamageError(message)
        found = _digests(model, list(self.rows), {})
        for name, digest in found.items():
            if digest != self.rows[name]["digest"]:
                message = (
                    f"{self.path}: the factors of {name} were made from a tensor with the digest "
                    f"{self.rows[name]['digest']}, {model.base.path} has {digest}; make them again "
                    "with `reasonvec factors`"
                )
                raise DamageError(message)


def factors(path: str | os.PathLike[str], model: Point | None = None) -> Factors:
    """Open a factor file that `write_factors` or ``reasonvec factors`` wrote. Reads headers only,
    and with a model its tensors, to compare their digests.

    Args:
        path: the file.
        model: the checkpoint that an adapter is to stand on.

    Raises:
        DamageError: the factors were made from other tensors than the model's.
        FormatError: it is no factor file.
        OSError: it cannot be read.

    Examples:
        >>> import reasonvec as rv
        >>> written = rv.write_factors(rv.open(family.sft), "f.safetensors", rank=4)
        >>> found = rv.factors("f.safetensors", rv.open(family.sft))
        >>> found["model.layers.0.self_attn.q_proj.weight"]["bottom.u"]
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
            rows = _rows(json.loads(metadata["tensors"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            message = f"{file}: is no factor file; make one with `reasonvec factors MODEL -o FILE`"
            raise FormatError(message) from None
    found = Factors(file, CoreCheckpoint(file), rows)
    entries = {name for name, _, _, _ in found.handle.tensors()}
    for name, row in rows.items():
        for part in cast("list[str]", row["parts"]):
            if f"{name}:{part}" not in entries:
                message = f"{file}: says that it has {name}:{part}, and has not: it is damaged"
                raise FormatError(message)
    if model is not None:
        found.check(model)
    return found


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

    What a file of that name already has of this model is kept, by the digest of the tensor that it
    was made from, under whatever name that was: factors of the same rank and seed are not made
    again, the other side stays beside the one that is made, if it has the same rank, and so do
    tensors that ``include`` and ``exclude`` leave out, at the rank that they have. So running it
    again on the same model reads its tensors once and computes nothing. Factors of other tensors
    than the model's go.

    A matrix of lower rank than ``rank`` has zeros in place of the triplets that it lacks.

    Args:
        model: a checkpoint without vectors.
        path: the file; written beside its name and renamed.
        rank: triplets of each matrix, at most its smaller side.
        which: the largest, the smallest (in f64 and stored in F32), or both.
        include: regular expressions; only tensors whose name one of them finds. By default every
            matrix but embeddings, head, routers and norms.
        exclude: regular expressions of tensors to leave out.
        seed: of the random test matrix of the largest.
        tell: called with the name of each tensor before it is factored, not when it is kept.

    Raises:
        FormatError: there is a file of that name which is no factor file.
        MismatchError: the model has vectors added, nothing is left to factor, or the file would lie
            in the model's folder.
        NonFiniteError: NaN or infinity in a matrix.
        OSError: a file cannot be read or written.
    """
    from reasonvec.factor_file import FactorFile

    if model.vector.terms:
        message = f"{model}: factors are those of a checkpoint; save the sum first"
        raise MismatchError(message)
    rule = rank_rule(rank)
    check_seed(seed)
    file = Path(path)
    kept = _Kept(file)
    folder = model.base.path
    if folder.is_dir() and folder.resolve() in file.resolve().parents:
        message = f"{file}: lies in the folder of the input {folder}; name a file outside of it"
        raise MismatchError(message)
    matrices = point_matrices(model)
    names = _selected(model.base, matrices.shapes, list(include), list(exclude))
    asked: tuple[Side, ...] = ("top", "bottom") if which == "both" else (which,)
    wanted = set(names)
    # In the order of the checkpoint, as if all had been asked for at once.
    names = [n for n, s in matrices.shapes.items() if n in wanted or (n in kept and len(s) == 2)]
    rows: dict[str, Json] = {}
    sides: dict[str, list[Side]] = {}
    for name, digest in _digests(model, names, options).items():
        m, n = matrices.shapes[name]
        least = min(rank, m, n) if name in wanted else kept.rank(name)
        row: Json = {"digest": digest, "rank": least, "shape": [m, n], "seed": seed}
        new = asked if name in wanted else ()
        # The largest that are there keep their seed, which the smallest do not depend on.
        if "top" not in new:
            row["seed"] = kept.seed(row, seed)
        there = [side for side in _SIDES if side in new or kept.find(row, side) is not None]
        if there:
            sides[name] = there
            rows[name] = row | {"parts": [f"{side}.{part}" for side in there for part in _PARTS]}
    known = {side for there in sides.values() for side in there}
    metadata = {
        "format": _FORMAT,
        "which": "both" if len(known) > 1 else min(known),
        "tensors": json.dumps(rows),
    }
    each = [(name, side) for name, there in sides.items() for side in there]
    runs = steps(options, [math.prod(matrices.shapes[name]) for name, _ in each])
    entries = [f"{name}:{side}.{part}" for name, side in each for part in _PARTS]
    with FactorFile(file, entries, metadata) as out:
        for (name, side), run in zip(each, runs, strict=True):
            found = kept.find(rows[name], side)
            if found is None:
                tell(name)
                made = svd(
                    matrices.plan(name, None),
                    matrices.operands,
                    rule=rule,
                    which=side,
                    seed=seed,
                    options=run,
                )
                found = _filled(made, min(rank, *matrices.shapes[name]))
            for part, values in zip(_PARTS, found, strict=True):
                out.add(f"{name}:{side}.{part}", values, "F32")
        # Where a file that is open cannot be replaced, the old one must not be.
        kept.close()
        out.finish()
    return factors(file)


def _filled(made: Svd, rank: int) -> tuple[Single, Single, Single]:
    """Triplets with zeros up to a rank: a zero matrix may have none."""
    from reasonvec.factor_file import single

    u, s, vt = single(made.u), single(made.s), single(made.vt)
    lack = rank - len(s)
    if lack <= 0:
        return u, s, vt
    import numpy as np

    return np.pad(u, ((0, 0), (0, lack))), np.pad(s, (0, lack)), np.pad(vt, ((0, lack), (0, 0)))


def _rows(found: dict[str, Json]) -> dict[str, Json]:
    """What a file says of its tensors, if it is what `write_factors` says.

    Raises:
        KeyError, TypeError: it is something else.
    """
    for row in found.values():
        if not isinstance(row["digest"], str) or type(row["rank"]) is not int:
            raise TypeError
        if not isinstance(row["parts"], list) or not isinstance(row["shape"], list):
            raise TypeError
        if not all(part in _EVERY_PART for part in row["parts"]):
            raise TypeError
    return found


class _Kept:
    """What a factor file had before it is written again, by digest. Somebody may have changed it:
    what is not as this module writes it is made again."""

    def __init__(self, path: Path) -> None:
        self._file = factors(path) if path.exists() else None
        self._names: dict[tuple[object, object], str] = {}
        for name, row in self._file.rows.items() if self._file is not None else ():
            self._names[row["digest"], row["rank"]] = name

    def __contains__(self, name: str) -> bool:
        return self._file is not None and name in self._file

    def rank(self, name: str) -> object:
        """The rank that a tensor's factors had."""
        return None if self._file is None else self._file.rows[name]["rank"]

    def seed(self, row: Json, default: int) -> object:
        """The seed of the largest that are there of the tensor that ``row`` is about."""
        name = self._names.get((row["digest"], row["rank"]))
        if self._file is None or name is None:
            return default
        seed = self._file.rows[name].get("seed")
        return seed if type(seed) is int else default

    def find(self, row: Json, side: Side) -> tuple[Single, Single, Single] | None:
        """The factors that ``row`` asks for, if they are there."""
        name = self._names.get((row["digest"], row["rank"]))
        if self._file is None or name is None:
            return None
        old = self._file.rows[name]
        # The smallest are exact: no random matrix is in them.
        if old["shape"] != row["shape"] or (side == "top" and old.get("seed") != row["seed"]):
            return None
        import numpy as np

        parts = self._file[name]
        m, n, rank = (int(str(x)) for x in (*cast("list[int]", row["shape"]), row["rank"]))
        found = []
        for part, shape in zip(_PARTS, ((m, rank), (rank,), (rank, n)), strict=True):
            tensor = parts.get(f"{side}.{part}")
            if tensor is None or tensor.dtype != "F32" or tuple(tensor.shape) != shape:
                return None
            values = np.asarray(memoryview(tensor))
            if not np.isfinite(values).all():
                return None
            found.append(values)
        return found[0], found[1], found[2]

    def close(self) -> None:
        self._file = None


def _digests(model: Point, names: list[str], options: RunOptions) -> dict[str, str | None]:
    found = core.digest_tensors(
        model.base.handle, names, "xxh3-128", json.dumps(settings(options)), None
    )
    return dict(zip(names, found, strict=True))


def _selected(
    folder: CheckpointFolder,
    shapes: Mapping[str, tuple[int, ...]],
    include: list[str],
    exclude: list[str],
) -> list[str]:
    copies = folder.layout.copies()
    names = []
    for name, shape in shapes.items():
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
