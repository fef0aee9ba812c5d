"""Low-rank vectors: the leading triplets of every matrix of a vector, in place of the matrix.

Storage in bf16 adds the grid's noise to an update, spread over all directions, while the update
itself lies in a few: the leading triplets are nearer to what was learned than the difference is
(docs/format.md, lowrank; arXiv 2510.00553). So the share of the sum of squares that a rank keeps
says little, and ``"auto"`` counts the singular values above those of the noise instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from reasonvec.adapter import ADAPTER_MODEL, AdapterFolder
from reasonvec.algebra import Adapter, Vector
from reasonvec.compat.layout import FLOATS
from reasonvec.compat.problem import demand
from reasonvec.destination import Destination
from reasonvec.errors import MismatchError, NonFiniteError
from reasonvec.extract import ExtractOptions, ExtractReport, Row, write_vector
from reasonvec.factor_file import FactorFile, Values
from reasonvec.folders import VECTOR_CONFIG
from reasonvec.json_values import Json
from reasonvec.memory import anonymous_bytes
from reasonvec.names import is_vocabulary
from reasonvec.run import DEFAULT_BUDGET, RunOptions, steps
from reasonvec.terms import Operands, Summed, elements, leaf_layout, sum_terms
from reasonvec.triplets import Rank, Triplets, check_rank, leading, memory

__all__ = [
    "CompressOptions",
    "CompressReport",
    "FactorsPlan",
    "compress",
    "from_lora",
    "has_factors",
    "plan_compress",
    "plan_factors",
    "summed",
]

# Headers, plans and the factors of one matrix on their way into the file.
_HEADROOM = 24 << 20
_FACTORS = "factors.safetensors.partial"


class CompressOptions(ExtractOptions, total=False):
    """Keywords of `Vector.compress`."""

    rank: Rank
    """How many triplets of each matrix: a number, "auto" (default) for those above the noise floor,
    or a share between 0 and 1 of the sum of squares (``energy`` in a command)."""
    rescale: bool
    """Stretch every compressed matrix to the norm that it had (default False)."""


@dataclass(frozen=True)
class CompressReport:
    """A finished low-rank vector."""

    path: Path
    recipe: str
    rows: list[Row]

    @property
    def compressed(self) -> list[Row]:
        """The tensors that are kept as factors, or whose rank is zero."""
        return [row for row in self.rows if row.residual is not None]

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def residual(self) -> float:
        """The norm of everything that was left out."""
        return math.sqrt(sum((row.residual or 0.0) ** 2 for row in self.rows))

    @property
    def norm(self) -> float:
        """The norm of what is stored."""
        return math.sqrt(sum(row.norm**2 for row in self.rows))

    def as_json(self) -> Json:
        return {
            "path": str(self.path),
            "recipe": self.recipe,
            "norm": self.norm,
            "residual": self.residual,
            "bytes": self.bytes,
            "tensors": len(self.rows),
            "compressed": len(self.compressed),
            "ranks": {
                row.name: {"rank": row.rank or 0, "norm": row.norm, "residual": row.residual}
                for row in self.compressed
            },
        }


@dataclass(frozen=True)
class FactorsPlan:
    """What a decomposition of a vector's matrices will take, from headers alone.

    ``memory`` has for every matrix the bytes that its decomposition holds, of order
    (rows + columns) * rank; the least and the most where a rule chooses the rank, which is the
    same where a number does. ``peak_memory`` is the process's at most, with what it holds now.
    """

    recipe: str
    rank: Rank
    memory: dict[str, tuple[int, int]]
    others: int
    peak_memory: tuple[int, int]

    def as_json(self) -> Json:
        return {
            "recipe": self.recipe,
            "rank": self.rank,
            "matrices": {name: list(span) for name, span in self.memory.items()},
            "other_tensors": self.others,
            "peak_memory": list(self.peak_memory),
        }


def plan_factors(
    vector: Vector, options: RunOptions, taken: Callable[[Summed], bool], rank: Rank = "auto"
) -> FactorsPlan:
    """What a decomposition of the matrices for which ``taken`` is true will take.

    Raises:
        MismatchError: the parts do not fit together, or ``rank`` is no rank.
    """
    check_rank(rank)
    tensors, _ = summed(vector)
    spans = {
        name: memory(tensor.shape, rank, options)
        for name, tensor in tensors.items()
        if tensor.terms and taken(tensor)
    }
    least, most = (max((span[i] for span in spans.values()), default=0) for i in (0, 1))
    # The pass that stores or measures the rest comes before or after, inside its budget.
    budget, now = options.get("memory_budget", DEFAULT_BUDGET), anonymous_bytes() + _HEADROOM
    return FactorsPlan(
        str(vector),
        rank,
        spans,
        len(tensors) - len(spans),
        (now + max(least, budget), now + max(most, budget)),
    )


def plan_compress(vector: Vector, options: CompressOptions) -> FactorsPlan:
    """What `compress` will do, from headers alone; see `Vector.plan_compress`."""
    return plan_factors(vector, options, _is_taken, options.get("rank", "auto"))


def has_factors(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor is one that is taken apart: a matrix of floats whose rows are no tokens."""
    return len(shape) == 2 and dtype in FLOATS and min(shape) > 0 and not is_vocabulary(name)


def is_stack(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor is a stack of such matrices: the experts of a layer, [experts, m, n]."""
    return len(shape) == 3 and has_factors(name, shape[1:], dtype) and shape[0] > 0


def _is_taken(tensor: Summed) -> bool:
    what = tensor.name, tensor.shape, tensor.dtype
    return has_factors(*what) or is_stack(*what)


def summed(vector: Vector) -> tuple[dict[str, Summed], Operands]:
    """A vector by itself, tensor by tensor.

    Raises:
        MismatchError: it is empty, or its parts have no sum.
    """
    if not vector.terms:
        message = "an empty vector (a point minus itself) has nothing to compress"
        raise MismatchError(message)
    operands = Operands()
    tensors, problems = sum_terms(vector, leaf_layout(vector.terms[0].leaf), operands)
    demand(problems)
    return tensors, operands


def compress(vector: Vector, out: Path, options: CompressOptions) -> CompressReport:
    """Write a vector with every matrix as factors; see `Vector.compress`."""
    rank, rescale = options.get("rank", "auto"), options.get("rescale", False)
    check_rank(rank)
    tensors, operands = summed(vector)

    matrices = {
        name: tensor for name, tensor in tensors.items() if tensor.terms and _is_taken(tensor)
    }
    # What is stored otherwise is read once, and told apart: it comes with a bar of its own.
    weights = [elements(tensor.shape) for tensor in matrices.values()]
    parts = dict(zip(matrices, steps(options, weights), strict=True))

    def factors(tensor: Summed, file: FactorFile) -> list[str] | None:
        if tensor.name not in matrices:
            return None
        name, shape, part = tensor.name, tensor.shape, parts[tensor.name]
        numbers: list[int | None] = [None] if len(shape) == 2 else list(range(shape[0]))
        runs = steps(part, [1] * len(numbers))
        found = [
            leading(name, shape, tensor.terms, operands, rank, run, number)
            for number, run in zip(numbers, runs, strict=True)
        ]
        most = max(one.rank for one in found)
        rows, columns = shape[-2:]
        if most == 0:
            return []
        if most * (rows + columns) >= rows * columns:
            # The factors would be larger than the matrix, which is exact.
            return None
        scaled = [_rescaled(one) for one in found] if rescale else found
        return _store(name, scaled, most, file, stack=len(shape) == 3)

    config: Json = {"compression": {"rank": rank, "rescale": rescale}}
    report = _write(vector, out, options, tensors, operands, factors, config)
    return CompressReport(report.path, report.recipe, report.rows)


def from_lora(adapter: Vector, out: Path, **options: Unpack[ExtractOptions]) -> CompressReport:
    """Write an adapter as a vector folder with its own factors, bit for bit.

    Raises:
        MismatchError: ``adapter`` is something else than an adapter as `reasonvec.adapter` opens
            it, or does not fit its base.
    """
    leaves = [scaled.leaf for scaled in adapter.terms]
    plain = len(leaves) == 1 and not adapter.terms[0].factors and adapter.terms[0].control is None
    leaf = leaves[0] if plain else None
    if not isinstance(leaf, Adapter):
        message = f"{adapter}: is no single adapter; compress it instead (vector.compress)"
        raise MismatchError(message)
    tensors, operands = summed(adapter)

    def factors(tensor: Summed, file: FactorFile) -> list[str] | None:
        update = leaf.updates.of.get(tensor.name)
        low = update.factors if update is not None else None
        if low is None or low.a is None or low.rank > min(tensor.shape):
            return None
        parts = {"u": low.a, "v": low.b} if low.transposed else {"u": low.b, "v": low.a}
        for role, entry in parts.items():
            values, dtype = _bits(leaf.folder, entry)
            file.add(f"{tensor.name}:{role}", values.T if low.transposed else values, dtype)
        file.add(f"{tensor.name}:s", np.full(low.rank, low.scale), "F64")
        return [f"{tensor.name}:{role}" for role in ("u", "s", "v")]

    origin = str(leaf.folder.path / ADAPTER_MODEL)
    report = _write(adapter, out, options, tensors, operands, factors, {}, origin)
    return CompressReport(report.path, report.recipe, report.rows)


def _bits(folder: AdapterFolder, entry: str) -> tuple[Values, str]:
    """A factor as it is stored, and its format; 16-bit floats as their bits."""
    info = folder.tensors[entry]
    raw = memoryview(folder.handle.tensor(entry)).cast("B")
    values: Values
    if info.dtype == "F64":
        values = np.frombuffer(raw, np.float64)
    elif info.dtype == "F32":
        values = np.frombuffer(raw, np.float32)
    else:
        values = np.frombuffer(raw, np.uint16)
    return values.reshape(info.shape), info.dtype


def _rescaled(found: Triplets) -> Triplets:
    squares = float(np.sum(found.s * found.s))
    s = found.s * math.sqrt(found.squares / squares) if squares else found.s
    return Triplets(found.u, s, found.v, found.squares)


def _store(
    name: str, found: list[Triplets], rank: int, file: FactorFile, *, stack: bool
) -> list[str]:
    if stack:
        # One rank for all: those of a lower one have zeros after their own.
        u = np.stack([np.pad(one.u, ((0, 0), (0, rank - one.rank))) for one in found])
        s = np.stack([np.pad(one.s, (0, rank - one.rank)) for one in found])
        v = np.stack([np.pad(one.v, ((0, rank - one.rank), (0, 0))) for one in found])
    else:
        u, s, v = found[0].u, found[0].s, found[0].v
    file.add(f"{name}:u", u, "F32")
    file.add(f"{name}:s", s, "F64")
    file.add(f"{name}:v", v, "F32")
    return [f"{name}:{role}" for role in ("u", "s", "v")]


def _write(
    vector: Vector,
    out: Path,
    options: ExtractOptions,
    tensors: dict[str, Summed],
    operands: Operands,
    factors: Callable[[Summed, FactorFile], list[str] | None],
    config: Json,
    origin: str | None = None,
) -> ExtractReport:
    """``origin`` is where the factors come from, for messages."""
    destination = Destination(out, operands.folders, overwrite=options.get("overwrite", False))
    names = [f"{name}:{role}" for name in tensors for role in ("u", "s", "v")]
    stored: dict[str, list[str]] = {}
    with destination.renewed(VECTOR_CONFIG) as place:
        path = place / _FACTORS
        try:
            with FactorFile(path, names) as file:
                for name, tensor in tensors.items():
                    entries = factors(tensor, file)
                    if entries is not None:
                        stored[name] = entries
                file.finish(sync=False)
            return write_vector(
                vector, out, options, place=place, factors=(path, stored), config=config
            )
        except NonFiniteError as error:
            # The file with the factors is our own, and gone when somebody looks for it.
            raise NonFiniteError(str(error).replace(str(path), origin or str(vector))) from None
        finally:
            path.unlink(missing_ok=True)
