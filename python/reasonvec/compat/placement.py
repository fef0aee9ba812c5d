"""Where the delta of a target tensor comes from, and the two folders it is decided between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from reasonvec.compat.layout import Layout, TensorInfo
from reasonvec.compat.problem import Problem

__all__ = ["Found", "Pair", "Placement", "Segment"]


class Segment(NamedTuple):
    """Elements [at, at + length) of a target tensor, flat and row-major, take those of the vector
    tensor `name` from `start`."""

    at: int
    length: int
    name: str
    start: int


class Placement(NamedTuple):
    """Where the delta of one target tensor comes from: the vector tensor ``name`` whole and in its
    own order (``segments`` is None), or segments, in order of `at`; elements between them get no
    update."""

    name: str
    segments: tuple[Segment, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The vector tensors it reads, in the order it first reads them."""
        if self.segments is None:
            return (self.name,)
        return tuple(dict.fromkeys(segment.name for segment in self.segments))


@dataclass(slots=True)
class Found:
    """What became of one target tensor: a placement or a reason, and what has to be said."""

    placement: Placement | None = None
    reason: str = ""
    problems: list[Problem] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # canonical vector names it accounts for
    exact: str | None = None  # the vector tensor that must be equal, where nothing can be added


class Pair:
    """A vector and a target, with the names their tensors have on either side."""

    def __init__(self, vector: Layout, target: Layout) -> None:
        self.vector = vector
        self.target = target
        self.deltas = vector.names()  # canonical name to stored name
        self.names = target.names()

    def delta(self, name: str) -> TensorInfo | None:
        """The vector tensor of a canonical name."""
        stored = self.deltas.get(name)
        return None if stored is None else self.vector.tensors[stored]

    def at(self, info: TensorInfo) -> str:
        """A target tensor, as a message names it."""
        return f"{self.target.path / info.file}: {info.name}"

    def of(self, delta: TensorInfo) -> str:
        """A vector tensor, as a message names it."""
        return f"{delta.name} in {self.vector.path / delta.file}"

    def refuse(self, kind: str, message: str, info: TensorInfo, *used: str) -> Found:
        """No placement, and an error that says why."""
        return Found(
            reason=f"refused: {kind}",
            problems=[Problem(kind, message, info.name)],
            used=set(used),
        )

    def refuse_shape(self, info: TensorInfo, delta: TensorInfo, used: str) -> Found:
        """Shapes that differ, or a transpose, which is another layout and not another size."""
        swapped = len(info.shape) > 1 and (
            (*info.shape[:-2], info.shape[-1], info.shape[-2]) == delta.shape
        )
        why = (
            "one is the transpose of the other, a layout that reasonvec does not convert: save "
            "both with the same version of transformers"
            if swapped
            else "the shapes must be equal: take donors of the target's architecture and size, or "
            "exclude the tensor"
        )
        message = (
            f"{self.at(info)} is {list(info.shape)}, but {self.of(delta)} is {list(delta.shape)}; "
            f"{why}"
        )
        return self.refuse("shape", message, info, used)

    def refuse_dtype(self, info: TensorInfo, delta: TensorInfo, used: str) -> Found:
        """Floats on one side only."""
        message = (
            f"{self.at(info)} is {info.dtype}, but {self.of(delta)} is {delta.dtype}: a float and "
            "an integer tensor have no sum; exclude it, or take checkpoints of one format"
        )
        return self.refuse("dtype", message, info, used)
