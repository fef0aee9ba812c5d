"""The folder that a run writes: may it, what must go first, and what a finished one holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reasonvec import _reasonvec as core
from reasonvec.errors import ReasonvecError
from reasonvec.folders import CheckpointFolder, Folder
from reasonvec.json_values import json_bytes, read_json

__all__ = ["MANIFEST", "STAGES", "TEMPLATES", "UNDO", "Destination", "relative", "write_json"]

MANIFEST = "reasonvec.json"
UNDO = "reasonvec_undo"
# What a run writes for itself, and takes away at its end.
STAGES = ".reasonvec-stages"
# Where an output grows while the one that it replaces still stands.
RENEWED = ".reasonvec-renewed"
# Where transformers keeps a chat template: a field of the one, or the other.
TEMPLATES = frozenset({"tokenizer_config.json", "chat_template.jinja"})
_SIGNS = (MANIFEST, "vector_config.json")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
_VECTOR_FILES = ("vector_config.json", "README.md", "tokenizer.json")
_OURS = frozenset({STAGES, RENEWED})
_INDEX = ".safetensors.index.json"


# What models are loaded with beside their weights: an old one must not stay beside new weights,
# even where somebody has changed it since.
_SIDE_FILES = frozenset(
    {
        "README.md",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)


def _is_shard(name: str) -> bool:
    return Path(name).name == name and name.endswith(".safetensors")


def _is_data(name: str) -> bool:
    return name.startswith("vector_model") and ".safetensors" in name


def relative(path: Path, start: Path) -> str:
    """A path as a manifest keeps it: from the folder that the manifest is in, so that folders which
    move together still find each other and nobody's home directory is published."""
    try:
        return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path.resolve())


def write_json(path: Path, value: object, *, sync: bool = True) -> None:
    """Write a JSON file whole or not at all."""
    core.write_whole(path, json_bytes(value, ascii_only=True), sync)


class Destination:
    """An output folder, before anything is written into it.

    Raises:
        ReasonvecError: it is an input, or holds something that the caller has not said may go.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[Folder],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.path = path
        self.problem = self._problem(inputs, overwrite=overwrite, resume=resume)
        self.stale: list[Path] = []
        journals = self._journals() if resume else []
        self._continued = bool(journals)
        # What is continued grows where it began; what is begun, beside an output that stands there.
        self._beside = (
            journals[0].parent.name == RENEWED
            if journals
            else any((path / name).is_file() for name in (*_SIGNS, *_ADAPTER_FILES))
        )
        begun = overwrite and not self._continued
        if self.problem is None and path.is_dir() and (begun or self._beside):
            self.stale = self._ours()

    @property
    def unfinished(self) -> bool:
        """Whether a run that was killed or failed can be continued here."""
        return bool(self._journals())

    @property
    def replaces(self) -> bool:
        """Whether an output stands here until the new one is whole."""
        return self._beside

    def _journals(self) -> list[Path]:
        """Those of unfinished runs, the latest first."""
        name = core.journal_name()
        return [p for p in (self.path / RENEWED / name, self.path / name) if p.is_file()]

    def _problem(self, inputs: Sequence[Folder], *, overwrite: bool, resume: bool) -> str | None:
        path = self.path
        for folder in inputs:
            where = folder.folder if isinstance(folder, CheckpointFolder) else folder.path
            if path.exists() and path.resolve() == where.resolve():
                return (
                    f"{path}: is an input of this run, and inputs are never written; name another "
                    "folder"
                )
            if where.resolve() in path.resolve().parents:
                return f"{path}: lies inside the input {where}; name a folder outside of it"
            if path.resolve() in where.resolve().parents:
                return f"{path}: the input {where} lies inside of it; name another folder"
        if not path.exists():
            return None
        if not path.is_dir():
            return f"{path}: is a file; name a folder"
        if self.unfinished:
            if resume or overwrite:
                return None
            return (
                f"{path}: holds an unfinished run; continue it with --resume, or start over with "
                "--overwrite"
            )
        if not self._names():
            return None
        signed = any((path / sign).is_file() for sign in _SIGNS)
        if not (signed or self._begun() or self._is_adapter()):
            return (
                f"{path}: is not empty, and reasonvec did not write what is in it; name another "
                "folder"
            )
        if overwrite:
            return None
        return (
            f"{path}: is not empty; name another folder, or replace what is there with --overwrite"
        )

    def _names(self) -> set[str]:
        """What is in the folder, but for what runs take away at their end."""
        return {path.name for path in self.path.iterdir()} - _OURS

    def _begun(self) -> bool:
        """Whether all that is here is a vector that was killed before it had its manifest."""
        names = self._names() - {"tokenizer.json"}
        return bool(names) and all(name.endswith(".partial") or _is_data(name) for name in names)

    def _is_adapter(self) -> bool:
        """Whether all that is here is an adapter that was made of a vector."""
        names = self._names()
        if "adapter_model.safetensors" not in names or not names <= set(_ADAPTER_FILES):
            return False
        weights = core.Checkpoint(self.path / "adapter_model.safetensors")
        return "reasonvec" in dict(weights.metadata("adapter_model.safetensors"))

    def _ours(self) -> list[Path]:
        """The files of an earlier run, by its own account; nothing else is touched."""
        path = self.path
        found = [*path.glob("*.partial"), path / core.journal_name()]
        found += [path / name for name in self._journalled() if _is_shard(name)]
        if (path / MANIFEST).is_file():
            found += [path / MANIFEST, *self._recorded()]
        if (path / "vector_config.json").is_file():
            found += [p for p in path.iterdir() if p.name in _VECTOR_FILES or _is_data(p.name)]
        elif self._begun() or self._is_adapter():
            found += path.iterdir()
        renewed = path / RENEWED
        if renewed.is_dir() and not renewed.is_symlink():
            # A run that was killed while it put these in their places.
            there = ((path / new.name, new) for new in renewed.iterdir() if new.is_file())
            found += [p for p, new in there if p.is_file() and p.samefile(new)]
        for folder in (path / UNDO, renewed, path / STAGES):
            if folder.is_dir() and not folder.is_symlink():
                found += folder.rglob("*") if folder.name == STAGES else folder.iterdir()
        return [p for p in dict.fromkeys(found) if p.is_file()]

    def _recorded(self) -> list[Path]:
        """The files that a manifest says a run wrote here, as far as a run writes such files: the
        manifest may be a stranger's, and other files of the folder somebody's own."""
        manifest = read_json(self.path / MANIFEST)
        output = manifest.get("output")
        tensors, files = (
            found if isinstance(output, dict) and isinstance(found := output.get(key), dict) else {}
            for key in ("tensors", "files")
        )
        rows = [row for row in tensors.values() if isinstance(row, dict)]
        shards = {name for row in rows if isinstance(name := row.get("file"), str)}
        return [
            *(self.path / name for name in sorted(shards) if _is_shard(name)),
            *(
                self.path / name
                for name, digest in sorted(files.items())
                if Path(name).name == name
                and (name in _SIDE_FILES or self._is_copy(name, digest, manifest.get("digest")))
            ),
        ]

    def _is_copy(self, name: str, digest: object, algorithm: object) -> bool:
        """Whether a file is to the byte the one that the run wrote."""
        path = self.path / name
        known = algorithm in ("xxh3-128", "blake3") and isinstance(digest, str)
        return known and path.is_file() and core.digest_file(path, str(algorithm)) == digest

    def _journalled(self) -> list[str]:
        """The files that an unfinished run has begun, and perhaps given their final names."""
        names: dict[str, None] = {}
        for journal in self._journals():
            for line in journal.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # what the kill cut off
                    continue
                if isinstance(row, dict) and "file" in row:
                    names[str(row["file"])] = None
        return list(names)

    def room(self) -> int:
        """Bytes free on the disk that the folder is, or will be, on, for an output that is begun
        there: what goes before it counts as gone, and what stands until it is whole does not."""
        import shutil  # It brings every compressor along, and an extraction never asks.

        where = self.path.absolute()
        while not where.exists():
            where = where.parent
        gone = [p for p in self.stale if not self._beside or p.parent.name == RENEWED]
        return shutil.disk_usage(where).free + sum(path.stat().st_size for path in gone)

    def check(self) -> None:
        """Raise `ReasonvecError` if the folder may not be written."""
        if self.problem is not None:
            raise ReasonvecError(self.problem)

    @contextmanager
    def renewed(self, sign: str, *, resumable: bool = False) -> Iterator[Path]:
        """The folder to write an output into. An older one in its place stands as it was until the
        block has ended well, so the disk has to hold both. ``sign`` is the file without which the
        folder is no output. What is ``resumable`` keeps a journal, and stays after an error; the
        journal goes when the output is whole.
        """
        self.check()
        folder, journal = self.path / RENEWED, core.journal_name()
        if not self._beside:
            self._clear()
            yield self.path
            (self.path / journal).unlink(missing_ok=True)
            return
        if not self._continued:
            # What a run that was killed has left, or a stranger's link.
            _remove(folder)
            folder.mkdir()
        try:
            yield folder
        except BaseException:
            if not (resumable and (folder / journal).is_file()):
                _remove(folder)
            raise
        self._replace(folder, sign)

    def _clear(self) -> None:
        """Make the folder, and remove what an unfinished run has left: nobody's output."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.stale, key=lambda p: (p.name not in _SIGNS, p.name)):
            path.unlink()
        _remove(self.path / RENEWED)

    def _replace(self, folder: Path, sign: str) -> None:
        """Put what is whole in the place of what was there.

        Whoever kills this leaves the old output or the new one whole: the new one is linked, not
        moved, and its own folder goes last. (A file system without links has it in two places
        then.) The journal in there says that the run is not finished, and what is in its place but
        whole there is known as ours. No index is without shards that it names, so that nobody takes
        half of a model for all of it.
        """
        journal = folder / core.journal_name()
        journal.touch()

        def leaving(path: Path) -> tuple[bool, bool, bool, str]:
            name = path.name
            return name in _SIGNS, name.endswith(_INDEX), name != "README.md", str(path)

        for path in sorted((p for p in self.stale if folder not in p.parents), key=leaving):
            path.unlink(missing_ok=True)

        def coming(path: Path) -> tuple[bool, bool, bool, str]:
            name = path.name
            return not name.endswith(_INDEX), name == "README.md", name == sign, str(path)

        for path in sorted((p for p in folder.rglob("*") if p.is_file()), key=coming):
            place = self.path / path.relative_to(folder)
            if path != journal:
                place.parent.mkdir(exist_ok=True)
                _link(path, place)
        for path in folder.iterdir():
            if path != journal:
                _remove(path)
        _remove(folder)


def _link(path: Path, place: Path) -> None:
    """A file under a second name, or where that cannot be, under that name alone."""
    place.unlink(missing_ok=True)
    try:
        os.link(path, place)
    except OSError:
        path.replace(place)


def _remove(folder: Path) -> None:
    """A folder, with what is in it."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            _remove(path)
        folder.rmdir()
    else:
        folder.unlink(missing_ok=True)
