"""A safetensors file that is written one tensor after the other, before their number is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonvec._reasonvec import Tensor

__all__ = ["FactorFile", "Values", "single"]

Values: TypeAlias = (
    NDArray[np.float32] | NDArray[np.float64] | NDArray[np.uint16] | NDArray[np.uint32]
)

# The longest that an entry can be besides its name: format, two extents, two offsets.
_ENTRY = 160


class FactorFile:
    """Room for the header is kept in front, by the names that may come; what is left of it is
    blanks, as every reader of safetensors allows. Under its final name only when it is whole.

    ``names`` are at least those that will be added.
    """

    def __init__(
        self, path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._entries: dict[str, object] = {"__metadata__": dict(metadata or {})}
        room = len(json.dumps(self._entries)) + sum(len(json.dumps(n)) + _ENTRY for n in names)
        self._room = room + -room % 8
        self._at = 0
        self._file = self._partial.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, values: Values, dtype: str) -> None:
        """Append a tensor; ``dtype`` is the safetensors name of what the array's bytes are."""
        data = np.ascontiguousarray(values)
        self._file.write(data.data if data.size else b"")
        end = self._at + data.nbytes
        self._entries[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [self._at, end],
        }
        self._at = end

    def finish(self, *, sync: bool = True) -> None:
        """Write the header and give the file its name."""
        text = json.dumps(self._entries, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def single(tensor: Tensor) -> NDArray[np.float32]:
    """A tensor of the core in float32."""
    return np.asarray(memoryview(tensor)).astype(np.float32, copy=False)
