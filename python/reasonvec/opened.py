"""What opened folders of all kinds have in common: who they are, and what their headers list."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reasonvec.compat.layout import TensorInfo

if TYPE_CHECKING:
    from reasonvec._reasonvec import Checkpoint

__all__ = ["Opened", "tensor_infos"]


class Opened:
    """Something on disk, opened. What is opened again is the same."""

    path: Path

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.path.resolve() == other.path.resolve()

    def __hash__(self) -> int:
        return hash(self.path.resolve())


def tensor_infos(handle: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by name, as its headers have them."""
    return {
        name: TensorInfo(name, dtype, tuple(shape), file)
        for name, dtype, shape, file in handle.tensors()
    }
