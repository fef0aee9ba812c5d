"""Writing a point: one vector or several into a target, as a checkpoint with a record of how it
came to be. One pass; the target's own files, shard names and tensor order are kept."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, TypedDict

from reasonvec import _reasonvec as core
from reasonvec.algebra import Point
from reasonvec.compat.alignment import MissingPolicy
from reasonvec.compat.layout import FLOATS
from reasonvec.compat.problem import Problem, demand
from reasonvec.compat.rows import VocabPolicy
from reasonvec.destination import MANIFEST, Destination
from reasonvec.errors import ReasonvecError
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json, read_json
from reasonvec.memory import anonymous_bytes
from reasonvec.names import kind_of
from reasonvec.rounding import Rounding
from reasonvec.run import DigestName, RunOptions, settings
from reasonvec.terms import Operands, elements, place_term

if TYPE_CHECKING:
    from reasonvec.merging.merge import Merge
    from reasonvec.merging.stages import Stages

__all__ = [
    "Accompaniment",
    "ApplyOptions",
    "ApplyPlan",
    "ApplyReport",
    "OutDtype",
    "Prediction",
    "SaveOptions",
    "TensorChange",
    "WrittenTensor",
    "apply",
    "plan",
    "settle",
]

OutDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
Action: TypeAlias = Literal["update", "merge", "copy", "convert", "check"]
_DTYPES: dict[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SaveOptions(RunOptions, total=False):
    """Keywords of saving any point."""

    missing: MissingPolicy
    """``"error"`` (default) or ``"skip"``: tensors that only some of the inputs have."""
    out_dtype: OutDtype | None
    """The dtype of the output where the target has its main one; the target's by default."""
    digest: DigestName
    """``"xxh3-128"`` (default) or ``"blake3"``; ``"none"`` makes the output unverifiable."""
    sync: bool
    """Whether files are flushed to the disk before they get their final names (default True)."""
    resume: bool
    """Continue an unfinished run in the folder."""
    overwrite: bool
    """Replace an earlier output of reasonvec in the folder. It stands until the new one is whole,
    so the disk has to hold both; after a run that failed or was killed it is still there, and
    ``resume`` goes on with the new one."""
    allow_nonfinite: bool
    """Let NaN and infinity pass."""


class ApplyOptions(SaveOptions, total=False):
    """Keywords of `Point.save` and `reasonvec.plan`."""

    vocab: VocabPolicy
    """``"strict"`` (default): embeddings and head must have the same rows for the same tokens;
    ``"skip"``: leave them as they are; ``"match-tokens"``: match rows by token string."""
    map_prefix: Sequence[tuple[str, str]]
    """Pairs (A, B): target names that begin with A read the vector's under B."""
    keep_undo: bool
    """Store the exact way back beside the output, for `undo` without the target."""
    chat_template_from: Path | None
    """A folder whose chat template the output takes instead of the target's."""


class TensorChange(NamedTuple):
    """What happens, or happened, to one tensor of the target.

    ``action`` is "update", "merge" (made of several, with nothing that it is a change of), "copy",
    "convert" (another dtype, no update) or "check" (an integer that must be equal in all inputs,
    then copied); ``why`` says why a tensor is not updated. ``method`` is the core's plan of a
    method that is no weighted sum, ``inputs`` names what a merge makes the tensor of."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    action: Action
    coefficients: tuple[float, ...]
    why: str | None = None
    digest: str | None = None
    rounding: Rounding | None = None
    method: Json | None = None
    inputs: tuple[str, ...] = ()


class WrittenTensor(TypedDict):
    """One tensor of an output, as the core reports it."""

    name: str
    file: str
    digest: str | None
    inputs: list[tuple[int, str, str | None]]
    """Of every tensor that was read: its operand, its name there, its digest."""
    rounding: dict[str, float | None] | None


class Prediction(TypedDict):
    """What the core says of a plan, in bytes."""

    read: int
    written: int
    memory: int


class Accompaniment(Protocol):
    """What an output has besides its shards, where it is not one target's own files."""

    def files(self, plan: ApplyPlan) -> dict[str, Path | bytes]:
        """By name, a file to copy or the bytes to write."""

    def index(self, plan: ApplyPlan) -> tuple[str, bytes] | None:
        """The name and the content of the shard index, if there are several shards."""

    def said(self, plan: ApplyPlan) -> Json:
        """The recipe, for the record."""

    def card(self, plan: ApplyPlan, tensors: list[TensorChange]) -> str | None:
        """The README.md, where one is wanted."""


@dataclass(frozen=True)
class ApplyPlan:
    """What a save will do, decided from headers alone: every tensor, every problem, every cost."""

    point: Point | Merge
    out: Path
    problems: list[Problem]
    tensors: list[TensorChange]
    read_bytes: int
    written_bytes: int
    peak_memory: int
    free_disk: int
    core_plan: Json = field(repr=False)
    operands: Operands = field(repr=False)
    destination: Destination = field(repr=False)
    options: ApplyOptions = field(repr=False)
    beside: Accompaniment | None = field(default=None, repr=False)
    stages: Stages | None = field(default=None, repr=False)

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop the run."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def as_json(self) -> Json:
        actions = Counter(tensor.action for tensor in self.tensors)
        return {
            "recipe": str(self.point),
            "out": str(self.out),
            "ok": not self.errors,
            "problems": [
                {"kind": p.kind, "severity": p.severity, "tensor": p.tensor, "message": p.message}
                for p in self.problems
            ],
            "actions": dict(actions),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "peak_memory": self.peak_memory,
            "free_disk": self.free_disk,
            "tensors": [
                {
                    "name": t.name,
                    "file": t.file,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "action": t.action,
                    "coefficients": list(t.coefficients),
                    "why": t.why,
                }
                | ({"method": t.method} if t.method is not None else {})
                | ({"inputs": list(t.inputs)} if t.inputs else {})
                for t in self.tensors
            ],
        }

    def run(self) -> ApplyReport:
        """Do it.

        Raises:
            MismatchError: the plan has errors; all of them are told.
            ReasonvecError: the folder may not be written.
            OSError, NonFiniteError, DamageError: see `Point.save`.
        """
        elsewhere = ("destination", "disk")
        demand(problem for problem in self.problems if problem.kind not in elsewhere)
        self.destination.check()
        for problem in self.problems:
            if problem.kind == "disk":
                strerror = problem.message.removeprefix(f"{self.out}: ")
                raise OSError(errno.ENOSPC, strerror, str(self.out))
        with self.destination.renewed(MANIFEST, resumable=True) as place:
            if self.stages is not None:
                # What is half made is taken away again; a run that is continued makes it anew.
                try:
                    self.stages.write(self.core_plan)
                except BaseException:
                    self.stages.remove()
                    raise
            text = json.dumps(self.core_plan | {"out": str(place)})
            rows: list[WrittenTensor] = json.loads(
                core.apply(text, self.operands.handles, self.options.get("progress"))
            )
            if self.stages is not None:
                self.stages.remove()
            from reasonvec.record import finish

            return finish(self, rows, place)


@dataclass(frozen=True)
class ApplyReport:
    """A finished output: what became of every tensor."""

    path: Path
    recipe: str
    tensors: list[TensorChange]
    warnings: list[Problem]

    @property
    def rounding(self) -> Rounding:
        """Realised against intended change, all tensors together."""
        return Rounding.total(t.rounding for t in self.tensors if t.rounding is not None)

    def by_kind(self) -> dict[str, Rounding]:
        """The same by kind of module."""
        kinds: dict[str, list[Rounding]] = {}
        for tensor in self.tensors:
            if tensor.rounding is not None:
                kinds.setdefault(kind_of(tensor.name), []).append(tensor.rounding)
        return {kind: Rounding.total(parts) for kind, parts in kinds.items()}

    def as_json(self) -> Json:
        return {
            "path": str(self.path),
            "recipe": self.recipe,
            "rounding": self.rounding.as_json(),
            "by_kind": {kind: part.as_json() for kind, part in self.by_kind().items()},
            "warnings": [problem.message for problem in self.warnings],
            "tensors": {
                t.name: {"action": t.action, "digest": t.digest}
                | ({"rounding": t.rounding.as_json()} if t.rounding is not None else {})
                for t in self.tensors
            },
        }


def apply(point: Point, out: Path, options: ApplyOptions) -> ApplyReport:
    """Write a point into a folder; see `Point.save`."""
    return plan(point, out, options).run()


def plan(point: Point, out: Path, options: ApplyOptions) -> ApplyPlan:
    """Decide what writing a point into a folder will do, from headers alone.

    Raises:
        FormatError, OSError: a config or tokenizer cannot be read.
    """
    target = point.base
    operands = Operands()
    operands.number(target)
    placed = [
        place_term(
            scaled,
            target.layout,
            operands,
            vocab=options.get("vocab", "strict"),
            missing=options.get("missing", "error"),
            map_prefix=options.get("map_prefix", ()),
        )
        for scaled in point.vector.terms
    ]
    problems = list(dict.fromkeys(p for term in placed for p in term.problems))
    problems += target.copy_problems
    problems += _template_problems(options.get("chat_template_from"))
    out_dtypes = _out_dtypes(target, options.get("out_dtype"))

    shards: dict[str, list[Json]] = {shard: [] for shard in target.handle.shards()}
    changes: list[TensorChange] = []
    for name, info in target.layout.tensors.items():
        terms = [term.terms[name] for term in placed if name in term.terms]
        equal = [ref for term in placed for ref in term.equal.get(name, [])]
        why = next((t.untouched[name] for t in placed if name in t.untouched), None)
        changed = out_dtypes[name] != info.dtype
        action: Action = (
            "update" if terms else "convert" if changed else "check" if equal else "copy"
        )
        coefficients = tuple(float(str(term["coefficient"])) for term in terms)
        changes.append(
            TensorChange(
                name,
                info.file,
                out_dtypes[name],
                info.shape,
                action,
                coefficients,
                None if terms else why,
            )
        )
        shards[info.file].append(
            {
                "name": name,
                "dtype": out_dtypes[name],
                "shape": list(info.shape),
                "target": operands.ref(target, name),
                "terms": terms,
                "equal": equal,
            }
        )
    layout = [_shard(target, file, tensors) for file, tensors in shards.items()]
    return settle(point, out, options, operands, problems, changes, layout)


def settle(
    point: Point | Merge,
    out: Path,
    options: ApplyOptions,
    operands: Operands,
    problems: list[Problem],
    changes: list[TensorChange],
    shards: list[Json],
    beside: Accompaniment | None = None,
    stages: Stages | None = None,
) -> ApplyPlan:
    """A plan, when it is decided what becomes of each tensor: what it costs, and whether its folder
    may be written."""
    core_plan: Json = {
        "out": str(out),
        "digest": options.get("digest", "xxh3-128"),
        "allow_nonfinite": options.get("allow_nonfinite", False),
        "shards": shards,
    } | settings(options, sync=options.get("sync", True), resume=options.get("resume", False))
    prediction: Prediction = {"read": 0, "written": 0, "memory": 0}
    if not any(problem.severity == "error" for problem in problems):
        if stages is None:
            prediction = json.loads(core.predict(json.dumps(core_plan), operands.handles))
        else:
            prediction = stages.predict(core_plan)
    inputs = [f for f in operands.folders if stages is None or f not in stages.staged]
    destination = Destination(
        out,
        inputs,
        overwrite=options.get("overwrite", False),
        resume=options.get("resume", False),
    )
    if destination.problem is not None:
        problems.append(Problem("destination", destination.problem))
    written, free = prediction["written"], destination.room()
    if written > free and not destination.unfinished:
        advice = (
            "remove the output that is there, which stands until the new one is whole"
            if destination.replaces
            else "free some"
        )
        message = (
            f"{out}: needs {written} bytes, and its disk has {free} free; {advice}, or name a "
            "folder on another disk"
        )
        problems.append(Problem("disk", message))
    return ApplyPlan(
        point,
        out,
        problems,
        changes,
        prediction["read"],
        written,
        anonymous_bytes() + prediction["memory"] + _HEADROOM,
        free,
        core_plan,
        operands,
        destination,
        options,
        beside,
        stages,
    )


# Thread stacks, the plan in the core's own form, block hashes of tensors under way, the report.
_HEADROOM = 24 << 20


def _shard(target: CheckpointFolder, file: str, tensors: list[Json]) -> Json:
    kept = all(
        target.layout.tensors[str(tensor["name"])].dtype == tensor["dtype"] for tensor in tensors
    )
    header: Json = {"header_of": [0, file]} if kept else {"metadata": target.handle.metadata(file)}
    return {"file": file, "tensors": tensors} | header


def _out_dtypes(target: CheckpointFolder, asked: OutDtype | None) -> dict[str, str]:
    tensors = target.layout.tensors
    if asked is None:
        return {name: info.dtype for name, info in tensors.items()}
    if asked not in _DTYPES:
        message = f"out_dtype: expected one of {', '.join(_DTYPES)}, found {asked!r}"
        raise ReasonvecError(message)
    weight: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype in FLOATS:
            weight[info.dtype] += elements(info.shape)
    # What the model keeps in another dtype on purpose (f32 router biases among bf16) it keeps.
    main = weight.most_common(1)[0][0] if weight else None
    return {
        name: _DTYPES[asked] if info.dtype == main else info.dtype for name, info in tensors.items()
    }


def _template_problems(folder: Path | None) -> list[Problem]:
    """Before a byte is written: is there a chat template to take?"""
    if folder is None or (folder / "chat_template.jinja").is_file():
        return []
    config = folder / "tokenizer_config.json"
    if config.is_file() and read_json(config).get("chat_template") is not None:
        return []
    message = (
        f"{folder}: has no chat template (neither chat_template.jinja nor in "
        "tokenizer_config.json); name another folder after --chat-template-from"
    )
    return [Problem("chat_template", message)]
