"""One tensor of a merge: which tensors of the inputs it is made of, by what method, with what
parameters, or why it is none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from reasonvec.compat.layout import FLOATS, TensorInfo
from reasonvec.compat.problem import Problem
from reasonvec.errors import ReasonvecError
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json
from reasonvec.merging.custom import Computation, Custom
from reasonvec.merging.inputs import Input
from reasonvec.merging.linear import LinearMethod
from reasonvec.merging.method import Numerics
from reasonvec.merging.parameters import Place
from reasonvec.merging.reader import TensorReader
from reasonvec.merging.slices import OpenedModel, OpenedSlice
from reasonvec.merging.stages import Staged, Stages
from reasonvec.merging.sums import moved, plain, times
from reasonvec.merging.vocabulary import Vocabulary, lay_rows
from reasonvec.names import is_embedding, is_vocabulary
from reasonvec.terms import Operands

if TYPE_CHECKING:
    from reasonvec.merging.merge import Merge

__all__ = ["BUFFERS", "DTYPES", "MergeMissing", "MergedTensor", "Slot", "TensorPlanner"]

MergeMissing: TypeAlias = Literal["error", "skip"]

DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Buffers that a model computes by itself: older files list them, newer ones do not.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(?:masked_)?bias$|position_ids$")


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """One tensor of the output. ``plan`` is the core's; ``why`` says why it is only copied."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    plan: Json
    inputs: tuple[str, ...]
    why: str | None = None
    stored: str = ""
    """The dtype of the tensor whose place it takes."""

    @property
    def coefficients(self) -> tuple[float, ...]:
        terms = self.plan["terms"]
        assert isinstance(terms, list)
        return tuple(float(str(term["coefficient"])) for term in terms)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the output for which a tensor is to be made.

    ``info`` is the tensor of the frame that stands there, ``out`` the name in the output, ``name``
    the canonical one in the slice's frame, ``layer`` the layer of the slice (None outside the
    layers, or where models are whole), ``ramp`` how deep it is for methods that go by depth, and
    ``rows`` the vocabulary that its rows are laid out for, if they move.
    """

    info: TensorInfo
    out: str
    name: str
    layer: int | None
    part: OpenedSlice
    place: Place
    ramp: float
    rows: Vocabulary | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.laid(self.info.shape)

    def laid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's shape with its rows laid out."""
        return shape if self.rows is None else (self.rows.rows, *shape[1:])

    def of(self, model: OpenedModel) -> str:
        """What the tensor is called in a model."""
        return model.name(self.name, self.layer)

    def info_of(self, model: OpenedModel) -> TensorInfo:
        """The tensor in a model."""
        return model.input.layout.tensors[model.input.names[self.of(model)]]


@dataclass
class TensorPlanner:
    """What all tensors of a merge have in common. Problems are put into ``problems``, and what has
    to be written first into ``stages``."""

    merge: Merge
    operands: Operands
    stages: Stages
    missing: MergeMissing
    numerics: Numerics
    seed: int
    problems: list[Problem] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    staged: dict[int, Staged] = field(default_factory=dict)

    def merged(self, slot: Slot) -> MergedTensor:
        """One output tensor, merged."""
        info, base, models = slot.info, slot.part.base, slot.part.models
        here = [m for m in (base, *models) if m is not None]
        missing = [m for m in here if slot.of(m) not in m.input.names]
        if missing:
            return self._lacking(slot, missing)
        infos = [slot.info_of(m) for m in here]
        if info.dtype not in FLOATS:
            refs = [ref for m in here for ref in self._refs(slot, m)]
            if not all(i.dtype == info.dtype and i.shape == info.shape for i in infos):
                self.error("dtype", _unlike(info, here, infos), slot.out)
            why = f"{info.dtype} is passed through"
            return _settled(info, slot.out, info.shape, refs[0], equal=refs[1:], why=why)
        for model, other in zip(here, infos, strict=True):
            if slot.laid(other.shape) != slot.shape or other.dtype not in FLOATS:
                self._unfit(slot, model, other)
                return _settled(info, slot.out, slot.shape, None, why="refused")
        reader = TensorReader(
            models,
            slot.part.levels,
            slot.place,
            len(slot.shape),
            slot.ramp,
            self.numerics,
            self.seed,
            self._steps(info),
            self.merge.method.usual_weight,
        )
        try:
            target, terms, method = self._combined(slot, reader)
            _check_finite(terms)
        except ReasonvecError as error:
            # One line for what is wrong in every tensor alike.
            if str(error) not in self.told:
                self.told.add(str(error))
                self.error("parameter", f"{error} (first at {slot.out})", slot.out)
            target, terms, method = None, [], None
        return _settled(
            info,
            slot.out,
            slot.shape,
            target,
            terms,
            method=method,
            inputs=tuple(m.input.label for m in here),
            steps=None if method is None else reader.steps,
        )

    def copied(self, name: str, source: Input, why: str) -> MergedTensor:
        """A tensor of an input as it is, by its canonical name."""
        info = source.layout.tensors[source.names[name]]
        whole = source.whole(name, self.operands)
        target = None if whole is None else whole.get("tensor")
        terms = [] if target is not None else source.terms(name, self.operands)
        return _settled(info, info.name, info.shape, target, terms, why=why)

    def error(self, kind: str, message: str, tensor: str | None = None) -> None:
        """Note what stops the merge."""
        self.problems.append(Problem(kind, message, tensor))

    def _steps(self, info: TensorInfo) -> str | None:
        """The 16 bits that mergekit would compute in: it rounds after every step, and before the
        first."""
        if self.numerics != "mergekit" or not self.merge.method.stepwise:
            return None
        working = info.dtype if self.merge.dtype is None else DTYPES[self.merge.dtype]
        return working if working in {"BF16", "F16"} else None

    def _combined(self, slot: Slot, reader: TensorReader) -> tuple[object, list[Json], Json | None]:
        """Target, terms and method of one float tensor."""
        method, base, models = self.merge.method, slot.part.base, slot.part.models
        steps = self.numerics == "mergekit" and method.stepwise
        said = (
            method.aside(reader, len(models))
            if not isinstance(method, LinearMethod)
            else None
            if steps
            else method.coefficients(reader, len(models))
        )
        if said is not None:
            if not said.differences:
                terms = [
                    times(c, term)
                    for c, model in zip(said.values, models, strict=True)
                    if c != 0.0
                    for term in self._sum(slot, model)
                ]
                copied = plain(terms[0]) if len(terms) == 1 else None
                return (copied, [], None) if copied is not None else (None, terms, None)
            assert base is not None
            anchor = self._sum(slot, base)
            sums = [self._sum(slot, model) for model in models]
            return (*moved(anchor, said.values, sums), None)
        if isinstance(method, Custom):
            return self._computed(method, slot, reader), [], None
        plan = method.plan(reader, len(models))
        weights = [reader.weight(i) if method.weighted else 1.0 for i in range(len(models))]
        if not math.isfinite(sum(abs(weight) for weight in weights)):
            message = f"the weights are too large to be added up: {weights}; give smaller ones"
            raise ReasonvecError(message)
        terms = [
            {"coefficient": weight, **self._single(slot, model)}
            for weight, model in zip(weights, models, strict=True)
        ]
        if base is None:
            return None, terms, plan
        single = self._single(slot, base)
        if method.base == "model":
            return None, [{"coefficient": 1.0, **single}, *terms], plan
        source = single.get("source")
        target = source.get("tensor") if isinstance(source, dict) else None
        if target is None:
            # What differences are taken from has to be a tensor by itself.
            target = self._stage(slot, base, [{"coefficient": 1.0, **single}])
        return target, terms, plan

    def _computed(self, method: Custom, slot: Slot, reader: TensorReader) -> Json:
        """A tensor that a function in Python makes, which has to be written first."""
        shape = slot.laid(slot.info_of(slot.part.frame).shape)
        base = None if slot.part.base is None else self._sum(slot, slot.part.base)
        models = tuple(self._sum(slot, model) for model in slot.part.models)
        staged = self.staged.get(id(method))
        if staged is None:
            label = self.merge.called or method.name
            staged = self.staged[id(method)] = self.stages.add(label, [])
        assert method.function is not None
        name, values = slot.place.name, method.values(reader)
        staged.computed.append(Computation(method.function, name, shape, models, base, values))
        return self.operands.ref(staged, name)

    def _sum(self, slot: Slot, model: OpenedModel) -> list[Json]:
        """The sum that a model's tensor is."""
        terms = model.input.terms(slot.of(model), self.operands)
        if slot.rows is None:
            return terms
        return lay_rows(slot.rows, model.input, slot.name, terms, self.operands)

    def _single(self, slot: Slot, model: OpenedModel) -> Json:
        """A model's tensor as one source, or as one list of segments."""
        here = slot.of(model)
        whole = model.input.whole(here, self.operands)
        laid: list[Json] = [] if whole is None else [{"coefficient": 1.0, "source": whole}]
        if slot.rows is not None:
            laid = lay_rows(slot.rows, model.input, here, laid, self.operands)
        if len(laid) == 1:
            return {key: laid[0][key] for key in ("source", "segments") if key in laid[0]}
        if not laid:
            laid = model.input.terms(here, self.operands)
        return {"source": {"tensor": self._stage(slot, model, laid)}}

    def _stage(self, slot: Slot, model: OpenedModel, terms: list[Json]) -> Json:
        """A tensor that has to be written first, because it is no tensor of any file."""
        staged = self.staged.get(id(model.input))
        if staged is None:
            staged = self.staged[id(model.input)] = self.stages.add(model.input.label, [])
        name = slot.of(model)
        if name in staged.names:  # a layer that stands in several slices
            return self.operands.ref(staged, name)
        staged.names.add(name)
        info = slot.info_of(model)
        # Rows that only move stay what they are; a sum is not rounded before it is used.
        kept = len(terms) == 1 and self._moved_only(terms[0], info)
        dtype = info.dtype if kept else "F64" if info.dtype == "F64" else "F32"
        staged.plans.append(_plan(name, dtype, slot.laid(info.shape), None, terms))
        return self.operands.ref(staged, name)

    def _moved_only(self, term: Json, info: TensorInfo) -> bool:
        """Whether a term is elements of tensors of this dtype, each as it is."""
        segments = term.get("segments", [term])
        assert isinstance(segments, list)
        for segment in segments:
            ref = plain({"coefficient": term["coefficient"], "source": segment.get("source")})
            if not isinstance(ref, dict):
                return False
            folder = self.operands.folders[ref["operand"]]
            if isinstance(folder, Staged):  # in the dtype of what it stands for
                continue
            if not isinstance(folder, CheckpointFolder):
                return False
            if folder.layout.tensors[ref["name"]].dtype != info.dtype:
                return False
        return True

    # ---- what does not fit

    def _refs(self, slot: Slot, model: OpenedModel) -> list[Json]:
        terms = model.input.terms(slot.of(model), self.operands)
        return [ref for term in terms if isinstance(ref := plain(term), dict)]

    def _lacking(self, slot: Slot, missing: Sequence[OpenedModel]) -> MergedTensor:
        info, part = slot.info, slot.part
        if self.missing == "error" and not BUFFERS.search(slot.name):
            for model in missing:
                message = (
                    f"{model.input.label}: has no {slot.of(model)}, which {info.file} of "
                    f"{part.frame.input.label} has; take models of one architecture, or pass "
                    "missing=skip to keep the first model's there"
                )
                self.error("missing", message, slot.out)
        frame = next((m for m in (part.base, *part.models) if m and m not in missing), None)
        if frame is None:
            return _settled(info, slot.out, info.shape, None, why="missing")
        terms = frame.input.terms(slot.of(frame), self.operands)
        target = plain(terms[0])
        rest = terms[1:] if target is not None else terms
        why = "not every model has it"
        return _settled(info, slot.out, info.shape, target, rest, why=why)

    def _unfit(self, slot: Slot, model: OpenedModel, other: TensorInfo) -> None:
        info = slot.info
        if other.dtype not in FLOATS:
            self.error("dtype", _unlike(info, [model], [other]), slot.out)
        elif is_vocabulary(slot.name) and info.shape[1:] == other.shape[1:]:
            what = "embeddings" if is_embedding(slot.name) else "head"
            self.error(
                "vocab",
                f"{model.input.label}: {other.name} has {other.shape[0]} rows, expected "
                f"{info.shape[0]}: the {what} are of different vocabularies; say "
                '"tokenizer_source: base" or "union" to have the rows laid out by token first',
                slot.out,
            )
        else:
            self.error(
                "shape",
                f"{model.input.label}: {other.name} is {list(other.shape)}, expected "
                f"{list(info.shape)}: the shapes must be equal; take models of one architecture "
                "and size",
                slot.out,
            )


def _check_finite(terms: Sequence[Json]) -> None:
    """Finite weights may still have an infinite product or quotient."""
    for term in terms:
        if not math.isfinite(float(str(term["coefficient"]))):
            message = (
                f"the weights make a coefficient of {term['coefficient']}: give weights, scales "
                "and a lambda whose products and quotients are finite"
            )
            raise ReasonvecError(message)


def _plan(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    target: object,
    terms: Sequence[Json] = (),
    equal: Sequence[Json] = (),
) -> Json:
    """A tensor in a plan of the core."""
    return {
        "name": name,
        "dtype": dtype,
        "shape": list(shape),
        "target": target,
        "terms": list(terms),
        "equal": list(equal),
    }


def _settled(
    info: TensorInfo,
    name: str,
    shape: tuple[int, ...],
    target: object,
    terms: Sequence[Json] = (),
    *,
    equal: Sequence[Json] = (),
    method: Json | None = None,
    why: str | None = None,
    inputs: tuple[str, ...] = (),
    steps: str | None = None,
) -> MergedTensor:
    plan = _plan(name, info.dtype, shape, target, terms, equal)
    if method is not None:
        plan["method"] = method
    if steps is not None:
        plan["steps"] = steps
    return MergedTensor(name, info.dtype, shape, plan, inputs, why, info.dtype)


def _unlike(info: TensorInfo, models: Sequence[OpenedModel], infos: Sequence[TensorInfo]) -> str:
    for model, other in zip(models, infos, strict=True):
        if (other.dtype, other.shape) != (info.dtype, info.shape):
            return (
                f"{model.input.label}: {other.name} is {other.dtype} {list(other.shape)}, expected "
                f"{info.dtype} {list(info.shape)}: tensors that are not of floats are copied, and "
                "have to be equal in all models"
            )
    return f"{info.name}: differs between the models"
