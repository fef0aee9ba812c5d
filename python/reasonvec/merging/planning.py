"""From a merge to the core's plan: which tensor of which input goes where, with what parameters,
and everything that stands in the way. Headers and small files only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from reasonvec.compat.alignment import folder_problems
from reasonvec.compat.configs import compare_functions
from reasonvec.compat.layout import FLOATS
from reasonvec.compat.problem import Problem, Severity
from reasonvec.compat.rows import compare_tokenizers
from reasonvec.errors import ReasonvecError
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json
from reasonvec.merging.inputs import Input, MergedInput, PointInput, is_behind, renumbered
from reasonvec.merging.layers import LayerOrigin, restacked_config
from reasonvec.merging.method import Numerics
from reasonvec.merging.parameters import Place
from reasonvec.merging.slices import OpenedModel, OpenedSlice, same_input
from reasonvec.merging.stages import Stages
from reasonvec.merging.tensors import (
    BUFFERS,
    DTYPES,
    MergedTensor,
    MergeMissing,
    Slot,
    TensorPlanner,
)
from reasonvec.merging.vocabulary import Vocabulary
from reasonvec.names import is_vocabulary
from reasonvec.terms import Operands, elements

if TYPE_CHECKING:
    from reasonvec.merging.merge import Merge, Module, Slice

__all__ = ["Plan", "plan_merge"]


@dataclass(frozen=True)
class Plan:
    """A merge, decided tensor by tensor. ``donor`` gives the small files, ``config`` is its
    config.json as the output has it."""

    method: str
    tensors: list[MergedTensor]
    problems: list[Problem]
    donor: CheckpointFolder
    config: Json
    vocabulary: Vocabulary | None
    inputs: list[Input]


@dataclass(frozen=True, slots=True)
class _Share:
    """What a module makes of the output: what it takes, and no earlier one does."""

    module: Module
    earlier: tuple[Module, ...]

    def has(self, name: str) -> bool:
        return self.module.takes(name) and not any(other.takes(name) for other in self.earlier)


@dataclass
class _Planner(TensorPlanner):
    """The whole merge: which tensors there are, and what stands in the way of all of them."""

    inputs: dict[int, Input] = field(default_factory=dict)

    # ---- opening

    def open(self, point: object) -> Input:
        """One input for each expression, however often it is named."""
        from reasonvec.algebra import Point
        from reasonvec.merging.merge import Merge

        known = self.inputs.get(id(point))
        if known is None:
            if isinstance(point, Merge):
                inner = plan_merge(
                    point,
                    self.operands,
                    self.stages,
                    out_dtype=point.out_dtype,
                    missing=self.missing,
                    numerics=self.numerics,
                    seed=self.seed,
                )
                known = MergedInput(inner, point.label or f"({point})", self.stages)
            else:
                assert isinstance(point, Point)
                known = PointInput(point)
            self.inputs[id(point)] = known
        return known

    def slice(self, part: Slice, module: Module) -> OpenedSlice:
        merge, method = self.merge, self.merge.method
        base = None if merge.base is None else self.open(merge.base)
        models = [
            OpenedModel(
                self.open(model.point),
                model.settings,
                None if model.layers is None else model.layers[0],
            )
            for model in part.models
        ]
        lengths = {m.layers[1] - m.layers[0] for m in part.models if m.layers is not None}
        if len(lengths) > 1 or (lengths and any(m.layers is None for m in part.models)):
            ranges = ", ".join(
                f"{self.open(m.point).label} {list(m.layers) if m.layers else 'without a range'}"
                for m in part.models
            )
            self.error("layers", f"the layer ranges of a slice must be of one length: {ranges}")
        for model in part.models:
            self._check_range(model.layers, self.open(model.point))
        opened: OpenedModel | None = None
        if base is not None and method.base != "none":
            listed = [model for model in models if same_input(model.input, base)]
            opened = (
                listed[0] if listed else OpenedModel(base, {}, models[0].start if models else None)
            )
            models = [model for model in models if model not in listed]
        elif (
            base is not None
            and method.name != "passthrough"
            and not lengths
            and not any(same_input(model.input, base) for model in models)
        ):
            models.append(OpenedModel(base, {}, None))
        if method.base in {"needed", "model"} and opened is None:
            self.error(
                "base",
                f"{method.name}: needs a base, what the others are compared with; name it "
                "(base_model in a config)",
            )
        # How many models there are besides the base shows only where there is a base.
        elif (problem := method.check(len(models))) is not None:
            self.error("models", problem)
        levels = [part.settings, module.settings, merge.settings]
        return OpenedSlice(models, opened, levels, lengths.pop() if lengths else None)

    def _check_range(self, layers: tuple[int, int] | None, source: Input) -> None:
        if layers is None:
            return
        if not 0 <= layers[0] < layers[1]:
            self.error(
                "layers",
                f"{source.label}: layer_range {list(layers)} is empty or turned round; it is "
                "[first, one past the last]",
            )
        elif layers[1] > source.stack.layers or source.stack.prefix is None:
            count = 0 if source.stack.prefix is None else source.stack.layers
            self.error(
                "layers",
                f"{source.label}: layer_range {list(layers)}, but it has {count} layers; the end "
                "of a range is one past its last layer",
            )

    # ---- the whole

    def run(self) -> Plan:
        merge = self.merge
        modules = [
            (module, [self.slice(part, module) for part in module.slices])
            for module in merge.modules
        ]
        first = modules[0][1][0]
        donor_input = (
            self.open(merge.base)
            if merge.base is not None
            else first.models[0].input
            if first.models
            else None
        )
        if donor_input is None or any(p.severity == "error" for p in self.problems):
            donor = donor_input.folder if donor_input is not None else None
            if donor is None:
                raise ReasonvecError("\n".join(p.message for p in self.problems))
            return self._nothing(donor)
        used = self._used(modules, donor_input)
        for source in used:
            self.problems += [*folder_problems(source.layout), *source.problems(self.operands)]
        if any(p.severity == "error" for p in self.problems):
            return self._nothing(donor_input.folder, used)
        sliced = any(part.length is not None for _, parts in modules for part in parts)
        self._compare(donor_input, used, sliced=sliced)
        vocabulary = self._vocabulary(donor_input, used)
        if any(p.severity == "error" for p in self.problems):
            return self._nothing(donor_input.folder, used)
        tensors, origins = self._tensors(modules, donor_input, vocabulary)
        config = restacked_config(dict(donor_input.layout.config), donor_input.stack, origins)
        return Plan(
            merge.method.name,
            tensors,
            list(dict.fromkeys(self.problems)),
            donor_input.folder,
            config,
            vocabulary,
            used,
        )

    def _nothing(self, donor: CheckpointFolder, used: Sequence[Input] = ()) -> Plan:
        problems = list(dict.fromkeys(self.problems))
        return Plan(self.merge.method.name, [], problems, donor, {}, None, list(used))

    def _used(
        self, modules: Sequence[tuple[Module, list[OpenedSlice]]], donor: Input
    ) -> list[Input]:
        used = [donor]
        for _, parts in modules:
            for part in parts:
                used += [m.input for m in (part.base, *part.models) if m is not None]
        return list({id(source): source for source in used}.values())

    def _compare(self, donor: Input, used: Sequence[Input], *, sliced: bool) -> None:
        for source in used[1:]:
            if source.folder is donor.folder:
                continue
            for problem in compare_functions(source.layout, donor.layout):
                # Layers are counted differently on purpose, and other differences of function are
                # for whoever mixes them to judge: tensors that do not fit are told one by one.
                if not (
                    sliced and problem.message.startswith(("num_hidden_layers", "layer_types"))
                ):
                    self.problems.append(problem._replace(severity="warning"))
            ours, theirs = donor.layout.ties, source.layout.ties
            if None not in (ours, theirs) and ours != theirs:
                tied, untied = (donor, source) if ours else (source, donor)
                self.error(
                    "tied",
                    f"{tied.label} ties its head to its embeddings, {untied.label} has a head of "
                    "its own: the two cannot be merged as they are; take models that are both tied "
                    "or both untied, or correct tie_word_embeddings in the config.json that is "
                    "wrong",
                )

    def _vocabulary(self, donor: Input, used: Sequence[Input]) -> Vocabulary | None:
        if self.merge.tokenizer is not None:
            vocabulary = Vocabulary.of(self.merge.tokenizer, donor, used, self.open)
            self.problems += vocabulary.problems
            return vocabulary
        advice = (
            'rows of different tokens would be mixed; say "tokenizer_source: union" (or base) to '
            "have the rows laid out by token first"
        )
        for source in used[1:]:
            verdict = compare_tokenizers(source.layout, donor.layout)
            if verdict.difference is None:
                severity: Severity = "error" if verdict.broken else "warning"
                said = "" if verdict.broken else ": only the number of rows was compared"
                self.problems.append(
                    Problem("tokenizer", verdict.message + said, severity=severity)
                )
            elif verdict.difference.harmful:
                self.error("tokenizer", f"{verdict.message}; {advice}")
            elif not verdict.difference.same:
                self.problems.append(
                    Problem(
                        "tokenizer",
                        f"{verdict.message}; their rows are padding on the other side",
                        severity="warning",
                    )
                )
        return None

    # ---- tensors

    def _tensors(
        self,
        modules: Sequence[tuple[Module, list[OpenedSlice]]],
        donor: Input,
        vocabulary: Vocabulary | None,
    ) -> tuple[list[MergedTensor], list[LayerOrigin] | None]:
        found: list[MergedTensor] = []
        done: set[str] = set()
        origins: list[LayerOrigin] | None = None
        copies = {*donor.layout.copies()}
        names = {n: s for n, s in donor.names.items() if s not in copies}
        depths: dict[str, int] = {}
        earlier: list[Module] = []
        for module, parts in modules:
            wanted = {n: s for n, s in names.items() if n not in done and module.takes(n)}
            if not wanted:
                self.error(
                    "module",
                    f"modules: {module.name}: {donor.label} has no tensor of that name; its "
                    f"tensors start like {next(iter(names), 'nothing')!r}",
                )
            done |= wanted.keys()
            layered = any(donor.stack.layer(name) is not None for name in wanted)
            if parts[0].length is None:
                self._check_names(parts[0], module, donor)
                found += self._whole(wanted, parts[0], donor, vocabulary)
                depth = donor.stack.layers
            elif layered:
                origins = []
                share = _Share(module, tuple(earlier))
                found += self._sliced(wanted, parts, donor, vocabulary, origins, share)
                depth = len(origins)
            else:
                self.error(
                    "module",
                    f"modules: {module.name}: has slices, and none of the layers "
                    f"{donor.stack.prefix}* that slices are of; list its models whole "
                    "(models in place of slices)",
                )
            if layered:
                depths[f"{module.name} makes"] = depth
            earlier.append(module)
        for name in names.keys() - done:
            self.problems.append(
                Problem(
                    "module",
                    f"no module takes {name}: it is copied from {donor.label}",
                    name,
                    "warning",
                )
            )
        if names.keys() - done:
            copied = {n: s for n, s in names.items() if n not in done}
            found += [self.copied(n, donor, "no module takes it") for n in copied]
            if any(donor.stack.layer(name) is not None for name in copied):
                depths["what no module takes has"] = donor.stack.layers
        if len({*depths.values()}) > 1:
            said = ", ".join(f"{who} {depth}" for who, depth in depths.items())
            self.error(
                "module",
                f"modules: the parts of a layer must be of equally many layers: {said}; give "
                "every module slices of the same lengths",
            )
        for name, count in Counter(tensor.name for tensor in found).items():
            if count > 1:
                message = f"{name} would be written {count} times: two modules or slices make it"
                self.error("module", message, name)
        return found, origins

    def _whole(
        self,
        names: Mapping[str, str],
        part: OpenedSlice,
        donor: Input,
        vocabulary: Vocabulary | None,
    ) -> Iterator[MergedTensor]:
        for name, stored in names.items():
            depth = donor.stack.depth(name)
            behind = is_behind(name) and depth == 0.0 and donor.stack.layer(name) is None
            info = donor.layout.tensors[stored]
            place = Place(name, depth)
            ramp = 1.0 if behind else depth
            rows = _moved_rows(vocabulary, name)
            yield self.merged(Slot(info, info.name, name, None, part, place, ramp, rows))

    def _sliced(
        self,
        names: Mapping[str, str],
        parts: Sequence[OpenedSlice],
        donor: Input,
        vocabulary: Vocabulary | None,
        origins: list[LayerOrigin],
        share: _Share,
    ) -> Iterator[MergedTensor]:
        stack = donor.stack
        outside = [name for name in names if stack.layer(name) is None]
        total = sum(part.length or 0 for part in parts)

        def beside(name: str, part: OpenedSlice, ramp: float) -> MergedTensor:
            info, rows = donor.layout.tensors[names[name]], _moved_rows(vocabulary, name)
            return self.merged(Slot(info, info.name, name, None, part, Place(name), ramp, rows))

        for name in outside:
            if not is_behind(name):
                yield beside(name, parts[0], 0.0)
        at = 0
        for part in parts:
            frame, length = part.frame, part.length or 0
            theirs = frame.input.names
            by_layer: dict[int, list[str]] = {}
            for name in theirs:
                if (layer := frame.input.stack.layer(name)) is not None:
                    by_layer.setdefault(layer, []).append(name)
            for k in range(length):
                number = (frame.start or 0) + k
                # A single layer is the last one: so mergekit's runs show.
                depth = k / (length - 1) if length > 1 else 1.0
                ramp = at / (total - 1) if total > 1 else 0.0
                origins.append(LayerOrigin(frame.input.layout, number))
                for name in by_layer.get(number, []):
                    if not share.has(renumbered(name, at)):
                        continue
                    info = frame.input.layout.tensors[theirs[name]]
                    out = renumbered(info.name, at)
                    place = Place(renumbered(name, at), depth)
                    rows = _moved_rows(vocabulary, name)
                    yield self.merged(Slot(info, out, name, k, part, place, ramp, rows))
                at += 1
        for name in outside:
            if is_behind(name):
                yield beside(name, parts[-1], 1.0)

    def _check_names(self, part: OpenedSlice, module: Module, donor: Input) -> None:
        """What an input has and the output would not."""
        have = donor.names.keys()
        severity: Severity = "error" if self.missing == "error" else "warning"
        for model in part.models:
            for name, stored in model.input.names.items():
                if name in have or not module.takes(name) or BUFFERS.search(name):
                    continue
                message = (
                    f"{model.input.label}: {stored} has no place: {donor.label} lacks it; take "
                    "models of one architecture, or pass missing=skip to do without it"
                )
                self.problems.append(Problem("unused", message, stored, severity))


def _moved_rows(vocabulary: Vocabulary | None, name: str) -> Vocabulary | None:
    """The vocabulary, if it moves the rows of this tensor."""
    moves = vocabulary is not None and vocabulary.moves and is_vocabulary(name)
    return vocabulary if moves else None


def plan_merge(
    merge: Merge,
    operands: Operands,
    stages: Stages,
    *,
    out_dtype: str | None = None,
    missing: MergeMissing = "error",
    numerics: Numerics = "default",
    seed: int = 0,
) -> Plan:
    """Decide a merge, tensor by tensor.

    Raises:
        FormatError, OSError: a config or tokenizer cannot be read.
        ReasonvecError: nothing at all can be planned.
    """
    planner = _Planner(merge, operands, stages, missing, numerics, seed)
    plan = planner.run()
    if out_dtype is None:
        return plan
    if out_dtype not in DTYPES:
        message = f"out_dtype: expected one of {', '.join(DTYPES)}, found {out_dtype!r}"
        raise ReasonvecError(message)
    weight: Counter[str] = Counter()
    for tensor in plan.tensors:
        if tensor.dtype in FLOATS:
            weight[tensor.dtype] += elements(tensor.shape)
    # What a model keeps in another dtype on purpose (f32 router biases among bf16) it keeps.
    main = weight.most_common(1)[0][0] if weight else None
    asked = DTYPES[out_dtype]
    tensors = [
        replace(t, dtype=asked, plan=t.plan | {"dtype": asked}) if t.dtype == main else t
        for t in plan.tensors
    ]
    return replace(plan, tensors=tensors)
