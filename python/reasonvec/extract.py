"""Writing a vector: the exact difference of two checkpoints, or any sum of vectors, as a folder."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from reasonvec import _reasonvec as core
from reasonvec.algebra import Adapter, Difference, Vector
from reasonvec.compat.problem import Problem, demand
from reasonvec.destination import Destination, relative
from reasonvec.errors import MismatchError
from reasonvec.folders import VECTOR_CONFIG, CheckpointFolder
from reasonvec.json_values import Json, objects_in
from reasonvec.names import kind_of
from reasonvec.run import DigestName, RunOptions, settings
from reasonvec.terms import Operands, leaf_folders, leaf_layout, sum_terms

__all__ = ["Encoding", "ExtractOptions", "ExtractReport", "Row", "extract", "write_vector"]

Encoding: TypeAlias = Literal["auto", "dense", "sparse"]


class ExtractOptions(RunOptions, total=False):
    """Keywords of `Vector.save`."""

    encoding: Encoding
    """``"auto"`` (default): the fewest bytes, tensor by tensor; ``"dense"`` or ``"sparse"``."""
    shard_bytes: int
    """Bytes after which a data file is full, 5 GB by default."""
    digest: DigestName
    """``"xxh3-128"`` (default) or ``"blake3"``."""
    sync: bool
    """Whether files are flushed to the disk before they get their final names (default True)."""
    overwrite: bool
    """Replace an earlier output of reasonvec in the folder. It stands until the new one is whole:
    there must be room for both."""
    allow_nonfinite: bool
    """Let NaN and infinity pass."""


class Row(NamedTuple):
    """One tensor of a vector, as its manifest has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    elements: int
    moved: int
    norm: float
    max: float
    inexact: int
    wide: int
    bytes: int
    rank: int | None = None
    residual: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, object]) -> Row:
        def number(key: str) -> float:
            value = row[key]
            return float(value) if isinstance(value, (int, float)) else float("nan")

        shape = row["shape"]
        return cls(
            name=str(row["name"]),
            dtype=str(row["dtype"]),
            shape=tuple(int(n) for n in shape) if isinstance(shape, list) else (),
            encoding=str(row["encoding"]),
            elements=int(number("elements")),
            moved=int(number("moved")),
            norm=number("norm"),
            max=number("max"),
            inexact=int(number("inexact")),
            wide=int(number("wide")),
            bytes=int(number("bytes")),
            rank=int(number("rank")) if "rank" in row else None,
            residual=number("residual") if "residual" in row else None,
        )


@dataclass(frozen=True)
class ExtractReport:
    """A finished vector."""

    path: Path
    recipe: str
    rows: list[Row]
    tested: bool
    warnings: list[Problem]

    @property
    def exact(self) -> bool | None:
        """Whether ``negative + vector == positive`` held bit for bit for every element; None for a
        sum of several vectors, which has no positive to be compared with."""
        return all(row.inexact == 0 for row in self.rows) if self.tested else None

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    @property
    def moved(self) -> int:
        return sum(row.moved for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def norm(self) -> float:
        return math.sqrt(sum(row.norm**2 for row in self.rows))

    def by_kind(self) -> dict[str, list[Row]]:
        kinds: dict[str, list[Row]] = {}
        for row in self.rows:
            kinds.setdefault(kind_of(row.name), []).append(row)
        return kinds

    def as_json(self) -> Json:
        def group(rows: list[Row]) -> Json:
            n, moved = sum(r.elements for r in rows), sum(r.moved for r in rows)
            size = sum(r.bytes for r in rows)
            return {
                "tensors": len(rows),
                "elements": n,
                "moved": moved,
                "moved_share": moved / n if n else 0.0,
                "norm": math.sqrt(sum(r.norm**2 for r in rows)),
                "bytes": size,
                "bytes_per_parameter": size / n if n else 0.0,
            }

        return {
            "path": str(self.path),
            "recipe": self.recipe,
            "exact": self.exact,
            "encodings": dict(Counter(row.encoding for row in self.rows)),
            "warnings": [problem.message for problem in self.warnings],
            "by_kind": {kind: group(rows) for kind, rows in self.by_kind().items()},
        } | group(self.rows)


def extract(vector: Vector, out: Path, options: ExtractOptions) -> ExtractReport:
    """Write a vector into a folder; see `Vector.save`."""
    return write_vector(vector, out, options)


def write_vector(
    vector: Vector,
    out: Path,
    options: ExtractOptions,
    *,
    checked: bool = True,
    card: bool = True,
    place: Path | None = None,
    factors: tuple[Path, Mapping[str, list[str]]] | None = None,
    config: Json | None = None,
) -> ExtractReport:
    """`extract`, for callers inside the package that know that the donors fit (``checked``), want
    no README.md (``card``), made the folder themselves (``place``, which will be ``out`` in the
    end), store factors in place of some tensors (``factors``: a safetensors file, and the names of
    u, s and v in it, none for a rank of zero), or have more to say in the manifest (``config``)."""
    if not vector.terms:
        message = "an empty vector (a point minus itself) has nothing to save"
        raise MismatchError(message)
    operands = Operands()
    first = leaf_layout(vector.terms[0].leaf)
    tensors, problems = sum_terms(vector, first, operands, checked=checked)
    demand(problems)
    where = nullcontext(place) if place is not None else _renewed(out, operands, options)
    plain = len(vector.terms) == 1 and isinstance(vector.terms[0].leaf, Difference)
    tested = plain and all(_is_plain(term) for tensor in tensors.values() for term in tensor.terms)
    tested = tested and factors is None
    entries: dict[str, Json] = {}
    if factors is not None:
        parts = CheckpointFolder(factors[0])
        for name, names in factors[1].items():
            entries[name] = {"factors": [operands.ref(parts, entry) for entry in names]}
    folder = _config_folder(vector)
    with where as made:
        plan: Json = {
            "out": str(made),
            "digest": options.get("digest", "xxh3-128"),
            "encoding": options.get("encoding", "auto"),
            "shard_bytes": options.get("shard_bytes", 5_000_000_000),
            "allow_nonfinite": options.get("allow_nonfinite", False),
            "tensors": [t.as_json() | entries.get(t.name, {}) for t in tensors.values()],
            "config": {
                **(config or {}),
                "recipe": str(vector),
                "tested": tested,
                "donors": _donors(vector, out),
                "config": dict(first.config),
            },
        } | settings(options, sync=options.get("sync", True))
        sync = options.get("sync", True)
        # The manifest comes last, and without the tokens nobody could tell what the rows are.
        if (folder / "tokenizer.json").is_file():
            core.copy_whole(folder / "tokenizer.json", made / "tokenizer.json", sync)
        try:
            manifest: Json = json.loads(
                core.extract(json.dumps(plan), operands.handles, options.get("progress"))
            )
        except BaseException:
            (made / "tokenizer.json").unlink(missing_ok=True)
            raise
        if card:
            from reasonvec.card import vector_card

            core.write_whole(made / "README.md", vector_card(manifest).encode(), sync)
    rows = [Row.of(row) for row in objects_in(manifest, "tensors", out / VECTOR_CONFIG)]
    warnings = [problem for problem in problems if problem.severity == "warning"]
    return ExtractReport(out, str(vector), rows, tested, warnings)


def _renewed(
    out: Path, operands: Operands, options: ExtractOptions
) -> AbstractContextManager[Path]:
    destination = Destination(out, operands.folders, overwrite=options.get("overwrite", False))
    return destination.renewed(VECTOR_CONFIG)


def _is_plain(term: Json) -> bool:
    return term["coefficient"] == 1.0 and "control" not in term


def _config_folder(vector: Vector) -> Path:
    leaf = vector.terms[0].leaf
    if isinstance(leaf, Adapter):
        return leaf.base.folder
    return leaf.positive.folder if isinstance(leaf, Difference) else leaf.path


def _donors(vector: Vector, out: Path) -> Json:
    """Who made the vector, by paths from its folder."""
    leaves = [scaled.leaf for scaled in vector.terms]
    leaf = leaves[0]
    if len(leaves) == 1 and isinstance(leaf, Difference):
        return {
            "positive": {"path": relative(leaf.positive.path, out), "files": _files(leaf.positive)},
            "negative": {"path": relative(leaf.negative.path, out), "files": _files(leaf.negative)},
        }
    donors: Json = {}
    for i, leaf in enumerate(leaves):
        for role, folder in leaf_folders(leaf).items():
            donors[f"{role} {i + 1}"] = {"path": relative(folder.path, out)}
    return donors


def _files(folder: CheckpointFolder) -> Json:
    """Sizes of the shards: enough to see that a donor is another one, without reading it."""
    return {name: (folder.folder / name).stat().st_size for name in folder.handle.shards()}
