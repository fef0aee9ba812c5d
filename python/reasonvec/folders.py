"""The kinds of folder on disk, checkpoints, stored vectors and adapters, opened but not read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from reasonvec import _reasonvec as core
from reasonvec.adapter import AdapterFolder
from reasonvec.compat.layout import Layout, TensorInfo
from reasonvec.compat.problem import Problem
from reasonvec.json_values import Json, objects_in, read_json
from reasonvec.opened import Opened, tensor_infos
from reasonvec.run import settings

if TYPE_CHECKING:
    from reasonvec._reasonvec import Tensor

__all__ = ["CheckpointFolder", "Folder", "VectorFolder", "is_vector"]

VECTOR_CONFIG = "vector_config.json"


def is_vector(path: Path) -> bool:
    """Whether a folder is a stored vector."""
    return (path / VECTOR_CONFIG).is_file()


class CheckpointFolder(Opened):
    """An opened checkpoint: names, formats, shapes; its tensors are read when they are used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = core.Checkpoint(path)
        self.folder = path if path.is_dir() else path.parent

    @cached_property
    def layout(self) -> Layout:
        tensors = tensor_infos(self.handle)
        config_path = self.folder / "config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        metadata = {k: v for shard in self.handle.shards() for k, v in self.handle.metadata(shard)}
        return Layout(self.folder, tensors, config, metadata)

    @cached_property
    def copy_problems(self) -> list[Problem]:
        """A tied model may list its head beside the embeddings that it is tied to. Whether the two
        are equal, as they must be, takes reading both."""
        problems = []
        for copy, original in self.layout.copies().items():
            pair = core.digest_tensors(
                self.handle, [copy, original], "xxh3-128", json.dumps(settings({}))
            )
            if pair[0] != pair[1]:
                message = (
                    f"{self.path}: config.json ties {copy} to {original}, but the two differ in "
                    "the files: untied against tied is never guessed; correct tie_word_embeddings "
                    "or remove the tensor that is wrong"
                )
                problems.append(Problem("tied", message, copy))
        return problems

    def tensor(self, name: str) -> Tensor:
        """One tensor, without a copy."""
        if name not in self.layout.tensors:
            raise KeyError(name)
        return self.handle.tensor(name)

    def files(self) -> Iterator[Path]:
        """Every file of the folder that is not weights, subfolders left out."""
        weights = {*self.handle.shards(), self.handle.index}
        if self.path.is_file():
            return
        for path in sorted(self.folder.iterdir()):
            skip = (
                path.name in weights or path.name.startswith(".") or path.name == "reasonvec.json"
            )
            if path.is_file() and not skip and path.suffix not in _OTHER_WEIGHTS:
                yield path


# The same weights in other formats would contradict the new ones; pickles are never carried on.
_OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"})


class VectorFolder(Opened):
    """An opened vector folder: its manifest is read and checked, its numbers are not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = core.VectorFolder(path)

    @cached_property
    def config(self) -> Json:
        return read_json(self.path / VECTOR_CONFIG)

    @cached_property
    def _files(self) -> list[core.Checkpoint]:
        return [
            core.Checkpoint(path) for path in sorted(self.path.glob("vector_model*.safetensors"))
        ]

    def part(self, entry: str) -> Tensor:
        """One entry of the data files, without a copy."""
        for file in self._files:
            if any(name == entry for name, _, _, _ in file.tensors()):
                return file.tensor(entry)
        raise KeyError(entry)

    @property
    def rows(self) -> list[Json]:
        return objects_in(self.config, "tensors", self.path / VECTOR_CONFIG)

    @cached_property
    def _by_name(self) -> dict[str, Json]:
        return {str(row["name"]): row for row in self.rows}

    def row(self, name: str) -> Json:
        """The manifest's row of a tensor."""
        return self._by_name[name]

    @cached_property
    def layout(self) -> Layout:
        tensors = {
            name: TensorInfo(name, dtype, tuple(shape), VECTOR_CONFIG)
            for name, dtype, shape in self.handle.tensors()
        }
        return Layout(self.path, tensors, _mapping(self.config.get("config")), {})


Folder: TypeAlias = CheckpointFolder | VectorFolder | AdapterFolder


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}
