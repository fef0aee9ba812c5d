"""The way back from an output to the target it was made of, bit for bit.

Subtracting a vector is not undoing: (t + v) - v gives t back for 97.6 to 99.1 % of bf16 elements.
So the target is copied from where it still is, if its digests are those of the record, or rebuilt
from the exact residual that `apply --keep-undo` stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

from reasonvec import _reasonvec as core
from reasonvec.apply import WrittenTensor
from reasonvec.destination import MANIFEST, TEMPLATES, UNDO, Destination
from reasonvec.errors import DamageError, FormatError, ReasonvecError
from reasonvec.folders import CheckpointFolder, VectorFolder
from reasonvec.json_values import Json, object_in, objects_in, read_json, string_in, strings_in
from reasonvec.run import RunOptions, settings
from reasonvec.terms import Operands
from reasonvec.verify import read_manifest

__all__ = ["UndoOptions", "UndoReport", "undo"]


class UndoOptions(RunOptions, total=False):
    """Keywords of `undo`."""

    source: Path | None
    """Where the target is now, if it has moved."""
    overwrite: bool
    """Replace an earlier output of reasonvec in the folder; it stands until the new one is
    whole."""
    sync: bool
    """Whether files are flushed to the disk before they get their final names (default True)."""


@dataclass(frozen=True, slots=True)
class UndoReport:
    """Where the target came from."""

    path: Path
    origin: Literal["source", "residual"]
    tensors: int

    def as_json(self) -> Json:
        return {"path": str(self.path), "origin": self.origin, "tensors": self.tensors}


def undo(folder: Path, out: Path, **options: Unpack[UndoOptions]) -> UndoReport:
    """Give back the target of an output of `apply`.

    Raises:
        ReasonvecError: neither the source nor a residual is to be had.
        DamageError: what came out is not what the record says the target was.
        OSError: a file cannot be read or written.
    """
    manifest = read_manifest(folder)
    record = folder / MANIFEST
    inputs = objects_in(manifest, "inputs", record)
    number = manifest.get("target")
    if "merge" in manifest:
        message = (
            f"{folder}: is a merge of several models, and changes none of them: there is no target "
            "to give back; the record names its inputs"
        )
        raise ReasonvecError(message)
    if not isinstance(number, int) or not 0 <= number < len(inputs):
        message = f"{record}: expected 'target' to be the number of an input, found {number!r}"
        raise FormatError(message)
    digests = strings_in(inputs[number], "tensors", record)
    algorithm = string_in(manifest, "digest", record)
    asked = options.get("source")
    # An absolute path stays what it is.
    source = folder / string_in(inputs[number], "path", record) if asked is None else asked
    why = _unlike(source, digests, algorithm, options)
    if why is None:
        return _copy(CheckpointFolder(source), out, options)
    if asked is not None:
        message = f"{source}: is not the target of {folder}: {why}"
        raise ReasonvecError(message)
    if (folder / UNDO).is_dir():
        return _rebuild(folder, out, digests, algorithm, options)
    message = (
        f"{folder}: its target is not where it was ({source}: {why}), and no residual was stored "
        "(apply --keep-undo does); name the target with --source"
    )
    raise ReasonvecError(message)


def _unlike(
    source: Path, digests: dict[str, str], algorithm: str, options: RunOptions
) -> str | None:
    """Why a folder is not the recorded target, or cannot be shown to be; None if it is."""
    if algorithm == "none":
        return "the record has no digests, because it was made with --digest none"
    if not source.exists():
        return "it is not there"
    try:
        folder = CheckpointFolder(source)
    except (ReasonvecError, OSError) as error:
        return str(error)
    names = list(folder.layout.tensors)
    if set(names) != set(digests):
        return "it has other tensors than the record"
    found = core.digest_tensors(
        folder.handle, names, algorithm, json.dumps(settings(options)), options.get("progress")
    )
    for name, digest in zip(names, found, strict=True):
        if digest != digests[name]:
            return f"{name} has changed since"
    return None


def _copy(source: CheckpointFolder, out: Path, options: UndoOptions) -> UndoReport:
    destination = Destination(out, [source], overwrite=options.get("overwrite", False))
    sync = options.get("sync", True)
    names = [*source.handle.shards(), *(path.name for path in source.files())]
    if source.handle.index is not None:
        names.append(source.handle.index)
    with destination.renewed(MANIFEST) as place:
        for name in names:
            core.copy_whole(source.folder / name, place / name, sync)
    return UndoReport(out, "source", len(source.layout.tensors))


def _rebuild(
    folder: Path, out: Path, digests: dict[str, str], algorithm: str, options: UndoOptions
) -> UndoReport:
    made = CheckpointFolder(folder)
    residual = VectorFolder(folder / UNDO)
    operands = Operands([made, residual])
    destination = Destination(out, operands.folders, overwrite=options.get("overwrite", False))
    dtypes = {str(row["name"]): str(row["dtype"]) for row in residual.rows}
    shards: list[Json] = []
    for file in made.handle.shards():
        tensors: list[Json] = []
        changed = False
        for name, info in made.layout.tensors.items():
            if info.file != file:
                continue
            stored = operands.ref(residual, name)
            same = name not in dtypes or info.dtype.startswith(("I", "U", "BOOL"))
            dtype = dtypes.get(name, info.dtype)
            changed |= dtype != info.dtype
            terms = [] if same else [{"coefficient": 1.0, "source": {"stored": stored}}]
            tensors.append(
                {
                    "name": name,
                    "dtype": dtype,
                    "shape": list(info.shape),
                    "target": operands.ref(made, name),
                    "terms": terms,
                }
            )
        shard: Json = {"file": file, "tensors": tensors}
        header = folder / UNDO / f"{file}.header"
        if changed and header.is_file():
            shard["header_text"] = header.read_text(encoding="utf-8")
        elif not changed:
            shard["header_of"] = [0, file]
        shards.append(shard)
    sync = options.get("sync", True)
    with destination.renewed(MANIFEST) as place:
        plan: Json = {
            "out": str(place),
            "digest": algorithm,
            "allow_nonfinite": True,
            "shards": shards,
        } | settings(options, sync=sync)
        rows: list[WrittenTensor] = json.loads(
            core.apply(json.dumps(plan), operands.handles, options.get("progress"))
        )
        for row in rows:
            name, digest = row["name"], row["digest"]
            if digest != digests.get(name):
                message = (
                    f"{out}: {name} came out with the digest {digest}, but the target's was "
                    f"{digests.get(name)}; {folder} or its residual was changed after it was "
                    "written"
                )
                raise DamageError(message)
        _side_files(folder, made, place, sync=sync)
    return UndoReport(out, "residual", len(rows))


def _side_files(folder: Path, made: CheckpointFolder, out: Path, *, sync: bool) -> None:
    """The target's files: those the output carried on, except where the residual kept another."""
    kept = {path.name: path for path in (folder / UNDO).iterdir()}
    record = folder / MANIFEST
    manifest = read_json(record)
    output = object_in(manifest, "output", record)
    names = set(object_in(output, "files", record) if "files" in output else ())
    if object_in(manifest, "options", record).get("chat_template_from") is not None:
        # The output's template is another folder's; the residual has the target's, if it had one.
        names -= TEMPLATES
        names |= TEMPLATES & kept.keys()
    index = made.handle.index
    for name in sorted(names):
        if name != index and Path(name).name == name:
            core.copy_whole(kept.get(name, folder / name), out / name, sync)
    if index is not None:
        core.copy_whole(kept.get(index, folder / index), out / index, sync)
