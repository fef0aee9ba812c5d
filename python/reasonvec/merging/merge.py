"""Merges as points: lazy, and written in one pass as any other point."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TypeAlias, Unpack

from reasonvec.algebra import Point, Vector
from reasonvec.errors import ReasonvecError
from reasonvec.merging.methods import (
    ArceeFusion,
    Breadcrumbs,
    BreadcrumbsTies,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    IsoC,
    IsoCts,
    Karcher,
    Knots,
    Linear,
    Lines,
    Method,
    ModelStock,
    Multislerp,
    Nearswap,
    Nuslerp,
    Passthrough,
    Ram,
    RamPlusTl,
    Sce,
    Slerp,
    Star,
    SubspaceBoosting,
    TaskArithmetic,
    Ties,
    TsvM,
)
from reasonvec.merging.parameters import Parameter, Setting, setting

if TYPE_CHECKING:
    from reasonvec.apply import ApplyPlan, ApplyReport
    from reasonvec.merging.saving import MergeOptions
    from reasonvec.merging.vocabulary import Tokenizer

__all__ = [
    "Merge",
    "Model",
    "Models",
    "Module",
    "Slice",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "linear",
    "lines",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "stack",
    "star",
    "subspace_boosting",
    "task_arithmetic",
    "ties",
    "tsv_m",
]

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


# ---- making them


def _merge(
    method: Method,
    models: Models,
    base: AnyPoint | None = None,
    per_model: Mapping[str, object] | None = None,
) -> Merge:
    """A merge of whole models; ``per_model`` are parameters that may be given by model."""
    listed = list(models)
    weights: dict[int, Parameter] = {}
    if isinstance(models, Mapping):
        weights = {i: models[point] for i, point in enumerate(listed)}  # type: ignore[index]
    own: list[dict[str, Setting]] = [{} for _ in listed]
    if method.weighted:
        for i in range(len(listed)):
            own[i]["weight"] = setting(weights.get(i, 1.0), f"{method.name}: weight")
    elif weights:
        message = f"{method.name}: takes no weights; give the models as a list"
        raise ReasonvecError(message)
    said = dict(method.parameters())
    for key, value in (per_model or {}).items():
        if _by_model(value):
            said.pop(key, None)
            for point, one in value.items():  # type: ignore[attr-defined]
                at = [i for i, known in enumerate(listed) if known is point]
                if not at:
                    message = f"{method.name}: {key} names {point}, which is none of the models"
                    raise ReasonvecError(message)
                own[at[0]][key] = setting(one, f"{method.name}: {key}")
    settings = {key: setting(value, f"{method.name}: {key}") for key, value in said.items()}
    inputs = tuple(Model(point, own[i]) for i, point in enumerate(listed))
    for point in (*listed, base):
        if point is not None and not isinstance(point, (Point, Merge)):
            message = f"{method.name}: expected a model (rv.open), found {type(point).__name__}"
            raise TypeError(message)
    # Only what differs from the defaults is worth a line in a recipe.
    fresh = type(method)().parameters()
    shown = {
        key: value for key, value in settings.items() if key not in fresh or said[key] != fresh[key]
    }
    return Merge(method, (Module((Slice(inputs),)),), base, shown)


def _by_model(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(key, (Point, Merge)) for key in value)


def _shared(value: object, default: Parameter) -> Parameter:
    """What the method says where a parameter is given by model."""
    return default if _by_model(value) else value  # type: ignore[return-value]


def linear(models: Models, *, normalize: Parameter = True) -> Merge:
    """The weighted average of models; see `reasonvec.merging.methods.Linear`."""
    return _merge(Linear(normalize), models)


def task_arithmetic(
    base: AnyPoint, models: Models, *, normalize: Parameter = False, lambda_: Parameter = 1.0
) -> Merge:
    """The base plus the weighted sum of task vectors, times ``lambda_``."""
    return _merge(TaskArithmetic(normalize, lambda_), models, base)


def lines(
    base: AnyPoint, models: Models, *, alpha: Parameter = 0.5, beta: Parameter = 0.5
) -> Merge:
    """Task arithmetic, with a scale from ``alpha`` in the first layer to ``alpha + beta`` in the
    last."""
    return _merge(Lines(alpha, beta), models, base)


def passthrough(model: AnyPoint, *, scale: Parameter = 1.0) -> Merge:
    """A copy, times ``scale``."""
    return _merge(Passthrough(scale), [model])


def stack(
    slices: Iterable[tuple[AnyPoint, range | tuple[int, int]]], *, scale: Parameter = 1.0
) -> Merge:
    """Layers of models on top of each other: embeddings of the first, norm and head of the last.

    Examples:
        >>> import reasonvec as rv
        >>> print(rv.stack([(rv.open(family.sft), range(0, 3)), (rv.open(family.rl), (1, 4))]))
        passthrough(sft [0:3], rl [1:4])
    """
    parts = []
    for point, layers in slices:
        if isinstance(layers, range):
            if layers.step != 1:
                message = f"rv.stack: {layers} leaves layers out; name each run by itself"
                raise ReasonvecError(message)
            layers = (layers.start, layers.stop)
        parts.append(Slice((Model(point, {}, (layers[0], layers[1])),)))
    method = Passthrough(scale)
    settings = {} if scale == 1.0 else {"scale": setting(scale, "passthrough: scale")}
    return Merge(method, (Module(tuple(parts)),), None, settings)


def slerp(a: AnyPoint, b: AnyPoint, *, t: Parameter) -> Merge:
    """The point a share ``t`` of the way from a to b along the great circle.

    Examples:
        >>> import reasonvec as rv
        >>> print(rv.slerp(rv.open(family.sft), rv.open(family.rl), t=[0.0, 0.5, 1.0]))
        slerp(base sft, rl, t [0, 0.5, 1])
    """
    return _merge(Slerp(t), [b], a)


def nuslerp(
    models: Models,
    *,
    base: AnyPoint | None = None,
    along: Literal["all", "rows", "columns"] = "all",
) -> Merge:
    """Slerp of two models by their weights, of their task vectors if there is a base.

    ``along``: whether a whole matrix is one vector, or each of its rows, or each of its columns.
    """
    method = Nuslerp() if along == "all" else Nuslerp(False, along == "columns")
    return _merge(method, models, base)


def multislerp(
    models: Models,
    *,
    base: AnyPoint | None = None,
    normalize_weights: Parameter = True,
    eps: Parameter = 1e-8,
) -> Merge:
    """The weighted barycentre of models on the sphere."""
    return _merge(Multislerp(normalize_weights, eps), models, base)


def karcher(
    models: Sequence[AnyPoint], *, max_iter: Parameter = 10, tol: Parameter = 1e-5
) -> Merge:
    """The Riemannian mean of models on the sphere."""
    return _merge(Karcher(max_iter, tol), models)


def model_stock(
    base: AnyPoint, models: Sequence[AnyPoint], *, filter_wise: Parameter = False
) -> Merge:
    """Between the base and the mean of the models, by the angle between their task vectors."""
    return _merge(ModelStock(filter_wise), models, base)


def nearswap(a: AnyPoint, b: AnyPoint, *, t: Parameter) -> Merge:
    """b where it is within ``t`` of a, between the two elsewhere."""
    return _merge(Nearswap(t), [b], a)


def arcee_fusion(base: AnyPoint, model: AnyPoint) -> Merge:
    """The base, with the elements of the model whose change is important."""
    return _merge(ArceeFusion(), [model], base)


def ties(
    base: AnyPoint,
    models: Models,
    *,
    density: PerModel = 1.0,
    normalize: Parameter = True,
    lambda_: Parameter = 1.0,
) -> Merge:
    """Trim, elect sign, merge.

    Examples:
        >>> import reasonvec as rv
        >>> base, a, b = (rv.open(p) for p in (family.base, family.sft, family.instruct))
        >>> print(rv.ties(base, {a: 0.5, b: 0.5}, density=0.2))
        ties(base base, sft: weight 0.5, instruct: weight 0.5, density 0.2)
    """
    method = Ties(_shared(density, 1.0), normalize, lambda_)
    return _merge(method, models, base, {"density": density})


def dare_linear(
    base: AnyPoint,
    models: Models,
    *,
    density: PerModel = 1.0,
    normalize: Parameter = False,
    rescale: Parameter = True,
    lambda_: Parameter = 1.0,
) -> Merge:
    """Task vectors with elements dropped at random and the rest rescaled, then their weighted
    sum."""
    method = DareLinear(_shared(density, 1.0), normalize, rescale, lambda_)
    return _merge(method, models, base, {"density": density})


def dare_ties(
    base: AnyPoint,
    models: Models,
    *,
    density: PerModel = 1.0,
    normalize: Parameter = False,
    rescale: Parameter = True,
    lambda_: Parameter = 1.0,
) -> Merge:
    """As `dare_linear`, with the sign election of TIES."""
    method = DareTies(_shared(density, 1.0), normalize, rescale, lambda_)
    return _merge(method, models, base, {"density": density})


def della_linear(
    base: AnyPoint,
    models: Models,
    *,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    normalize: Parameter = False,
    rescale: Parameter = True,
    lambda_: Parameter = 1.0,
) -> Merge:
    """Task vectors with elements dropped by chance, the small ones rather than the large, then
    their weighted sum."""
    method = DellaLinear(_shared(density, 1.0), _shared(epsilon, 0.15), normalize, rescale, lambda_)
    return _merge(method, models, base, {"density": density, "epsilon": epsilon})


def della(
    base: AnyPoint,
    models: Models,
    *,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    normalize: Parameter = True,
    rescale: Parameter = True,
    lambda_: Parameter = 1.0,
) -> Merge:
    """As `della_linear`, with the sign election of TIES."""
    method = Della(_shared(density, 1.0), _shared(epsilon, 0.15), normalize, rescale, lambda_)
    return _merge(method, models, base, {"density": density, "epsilon": epsilon})


def breadcrumbs(
    base: AnyPoint,
    models: Models,
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    normalize: Parameter = False,
    lambda_: Parameter = 1.0,
) -> Merge:
    """Task vectors without their largest and their smallest elements, then their weighted sum."""
    method = Breadcrumbs(_shared(density, 1.0), _shared(gamma, 0.01), normalize, lambda_)
    return _merge(method, models, base, {"density": density, "gamma": gamma})


def breadcrumbs_ties(
    base: AnyPoint,
    models: Models,
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    normalize: Parameter = False,
    lambda_: Parameter = 1.0,
) -> Merge:
    """As `breadcrumbs`, with the sign election of TIES."""
    method = BreadcrumbsTies(_shared(density, 1.0), _shared(gamma, 0.01), normalize, lambda_)
    return _merge(method, models, base, {"density": density, "gamma": gamma})


def sce(
    base: AnyPoint,
    models: Sequence[AnyPoint],
    *,
    select_topk: Parameter = 1.0,
    lambda_: Parameter = 1.0,
) -> Merge:
    """Select by variance, calculate by energy, erase by sign."""
    return _merge(Sce(select_topk, lambda_), models, base)


def ram(base: AnyPoint, models: Sequence[AnyPoint], *, epsilon: Parameter = 1e-5) -> Merge:
    """What one model alone moved kept whole, what several moved averaged."""
    return _merge(Ram(epsilon), models, base)


def ramplus_tl(
    base: AnyPoint,
    models: Sequence[AnyPoint],
    *,
    epsilon: Parameter = 1e-5,
    r: Parameter = 0.1,
    alpha: Parameter = 0.2,
) -> Merge:
    """As `ram`, with the unique part of each model strengthened by what it shares."""
    return _merge(RamPlusTl(epsilon, r, alpha), models, base)


def tsv_m(
    base: AnyPoint,
    models: Models,
    *,
    rank: Parameter | None = None,
    lambda_: Parameter = 1.0,
) -> Merge:
    """The first singular vectors of every task, made orthogonal to each other (TSV-Merge).

    ``rank`` is the share of each matrix's directions that every model gets, 1 / models at most and
    if nothing is said.

    Examples:
        >>> import reasonvec as rv
        >>> base, a, b = (rv.open(p) for p in (family.base, family.sft, family.instruct))
        >>> print(rv.tsv_m(base, [a, b], lambda_=0.8))
        tsv_m(base base, sft: weight 1, instruct: weight 1, lambda 0.8)
    """
    return _merge(TsvM(rank, lambda_), models, base)


def iso_c(base: AnyPoint, models: Models, *, lambda_: Parameter = 1.0) -> Merge:
    """The sum of the task vectors with all singular values of a matrix set to their mean (Iso-C).

    Examples:
        >>> import reasonvec as rv
        >>> base, a, b = (rv.open(p) for p in (family.base, family.sft, family.instruct))
        >>> report = rv.iso_c(base, [a, b]).save("isotropic")
        >>> print(report.recipe)
        iso_c(base base, sft: weight 1, instruct: weight 1)
    """
    return _merge(IsoC(lambda_), models, base)


def iso_cts(
    base: AnyPoint, models: Models, *, common: Parameter = 0.8, lambda_: Parameter = 1.0
) -> Merge:
    """As `iso_c`, with a share ``common`` of the directions from the sum of the task vectors, and
    the others from the single ones (Iso-CTS)."""
    return _merge(IsoCts(common, lambda_), models, base)


def knots(
    base: AnyPoint,
    models: Models,
    *,
    density: PerModel = 1.0,
    elect: Parameter = True,
    normalize: Parameter = True,
    lambda_: Parameter = 1.0,
) -> Merge:
    """TIES in the space that the task vectors of a matrix side by side span (KnOTS).

    Without ``elect`` no signs are elected: at a density of 1 that is task arithmetic.
    """
    method = Knots(_shared(density, 1.0), elect, normalize, lambda_)
    return _merge(method, models, base, {"density": density})


def star(
    base: AnyPoint,
    models: Models,
    *,
    eta: Parameter = 0.4,
    rank: Parameter | None = None,
    normalize: Parameter = True,
    lambda_: Parameter = 1.0,
) -> Merge:
    """Task vectors cut to the first singular values that make up a share ``eta`` of their sum (or
    to the first ``rank``), rescaled to the sum that they had, and averaged (STAR)."""
    return _merge(Star(eta, rank, normalize, lambda_), models, base)


def subspace_boosting(
    base: AnyPoint, models: Models, *, beta: Parameter = 0.01, lambda_: Parameter = 1.0
) -> Merge:
    """The weighted sum of task vectors with the small singular values of a matrix raised.

    Examples:
        On top of another merge, that merge is the only model (and is not rounded to BF16 before):

        >>> import reasonvec as rv
        >>> base, a, b = (rv.open(p) for p in (family.base, family.sft, family.instruct))
        >>> merged = rv.ties(base, {a: 0.5, b: 0.5}, density=0.2)
        >>> report = rv.subspace_boosting(base, [merged], beta=0.02).save("boosted")
    """
    return _merge(SubspaceBoosting(beta, lambda_), _unrounded(models), base)


def _unrounded(models: Models) -> Models:
    """Merges among models in F32: rounding to BF16 would be raised with the small values."""

    def wide(point: AnyPoint) -> AnyPoint:
        if isinstance(point, Merge) and point.out_dtype is None:
            return replace(point, out_dtype="float32")
        return point

    if isinstance(models, Mapping):
        return {wide(point): weight for point, weight in models.items()}
    return [wide(point) for point in models]
