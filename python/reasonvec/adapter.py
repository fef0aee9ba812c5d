"""Adapters as PEFT stores them: the folder, opened but not read. What one does to a base is in
`reasonvec.adapter_updates`."""

from __future__ import annotations

from pathlib import Path

from reasonvec import _reasonvec as core
from reasonvec.compat.problem import Problem
from reasonvec.errors import FormatError
from reasonvec.json_values import Json, read_json
from reasonvec.opened import Opened, tensor_infos

__all__ = ["ADAPTER_CONFIG", "ADAPTER_MODEL", "AdapterFolder", "is_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"


def is_adapter(path: Path) -> bool:
    """Whether a folder is a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


class AdapterFolder(Opened):
    """An opened PEFT adapter: its config and its header are read, its factors are not.

    Raises:
        FormatError: a file is damaged, or the weights are pickled.
        OSError: a file is missing or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: Json = read_json(path / ADAPTER_CONFIG)
        weights = path / ADAPTER_MODEL
        if not weights.is_file() and (path / "adapter_model.bin").is_file():
            message = (
                f"{path}: has pickled weights (adapter_model.bin), which are never loaded because "
                "they can run code: load the adapter where you trust it and save it again with "
                "save_pretrained(..., safe_serialization=True)"
            )
            raise FormatError(message)
        self.handle = core.Checkpoint(weights)
        self.tensors = tensor_infos(self.handle)

    @property
    def base_path(self) -> str | None:
        """What the adapter says of its base: a folder, or a name on a hub."""
        said = self.config.get("base_model_name_or_path")
        return said if isinstance(said, str) and said else None

    def problem(self, message: str, tensor: str | None = None) -> Problem:
        """What stops the adapter, as a whole or in one tensor or module."""
        where = f"{self.path}: " if tensor is None else f"{self.path}: {tensor}: "
        return Problem("adapter", where + message, tensor)
