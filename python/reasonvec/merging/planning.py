"""From a merge to the core's plan: which tensor of which input goes where, with what parameters,
and everything that stands in the way. Headers and small files only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from reasonvec.compat.alignment import folder_problems
from reasonvec.compat.configs import compare_functions
from reasonvec.compat.layout import FLOATS, TensorInfo
from reasonvec.compat.problem import Problem, Severity
from reasonvec.compat.rows import compare_tokenizers
from reasonvec.errors import ReasonvecError
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json
from reasonvec.merging.custom import Computation, Custom
from reasonvec.merging.inputs import Input, MergedInput, PointInput, is_behind, renumbered
from reasonvec.merging.layers import LayerOrigin, restacked_config
from reasonvec.merging.linear import LinearMethod
from reasonvec.merging.method import Numerics
from reasonvec.merging.parameters import Place
from reasonvec.merging.reader import TensorReader
from reasonvec.merging.slices import OpenedModel, OpenedSlice, same_input
from reasonvec.merging.stages import Staged, Stages
from reasonvec.merging.sums import moved, plain, times
from reasonvec.merging.vocabulary import Vocabulary, lay_rows
from reasonvec.names import is_embedding, is_vocabulary
from reasonvec.terms import Operands, elements

if TYPE_CHECKING:
    from reasonvec.merging.merge import Merge, Module, Slice

__all__ = ["MergeMissing", "MergedTensor", "Plan", "plan_merge"]

MergeMissing: TypeAlias = Literal["error", "skip"]

_DTYPES: dict[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Buffers that a model computes by itself: older files list them, newer ones do not.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(?:masked_)?bias$|position_ids$")


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


@dataclass
class _Planner:
    merge: Merge
    operands: Operands
    stages: Stages
    missing: MergeMissing
    numerics: Numerics
    seed: int
    problems: list[Problem] = field(default_factory=list)
    inputs: dict[int, Input] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    staged: dict[int, Staged] = field(default_factory=dict)

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

    def error(self, kind: str, message: str, tensor: str | None = None) -> None:
        self.problems.append(Problem(kind, message, tensor))

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
                    self.problems.append(replace(problem, severity="warning"))
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
        for module, parts in modules:
            wanted = {n: s for n, s in names.items() if n not in done and module.takes(n)}
            if not wanted:
                self.error(
                    "module",
                    f"modules: {module.name}: {donor.label} has no tensor of that name; its "
                    f"tensors start like {next(iter(names), 'nothing')!r}",
                )
            done |= wanted.keys()
            if parts[0].length is None:
                self._check_names(parts[0], module, donor)
                found += self._whole(wanted, parts[0], donor, vocabulary)
            else:
                origins = []
                found += self._sliced(wanted, parts, donor, vocabulary, origins)
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
            found += [self._copy(n, donor, "no module takes it") for n in copied]
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
            yield self._tensor(info, info.name, name, None, part, place, ramp, vocabulary)

    def _sliced(
        self,
        names: Mapping[str, str],
        parts: Sequence[OpenedSlice],
        donor: Input,
        vocabulary: Vocabulary | None,
        origins: list[LayerOrigin],
    ) -> Iterator[MergedTensor]:
        stack = donor.stack
        outside = [name for name in names if stack.layer(name) is None]
        total = sum(part.length or 0 for part in parts)
        for name in outside:
            if not is_behind(name):
                info = donor.layout.tensors[names[name]]
                yield self._tensor(
                    info, info.name, name, None, parts[0], Place(name), 0.0, vocabulary
                )
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
                    info = frame.input.layout.tensors[theirs[name]]
                    out = renumbered(info.name, at)
                    place = Place(renumbered(name, at), depth)
                    yield self._tensor(info, out, name, k, part, place, ramp, vocabulary)
                at += 1
        for name in outside:
            if is_behind(name):
                info = donor.layout.tensors[names[name]]
                yield self._tensor(
                    info, info.name, name, None, parts[-1], Place(name), 1.0, vocabulary
                )

    def _check_names(self, part: OpenedSlice, module: Module, donor: Input) -> None:
        """What an input has and the output would not."""
        have = donor.names.keys()
        severity: Severity = "error" if self.missing == "error" else "warning"
        for model in part.models:
            for name, stored in model.input.names.items():
                if name in have or not module.takes(name) or _BUFFERS.search(name):
                    continue
                message = (
                    f"{model.input.label}: {stored} has no place: {donor.label} lacks it; take "
                    "models of one architecture, or pass missing=skip to do without it"
                )
                self.problems.append(Problem("unused", message, stored, severity))

    def _copy(self, name: str, source: Input, why: str) -> MergedTensor:
        info = source.layout.tensors[source.names[name]]
        whole = source.whole(name, self.operands)
        target = None if whole is None else whole.get("tensor")
        terms = [] if target is not None else source.terms(name, self.operands)
        return self._settled(info, info.name, info.shape, target, terms, [], None, why)

    def _settled(
        self,
        info: TensorInfo,
        name: str,
        shape: tuple[int, ...],
        target: object,
        terms: list[Json],
        equal: list[Json],
        method: Json | None,
        why: str | None = None,
        inputs: tuple[str, ...] = (),
        steps: str | None = None,
    ) -> MergedTensor:
        plan: Json = {
            "name": name,
            "dtype": info.dtype,
            "shape": list(shape),
            "target": target,
            "terms": terms,
            "equal": equal,
        }
        if method is not None:
            plan["method"] = method
        if steps is not None:
            plan["steps"] = steps
        return MergedTensor(name, info.dtype, shape, plan, inputs, why, info.dtype)

    def _tensor(
        self,
        info: TensorInfo,
        out: str,
        name: str,
        layer: int | None,
        part: OpenedSlice,
        place: Place,
        ramp: float,
        vocabulary: Vocabulary | None,
    ) -> MergedTensor:
        """One output tensor; ``name`` is its canonical name in the slice's frame."""
        base, models = part.base, part.models
        rows = vocabulary if vocabulary is not None and is_vocabulary(name) else None
        if rows is not None and not rows.moves:
            rows = None
        missing = [m for m in (base, *models) if m is not None and not self._has(m, name, layer)]
        if missing:
            return self._lacking(info, out, name, layer, part, missing)
        here = [m for m in (base, *models) if m is not None]
        infos = [m.input.layout.tensors[m.input.names[m.name(name, layer)]] for m in here]
        if info.dtype not in FLOATS:
            refs = [r for m in here for r in self._refs(m, name, layer)]
            same = all(i.dtype == info.dtype and i.shape == info.shape for i in infos)
            if not same:
                self.error("dtype", _unlike(info, here, infos), out)
            return self._settled(
                info,
                out,
                info.shape,
                refs[0],
                [],
                refs[1:],
                None,
                f"{info.dtype} is passed through",
            )
        shape = info.shape
        if rows is not None:
            shape = (rows.rows, *info.shape[1:])
        for model, other in zip(here, infos, strict=True):
            fits = other.shape == info.shape
            if rows is not None:
                fits = other.shape[1:] == info.shape[1:]
            if not fits or other.dtype not in FLOATS:
                self._unfit(info, out, name, model, other)
                return self._settled(info, out, shape, None, [], [], None, "refused")
        reader = TensorReader(
            models,
            part.levels,
            place,
            len(shape),
            ramp,
            self.numerics,
            self.seed,
            self._steps(info),
            self.merge.method.usual_weight,
        )
        labels = tuple(m.input.label for m in here)
        try:
            target, terms, method = self._combined(part, name, layer, reader, rows)
        except ReasonvecError as error:
            # One line for what is wrong in every tensor alike.
            if str(error) not in self.told:
                self.told.add(str(error))
                self.error("parameter", f"{error} (first at {out})", out)
            target, terms, method = None, [], None
        steps = None if method is None else reader.steps
        return self._settled(info, out, shape, target, terms, [], method, None, labels, steps)

    def _steps(self, info: TensorInfo) -> str | None:
        """The 16 bits that mergekit would compute in: it rounds after every step, and before the
        first."""
        if self.numerics != "mergekit" or not self.merge.method.stepwise:
            return None
        working = info.dtype if self.merge.dtype is None else _DTYPES[self.merge.dtype]
        return working if working in {"BF16", "F16"} else None

    def _combined(
        self,
        part: OpenedSlice,
        name: str,
        layer: int | None,
        reader: TensorReader,
        rows: Vocabulary | None,
    ) -> tuple[object, list[Json], Json | None]:
        """Target, terms and method of one float tensor."""
        method, base, models = self.merge.method, part.base, part.models

        def sum_of(model: OpenedModel) -> list[Json]:
            terms = model.input.terms(model.name(name, layer), self.operands)
            return (
                terms if rows is None else lay_rows(rows, model.input, name, terms, self.operands)
            )

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
                    for term in sum_of(model)
                ]
                copied = plain(terms[0]) if len(terms) == 1 else None
                return (copied, [], None) if copied is not None else (None, terms, None)
            assert base is not None
            return (*moved(sum_of(base), said.values, [sum_of(m) for m in models]), None)
        if isinstance(method, Custom):
            return self._computed(method, part, name, layer, reader, rows, sum_of), [], None
        plan = method.plan(reader, len(models))
        weights = [reader.weight(i) if method.weighted else 1.0 for i in range(len(models))]
        terms = [
            {"coefficient": weight, **self._single(model, name, layer, rows)}
            for weight, model in zip(weights, models, strict=True)
        ]
        if base is None:
            return None, terms, plan
        anchor = self._single(base, name, layer, rows)
        if method.base == "model":
            return None, [{"coefficient": 1.0, **anchor}, *terms], plan
        source = anchor.get("source")
        target = source.get("tensor") if isinstance(source, dict) else None
        if target is None:
            # What differences are taken from has to be a tensor by itself.
            laid: list[Json] = [{"coefficient": 1.0, **anchor}]
            target = self._stage(base, base.name(name, layer), laid, rows)
        return target, terms, plan

    def _computed(
        self,
        method: Custom,
        part: OpenedSlice,
        name: str,
        layer: int | None,
        reader: TensorReader,
        rows: Vocabulary | None,
        sum_of: Callable[[OpenedModel], list[Json]],
    ) -> Json:
        """A tensor that a function in Python makes, which has to be written first."""
        frame = part.frame
        info = frame.input.layout.tensors[frame.input.names[frame.name(name, layer)]]
        shape = info.shape if rows is None else (rows.rows, *info.shape[1:])
        base = None if part.base is None else sum_of(part.base)
        models = tuple(sum_of(model) for model in part.models)
        staged = self.staged.get(id(method))
        if staged is None:
            label = self.merge.called or method.name
            staged = self.staged[id(method)] = self.stages.add(label, [])
        assert method.function is not None
        staged.computed.append(
            Computation(
                method.function, reader.place.name, shape, models, base, method.values(reader)
            )
        )
        return self.operands.ref(staged, reader.place.name)

    def _single(
        self, model: OpenedModel, name: str, layer: int | None, rows: Vocabulary | None
    ) -> Json:
        """A model's tensor as one source, or as one list of segments."""
        here = model.name(name, layer)
        whole = model.input.whole(here, self.operands)
        laid: list[Json] = [] if whole is None else [{"coefficient": 1.0, "source": whole}]
        if rows is not None:
            laid = lay_rows(rows, model.input, here, laid, self.operands)
        if len(laid) == 1:
            return {key: laid[0][key] for key in ("source", "segments") if key in laid[0]}
        if not laid:
            laid = model.input.terms(here, self.operands)
        return {"source": {"tensor": self._stage(model, here, laid, rows)}}

    def _stage(
        self, model: OpenedModel, name: str, terms: list[Json], rows: Vocabulary | None
    ) -> Json:
        """A tensor that has to be written first, because it is no tensor of any file."""
        staged = self.staged.get(id(model.input))
        if staged is None:
            staged = self.staged[id(model.input)] = self.stages.add(model.input.label, [])
        if name in staged.names:  # a layer that stands in several slices
            return self.operands.ref(staged, name)
        staged.names.add(name)
        info = model.input.layout.tensors[model.input.names[name]]
        shape = info.shape if rows is None else (rows.rows, *info.shape[1:])
        # Rows that only move stay what they are; a sum is not rounded before it is used.
        dtype = info.dtype if len(terms) == 1 else "F64" if info.dtype == "F64" else "F32"
        staged.plans.append(
            {
                "name": name,
                "dtype": dtype,
                "shape": list(shape),
                "target": None,
                "terms": terms,
                "equal": [],
            }
        )
        return self.operands.ref(staged, name)

    # ---- what does not fit

    def _has(self, model: OpenedModel, name: str, layer: int | None) -> bool:
        return model.name(name, layer) in model.input.names

    def _refs(self, model: OpenedModel, name: str, layer: int | None) -> list[Json]:
        terms = model.input.terms(model.name(name, layer), self.operands)
        return [ref for term in terms if isinstance(ref := plain(term), dict)]

    def _lacking(
        self,
        info: TensorInfo,
        out: str,
        name: str,
        layer: int | None,
        part: OpenedSlice,
        missing: Sequence[OpenedModel],
    ) -> MergedTensor:
        if self.missing == "error" and not _BUFFERS.search(name):
            for model in missing:
                message = (
                    f"{model.input.label}: has no {model.name(name, layer)}, which "
                    f"{info.file} of {part.frame.input.label} has; take models of one "
                    "architecture, or pass missing=skip to keep the first model's there"
                )
                self.error("missing", message, out)
        frame = next((m for m in (part.base, *part.models) if m and m not in missing), None)
        if frame is None:
            return self._settled(info, out, info.shape, None, [], [], None, "missing")
        terms = frame.input.terms(frame.name(name, layer), self.operands)
        target = plain(terms[0])
        rest = terms[1:] if target is not None else terms
        return self._settled(
            info, out, info.shape, target, rest, [], None, "not every model has it"
        )

    def _unfit(
        self, info: TensorInfo, out: str, name: str, model: OpenedModel, other: TensorInfo
    ) -> None:
        if other.dtype not in FLOATS:
            self.error("dtype", _unlike(info, [model], [other]), out)
        elif is_vocabulary(name) and info.shape[1:] == other.shape[1:]:
            what = "embeddings" if is_embedding(name) else "head"
            self.error(
                "vocab",
                f"{model.input.label}: {other.name} has {other.shape[0]} rows, expected "
                f"{info.shape[0]}: the {what} are of different vocabularies; say "
                '"tokenizer_source: base" or "union" to have the rows laid out by token first',
                out,
            )
        else:
            self.error(
                "shape",
                f"{model.input.label}: {other.name} is {list(other.shape)}, expected "
                f"{list(info.shape)}: the shapes must be equal; take models of one architecture "
                "and size",
                out,
            )


def _unlike(info: TensorInfo, models: Sequence[OpenedModel], infos: Sequence[TensorInfo]) -> str:
    for model, other in zip(models, infos, strict=True):
        if (other.dtype, other.shape) != (info.dtype, info.shape):
            return (
                f"{model.input.label}: {other.name} is {other.dtype} {list(other.shape)}, expected "
                f"{info.dtype} {list(info.shape)}: tensors that are not of floats are copied, and "
                "have to be equal in all models"
            )
    return f"{info.name}: differs between the models"


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
    if out_dtype not in _DTYPES:
        message = f"out_dtype: expected one of {', '.join(_DTYPES)}, found {out_dtype!r}"
        raise ReasonvecError(message)
    weight: Counter[str] = Counter()
    for tensor in plan.tensors:
        if tensor.dtype in FLOATS:
            weight[tensor.dtype] += elements(tensor.shape)
    # What a model keeps in another dtype on purpose (f32 router biases among bf16) it keeps.
    main = weight.most_common(1)[0][0] if weight else None
    asked = _DTYPES[out_dtype]
    tensors = [
        replace(t, dtype=asked, plan=t.plan | {"dtype": asked}) if t.dtype == main else t
        for t in plan.tensors
    ]
    return replace(plan, tensors=tensors)
