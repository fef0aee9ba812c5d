"""The compatibility report: do these checkpoints fit together, and how close are they?

Headers, configs and tokenizers first, every problem at once. Then distances: a vector is expected
to carry over only between points that are near each other in weight space (arXiv 2509.01363), and
models that share their initialisation still have their neurons in the same places.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, Unpack

import numpy as np
from numpy.typing import NDArray

from reasonvec import _reasonvec as core
from reasonvec.algebra import Checkpoint, Difference, Scaled
from reasonvec.compat.alignment import MissingPolicy
from reasonvec.compat.donors import donor_problems
from reasonvec.compat.layout import FLOATS
from reasonvec.compat.problem import Problem
from reasonvec.compat.rows import VocabPolicy
from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json
from reasonvec.measure import Measured, Quantities, measure
from reasonvec.names import kind_of, layer_of
from reasonvec.run import RunOptions
from reasonvec.terms import Operands, elements, negative_names, place_term

__all__ = ["CheckOptions", "CheckReport", "Distances", "Verdict", "check"]

Verdict: TypeAlias = Literal["compatible", "doubtful", "incompatible"]

# Fine-tunes of one model lie within a few per cent of each other; unrelated models of equal norm
# lie sqrt(2) apart.
_FAR = 0.5
_UNRELATED = 1.0
_SAME_NEURONS = 0.95


class CheckOptions(RunOptions, total=False):
    """Keywords of `check`; see `ApplyOptions` for the policies."""

    vocab: VocabPolicy
    missing: MissingPolicy
    map_prefix: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Distances:
    """How far apart the points are, over some tensors: v = P - N is the vector, T the target."""

    vector_share: float | None
    """``|P - N| / |N|``."""
    target_share: float | None
    """``|T - N| / |N|``; None without a target."""
    cosine: float | None
    """Between P - N and T - N; None where one is zero, or without a target."""
    vector_over_target: float | None
    """``|P - N| / |T - N|``."""
    moved_share: float
    """Elements in which P and N differ."""

    @classmethod
    def of(cls, row: Measured, count: int) -> Distances:
        def ratio(a: float, b: float) -> float | None:
            return a / b if b > 0 else None

        with_target = len(row.moved) > 2
        negative, vector = row.norm(0), row.norm(1)
        apart = row.norm(2) if with_target else 0.0
        return cls(
            ratio(vector, negative),
            ratio(apart, negative) if with_target else None,
            row.cosine(1, 2) if with_target else None,
            ratio(vector, apart) if with_target else None,
            row.moved[1] / count if count else 0.0,
        )

    def as_json(self) -> Json:
        return {
            "vector_over_negative": self.vector_share,
            "target_over_negative": self.target_share,
            "cosine": self.cosine,
            "vector_over_target": self.vector_over_target,
            "moved_share": self.moved_share,
        }


@dataclass(frozen=True)
class CheckReport:
    """Everything that `check` found."""

    verdict: Verdict
    reasons: list[str]
    problems: list[Problem]
    total: Distances | None
    by_kind: dict[str, Distances]
    same_neurons: float | None
    """Share of sampled MLP neurons of the target whose best match among the negative donor's is the
    neuron in the same place: about 1 for models of one initialisation."""

    @property
    def ok(self) -> bool:
        return self.verdict != "incompatible"

    def as_json(self) -> Json:
        return {
            "verdict": self.verdict,
            "reasons": self.reasons,
            "problems": [
                {"kind": p.kind, "severity": p.severity, "tensor": p.tensor, "message": p.message}
                for p in self.problems
            ],
            "total": self.total.as_json() if self.total is not None else None,
            "by_kind": {kind: d.as_json() for kind, d in self.by_kind.items()},
            "same_neurons": self.same_neurons,
        }


def check(
    positive: Checkpoint,
    negative: Checkpoint,
    target: Checkpoint | None = None,
    **options: Unpack[CheckOptions],
) -> CheckReport:
    """Say whether ``positive - negative`` is a vector, and whether it can be added to ``target``.

    Reads headers, configs and tokenizers, then every tensor that all sides have, once.

    Raises:
        FormatError, OSError: a file cannot be read.
        NonFiniteError: NaN or infinity in a tensor.
    """
    p, n = positive.base, negative.base
    t = None if target is None else target.base
    operands = Operands()
    problems = list(dict.fromkeys(_problems(p, n, t, operands, options)))
    quantities = _quantities(p, n, t, operands)
    rows = measure(quantities, operands, options) if quantities else []
    counts = {q.name: q.elements for q in quantities}

    def distances(part: list[Measured]) -> Distances:
        return Distances.of(Measured.total("", part), sum(counts[row.name] for row in part))

    kinds: dict[str, list[Measured]] = {}
    for row in rows:
        kinds.setdefault(kind_of(row.name), []).append(row)
    total = distances(rows) if rows else None
    same = _same_neurons(n, t or p) if rows else None
    errors = [problem.message for problem in problems if problem.severity == "error"]
    # Norm weights and biases are of one size in every model, and may outweigh all the matrices.
    matrices = [row for row in rows if len(p.layout.tensors[row.name].shape) > 1] or rows
    verdict, reasons = _judge(errors, problems, distances(matrices) if matrices else None, same)
    by_kind = {kind: distances(part) for kind, part in kinds.items()}
    return CheckReport(verdict, reasons, problems, total, by_kind, same)


def _problems(
    p: CheckpointFolder,
    n: CheckpointFolder,
    t: CheckpointFolder | None,
    operands: Operands,
    options: CheckOptions,
) -> list[Problem]:
    notes = [
        Problem("index", note, None, "warning")
        for folder in (p, n, t)
        if folder is not None
        for note in folder.handle.notes
    ]
    if t is None:
        return [*notes, *donor_problems(p.layout, n.layout)]
    placed = place_term(
        Scaled(Difference(p, n)),
        t.layout,
        operands,
        vocab=options.get("vocab", "strict"),
        missing=options.get("missing", "error"),
        map_prefix=options.get("map_prefix", ()),
    )
    return [*notes, *placed.problems]


def _quantities(
    p: CheckpointFolder, n: CheckpointFolder, t: CheckpointFolder | None, operands: Operands
) -> list[Quantities]:
    """N, P - N and T - N, for the float tensors that all have in one shape."""
    found = []
    targets = {} if t is None else t.layout.names()
    canonical = {stored: name for name, stored in p.layout.names().items()}
    for name, other in negative_names(Difference(p, n)).items():
        info, against = p.layout.tensors[name], n.layout.tensors[other]
        if info.dtype not in FLOATS or against.dtype not in FLOATS or info.shape != against.shape:
            continue
        negative = operands.ref(n, other)
        terms = [
            [{"coefficient": 1.0, "source": {"tensor": negative}}],
            [{"coefficient": 1.0, "source": {"difference": [operands.ref(p, name), negative]}}],
        ]
        if t is not None:
            at = targets.get(canonical.get(name, name))
            if at is None or t.layout.tensors[at].shape != info.shape:
                continue
            if t.layout.tensors[at].dtype not in FLOATS:
                continue
            apart = {"difference": [operands.ref(t, at), negative]}
            terms.append([{"coefficient": 1.0, "source": apart}])
        found.append(Quantities(name, elements(info.shape), terms))
    return found


def _judge(
    errors: list[str], problems: list[Problem], total: Distances | None, same: float | None
) -> tuple[Verdict, list[str]]:
    if total is None:
        errors = [*errors, "no float tensor is in all checkpoints with one shape"]
    far: list[str] = []
    shares = (
        ("the donors", total.vector_share if total else None),
        ("the target and the negative donor", total.target_share if total else None),
    )
    for who, share in shares:
        if share is None or share < _FAR:
            continue
        text = (
            f"{who} are {share:.2f} of a norm apart in their matrices; fine-tunes of one model "
            "are a few hundredths apart"
        )
        if share >= _UNRELATED:
            errors.append(f"{text}, and unrelated models 1.41")
        else:
            far.append(text)
    if same is not None and same < _SAME_NEURONS:
        far.append(
            f"only {same:.0%} of the sampled MLP neurons are still in the same place: the "
            "models do not seem to share their initialisation"
        )
    if errors:
        return "incompatible", errors
    doubts = [
        p.message for p in problems if p.severity == "warning" and p.kind in {"config", "vocab"}
    ]
    return ("doubtful", far + doubts) if far else ("compatible", doubts)


def _same_neurons(n: CheckpointFolder, other: CheckpointFolder) -> float | None:
    """The share of sampled rows of gate (or up) projections that are nearest to themselves."""
    pairs = [
        (name, info.shape)
        for name, info in n.layout.tensors.items()
        if kind_of(name) in {"gate_proj", "up_proj"}
        and name.endswith((".gate_proj.weight", ".up_proj.weight"))
        and len(info.shape) == 2
        and info.dtype in FLOATS
        and name in other.layout.tensors
        and other.layout.tensors[name].shape == info.shape
    ]
    gates = [pair for pair in pairs if kind_of(pair[0]) == "gate_proj"] or pairs
    if not gates:
        return None
    gates.sort(key=lambda pair: layer_of(pair[0]) or 0)
    sampled = [gates[i * (len(gates) - 1) // 3] for i in range(4)] if len(gates) > 4 else gates
    hits = total = 0
    for name, (rows, columns) in sampled:
        step = max(1, rows // 128)
        chosen = np.arange(0, rows, step)[:128]
        mine = np.stack([_rows(other, name, columns, int(row), int(row) + 1)[0] for row in chosen])
        best = np.full(chosen.size, -np.inf, np.float32)
        at = np.zeros(chosen.size, np.int64)
        for start in range(0, rows, 1024):
            theirs = _rows(n, name, columns, start, min(start + 1024, rows))
            length = np.maximum(np.linalg.norm(theirs, axis=1), np.float32(1e-30))
            likeness = mine @ (theirs / length[:, None]).T
            top = likeness.argmax(axis=1)
            value = likeness[np.arange(chosen.size), top]
            better = value > best
            best[better], at[better] = value[better], top[better] + start
        hits += int((at == chosen).sum())
        total += chosen.size
    return hits / total


def _rows(
    folder: CheckpointFolder, name: str, columns: int, start: int, stop: int
) -> NDArray[np.float32]:
    term = [{"coefficient": 1.0, "source": {"tensor": {"operand": 0, "name": name}}}]
    n = elements(folder.layout.tensors[name].shape)
    values = core.values(
        json.dumps(term), name, n, start * columns, stop * columns, [folder.handle]
    )
    return np.asarray(memoryview(values)).reshape(stop - start, columns)
