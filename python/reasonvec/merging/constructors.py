"""The merge methods as functions of models: `rv.ties(base, models, density=0.2)` and the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeGuard

from reasonvec.algebra import Point
from reasonvec.errors import ReasonvecError
from reasonvec.merging.gram import Karcher, ModelStock, Multislerp, Nuslerp, Slerp
from reasonvec.merging.linear import Linear, Lines, Passthrough, TaskArithmetic
from reasonvec.merging.mask import (
    ArceeFusion,
    Breadcrumbs,
    BreadcrumbsTies,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    Nearswap,
    Ram,
    RamPlusTl,
    Sce,
    Ties,
)
from reasonvec.merging.merge import AnyPoint, Merge, Model, Models, Module, PerModel, Slice
from reasonvec.merging.method import Method
from reasonvec.merging.parameters import Parameter, Setting, setting
from reasonvec.merging.spectral import IsoC, IsoCts, Knots, Star, SubspaceBoosting, TsvM

__all__ = [
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


def _merge(
    method: type[Method], models: Models, base: AnyPoint | None = None, **parameters: object
) -> Merge:
    """A merge of whole models; a parameter may be given by model."""
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
    each = {key: value for key, value in parameters.items() if _is_by_model(value)}
    for key, values in each.items():
        if key not in method.by_model:
            message = f"{method.name}: {key} is one for all models, and was given by model"
            raise ReasonvecError(message)
        for point, one in values.items():
            at = [i for i, known in enumerate(listed) if known is point]
            if not at:
                message = f"{method.name}: {key} names {point}, which is none of the models"
                raise ReasonvecError(message)
            own[at[0]][key] = setting(one, f"{method.name}: {key}")
    fresh = method().parameters()
    made = replace(method(), **{k: value for k, value in parameters.items() if k not in each})
    said = {key: value for key, value in made.parameters().items() if key not in each}
    settings = {key: setting(value, f"{method.name}: {key}") for key, value in said.items()}
    inputs = tuple(Model(point, own[i]) for i, point in enumerate(listed))
    for point in (*listed, base):
        if point is not None and not isinstance(point, (Point, Merge)):
            message = f"{method.name}: expected a model (rv.open), found {type(point).__name__}"
            raise TypeError(message)
    # Only what differs from the defaults is worth a line in a recipe.
    shown = {
        key: value for key, value in settings.items() if key not in fresh or said[key] != fresh[key]
    }
    return Merge(made, (Module((Slice(inputs),)),), base, shown)


def _is_by_model(value: object) -> TypeGuard[Mapping[object, Parameter]]:
    return isinstance(value, Mapping) and any(isinstance(key, (Point, Merge)) for key in value)


def linear(models: Models, *, normalize: Parameter = True) -> Merge:
    """The weighted average of models; see `reasonvec.merging.linear.Linear`."""
    return _merge(Linear, models, normalize=normalize)


def task_arithmetic(
    base: AnyPoint, models: Models, *, normalize: Parameter = False, lambda_: Parameter = 1.0
) -> Merge:
    """The base plus the weighted sum of task vectors, times ``lambda_``."""
    return _merge(TaskArithmetic, models, base, normalize=normalize, lambda_=lambda_)


def lines(
    base: AnyPoint, models: Models, *, alpha: Parameter = 0.5, beta: Parameter = 0.5
) -> Merge:
    """Task arithmetic, with a scale from ``alpha`` in the first layer to ``alpha + beta`` in the
    last."""
    return _merge(Lines, models, base, alpha=alpha, beta=beta)


def passthrough(model: AnyPoint, *, scale: Parameter = 1.0) -> Merge:
    """A copy, times ``scale``."""
    return _merge(Passthrough, [model], scale=scale)


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
    return _merge(Slerp, [b], a, t=t)


def nuslerp(
    models: Models,
    *,
    base: AnyPoint | None = None,
    along: Literal["all", "rows", "columns"] = "all",
) -> Merge:
    """Slerp of two models by their weights, of their task vectors if there is a base.

    ``along``: whether a whole matrix is one vector, or each of its rows, or each of its columns.
    """
    if along not in ("all", "rows", "columns"):
        message = f"nuslerp: along is {along!r}, expected all, rows or columns"
        raise ReasonvecError(message)
    return _merge(
        Nuslerp,
        models,
        base,
        nuslerp_flatten=along == "all",
        nuslerp_row_wise=along == "columns",
    )


def multislerp(
    models: Models,
    *,
    base: AnyPoint | None = None,
    normalize_weights: Parameter = True,
    eps: Parameter = 1e-8,
) -> Merge:
    """The weighted barycentre of models on the sphere."""
    return _merge(Multislerp, models, base, normalize_weights=normalize_weights, eps=eps)


def karcher(
    models: Sequence[AnyPoint], *, max_iter: Parameter = 10, tol: Parameter = 1e-5
) -> Merge:
    """The Riemannian mean of models on the sphere. ``max_iter`` is from 1 to 10,000."""
    return _merge(Karcher, models, max_iter=max_iter, tol=tol)


def model_stock(
    base: AnyPoint, models: Sequence[AnyPoint], *, filter_wise: Parameter = False
) -> Merge:
    """Between the base and the mean of the models, by the angle between their task vectors."""
    return _merge(ModelStock, models, base, filter_wise=filter_wise)


def nearswap(a: AnyPoint, b: AnyPoint, *, t: Parameter) -> Merge:
    """b where it is within ``t`` of a, between the two elsewhere."""
    return _merge(Nearswap, [b], a, t=t)


def arcee_fusion(base: AnyPoint, model: AnyPoint) -> Merge:
    """The base, with the elements of the model whose change is important."""
    return _merge(ArceeFusion, [model], base)


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
    return _merge(Ties, models, base, density=density, normalize=normalize, lambda_=lambda_)


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
    return _merge(
        DareLinear,
        models,
        base,
        density=density,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


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
    return _merge(
        DareTies,
        models,
        base,
        density=density,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


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
    return _merge(
        DellaLinear,
        models,
        base,
        density=density,
        epsilon=epsilon,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


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
    return _merge(
        Della,
        models,
        base,
        density=density,
        epsilon=epsilon,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


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
    return _merge(
        Breadcrumbs,
        models,
        base,
        density=density,
        gamma=gamma,
        normalize=normalize,
        lambda_=lambda_,
    )


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
    return _merge(
        BreadcrumbsTies,
        models,
        base,
        density=density,
        gamma=gamma,
        normalize=normalize,
        lambda_=lambda_,
    )


def sce(
    base: AnyPoint,
    models: Sequence[AnyPoint],
    *,
    select_topk: Parameter = 1.0,
    lambda_: Parameter = 1.0,
) -> Merge:
    """Select by variance, calculate by energy, erase by sign."""
    return _merge(Sce, models, base, select_topk=select_topk, lambda_=lambda_)


def ram(base: AnyPoint, models: Sequence[AnyPoint], *, epsilon: Parameter = 1e-5) -> Merge:
    """What one model alone moved kept whole, what several moved averaged."""
    return _merge(Ram, models, base, epsilon=epsilon)


def ramplus_tl(
    base: AnyPoint,
    models: Sequence[AnyPoint],
    *,
    epsilon: Parameter = 1e-5,
    r: Parameter = 0.1,
    alpha: Parameter = 0.2,
) -> Merge:
    """As `ram`, with the unique part of each model strengthened by what it shares."""
    return _merge(RamPlusTl, models, base, epsilon=epsilon, r=r, alpha=alpha)


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
    return _merge(TsvM, models, base, rank=rank, lambda_=lambda_)


def iso_c(base: AnyPoint, models: Models, *, lambda_: Parameter = 1.0) -> Merge:
    """The sum of the task vectors with all singular values of a matrix set to their mean (Iso-C).

    Examples:
        >>> import reasonvec as rv
        >>> base, a, b = (rv.open(p) for p in (family.base, family.sft, family.instruct))
        >>> report = rv.iso_c(base, [a, b]).save("isotropic")
        >>> print(report.recipe)
        iso_c(base base, sft: weight 1, instruct: weight 1)
    """
    return _merge(IsoC, models, base, lambda_=lambda_)


def iso_cts(
    base: AnyPoint, models: Models, *, common: Parameter = 0.8, lambda_: Parameter = 1.0
) -> Merge:
    """As `iso_c`, with a share ``common`` of the directions from the sum of the task vectors, and
    the others from the single ones (Iso-CTS)."""
    return _merge(IsoCts, models, base, common=common, lambda_=lambda_)


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
    return _merge(
        Knots, models, base, density=density, elect=elect, normalize=normalize, lambda_=lambda_
    )


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
    return _merge(Star, models, base, eta=eta, rank=rank, normalize=normalize, lambda_=lambda_)


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
    return _merge(SubspaceBoosting, _unrounded(models), base, beta=beta, lambda_=lambda_)


def _unrounded(models: Models) -> Models:
    """Merges among models in F32: rounding to BF16 would be raised with the small values."""

    def wide(point: AnyPoint) -> AnyPoint:
        if isinstance(point, Merge) and point.out_dtype is None:
            return replace(point, out_dtype="float32")
        return point

    if isinstance(models, Mapping):
        return {wide(point): weight for point, weight in models.items()}
    return [wide(point) for point in models]
