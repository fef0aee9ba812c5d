"""What a merge reads: checkpoints, checkpoints with vectors, and other merges, each as a layout and
as terms of the core's plan, tensor by tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from reasonvec.algebra import Adapter, Point
from reasonvec.compat.layout import Layout, TensorInfo
from reasonvec.compat.problem import Problem
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json
from reasonvec.names import kind_of
from reasonvec.terms import Operands, PlacedTerm, depth, place_term

if TYPE_CHECKING:
    from reasonvec.merging.planning import Plan
    from reasonvec.merging.stages import Stages

__all__ = ["Input", "MergedInput", "PointInput", "Stack", "is_behind", "renumbered"]

_NUMBERED = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")
_TOWERS = re.compile(r"vision|visual|audio|image|speech|\bencoder\b|mtp")


class Input(Protocol):
    """One input of a merge, opened."""

    @property
    def label(self) -> str:
        """The input as a recipe shows it."""

    @property
    def layout(self) -> Layout:
        """Its tensors, config and tokenizer."""

    @property
    def names(self) -> Mapping[str, str]:
        """Canonical name to the name in the files, for all that is not a copy of another."""

    @property
    def folder(self) -> CheckpointFolder:
        """Whose small files it has."""

    @property
    def stack(self) -> Stack:
        """Its layers."""

    def problems(self, operands: Operands) -> list[Problem]:
        """What is wrong with it by itself."""

    def terms(self, name: str, operands: Operands) -> list[Json]:
        """The sum that a tensor (by its canonical name) is, as terms of a plan."""

    def whole(self, name: str, operands: Operands) -> Json | None:
        """The tensor as one source, or None where it takes several."""


class PointInput:
    """A checkpoint, perhaps with vectors added."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self.folder = point.base
        self._placed: list[PlacedTerm] | None = None

    @property
    def label(self) -> str:
        return str(self.point)

    @property
    def layout(self) -> Layout:
        return self.folder.layout

    @cached_property
    def stack(self) -> Stack:
        return Stack(self.layout)

    @cached_property
    def names(self) -> Mapping[str, str]:
        return self.layout.names()

    def place(self, operands: Operands) -> list[PlacedTerm]:
        if self._placed is None:
            self._placed = [
                place_term(scaled, self.layout, operands) for scaled in self.point.vector.terms
            ]
        return self._placed

    def problems(self, operands: Operands) -> list[Problem]:
        placed = [problem for term in self.place(operands) for problem in term.problems]
        return [*self.folder.copy_problems, *placed]

    def terms(self, name: str, operands: Operands) -> list[Json]:
        stored = self.names[name]
        own: Json = {"coefficient": 1.0, "source": {"tensor": operands.ref(self.folder, stored)}}
        added = [term.terms[stored] for term in self.place(operands) if stored in term.terms]
        return [own, *added]

    def whole(self, name: str, operands: Operands) -> Json | None:
        adapters = [scaled.leaf for scaled in self.point.vector.terms]
        if not all(isinstance(leaf, Adapter) for leaf in adapters) or any(
            scaled.factors or scaled.control for scaled in self.point.vector.terms
        ):
            return _one(self.terms(name, operands))
        stored = self.names[name]
        tensor = operands.ref(self.folder, stored)
        factors: list[Json] = []
        for leaf in adapters:
            assert isinstance(leaf, Adapter)
            update, number = leaf.updates.of.get(stored), operands.number(leaf.folder)
            if update is not None and update.saved is not None:
                tensor = {"operand": number, "name": update.saved}
            if update is not None and update.factors is not None:
                factors.append(update.factors.as_json(number))
        return (
            {"adapted": {"tensor": tensor, "adapters": factors}} if factors else {"tensor": tensor}
        )


class MergedInput:
    """Another merge. Weighted sums become part of what reads them; what is no weighted sum is
    written first (`reasonvec.merging.stages`)."""

    def __init__(self, plan: Plan, name: str, stages: Stages) -> None:
        self.plan = plan
        self.label = name
        self.folder = plan.donor
        curved = [t.plan for t in plan.tensors if t.plan.get("method") is not None]
        self.staged = stages.add(name, curved) if curved else None

    @cached_property
    def layout(self) -> Layout:
        tensors = {
            t.name: TensorInfo(t.name, t.dtype, t.shape, self.label) for t in self.plan.tensors
        }
        return Layout(self.folder.folder, tensors, self.plan.config)

    @cached_property
    def names(self) -> Mapping[str, str]:
        return self.layout.names()

    @cached_property
    def stack(self) -> Stack:
        return Stack(self.layout)

    @cached_property
    def _tensors(self) -> dict[str, Json]:
        return {t.name: t.plan for t in self.plan.tensors}

    def problems(self, operands: Operands) -> list[Problem]:
        return self.plan.problems

    def terms(self, name: str, operands: Operands) -> list[Json]:
        stored = self.names[name]
        tensor = self._tensors[stored]
        if tensor.get("method") is not None and self.staged is not None:
            ref = operands.ref(self.staged, stored)
            return [{"coefficient": 1.0, "source": {"tensor": ref}}]
        target, terms = tensor["target"], tensor["terms"]
        own: list[Json] = []
        if target is not None:
            own.append({"coefficient": 1.0, "source": {"tensor": target}})
        if isinstance(terms, list):
            own += terms
        return own

    def whole(self, name: str, operands: Operands) -> Json | None:
        return _one(self.terms(name, operands))


def _one(terms: list[Json]) -> Json | None:
    if len(terms) == 1 and terms[0]["coefficient"] == 1.0 and "source" in terms[0]:
        source = terms[0]["source"]
        return source if isinstance(source, dict) else None
    return None


class Stack:
    """The numbered layers of a checkpoint, by the names of its tensors."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.prefix, self.layers = self._main()

    def _main(self) -> tuple[str | None, int]:
        """The stack that slices speak of: the language model's, where there are several."""
        found: dict[str, set[int]] = defaultdict(set)
        for name in self.layout.names():
            if (match := _NUMBERED.search(name)) is not None:
                found[name[: match.start(1)]].add(int(match[1]))
        if not found:
            return None, 1
        said = depth(self.layout)

        def fitness(prefix: str) -> tuple[bool, bool, int]:
            tower = _TOWERS.search(prefix) is not None
            return tower, len(found[prefix]) < said, -len(found[prefix])

        prefix = min(found, key=fitness)
        return prefix, min(said, max(found[prefix]) + 1)

    def layer(self, name: str) -> int | None:
        """The layer of the stack that a tensor (by its canonical name) is in."""
        if self.prefix is None or not name.startswith(self.prefix):
            return None
        match = _NUMBERED.search(name)
        number = int(match[1]) if match is not None else None
        # Prediction layers stand behind the last one, and belong to no slice.
        return number if number is not None and number < self.layers else None

    def depth(self, name: str) -> float:
        """How far through its own stack a tensor is, 0 outside of any."""
        match = _NUMBERED.search(name)
        if match is None:
            return 0.0
        number, prefix = int(match[1]), name[: match.start(1)]
        layers = self.layers if prefix == self.prefix else self._others.get(prefix, 1)
        return min(1.0, number / (layers - 1)) if layers > 1 else 1.0

    @cached_property
    def _others(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name in self.layout.names():
            if (match := _NUMBERED.search(name)) is not None:
                prefix = name[: match.start(1)]
                found[prefix] = max(found.get(prefix, 0), int(match[1]) + 1)
        return found


def renumbered(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    match = _NUMBERED.search(name)
    if match is None:
        return name
    return f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"


def is_behind(name: str) -> bool:
    """Whether a tensor outside the layers comes after them (the final norm, the head)."""
    return kind_of(name) in {"norm", "lm_head"} and "embed" not in name
