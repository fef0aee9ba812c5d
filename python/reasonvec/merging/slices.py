"""The models of a slice, opened: which tensor of which model stands where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from reasonvec.merging.inputs import Input, PointInput, renumbered
from reasonvec.merging.parameters import Setting

__all__ = ["OpenedModel", "OpenedSlice", "Settings", "same_input"]

Settings: TypeAlias = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model of a slice. ``start`` is its first layer there, None where it is whole."""

    input: Input
    settings: Settings
    start: int | None

    def name(self, frame: str, layer: int | None) -> str:
        """The name here of the tensor that is called so in the frame, in the slice's layer."""
        if layer is None or self.start is None:
            return frame
        number = self.start + layer
        prefix = self.input.stack.prefix
        if prefix is None:
            return renumbered(frame, number)
        tail = re.sub(r"^.*?(?:layers|h|blocks)\.\d+\.", "", frame, count=1)
        return f"{prefix}{number}.{tail}"


@dataclass(frozen=True, slots=True)
class OpenedSlice:
    """What is merged together. ``levels`` are the parameters that are not a model's own, narrowest
    first; ``length`` is the number of layers, None where models are whole."""

    models: list[OpenedModel]
    base: OpenedModel | None
    levels: list[Settings]
    length: int | None

    @property
    def frame(self) -> OpenedModel:
        """Whose layers the slice has."""
        return self.models[0] if self.length is not None or self.base is None else self.base


def same_input(a: Input, b: Input) -> bool:
    if a is b:
        return True
    if not (isinstance(a, PointInput) and isinstance(b, PointInput)):
        return False
    return a.folder == b.folder and not a.point.vector.terms and not b.point.vector.terms
