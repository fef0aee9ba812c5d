"""Digests against the record, and exact differences between two checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from reasonvec import _reasonvec as core
from reasonvec.destination import MANIFEST, UNDO
from reasonvec.errors import DamageError, FormatError, ReasonvecError
from reasonvec.folders import CheckpointFolder, VectorFolder, is_vector
from reasonvec.json_values import Json, object_in, read_json, string_in
from reasonvec.run import RunOptions, settings
from reasonvec.terms import elements

__all__ = ["DiffReport", "TensorDiff", "VerifyReport", "diff", "read_manifest", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and what is not as it was written."""

    path: Path
    algorithm: str
    tensors: int
    files: int
    damage: list[str]

    @property
    def ok(self) -> bool:
        return not self.damage

    def as_json(self) -> Json:
        return {
            "path": str(self.path),
            "ok": self.ok,
            "digest": self.algorithm,
            "tensors": self.tensors,
            "files": self.files,
            "damage": self.damage,
        }


def read_manifest(path: Path) -> Json:
    """The record of an output of `apply`.

    Raises:
        ReasonvecError: the folder has none, or its run never finished.
        FormatError: it is damaged.
    """
    if (path / core.journal_name()).is_file():
        message = f"{path}: holds an unfinished run; finish it with `reasonvec apply ... --resume`"
        raise ReasonvecError(message)
    if not (path / MANIFEST).is_file():
        message = (
            f"{path}: has no {MANIFEST}; only outputs of `reasonvec apply` and vectors have digests"
        )
        raise ReasonvecError(message)
    manifest = read_json(path / MANIFEST)
    output = manifest.get("output")
    if manifest.get("format") != 1:
        message = (
            f"{path / MANIFEST}: is of format {manifest.get('format')!r}, this version reads 1"
        )
        raise FormatError(message)
    if not isinstance(output, dict) or not isinstance(output.get("tensors"), dict):
        message = f"{path / MANIFEST}: expected output.tensors; the file is damaged"
        raise FormatError(message)
    return manifest


def verify(path: Path, **options: Unpack[RunOptions]) -> VerifyReport:
    """Compare every digest of an output folder or a vector with the bytes that are there now.

    Raises:
        ReasonvecError: there is no record to compare with.
        OSError: a file cannot be read.
    """
    if is_vector(path):
        return _verify_vector(path, options)
    manifest = read_manifest(path)
    record = path / MANIFEST
    algorithm = string_in(manifest, "digest", record)
    if algorithm == "none":
        message = f"{path}: was written with --digest none, so there is nothing to compare with"
        raise ReasonvecError(message)
    output = object_in(manifest, "output", record)
    tensors = object_in(output, "tensors", record)
    rows = {name: object_in(tensors, name, record).get("digest") for name in tensors}
    files = object_in(output, "files", record) if "files" in output else {}
    damage: list[str] = []
    folder = CheckpointFolder(path)
    there = folder.layout.tensors
    damage += [f"{name}: is not in the folder any more" for name in rows if name not in there]
    damage += [
        f"{name}: is in the folder, but not in the record" for name in there if name not in rows
    ]
    names = [name for name in rows if name in there]
    found = core.digest_tensors(
        folder.handle, names, algorithm, json.dumps(settings(options)), options.get("progress")
    )
    for name, digest in zip(names, found, strict=True):
        where, info = path / there[name].file, there[name]
        if digest != rows[name]:
            damage.append(f"{where}: {name} has the digest {digest}, the record says {rows[name]}")
        row = object_in(tensors, name, record)
        said = row.get("dtype", info.dtype), row.get("shape", list(info.shape))
        if said != (info.dtype, list(info.shape)):
            found_as = f"{info.dtype} {list(info.shape)}"
            damage.append(f"{where}: {name} is {found_as}, the record says {said[0]} {said[1]}")
    for name, recorded in files.items():
        if Path(name).name != name:
            damage.append(f"{name!r}: is no plain file name")
        elif not (path / name).is_file():
            damage.append(f"{path / name}: is missing")
        elif recorded is not None and core.digest_file(path / name, algorithm) != recorded:
            damage.append(f"{path / name}: is not the file that was written")
    if (path / UNDO).is_dir():
        damage += _verify_vector(path / UNDO, options).damage
    elif manifest.get("undo") is not None:
        damage.append(f"{path / UNDO}: is missing")
    return VerifyReport(path, algorithm, len(rows), len(files), damage)


def _verify_vector(path: Path, options: RunOptions) -> VerifyReport:
    folder = VectorFolder(path)
    damage = []
    try:
        core.verify_vector(folder.handle, json.dumps(settings(options)), options.get("progress"))
    except DamageError as error:
        damage.append(str(error))
    return VerifyReport(path, str(folder.config.get("digest")), len(folder.rows), 0, damage)


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How one tensor differs: elements whose bits do, and the first of them; or ``why`` it cannot
    be compared."""

    name: str
    elements: int
    differing: int
    first: int | None
    why: str | None = None


@dataclass(frozen=True)
class DiffReport:
    """Exact counts of what differs between two checkpoints."""

    first: Path
    second: Path
    tensors: list[TensorDiff]

    @property
    def same(self) -> bool:
        return all(t.differing == 0 and t.why is None for t in self.tensors)

    @property
    def differing(self) -> int:
        return sum(t.differing for t in self.tensors)

    @property
    def elements(self) -> int:
        return sum(t.elements for t in self.tensors)

    def as_json(self) -> Json:
        return {
            "first": str(self.first),
            "second": str(self.second),
            "same": self.same,
            "elements": self.elements,
            "differing": self.differing,
            "tensors": {
                t.name: {
                    "elements": t.elements,
                    "differing": t.differing,
                    "first": t.first,
                    "why": t.why,
                }
                for t in self.tensors
                if t.differing or t.why is not None
            },
        }


class _Differing(TypedDict):
    """One tensor, as the core reports it."""

    name: str
    differing: int
    first: int | None


def diff(first: Path, second: Path, **options: Unpack[RunOptions]) -> DiffReport:
    """Count, bit for bit, the elements in which two checkpoints differ.

    Raises:
        FormatError, OSError: a folder cannot be read.
    """
    a, b = CheckpointFolder(first), CheckpointFolder(second)
    mine, theirs = a.layout.tensors, b.layout.tensors
    rows: dict[str, TensorDiff] = {}
    names: list[str] = []
    for name in dict.fromkeys([*mine, *theirs]):
        one, other = mine.get(name), theirs.get(name)
        if one is None or other is None:
            rows[name] = TensorDiff(
                name, 0, 0, None, f"only in {first if one is not None else second}"
            )
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            why = f"{one.dtype} {list(one.shape)} against {other.dtype} {list(other.shape)}"
            rows[name] = TensorDiff(name, elements(one.shape), 0, None, why)
        else:
            names.append(name)
    found: list[_Differing] = json.loads(
        core.diff(a.handle, b.handle, names, json.dumps(settings(options)), options.get("progress"))
    )
    for row in found:
        name = row["name"]
        n = elements(mine[name].shape)
        rows[name] = TensorDiff(name, n, row["differing"], row["first"])
    return DiffReport(first, second, [rows[name] for name in dict.fromkeys([*mine, *theirs])])
