"""Points and vectors: the typed algebra of weight space.

A checkpoint is a point, a capability is a vector between two points, and a merge is a point plus a
sum of scaled vectors. Expressions are lazy: nothing is read until one is saved, measured or asked
for values, and then everything happens in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn, TypeAlias, Unpack, overload

from reasonvec.adapter import AdapterFolder, is_adapter
from reasonvec.coefficients import AlphaFor, Constant, Factor, Function, Ramp, Where, pattern
from reasonvec.compat.problem import Problem
from reasonvec.errors import FormatError, MismatchError, ReasonvecError
from reasonvec.folders import CheckpointFolder, VectorFolder, is_vector
from reasonvec.svd import Decomposable

if TYPE_CHECKING:
    from reasonvec._reasonvec import Tensor
    from reasonvec.adapter_updates import Updates
    from reasonvec.apply import ApplyOptions, ApplyPlan, ApplyReport
    from reasonvec.compare import Comparison
    from reasonvec.extract import ExtractOptions, ExtractReport
    from reasonvec.inspection import Inspection
    from reasonvec.lora import LoraOptions, LoraReport
    from reasonvec.lowrank import CompressOptions, CompressReport, FactorsPlan
    from reasonvec.matrices import Matrices
    from reasonvec.run import RunOptions

__all__ = [
    "Checkpoint",
    "Control",
    "Point",
    "Vector",
    "adapter",
    "lerp",
    "load",
    "mean",
    "open",
]

Control: TypeAlias = Literal["random", "shuffle"]


class Difference(NamedTuple):
    """Positive donor minus negative donor, read from both."""

    positive: CheckpointFolder
    negative: CheckpointFolder

    @property
    def text(self) -> str:
        return f"({self.positive.path.name} - {self.negative.path.name})"


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to the base that it was trained on."""

    folder: AdapterFolder
    base: CheckpointFolder

    @cached_property
    def updates(self) -> Updates:
        from reasonvec.adapter_updates import fit

        return fit(self.folder, self.base.layout)

    @cached_property
    def copy_problems(self) -> list[Problem]:
        """PEFT stores embeddings beside their factors. The copy must be the base's own, as it was
        when the factors were trained; that takes reading both."""
        from reasonvec.adapter_updates import copy_problems

        return copy_problems(self.folder, self.base.layout, self.base.handle, self.updates)

    @property
    def text(self) -> str:
        return self.folder.path.name


Leaf: TypeAlias = Difference | VectorFolder | Adapter


class Scaled(NamedTuple):
    """A leaf, its coefficient, and perhaps a control in its place."""

    leaf: Leaf
    factors: tuple[Factor, ...] = ()
    control: tuple[Control, int] | None = None

    def times(self, factor: Factor) -> Scaled:
        return self._replace(factors=(*self.factors, factor))

    @property
    def text(self) -> str:
        leaf = self.leaf.path.name if isinstance(self.leaf, VectorFolder) else self.leaf.text
        if self.control is not None:
            kind, seed = self.control
            leaf = f"{kind}({leaf}, seed={seed})"
        for factor in self.factors:
            text = factor.text
            leaf = f"{text} {leaf}" if text.endswith("*") else f"{leaf}.{text}"
        return leaf


class Vector(Decomposable):
    """A sum of scaled differences and stored vectors. Immutable; nothing is read by making one.

    Examples:
        >>> import reasonvec as rv
        >>> reason = rv.open(family.rl) - rv.open(family.sft)
        >>> half = 0.5 * reason
        >>> print(half - reason)
        0.5 * (rl - sft) + -1 * (rl - sft)
    """

    __slots__ = ("terms",)
    # Scalars of numpy leave the operators to this class instead of making arrays of it.
    __array_ufunc__ = None

    terms: tuple[Scaled, ...]

    def __init__(self, terms: Iterable[Scaled]) -> None:
        self.terms = tuple(terms)

    def _each(self, factor: Factor) -> Vector:
        return Vector(term.times(factor) for term in self.terms)

    def __add__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        return Vector((*self.terms, *other.terms))

    def __sub__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        return self + -other

    def __neg__(self) -> Vector:
        return self._each(Constant(-1.0))

    def __mul__(self, scale: float) -> Vector:
        if not isinstance(scale, Real):
            return NotImplemented
        return self._each(Constant(float(scale)))

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> Vector:
        if not isinstance(scale, Real):
            return NotImplemented
        return self * (1.0 / scale)

    def alpha_for(self, rules: Mapping[str, float]) -> Vector:
        """Another coefficient for tensors whose name a regular expression finds.

        Args:
            rules: regular expression to coefficient, which replaces whatever scaling the vector has
                so far; the last that fits wins.
        """
        return self._each(AlphaFor.of(rules))

    def ramp(self, first: float, last: float) -> Vector:
        """Times a straight line over depth, from ``first`` in layer 0 to ``last`` in the last layer
        (LiNeS, arXiv 2410.17146); embeddings take ``first``, the final norm and the head
        ``last``."""
        return self._each(Ramp(float(first), float(last)))

    def where(self, *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Vector:
        """Only the tensors whose names some regular expression of ``include`` finds (all, if there
        is none) and none of ``exclude`` does. A target keeps its own tensors everywhere else."""
        return self._each(Where(tuple(map(pattern, include)), tuple(map(pattern, exclude))))

    def map(self, function: Callable[[str], float]) -> Vector:
        """Times a function of the tensor's name."""
        return self._each(Function(function))

    def control(self, kind: Control | Literal["reverse"], *, seed: int = 0) -> Vector:
        """A control experiment in place of every vector of the sum.

        Args:
            kind: ``"random"``: normal noise with the vector's norm, tensor by tensor;
                ``"shuffle"``: the vector's own elements in random places; ``"reverse"``: minus the
                vector.
            seed: any integer from 0 to 2**64 - 1. The same seed gives the same bytes everywhere.

        Raises:
            ReasonvecError: the seed is out of range.
        """
        if kind == "reverse":
            return -self
        if not 0 <= seed < 1 << 64:
            message = f"seed: expected an integer from 0 to 2**64 - 1, found {seed}"
            raise ReasonvecError(message)
        return Vector(term._replace(control=(kind, seed)) for term in self.terms)

    def save(self, path: str | PathLike[str], **options: Unpack[ExtractOptions]) -> ExtractReport:
        """Write the vector as a folder, in one pass; see `reasonvec.extract`.

        Raises:
            MismatchError: the donors do not fit together; every problem is told, and nothing is
                written.
            NonFiniteError: NaN or infinity in a donor.
            OSError: a file cannot be read or written.

        Examples:
            >>> import reasonvec as rv
            >>> report = (rv.open(family.rl) - rv.open(family.sft)).save("reason")
            >>> report.exact
            True
        """
        from reasonvec.extract import extract

        return extract(self, Path(path), options)

    def compress(
        self, path: str | PathLike[str], **options: Unpack[CompressOptions]
    ) -> CompressReport:
        """Write the vector as a folder with every matrix as the product of two thin ones; what has
        no rank to cut (biases, norms, embeddings, head, single rows) is kept exactly.

        Raises:
            MismatchError: the parts do not fit together, or ``rank`` is no rank.
            NonFiniteError: NaN or infinity in a donor.
            OSError: a file cannot be read or written.

        Examples:
            >>> import reasonvec as rv
            >>> reason = rv.open(family.rl) - rv.open(family.sft)
            >>> report = reason.compress("small", rank=4, rescale=True)
            >>> {row.rank for row in report.compressed}
            {4}
        """
        from reasonvec.lowrank import compress

        return compress(self, Path(path), options)

    def to_lora(self, path: str | PathLike[str], **options: Unpack[LoraOptions]) -> LoraReport:
        """Write the vector as a LoRA adapter that PEFT loads, and say what that leaves out.

        Raises:
            MismatchError: the parts do not fit together, or no matrix has a rank above zero.
            NonFiniteError: NaN or infinity in a donor.
            OSError: a file cannot be read or written.

        Examples:
            >>> import reasonvec as rv
            >>> reason = rv.open(family.rl) - rv.open(family.sft)
            >>> report = reason.to_lora("lora", rank=4)
            >>> sorted({part.why for part in report.left_out})
            ['its rows are tokens']
        """
        from reasonvec.lora import to_lora

        return to_lora(self, Path(path), options)

    def plan_compress(self, **options: Unpack[CompressOptions]) -> FactorsPlan:
        """What `compress` will take, from headers alone: the memory of every matrix, of order
        (rows + columns) * rank.

        Raises:
            MismatchError: the parts do not fit together, or ``rank`` is no rank.

        Examples:
            >>> import reasonvec as rv
            >>> reason = rv.open(family.rl) - rv.open(family.sft)
            >>> plan = reason.plan_compress(rank=4)
            >>> least, most = plan.peak_memory
            >>> least == most
            True
        """
        from reasonvec.lowrank import plan_compress

        return plan_compress(self, options)

    def plan_lora(self, **options: Unpack[LoraOptions]) -> FactorsPlan:
        """What `to_lora` will take; as `plan_compress`."""
        from reasonvec.lora import plan_lora

        return plan_lora(self, options)

    def inspect(self, **options: Unpack[RunOptions]) -> Inspection:
        """Norms, sparsity and largest changes, tensor by tensor."""
        from reasonvec.inspect import inspect_vector

        return inspect_vector(self, **options)

    def compare(self, other: Vector, **options: Unpack[RunOptions]) -> Comparison:
        """Cosine, sign agreement and overlap with another vector."""
        from reasonvec.compare import compare

        return compare(self, other, **options)

    def _matrices(self) -> Matrices:
        from reasonvec.matrices import vector_matrices

        return vector_matrices(self)

    def __str__(self) -> str:
        return " + ".join(term.text for term in self.terms) if self.terms else "0"

    def __repr__(self) -> str:
        return f"Vector({self})"


class Point(Decomposable):
    """A checkpoint, perhaps with vectors added. Immutable; nothing is read by making one."""

    __slots__ = ("base", "vector")
    __array_ufunc__ = None

    base: CheckpointFolder
    vector: Vector

    def __init__(self, base: CheckpointFolder, vector: Vector | None = None) -> None:
        self.base = base
        self.vector = Vector(()) if vector is None else vector

    def __add__(self, other: Vector) -> Point:
        if isinstance(other, Point):
            _no_sum(self, other)
        if not isinstance(other, Vector):
            return NotImplemented
        return Point(self.base, self.vector + other)

    __radd__ = __add__

    @overload
    def __sub__(self, other: Vector) -> Point: ...
    @overload
    def __sub__(self, other: Point) -> Vector: ...

    def __sub__(self, other: Vector | Point) -> Point | Vector:
        if isinstance(other, Vector):
            return Point(self.base, self.vector - other)
        if not isinstance(other, Point):
            return NotImplemented
        added = self.vector - other.vector
        if self.base is other.base or self.base.path.resolve() == other.base.path.resolve():
            return added
        return Vector([Scaled(Difference(self.base, other.base))]) + added

    def __mul__(self, scale: float) -> NoReturn:
        message = (
            f"{scale!r} * {self}: a point in weight space has no multiples, only vectors do; for a "
            "weighted average of checkpoints use rv.mean or rv.lerp, to scale an update write "
            "base + alpha * (model - base)"
        )
        raise TypeError(message)

    __rmul__ = __mul__

    def plan(self, path: str | PathLike[str], **options: Unpack[ApplyOptions]) -> ApplyPlan:
        """What `save` will do, from headers alone: every tensor, every problem, every cost."""
        from reasonvec.apply import plan

        return plan(self, Path(path), options)

    def save(self, path: str | PathLike[str], **options: Unpack[ApplyOptions]) -> ApplyReport:
        """Write the point as a checkpoint folder, in one pass; see `reasonvec.apply`.

        Raises:
            MismatchError: vectors and target do not fit together; every problem is told, and
                nothing is written.
            NonFiniteError: NaN or infinity in an input, or a sum that overflows the output's dtype.
            OSError: a file cannot be read or written; the disk is full.

        Examples:
            >>> import reasonvec as rv
            >>> reason = rv.open(family.rl) - rv.open(family.sft)
            >>> report = (rv.open(family.instruct) + 0.8 * reason).save("reasoning")
            >>> print(report.recipe)
            instruct + 0.8 * (rl - sft)
        """
        from reasonvec.apply import apply

        return apply(self, Path(path), options)

    def _matrices(self) -> Matrices:
        from reasonvec.matrices import point_matrices

        return point_matrices(self)

    def __str__(self) -> str:
        name = self.base.path.name
        return f"{name} + {self.vector}" if self.vector.terms else name

    def __repr__(self) -> str:
        return f"Point({self})"


class Checkpoint(Point, Mapping[str, "Tensor"]):
    """A checkpoint on disk: a point, and a mapping from names to tensors that share its bytes.

    Examples:
        >>> import reasonvec as rv
        >>> model = rv.open(family.sft)
        >>> model["model.norm.weight"]
        Tensor(BF16, [64])
    """

    __slots__ = ()

    # Two checkpoints are equal if they are one: a mapping's own equality would read both, and a
    # checkpoint could be no key of the weights of a merge.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, name: str) -> Tensor:
        return self.base.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.layout.tensors)

    def __len__(self) -> int:
        return len(self.base.layout.tensors)

    def inspect(self, **options: Unpack[RunOptions]) -> Inspection:
        """Norms, non-zero elements and largest magnitudes, tensor by tensor."""
        from reasonvec.inspect import inspect_checkpoint

        return inspect_checkpoint(self.base, **options)


def _no_sum(a: Point, b: Point) -> NoReturn:
    message = (
        f"({a}) + ({b}): two points in weight space have no sum; for the average use "
        "rv.mean(a, b), for a point between them rv.lerp(a, b, t), to add what b learned write "
        "a + (b - base)"
    )
    raise TypeError(message)


def open(path: str | PathLike[str]) -> Checkpoint:  # noqa: A001 - rv.open reads as it should
    """Open a checkpoint: a folder of safetensors shards, or one such file. Reads headers only.

    Raises:
        FormatError: a header, an index or config.json is damaged or hostile, the weights are
            pickled, or the folder is a vector.
        OSError: a file is missing or cannot be read.
    """
    folder = Path(path)
    if is_vector(folder):
        message = f"{folder}: is a vector; open it with rv.load (in a command, name it as V)"
        raise FormatError(message)
    if is_adapter(folder):
        message = (
            f"{folder}: is an adapter; put it on its base with rv.adapter(folder, base=...) (in a "
            "command, name it as V, and its base with --base)"
        )
        raise FormatError(message)
    return Checkpoint(CheckpointFolder(folder))


def load(path: str | PathLike[str]) -> Vector:
    """Open a vector folder that `Vector.save` wrote. Reads its manifest and headers only.

    Raises:
        FormatError: manifest and data contradict each other, or the folder is no vector.
        OSError: a file is missing or cannot be read.

    Examples:
        >>> import reasonvec as rv
        >>> report = (rv.open(family.rl) - rv.open(family.sft)).save("reason")
        >>> print(rv.open(family.instruct) + 0.8 * rv.load("reason"))
        instruct + 0.8 * reason
    """
    folder = Path(path)
    if is_adapter(folder):
        message = f"{folder}: is an adapter; open it with rv.adapter(folder, base=rv.open(...))"
        raise FormatError(message)
    if folder.is_dir() and not is_vector(folder):
        message = (
            f"{folder}: has no vector_config.json, so it is no vector; open a checkpoint with "
            "rv.open, and take the difference of two checkpoints with rv.open(p) - rv.open(n) "
            "(in a command: --from P N)"
        )
        raise FormatError(message)
    return Vector([Scaled(VectorFolder(folder))])


def adapter(path: str | PathLike[str], base: Point | None = None) -> Vector:
    """Open a LoRA adapter of PEFT as the vector that it adds to its base. Reads its config and its
    header only; the products of its factors are made tile by tile, in float64, where they are
    used. Adapters add, scale and subtract as every vector does, without cross terms.

    Args:
        path: the folder, with adapter_config.json and adapter_model.safetensors.
        base: the checkpoint that it was trained on. By default the one that its config names
            (base_model_name_or_path), if that is a folder here.

    Raises:
        FormatError: a file is damaged, or the weights are pickled.
        MismatchError: no base is given and none can be found, or ``base`` is no plain checkpoint.
        OSError: a file is missing or cannot be read.
    """
    folder = AdapterFolder(Path(path))
    if base is None:
        named = folder.base_path
        if named is None or not Path(named).is_dir():
            message = (
                f"{folder.path}: was trained on {named or 'a base that it does not name'}, which "
                "is no folder here; say where the base is with rv.adapter(folder, "
                "base=rv.open(...)) (in a command: --base)"
            )
            raise MismatchError(message)
        base = open(named)
    if base.vector.terms:
        message = f"{base}: is no checkpoint but a sum; save it, and take that as the base"
        raise MismatchError(message)
    return Vector([Scaled(Adapter(folder, base.base))])


def lerp(a: Point, b: Point, t: float) -> Point:
    """The point a share ``t`` of the way from ``a`` to ``b``: ``a + t * (b - a)``.

    Examples:
        >>> import reasonvec as rv
        >>> print(rv.lerp(rv.open(family.sft), rv.open(family.rl), 0.25))
        sft + 0.25 * (rl - sft)
    """
    return a + t * (b - a)


def mean(first: Point, *others: Point) -> Point:
    """The average of points, as ``first`` plus the average of the differences from it.

    Examples:
        >>> import reasonvec as rv
        >>> print(rv.mean(rv.open(family.sft), rv.open(family.rl)))
        sft + 0.5 * (rl - sft)
    """
    share = 1.0 / (1 + len(others))
    point = first
    for other in others:
        point = point + share * (other - first)
    return point
