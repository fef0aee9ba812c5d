"""Which tensor of a vector goes where in a target, and everything that stands in the way.

Every float tensor of the target gets a placement or a reason why it gets none, and every tensor of
the vector is either used or a problem: nothing is dropped in silence, resized, or matched by shape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from reasonvec.compat.configs import compare_functions
from reasonvec.compat.layout import FLOATS, Layout, TensorInfo
from reasonvec.compat.mixtures import Mixtures
from reasonvec.compat.placement import Found, Pair, Placement
from reasonvec.compat.problem import Problem, Severity
from reasonvec.compat.rows import Rows, VocabPolicy
from reasonvec.names import is_vocabulary

__all__ = ["Alignment", "MissingPolicy", "align", "folder_problems"]

MissingPolicy: TypeAlias = Literal["error", "skip"]


class Alignment(NamedTuple):
    """For every target tensor a placement or None, for every None a reason, and every problem;
    and by target tensors that are not of floats, the vector tensors that must equal them."""

    sources: dict[str, Placement | None]
    untouched: dict[str, str]
    problems: list[Problem]
    exact: dict[str, str]

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "error"]


def align(
    vector: Layout,
    target: Layout,
    *,
    vocab: VocabPolicy = "strict",
    missing: MissingPolicy = "error",
    map_prefix: Sequence[tuple[str, str]] = (),
    select: Callable[[str], bool] | None = None,
) -> Alignment:
    """Place a vector's tensors in a target.

    ``vector`` is a stored vector (with the config and the tokenizer.json of its donors, where it
    has them) or the positive donor of a difference that is never written.

    ``vocab``: what happens to embeddings and head. "strict" wants the same rows and the same token
    ids; "skip" leaves both untouched, always; "match-tokens" matches rows by token string, or,
    where the two tokenizers are the same and only the padding differs, takes the common rows.

    ``missing``: whether a tensor of one side that the other lacks is an error or a warning.

    ``map_prefix``: pairs (A, B): target names that start with A read the vector's under B; the
    first pair that fits counts. Target tensors outside every A that the vector lacks stay as they
    are.

    ``select``: which target tensors are wanted, by name; the others stay as they are and are no
    problem.
    """
    pair = Pair(vector, target)
    return _Aligner(pair, vocab, missing, tuple(map_prefix), select or (lambda _: True)).run()


class _Aligner:
    def __init__(
        self,
        pair: Pair,
        vocab: VocabPolicy,
        missing: MissingPolicy,
        map_prefix: tuple[tuple[str, str], ...],
        select: Callable[[str], bool],
    ) -> None:
        self.pair = pair
        self.lenient: Severity = "error" if missing == "error" else "warning"
        self.map_prefix = map_prefix
        self.select = select
        self.rows = Rows(pair, vocab)
        self.mixtures = Mixtures(pair, self.lenient)
        self.outside: list[str] = []

    def run(self) -> Alignment:
        vector, target = self.pair.vector, self.pair.target
        problems = [*folder_problems(vector), *folder_problems(target)]
        problems += compare_functions(vector, target, tower=bool(self.map_prefix))
        problems += self._prefix_problems()
        blocked = self._ties()

        sources: dict[str, Placement | None] = {}
        untouched: dict[str, str] = {}
        readers: dict[str, str] = {}
        used: set[str] = set()
        refused: set[str] = set()
        exact: dict[str, str] = {}
        read: Counter[str] = Counter()  # elements of a vector tensor that segments take
        for name, stored in self.pair.names.items():
            wanted = self.select(stored)
            found = blocked.get(name) or self._place(name, wanted)
            used |= found.used
            if found.placement is None:
                refused |= found.used
            for segment in found.placement.segments or () if found.placement else ():
                read[segment.name] += segment.length
            if not wanted:
                sources[stored], untouched[stored] = None, "not selected"
                continue
            problems += found.problems
            if found.exact is not None:
                exact[stored] = found.exact
            sources[stored] = found.placement
            if found.placement is None:
                untouched[stored] = found.reason
            elif found.placement.segments is None:
                first = readers.setdefault(found.placement.name, stored)
                if first != stored:
                    problems.append(self._read_twice(found.placement.name, first, stored))
        for copy, original in target.copies().items():
            sources[copy] = sources[original]
            if original in untouched:
                untouched[copy] = untouched[original]
        problems += self.rows.problems()
        problems += self._unused(used)
        problems += self._unread(read, refused)
        order = {name: sources[name] for name in target.tensors}
        return Alignment(order, untouched, list(dict.fromkeys(problems)), exact)

    def _place(self, name: str, wanted: bool) -> Found:
        info = self.pair.target.tensors[self.pair.names[name]]
        source = self._source(name)
        delta = self.pair.delta(source)
        if info.dtype not in FLOATS:
            return self._place_exact(info, delta, source)
        if is_vocabulary(name) and self.rows.vocab == "skip":
            return Found(
                reason="--vocab skip leaves embeddings and head as they are", used={source}
            )
        if delta is None:
            return self.mixtures.place(source, info) or self._missing(name, source, info, wanted)
        if delta.dtype not in FLOATS:
            return self.pair.refuse_dtype(info, delta, source)
        if is_vocabulary(name):
            # To compare two tokenizers takes seconds, and is in vain for what is not wanted.
            return self.rows.place(source, info, delta) if wanted else Found(used={source})
        if delta.shape != info.shape:
            return self.pair.refuse_shape(info, delta, source)
        return Found(Placement(delta.name), used={source})

    def _place_exact(self, info: TensorInfo, delta: TensorInfo | None, source: str) -> Found:
        if delta is not None and (delta.dtype, delta.shape) != (info.dtype, info.shape):
            message = (
                f"{self.pair.at(info)} is {info.dtype} {list(info.shape)}, but "
                f"{self.pair.of(delta)} is {delta.dtype} {list(delta.shape)}: a tensor that is not "
                "of floats has to be equal in all inputs; exclude it, or take checkpoints of one "
                "format"
            )
            return self.pair.refuse("dtype", message, info, source)
        reason = f"{info.dtype} is passed through, not added to"
        return Found(reason=reason, used={source}, exact=None if delta is None else delta.name)

    def _missing(self, name: str, source: str, info: TensorInfo, wanted: bool) -> Found:
        if self.map_prefix and not any(name.startswith(ours) for ours, _ in self.map_prefix):
            if wanted:
                self.outside.append(name)
            return Found(reason="outside every --map-prefix, and not in the vector")
        looked = "" if source == name else f" (looked for as {source})"
        message = (
            f"{self.pair.at(info)} has no delta: expected it in {self.pair.vector.path}{looked}, "
            "found none; take donors of the target's family, or exclude it, or pass missing=skip "
            "to leave it as it is"
        )
        problem = Problem("missing", message, info.name, self.lenient)
        return Found(reason="the vector has no such tensor", problems=[problem])

    def _source(self, name: str) -> str:
        for ours, theirs in self.map_prefix:
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        return name

    def _destination(self, name: str) -> str:
        for ours, theirs in self.map_prefix:
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name

    def _ties(self) -> dict[str, Found]:
        """Refuse a tied vector for an untied target, and the other way round."""
        vector, target = self.pair.vector, self.pair.target
        embedding, head = target.vocabulary()
        own_embedding, own_head = vector.vocabulary()
        if embedding is None or self._source(embedding) != own_embedding:
            return {}
        ours, theirs = target.ties, vector.ties
        info = target.tensors[self.pair.names[embedding]]
        if None in (ours, theirs) or ours == theirs or self.rows.vocab == "skip":
            return {}
        if not self.select(info.name):
            return {}
        if ours:
            why = (
                f"{vector.path} has one delta for {own_embedding} and another for "
                f"{own_head or 'its head'}, and {target.path} is tied, one matrix for both: "
                "whichever is added also changes what it was not made for"
            )
        else:
            why = (
                f"{vector.path} comes from tied donors and has one delta for embeddings and head, "
                f"and {target.path} is untied, with {head or 'a head'} apart from {embedding}: "
                "whether the delta belongs to one or to both is not known"
            )
        message = (
            f"{why}; take a target that is {'untied' if ours else 'tied'} as the donors are, or "
            "--vocab skip to leave embeddings and head as they are, or exclude both"
        )
        refused = self.pair.refuse("tied", message, info)
        refused.used = {name for name in (own_embedding, own_head) if name is not None}
        blocked = {embedding: refused}
        if head is not None:
            blocked[head] = Found(reason=refused.reason, used={self._source(head)})
        return blocked

    def _prefix_problems(self) -> list[Problem]:
        path, names = self.pair.target.path, self.pair.names
        return [
            Problem(
                "prefix",
                f"--map-prefix {ours}={theirs}: no tensor of {path} starts with {ours!r}; its "
                f"names start like {next(iter(names), 'nothing, it has none')!r}",
            )
            for ours, theirs in self.map_prefix
            if not any(name.startswith(ours) for name in names)
        ]

    def _read_twice(self, name: str, first: str, second: str) -> Problem:
        return Problem(
            "prefix",
            f"{self.pair.target.path}: {first} and {second} would both get the delta of {name}: "
            "give every part of the target a --map-prefix of its own, or exclude one of them",
            second,
        )

    def _unread(self, read: Counter[str], refused: set[str]) -> list[Problem]:
        """Packed experts that the target has no matrix for. Rows say so themselves."""
        problems: list[Problem] = []
        for name, stored in self.pair.deltas.items():
            info = self.pair.vector.tensors[stored]
            size = math.prod(info.shape)
            if not 0 < read[stored] < size or name in refused or is_vocabulary(name):
                continue
            message = (
                f"{self.pair.of(info)} would be dropped in part: {self.pair.target.path} has a "
                f"place for {read[stored]} of its {size} elements; take a target with the same "
                "experts, or pass missing=skip to do without the others"
            )
            problems.append(Problem("unused", message, stored, self.lenient))
        return problems

    def _unused(self, used: set[str]) -> list[Problem]:
        path = self.pair.target.path
        problems = [
            Problem(
                "unused",
                f"{self.pair.of(self.pair.vector.tensors[stored])} would be dropped: {path} has no "
                "tensor for it; take a target of the donors' family, or exclude it, or pass "
                "missing=skip to do without it",
                stored,
                self.lenient,
            )
            for name, stored in self.pair.deltas.items()
            if name not in used
            and self.select(self._destination(name))
            and not (self.rows.vocab == "skip" and is_vocabulary(name))
        ]
        if self.outside:
            problems.append(
                Problem(
                    "prefix",
                    f"{len(self.outside)} tensors of {path} are outside every --map-prefix and not "
                    f"in the vector, the first is {self.outside[0]}: they stay as they are",
                    severity="warning",
                )
            )
        return problems


def folder_problems(layout: Layout) -> list[Problem]:
    """What is wrong with one folder by itself: it holds codes, or contradicts itself."""
    problems: list[Problem] = []
    reason = layout.quantised
    if reason is not None:
        problems.append(
            Problem(
                "quantised",
                f"{layout.path} is quantised: {reason}; codes are not numbers that can be "
                "subtracted, so take the bf16 checkpoint, or dequantise it first",
            )
        )
    embedding, head = layout.vocabulary()
    if layout.tied and embedding is not None and head is not None:
        ours = layout.tensors[layout.names()[embedding]]
        theirs = layout.tensors[layout.names()[head]]
        problems.append(
            Problem(
                "tied",
                f"{layout.path / 'config.json'} says that embeddings and head are tied, but "
                f"{ours.name} is {ours.dtype} {list(ours.shape)} and {theirs.name} is "
                f"{theirs.dtype} {list(theirs.shape)}; correct tie_word_embeddings, or drop the "
                "head from the files",
                theirs.name,
            )
        )
    return problems
