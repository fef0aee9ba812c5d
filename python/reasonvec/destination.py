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
        if (
            self.problem is None
            and overwrite
            and path.is_dir()
            and not (resume and self.unfinished)
        ):
            self.stale = self._ours()

    @property
    def unfinished(self) -> bool:
        """Whether a run that was killed or failed can be continued here."""
        return (self.path / core.journal_name()).is_file()

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
        if not self._names():
            return None
        if self.unfinished:
            if resume or overwrite:
                return None
            return (
                f"{path}: holds an unfinished run; continue it with --resume, or start over with "
                "--overwrite"
            )
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
        for folder in (path / UNDO, path / RENEWED, path / STAGES):
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
        if self.unfinished:
            for line in (self.path / core.journal_name()).read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # what the kill cut off
                    continue
                if isinstance(row, dict) and "file" in row:
                    names[str(row["file"])] = None
        return list(names)

    def room(self) -> int:
        """Bytes free on the disk that the folder is, or will be, on, with what is to be replaced
        gone."""
        import shutil  # It brings every compressor along, and an extraction never asks.

        where = self.path.absolute()
        while not where.exists():
            where = where.parent
        return shutil.disk_usage(where).free + sum(path.stat().st_size for path in self.stale)

    def check(self) -> None:
        """Raise `ReasonvecError` if the folder may not be written."""
        if self.problem is not None:
            raise ReasonvecError(self.problem)

    def prepare(self) -> None:
        """Make the folder, and remove what is to be replaced: the manifest first, so that a folder
        that is half removed does not look whole.

        For outputs that grow in their place, shard by shard, and can be resumed: checkpoints, which
        two of may not fit on a disk. Whatever headers can tell must have been told before. What is
        left to fail then, with the old output gone, is what only the bytes tell (NaN, damage) and
        the disk.
        """
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.stale, key=lambda p: (p.name not in _SIGNS, p.name)):
            path.unlink()

    @contextmanager
    def renewed(self, sign: str) -> Iterator[Path]:
        """The folder to write an output into that is small and made in one go: a vector, an
        adapter. An older one in its place is removed only when the block has ended well; after an
        error it stands as it was. ``sign`` is the file without which the folder is no output.
        """
        self.check()
        folder = self.path / RENEWED
        if not any((self.path / name).is_file() for name in (*_SIGNS, *_ADAPTER_FILES)):
            self.prepare()
            _remove(folder)
            yield self.path
            return
        # What a run that was killed has left, or a stranger's link.
        _remove(folder)
        folder.mkdir()
        try:
            yield folder
        except BaseException:
            _remove(folder)
            raise

        # Whoever kills this leaves data without a sign, which is known for what it is as long as no
        # card is beside it.
        def order(path: Path) -> tuple[bool, bool, str]:
            return path.name == "README.md", path.name == sign, path.name

        stale = [path for path in self.stale if path.parent != folder]
        for path in sorted(stale, key=lambda p: (p.name != "README.md", p.name not in _SIGNS)):
            path.unlink(missing_ok=True)
        for path in sorted(folder.iterdir(), key=order):
            path.replace(self.path / path.name)
        folder.rmdir()


def _remove(folder: Path) -> None:
    """A folder of files, with what is in it."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    else:
        folder.unlink(missing_ok=True)
