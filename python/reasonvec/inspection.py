"""What `inspect` measured: one row per tensor, and the sums a reader asks for.

The rows are filled by the Rust core; nothing here opens a file. For a vector every measure is about
the change ``u`` (the difference of the donors); for a checkpoint it is about the values themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

_Key = TypeVar("_Key", bound=Hashable)

_KIND_ORDER = (
    *("embed", "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_up_proj", "gate_proj", "up_proj", "down_proj", "router"),
    *(f"experts.{part}_proj" for part in ("gate_up", "gate", "up", "down")),
    *(f"shared_experts.{part}_proj" for part in ("gate_up", "gate", "up", "down")),
    *("norm", "lm_head"),
)


def in_order(kinds: Iterable[str]) -> list[str]:
    """Each kind once, along the way of the data through a model; unknown ones last."""
    unique = dict.fromkeys(kinds)
    known = [kind for kind in _KIND_ORDER if kind in unique]
    return known + [kind for kind in unique if kind not in _KIND_ORDER]


class _Measured:
    """What follows from the measures that tensors and groups of them have alike."""

    __slots__ = ()
    elements: int
    moved: int
    norm: float
    max: float

    @property
    def moved_share(self) -> float:
        """Moved elements over all elements, 0 to 1; 0 where there are none."""
        return self.moved / self.elements if self.elements else 0.0

    @property
    def rms(self) -> float:
        """Root mean square per element: ``norm / sqrt(elements)``; 0 where there are none."""
        return self.norm / math.sqrt(self.elements) if self.elements else 0.0

    def _figures(self) -> dict[str, object]:
        return {
            "elements": self.elements,
            "moved": self.moved,
            "moved_share": self.moved_share,
            "norm": _finite(self.norm),
            "rms": _finite(self.rms),
            "max": _finite(self.max),
        }


@dataclass(frozen=True, slots=True)
class TensorMeasure(_Measured):
    """The measures of one tensor.

    ``kind`` is the module it belongs to (``q_proj``, ``down_proj``, ``norm`` ...), ``layer`` its
    layer or None when it belongs to no layer. ``moved`` counts the elements that changed (for a
    checkpoint: that are not zero), ``norm`` is the 2-norm over all elements, ``max`` the largest
    magnitude and ``max_at`` its flat row-major index. ``stored_bytes`` and ``encoding`` say how
    the file holds it, where that is known.
    """

    name: str
    kind: str
    layer: int | None
    dtype: str
    shape: tuple[int, ...]
    elements: int
    moved: int
    norm: float
    max: float
    max_at: int | None
    stored_bytes: int | None = None
    encoding: str | None = None

    def as_json(self) -> dict[str, object]:
        """The fields under their own names; a number that JSON cannot hold (NaN, inf) is null."""
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": self.layer,
            "dtype": self.dtype,
            "shape": list(self.shape),
            **self._figures(),
            "max_at": self.max_at,
            "stored_bytes": self.stored_bytes,
            "encoding": self.encoding,
        }


@dataclass(frozen=True, slots=True)
class GroupMeasure(_Measured):
    """The measures of several tensors taken as one.

    Counts and bytes add, norms add in quadrature, the largest magnitude is the largest of all;
    ``max_in`` is the tensor that holds it. A NaN in any tensor is a NaN here. ``stored_bytes`` is
    None as soon as one tensor's is unknown: a part of a sum is not a sum.
    """

    tensors: int
    elements: int
    moved: int
    norm: float
    max: float
    max_in: TensorMeasure | None
    stored_bytes: int | None

    @classmethod
    def of(cls, tensors: Iterable[TensorMeasure]) -> GroupMeasure:
        """Joins the tensors; no tensors give zeros."""
        rows = tuple(tensors)
        # hypot neither overflows nor underflows on the way.
        norm = math.hypot(*(row.norm for row in rows))
        largest: TensorMeasure | None = None
        for row in rows:
            if math.isnan(row.norm) or math.isnan(row.max):
                norm = math.nan
            if largest is None or row.max > largest.max or _newly_nan(row.max, largest.max):
                largest = row
        stored = [row.stored_bytes for row in rows if row.stored_bytes is not None]
        return cls(
            tensors=len(rows),
            elements=sum(row.elements for row in rows),
            moved=sum(row.moved for row in rows),
            norm=norm,
            max=0.0 if largest is None else largest.max,
            max_in=largest,
            stored_bytes=sum(stored) if len(stored) == len(rows) else None,
        )

    @property
    def bytes_per_parameter(self) -> float | None:
        """Stored bytes over elements; None when either is unknown or there are no elements."""
        if self.stored_bytes is None or not self.elements:
            return None
        return self.stored_bytes / self.elements

    def as_json(self) -> dict[str, object]:
        """The fields under their own names; a number that JSON cannot hold (NaN, inf) is null."""
        return {
            "tensors": self.tensors,
            **self._figures(),
            "max_in": None if self.max_in is None else self.max_in.name,
            "max_at": None if self.max_in is None else self.max_in.max_at,
            "stored_bytes": self.stored_bytes,
            "bytes_per_parameter": self.bytes_per_parameter,
        }


@dataclass(frozen=True, slots=True)
class Inspection:
    """A vector or a checkpoint, measured tensor by tensor.

    ``donors`` maps what a donor was (``positive``, ``negative``, ``positive digest`` ...) to its
    path or digest, in the order they should be read; ``recipe`` is the expression that made it.
    """

    title: str
    path: str
    what: Literal["vector", "checkpoint"]
    tensors: tuple[TensorMeasure, ...]
    recipe: str | None
    donors: Mapping[str, str]

    def totals(self) -> GroupMeasure:
        """All tensors as one."""
        return GroupMeasure.of(self.tensors)

    def by_kind(self) -> dict[str, GroupMeasure]:
        """The tensors of each kind as one, kinds as `in_order` puts them."""
        groups = _grouped(self.tensors, lambda row: row.kind)
        return {kind: groups[kind] for kind in in_order(groups)}

    def by_layer(self) -> dict[int | None, GroupMeasure]:
        """The tensors of each layer as one: layers upwards, then None for those outside."""
        groups = _grouped(self.tensors, lambda row: row.layer)
        return dict(sorted(groups.items(), key=lambda item: _layer_order(item[0])))

    def by_layer_and_kind(self) -> dict[tuple[int | None, str], GroupMeasure]:
        """The tensors of each (layer, kind) as one: layers upwards, then None."""
        groups = _grouped(self.tensors, lambda row: (row.layer, row.kind))
        return dict(sorted(groups.items(), key=lambda item: _layer_order(item[0][0])))

    def largest(self, n: int = 20) -> tuple[TensorMeasure, ...]:
        """The ``n`` tensors of largest norm, NaN first, ties in name order."""
        return tuple(
            sorted(
                self.tensors,
                key=lambda row: (
                    not math.isnan(row.norm),
                    0.0 if math.isnan(row.norm) else -row.norm,
                    row.name,
                ),
            )[:n]
        )

    def encodings(self) -> dict[str, int]:
        """How many tensors each encoding holds, most first; where none is known, none."""
        counts: dict[str, int] = {}
        for row in self.tensors:
            if row.encoding is not None:
                counts[row.encoding] = counts.get(row.encoding, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def as_json(self) -> dict[str, object]:
        """Everything, sums included, in the types of the json module (never NaN or inf)."""
        return {
            "title": self.title,
            "path": self.path,
            "what": self.what,
            "recipe": self.recipe,
            "donors": dict(self.donors),
            "totals": self.totals().as_json(),
            "kinds": [{"kind": kind, **group.as_json()} for kind, group in self.by_kind().items()],
            "layers": [
                {"layer": layer, **group.as_json()} for layer, group in self.by_layer().items()
            ],
            "tensors": [row.as_json() for row in self.tensors],
        }


def _grouped(
    tensors: Iterable[TensorMeasure], key: Callable[[TensorMeasure], _Key]
) -> dict[_Key, GroupMeasure]:
    members: dict[_Key, list[TensorMeasure]] = {}
    for row in tensors:
        members.setdefault(key(row), []).append(row)
    return {group: GroupMeasure.of(rows) for group, rows in members.items()}


def _layer_order(layer: int | None) -> tuple[bool, int]:
    return (layer is None, -1 if layer is None else layer)


def _newly_nan(x: float, y: float) -> bool:
    return math.isnan(x) and not math.isnan(y)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
