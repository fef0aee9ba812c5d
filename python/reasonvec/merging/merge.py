"""Merges as points: lazy, and written in one pass as any other point."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias, Unpack

from reasonvec.algebra import Point, Vector
from reasonvec.merging.method import Method
from reasonvec.merging.parameters import Parameter, Setting

if TYPE_CHECKING:
    from reasonvec.apply import ApplyPlan, ApplyReport
    from reasonvec.merging.saving import MergeOptions
    from reasonvec.merging.vocabulary import Tokenizer

__all__ = ["AnyPoint", "Merge", "Model", "Models", "Module", "PerModel", "Slice"]

AnyPoint: TypeAlias = "Point | Merge"
Models: TypeAlias = "Mapping[Point | Merge, Parameter] | Mapping[Point, Parameter] | Mapping[Merge, Parameter] | Sequence[Point | Merge]"  # noqa: E501
"""Models with their weights, or a list of models of weight 1."""
PerModel: TypeAlias = "Parameter | Mapping[Point, Parameter]"
"""One parameter for all models, or one for each."""


@dataclass(frozen=True, slots=True)
class Model:
    """One input of a slice: a model, perhaps only some of its layers, with its own parameters."""

    point: AnyPoint
    settings: Mapping[str, Setting] = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """What is merged together."""

    models: tuple[Model, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model, by the names of its tensors (None: all of them), and its slices."""

    slices: tuple[Slice, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    name: str = "default"
    names: re.Pattern[str] | None = None

    def takes(self, name: str) -> bool:
        """Whether a tensor belongs to this part."""
        return self.names is None or self.names.search(name) is not None


@dataclass(frozen=True, eq=False)
class Merge:
    """Models merged by a method: a point. Immutable; nothing is read by making one.

    ``dtype`` is the one that mergekit would have worked in, which only its numerics ask for;
    ``out_dtype`` is the output's. ``label`` is a name for messages, ``config`` the text of the YAML
    that the merge was read from, ``called`` the name of a method that is the caller's own.
    """

    method: Method
    modules: tuple[Module, ...]
    base: AnyPoint | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    label: str | None = None
    config: bytes | None = None
    called: str | None = None

    __array_ufunc__ = None

    def __add__(self, other: Vector) -> NoReturn:
        if isinstance(other, Vector):
            message = (
                f"({self}) + ({other}): a merge and a vector are not written in one pass; save the "
                "merge and add the vector to it (rv.open(folder) + vector), or add the vector to "
                f"one of the models of {self.method.name}, or use rv.task_arithmetic"
            )
            raise TypeError(message)
        _no_algebra(self)

    __radd__ = __add__

    def __sub__(self, other: object) -> NoReturn:
        _no_algebra(self)

    __rsub__ = __sub__

    def __mul__(self, scale: float) -> NoReturn:
        message = (
            f"{scale!r} * ({self}): a point in weight space has no multiples, only vectors do; for "
            "a weighted average use rv.linear"
        )
        raise TypeError(message)

    __rmul__ = __mul__

    def plan(self, path: str | PathLike[str], **options: Unpack[MergeOptions]) -> ApplyPlan:
        """What `save` will do, from headers alone: every tensor, every problem, every cost."""
        from reasonvec.merging.saving import plan

        return plan(self, Path(path), options)

    def save(self, path: str | PathLike[str], **options: Unpack[MergeOptions]) -> ApplyReport:
        """Write the merge as a checkpoint folder, in one pass; see `reasonvec.merging.saving`.

        Raises:
            MismatchError: the models do not fit together; every problem is told, and nothing is
                written.
            NonFiniteError: NaN or infinity in an input, or a sum that overflows the output's dtype.
            OSError: a file cannot be read or written; the disk is full.

        Examples:
            >>> import reasonvec as rv
            >>> merge = rv.linear({rv.open(family.sft): 0.75, rv.open(family.instruct): 0.25})
            >>> report = merge.save("average")
            >>> print(report.recipe)
            linear(sft: weight 0.75, instruct: weight 0.25)
        """
        return self.plan(path, **options).run()

    def __str__(self) -> str:
        parts: list[str] = []
        if self.base is not None:
            parts.append(f"base {_name(self.base)}")
        for module in self.modules:
            for part in module.slices:
                parts += [_model_text(model) for model in part.models]
        parts += [f"{key} {value.text}" for key, value in self.settings.items()]
        return f"{self.called or self.method.name}({', '.join(parts)})"

    def __repr__(self) -> str:
        return f"Merge({self})"


def _name(point: AnyPoint) -> str:
    return (point.label or str(point)) if isinstance(point, Merge) else str(point)


def _model_text(model: Model) -> str:
    text = _name(model.point)
    if model.layers is not None:
        text += f" [{model.layers[0]}:{model.layers[1]}]"
    said = ", ".join(f"{key} {value.text}" for key, value in model.settings.items())
    return f"{text}: {said}" if said else text


def _no_algebra(merge: Merge) -> NoReturn:
    message = (
        f"({merge}): a merge has no sum or difference in one pass; save it, and open the folder "
        "with rv.open"
    )
    raise TypeError(message)
