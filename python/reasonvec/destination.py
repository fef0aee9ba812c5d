"""The folder that a run writes: may it, what must go first, and what a finished one holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from reasonvec import _reasonvec as core
from reasonvec.errors import ReasonvecError
from reasonvec.folders import CheckpointFolder, VectorFolder, read_json

__all__ = ["MANIFEST", "UNDO", "Destination", "relative", "write_json"]

MANIFEST = "reasonvec.json"
UNDO = "reasonvec_undo"
_VECTOR_FILES = ("vector_config.json", "vector_model", "README.md", "tokenizer.json")


def relative(path: Path, start: Path) -> str:
    """A path as a manifest keeps it: from the folder that the manifest is in, so that folders which move
    together still find each other and nobody's home directory is published."""
    try:
        return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path.resolve())


def write_json(path: Path, value: object, *, sync: bool = True) -> None:
    """Write a JSON file whole or not at all."""
    core.write_whole(path, (json.dumps(value, indent=2) + "\n").encode(), sync)


class Destination:
    """An output folder, before anything is written into it.

    Raises:
        ReasonvecError: it is an input, or holds something that the caller has not said may go.
    """

    def __init__(
        self,
        path: Path,
        inputs: list[CheckpointFolder | VectorFolder],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.path = path
        self.problem = self._problem(inputs, overwrite=overwrite, resume=resume)
        self.stale: list[Path] = []
        if self.problem is None and overwrite and path.is_dir() and not (resume and self.unfinished):
            self.stale = self._ours()

    @property
    def unfinished(self) -> bool:
        """Whether a run that was killed or failed can be continued here."""
        return (self.path / core.journal_name()).is_file()

    def _problem(
        self, inputs: list[CheckpointFolder | VectorFolder], *, overwrite: bool, resume: bool
    ) -> str | None:
        path = self.path
        for folder in inputs:
            where = folder.folder if isinstance(folder, CheckpointFolder) else folder.path
            if path.exists() and path.resolve() == where.resolve():
                return f"{path}: is an input of this run, and inputs are never written; name another folder"
            if where.resolve() in path.resolve().parents:
                return f"{path}: lies inside the input {where}; name a folder outside of it"
        if not path.exists():
            return None
        if not path.is_dir():
            return f"{path}: is a file; name a folder"
        if not any(path.iterdir()):
            return None
        if self.unfinished:
            if resume or overwrite:
                return None
            return f"{path}: holds an unfinished run; continue it with --resume, or start over with --overwrite"
        ours = (path / MANIFEST).is_file() or (path / "vector_config.json").is_file() or self._partial()
        if not ours:
            return f"{path}: is not empty, and reasonvec did not write what is in it; name another folder"
        if overwrite:
            return None
        return f"{path}: is not empty; name another folder, or replace what is there with --overwrite"

    def _partial(self) -> bool:
        return all(path.name.endswith(".partial") for path in self.path.iterdir())

    def _ours(self) -> list[Path]:
        """The files of an earlier run, by its own account; nothing else is touched."""
        path = self.path
        found = [*path.glob("*.partial"), path / core.journal_name()]
        if (path / MANIFEST).is_file():
            output = read_json(path / MANIFEST).get("output")
            names = {MANIFEST}
            if isinstance(output, dict):
                names |= {str(name) for name in output.get("files", {})}
                names |= {str(row["file"]) for row in output.get("tensors", {}).values()}
            found += [path / name for name in sorted(names) if Path(name).name == name]
        if (path / "vector_config.json").is_file():
            found += [p for p in path.iterdir() if p.name.startswith(_VECTOR_FILES)]
        if (path / UNDO).is_dir():
            found += [p for p in (path / UNDO).iterdir() if p.is_file()]
        return [p for p in dict.fromkeys(found) if p.is_file()]

    def room(self) -> int:
        """Bytes free on the disk that the folder is, or will be, on."""
        where = self.path.absolute()
        while not where.exists():
            where = where.parent
        return shutil.disk_usage(where).free

    def prepare(self) -> None:
        """Make the folder, and remove what is to be replaced: the manifest first, so that a folder that
        is half removed does not look whole."""
        if self.problem is not None:
            raise ReasonvecError(self.problem)
        self.path.mkdir(parents=True, exist_ok=True)
        order = (MANIFEST, "vector_config.json")
        for path in sorted(self.stale, key=lambda p: (p.name not in order, p.name)):
            path.unlink()
