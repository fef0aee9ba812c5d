"""What a merge writes for itself before it can be made in one pass: embeddings whose rows move,
sums that a method reads as models, merges inside a merge whose result is no weighted sum. It lies
in a folder inside the output while the run lasts, and is gone when it is done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

from reasonvec import _reasonvec as core
from reasonvec.apply import Prediction, WrittenTensor
from reasonvec.compat.layout import Layout, TensorInfo
from reasonvec.destination import STAGES
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json
from reasonvec.merging.custom import Computation, write_computed
from reasonvec.run import DEFAULT_BUDGET
from reasonvec.terms import Operands, elements

__all__ = ["Staged", "Stages"]

_FILE = "model.safetensors"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Staged(CheckpointFolder):
    """A checkpoint that is planned, and not there yet."""

    def __init__(self, label: str, folder: Path) -> None:
        self.label = label
        self.path = folder
        self.folder = folder
        self.plans: list[Json] = []
        self.names: set[str] = set()
        self.computed: list[Computation] = []

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @cached_property
    def layout(self) -> Layout:
        found = (TensorInfo(str(p["name"]), str(p["dtype"]), _shape(p), _FILE) for p in self.plans)
        tensors = {info.name: info for info in found}
        for made in self.computed:
            tensors[made.name] = TensorInfo(made.name, "F32", made.shape, _FILE)
        return Layout(self.folder, tensors)

    @property
    def written(self) -> int:
        """Bytes that it takes."""
        made = sum(4 * elements(tensor.shape) for tensor in self.computed)
        return made + sum(_size(plan) for plan in self.plans)


def _shape(plan: Json) -> tuple[int, ...]:
    return tuple(cast("list[int]", plan["shape"]))


def _size(plan: Json) -> int:
    return elements(_shape(plan)) * _BYTES.get(str(plan["dtype"]), 8)


@dataclass
class Stages:
    """The checkpoints of one run, in the order that they are written in."""

    out: Path
    operands: Operands
    staged: list[Staged] = field(default_factory=list)
    rows: list[WrittenTensor] = field(default_factory=list)
    """What was read and written, as the core reports it."""

    def add(self, label: str, plans: list[Json]) -> Staged:
        """A checkpoint of these tensors."""
        staged = Staged(label, self.out / STAGES / str(len(self.staged)))
        staged.plans += plans
        self.staged.append(staged)
        return staged

    @property
    def written(self) -> int:
        """Bytes that all of them take."""
        return sum(staged.written for staged in self.staged)

    def handles(self, ready: int) -> list[core.Checkpoint | core.VectorFolder]:
        """The operands of a plan that reads the first so many of them. What is not there yet is
        named by no plan, and any folder stands in its place."""
        waiting = self.staged[ready:]
        there = [f for f in self.operands.folders if f not in waiting]
        return [(there[0] if f in waiting else f).handle for f in self.operands.folders]

    def readable(self, plan: Json) -> tuple[Json, list[Json]]:
        """A plan without the tensors that read what is not there yet, and those tensors."""
        numbers = {
            number for number, f in enumerate(self.operands.folders) if isinstance(f, Staged)
        }
        kept: list[Json] = []
        waiting: list[Json] = []
        for shard in cast("list[Json]", plan["shards"]):
            tensors: list[Json] = []
            for tensor in cast("list[Json]", shard["tensors"]):
                later = bool(numbers & set(_operands(tensor)))
                (waiting if later else tensors).append(tensor)
            if tensors:
                kept.append({"file": shard["file"], "metadata": [], "tensors": tensors})
        return plan | {"shards": kept}, waiting

    def predict(self, plan: Json) -> Prediction:
        """What a plan and its stages read, write and hold, from headers alone."""
        total: Prediction = {"read": 0, "written": 0, "memory": 0}
        for staged in self.staged:
            made = sum(4 * elements(tensor.shape) for tensor in staged.computed)
            total["read"] += sum(
                (len(t.models) + 1) * 4 * elements(t.shape) for t in staged.computed
            )
            total["written"] += made
        for part in (plan, *(self._plan(plan, staged) for staged in self.staged)):
            now, waiting = self.readable(part)
            found: Prediction = json.loads(core.predict(json.dumps(now), self.handles(0)))
            later = sum(_size(tensor) for tensor in waiting)
            total["read"] += found["read"] + 2 * later
            total["written"] += found["written"] + later
            total["memory"] = max(
                total["memory"], found["memory"], DEFAULT_BUDGET if waiting else 0
            )
        return total

    def _plan(self, plan: Json, staged: Staged) -> Json:
        shards = [{"file": _FILE, "metadata": [["format", "pt"]], "tensors": staged.plans}]
        changes: Json = {"out": str(staged.folder), "shards": shards}
        return plan | changes | {"sync": False, "resume": False}

    def write(self, plan: Json) -> None:
        """Write them, one after the other."""
        self.remove()
        for at, staged in enumerate(self.staged):
            staged.folder.mkdir(parents=True)
            if staged.computed:
                write_computed(
                    staged.folder / _FILE,
                    staged.computed,
                    self.handles(at),
                    allow_nonfinite=bool(plan["allow_nonfinite"]),
                )
            else:
                text = json.dumps(self._plan(plan, staged))
                self.rows += json.loads(core.apply(text, self.handles(at)))
            # A run that is continued makes the same bytes again, and has to know them as the same.
            os.utime(staged.folder / _FILE, (0, 0))
            staged.handle = core.Checkpoint(staged.folder)

    def remove(self) -> None:
        """Take them away."""
        for staged in self.staged:
            if "handle" in vars(staged):
                del staged.handle
        folder = self.out / STAGES
        if folder.is_dir():
            shutil.rmtree(folder)


def _operands(value: object) -> Iterator[int]:
    """Every operand that a plan names."""
    if isinstance(value, dict):
        number = value.get("operand")
        if isinstance(number, int):
            yield number
        for part in value.values():
            yield from _operands(part)
    elif isinstance(value, list):
        for part in value:
            yield from _operands(part)
