"""From expressions to the plans of the core: operands by number, terms tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from reasonvec._reasonvec import Checkpoint as CoreCheckpoint
from reasonvec._reasonvec import VectorFolder as CoreVector
from reasonvec.algebra import Adapter, Difference, Leaf, Scaled, Vector
from reasonvec.coefficients import coefficient
from reasonvec.compat.alignment import MissingPolicy, align
from reasonvec.compat.donors import donor_problems
from reasonvec.compat.layout import FLOATS, Layout, text_config
from reasonvec.compat.placement import Placement
from reasonvec.compat.problem import Problem
from reasonvec.compat.rows import VocabPolicy
from reasonvec.folders import Folder, VectorFolder
from reasonvec.json_values import Json
from reasonvec.names import layer_of

__all__ = [
    "Operands",
    "PlacedTerm",
    "Summed",
    "depth",
    "elements",
    "leaf_folders",
    "leaf_layout",
    "place_term",
    "sum_terms",
    "vector_quantity",
]


class Operands:
    """The opened folders of a plan, each with a number."""

    def __init__(self, folders: Sequence[Folder] = ()) -> None:
        self.folders = list(folders)

    def number(self, folder: Folder) -> int:
        for i, known in enumerate(self.folders):
            if known is folder:
                return i
        self.folders.append(folder)
        return len(self.folders) - 1

    def ref(self, folder: Folder, name: str) -> Json:
        return {"operand": self.number(folder), "name": name}

    @property
    def handles(self) -> list[CoreCheckpoint | CoreVector]:
        return [folder.handle for folder in self.folders]


def elements(shape: Sequence[int]) -> int:
    """The number of elements of a shape."""
    n = 1
    for dimension in shape:
        n *= dimension
    return n


def depth(layout: Layout) -> int:
    """How many layers a model has: by its config, else by its names."""
    said = text_config(layout.config).get("num_hidden_layers")
    if isinstance(said, int) and not isinstance(said, bool):
        return said
    return 1 + max(
        (layer for name in layout.tensors if (layer := layer_of(name)) is not None), default=0
    )


def leaf_layout(leaf: Leaf) -> Layout:
    """What a leaf has to say of itself; a difference speaks through its positive donor, an adapter
    through its base."""
    if isinstance(leaf, Adapter):
        return leaf.base.layout
    return leaf.positive.layout if isinstance(leaf, Difference) else leaf.layout


def leaf_folders(leaf: Leaf) -> dict[str, Folder]:
    """The folders of a leaf by their part in it."""
    if isinstance(leaf, Adapter):
        return {"adapter": leaf.folder, "base": leaf.base}
    if isinstance(leaf, Difference):
        return {"positive": leaf.positive, "negative": leaf.negative}
    return {"vector": leaf}


def negative_names(leaf: Difference) -> dict[str, str]:
    """The name in the positive donor to the name of the same tensor in the negative one."""
    negative = leaf.negative.layout.names()
    pairs = {
        stored: negative[name]
        for name, stored in leaf.positive.layout.names().items()
        if name in negative
    }
    for copy, original in leaf.positive.layout.copies().items():
        if original in pairs:
            pairs[copy] = pairs[original]
    return pairs


def source(
    leaf: Leaf, name: str, operands: Operands, negatives: dict[str, str] | None = None
) -> Json:
    """A leaf's tensor, for the core."""
    if isinstance(leaf, VectorFolder):
        return {"stored": operands.ref(leaf, name)}
    if isinstance(leaf, Adapter):
        return _added(leaf, name, operands)
    negatives = negative_names(leaf) if negatives is None else negatives
    pair = [
        operands.ref(leaf.positive, name),
        operands.ref(leaf.negative, negatives.get(name, name)),
    ]
    return {"difference": pair}


def _added(leaf: Adapter, name: str, operands: Operands) -> Json:
    """What an adapter adds to a tensor that it changes."""
    update, shape = leaf.updates.of[name], leaf.base.layout.tensors[name].shape
    if update.factors is None:
        saved = {"operand": operands.number(leaf.folder), "name": update.saved}
        return {"difference": [saved, operands.ref(leaf.base, name)]}
    rows, columns = (elements(shape), 1) if update.factors.a is None else shape
    adapter = update.factors.as_json(operands.number(leaf.folder))
    return {"product": adapter | {"rows": rows, "columns": columns}}


def changes(leaf: Leaf, name: str) -> bool:
    """Whether a leaf has anything to add to a tensor of its own layout."""
    return not isinstance(leaf, Adapter) or name in leaf.updates.of


def _adapter_problems(leaf: Adapter, alpha: Callable[[str], float]) -> list[Problem]:
    """What stops an adapter, in the tensors that are wanted."""
    problems = [
        problem
        for problem in leaf.updates.problems
        if problem.tensor is None or alpha(problem.tensor) != 0.0
    ]
    if any(problem.severity == "error" for problem in problems):
        return problems
    return problems + [p for p in leaf.copy_problems if p.tensor is None or alpha(p.tensor) != 0.0]


class PlacedTerm(NamedTuple):
    """One summand, placed in a target: what it adds to each tensor, why not, and every problem."""

    terms: dict[str, Json]
    equal: dict[str, list[Json]]
    untouched: dict[str, str]
    problems: list[Problem]


def place_term(
    scaled: Scaled,
    target: Layout,
    operands: Operands,
    *,
    vocab: VocabPolicy = "strict",
    missing: MissingPolicy = "error",
    map_prefix: Sequence[tuple[str, str]] = (),
) -> PlacedTerm:
    """Decide where a summand goes, tensor by tensor of the target."""
    leaf, layers = scaled.leaf, depth(target)
    layout = leaf_layout(leaf)

    def alpha(name: str) -> float:
        return coefficient(scaled.factors, name, layers)

    problems: list[Problem] = []
    negatives: dict[str, str] | None = None
    if isinstance(leaf, Difference):
        # Under a prefix map the donors' names are not the target's, which alpha speaks of.
        select: Callable[[str], bool] | None = (
            None if map_prefix else lambda name: alpha(name) != 0.0
        )
        problems += donor_problems(leaf.positive.layout, leaf.negative.layout, select=select)
        problems += leaf.positive.copy_problems + leaf.negative.copy_problems
        negatives = negative_names(leaf)
    if isinstance(leaf, Adapter):
        problems += _adapter_problems(leaf, alpha)

    def wanted(name: str) -> bool:
        # What an adapter does not change needs no place; under a prefix map the names are others.
        return alpha(name) != 0.0 and (bool(map_prefix) or changes(leaf, name))

    aligned = align(
        layout,
        target,
        vocab=vocab,
        missing=missing,
        map_prefix=map_prefix,
        select=wanted,
    )
    problems += aligned.problems
    terms: dict[str, Json] = {}
    equal: dict[str, list[Json]] = {}
    if isinstance(leaf, Difference):
        of = negatives or {}
        for name, exact in aligned.exact.items():
            equal[name] = [
                operands.ref(leaf.positive, exact),
                operands.ref(leaf.negative, of.get(exact, exact)),
            ]
    for name, placement in aligned.sources.items():
        if placement is None:
            continue
        placed = _placed(leaf, placement, operands, negatives)
        if placed is None:
            continue
        term: Json = {"coefficient": alpha(name)} | placed
        if scaled.control is not None:
            kind, seed = scaled.control
            term["control"] = {"kind": kind, "seed": seed}
        terms[name] = term
    return PlacedTerm(terms, equal, aligned.untouched, problems)


def _placed(
    leaf: Leaf, placement: Placement, operands: Operands, negatives: dict[str, str] | None
) -> Json | None:
    if placement.segments is None:
        if not changes(leaf, placement.name):
            return None
        return {"source": source(leaf, placement.name, operands, negatives)}
    segments = [
        {
            "at": segment.at,
            "length": segment.length,
            "start": segment.start,
            "source": source(leaf, segment.name, operands, negatives),
        }
        for segment in placement.segments
        if changes(leaf, segment.name)
    ]
    return {"segments": segments} if segments else None


class Summed(NamedTuple):
    """A tensor of a vector that stands by itself: what is summed, or what must be equal."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    terms: list[Json]
    equal: list[Json]

    def as_json(self) -> Json:
        """The tensor in a plan of the core."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": self.shape,
            "terms": self.terms,
            "equal": self.equal,
        }


def sum_terms(
    vector: Vector, first: Layout, operands: Operands, *, checked: bool = True
) -> tuple[dict[str, Summed], list[Problem]]:
    """A vector by itself, tensor by tensor as its first summand has them, and what does not fit."""
    tensors: dict[str, Summed] = {}
    problems: list[Problem] = []
    for scaled in vector.terms:
        problems += _add_term(scaled, first, operands, tensors, checked=checked)
    return tensors, list(dict.fromkeys(problems))


def vector_quantity(
    vector: Vector, first: Layout, operands: Operands
) -> tuple[dict[str, list[Json]], list[Problem]]:
    """The float tensors of a vector by itself, for measuring."""
    tensors, problems = sum_terms(vector, first, operands)
    return {name: t.terms for name, t in tensors.items() if t.dtype in FLOATS}, problems


def _add_term(
    scaled: Scaled, first: Layout, operands: Operands, tensors: dict[str, Summed], *, checked: bool
) -> list[Problem]:
    leaf, layout, layers = scaled.leaf, leaf_layout(scaled.leaf), depth(first)

    def alpha(name: str) -> float:
        return coefficient(scaled.factors, name, layers)

    problems: list[Problem] = []
    negatives: dict[str, str] = {}
    if isinstance(leaf, Difference):
        if checked:
            positive, negative = leaf.positive.layout, leaf.negative.layout
            problems += donor_problems(positive, negative, select=lambda name: alpha(name) != 0.0)
            problems += leaf.positive.copy_problems + leaf.negative.copy_problems
            if any(problem.severity == "error" for problem in problems):
                return problems
        negatives = negative_names(leaf)
    if isinstance(leaf, Adapter):
        problems += _adapter_problems(leaf, alpha)
        if any(problem.severity == "error" for problem in problems):
            return problems
    copies = layout.copies() if checked else {}
    for name, info in layout.tensors.items():
        if alpha(name) == 0.0 or name in copies:
            continue
        known = first.tensors.get(name)
        if known is None or known.shape != info.shape:
            found = "lacks it" if known is None else f"has {list(known.shape)}"
            message = (
                f"{layout.path}: {name} is {list(info.shape)}, but {first.path} {found}; only "
                "vectors of one architecture and size have a sum: take others, or leave the tensor "
                "out"
            )
            problems.append(Problem("shape", message, name))
            continue
        tensor = tensors.setdefault(name, Summed(name, known.dtype, known.shape, [], []))
        if info.dtype in FLOATS and changes(leaf, name):
            term: Json = {
                "coefficient": alpha(name),
                "source": source(leaf, name, operands, negatives),
            }
            if scaled.control is not None:
                term["control"] = {"kind": scaled.control[0], "seed": scaled.control[1]}
            tensor.terms.append(term)
        elif isinstance(leaf, Difference):
            tensor.equal.append(operands.ref(leaf.positive, name))
            tensor.equal.append(operands.ref(leaf.negative, negatives.get(name, name)))
    return problems
