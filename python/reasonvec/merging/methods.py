"""The merge methods: their parameters and defaults, what inputs they need, and their plans.

One frozen class a method. Numbers may differ by layer and by tensor name; what a class says is its
own parameters' values where nothing narrower (a slice, a model) says another. The formulas are in
`reasonvec.reference` and in docs; the arithmetic is the core's.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

from reasonvec.errors import ReasonvecError
from reasonvec.json_values import Json
from reasonvec.merging.parameters import Parameter

__all__ = [
    "METHODS",
    "BaseRule",
    "Coefficients",
    "LinearMethod",
    "Method",
    "Numerics",
    "Reader",
    "field_keys",
]

BaseRule: TypeAlias = Literal["needed", "optional", "model", "none"]
"""What a base is to a method: what task vectors are taken from ("needed", "optional"), its first
model ("model"), or one more model ("none")."""

Numerics: TypeAlias = Literal["default", "mergekit"]


class Reader(Protocol):
    """The parameters of one tensor."""

    @property
    def numerics(self) -> Numerics:
        """Whose numerics."""

    @property
    def seed(self) -> int:
        """Of everything random."""

    @property
    def dimensions(self) -> int:
        """Of the tensor."""

    @property
    def matrix(self) -> bool:
        """Whether it is a matrix or a stack of experts, and not the vocabulary's."""

    @property
    def ramp(self) -> float:
        """How deep the tensor is, from 0 (embeddings, the first layer) to 1 (the last layer, the
        final norm, the head)."""

    def value(self, key: str, default: float, model: int | None = None) -> float:
        """A parameter's number here, of one model or of the whole."""

    def weight(self, model: int) -> float:
        """The weight of a model here."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """A linear method at one tensor: a coefficient for every model, or for every difference from
    the base that is then added to."""

    values: list[float]
    differences: bool = False


@dataclass(frozen=True, slots=True)
class Method(ABC):
    """What all methods have. ``models`` are the fewest and the most that it takes, the base of a
    "needed" or "optional" rule not counted; ``stepwise``: mergekit rounds the weights and every
    step to the working dtype, as its runs show."""

    name: ClassVar[str]
    base: ClassVar[BaseRule] = "none"
    models: ClassVar[tuple[int, int | None]] = (1, None)
    weighted: ClassVar[bool] = False
    stepwise: ClassVar[bool] = False
    usual_weight: ClassVar[float | None] = None
    """The weight of a model that is given none; without one, that is an error."""

    def parameters(self) -> dict[str, Parameter]:
        """What this instance says itself, by the names that a YAML has."""
        said: dict[str, Parameter] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                said[_key(field.name)] = value
        return said

    @abstractmethod
    def plan(self, read: Reader, models: int) -> Json:
        """The core's plan of one tensor.

        Raises:
            ReasonvecError: a parameter is out of its range.
        """

    def aside(self, read: Reader, models: int) -> Coefficients | None:
        """What it is at a tensor that the method proper is not for, if that is a weighted sum."""
        return None

    def check(self, models: int) -> str | None:
        """What is wrong with this number of models, or None."""
        fewest, most = self.models
        if models >= fewest and (most is None or models <= most):
            return None
        wanted = (
            f"exactly {fewest}"
            if most == fewest
            else f"at least {fewest}"
            if most is None
            else f"{fewest} to {most}"
        )
        besides = " besides the base" if self.base in {"needed", "model"} else ""
        plural = "" if wanted.endswith(" 1") else "s"
        return f"{self.name}: needs {wanted} model{plural}{besides}, found {models}"


def _key(name: str) -> str:
    return name.removesuffix("_")


def field_keys(method: type[Method]) -> frozenset[str]:
    """The parameters of a method, by the names that a YAML has."""
    own = {_key(field.name) for field in dataclasses.fields(method)}
    return frozenset(own | ({"weight"} if method.weighted else set()))


def _flag(read: Reader, key: str, default: bool) -> bool:
    return read.value(key, float(default)) != 0.0


def _share(read: Reader, key: str, default: float, model: int | None = None) -> float:
    value = read.value(key, default, model)
    if not 0.0 <= value <= 1.0:
        message = f"{key} is {value:g}, expected a share from 0 to 1"
        raise ReasonvecError(message)
    return value


def _asked(read: Reader, key: str, method: str) -> float:
    """A parameter that has no default."""
    value = read.value(key, math.nan)
    if math.isnan(value):
        raise ReasonvecError(f"{method}: needs the parameter {key}, which is nowhere given")
    return value


def _shares(read: Reader, key: str, default: float, models: int) -> list[float]:
    return [_share(read, key, default, model) for model in range(models)]


# ---- linear: the coefficients are known


@dataclass(frozen=True, slots=True)
class LinearMethod(Method):
    """A method whose coefficients depend on the tensor's place alone."""

    @abstractmethod
    def coefficients(self, read: Reader, models: int) -> Coefficients:
        """What each model, or its difference from the base, is multiplied by.

        Raises:
            ReasonvecError: the weights cannot be normalised.
        """

    def plan(self, read: Reader, models: int) -> Json:
        return {"kind": "linear"}


def _normalised(weights: Sequence[float], read: Reader, *, default: bool) -> list[float]:
    if not _flag(read, "normalize", default):
        return list(weights)
    total = sum(weights)
    if total == 0.0:
        message = (
            "the weights sum to 0, so they cannot be normalised: give other weights, or "
            "normalize: false"
        )
        raise ReasonvecError(message)
    return [weight / total for weight in weights]


@dataclass(frozen=True, slots=True)
class Linear(LinearMethod):
    """The weighted average (model soups, arXiv 2203.05482): ``sum w_i x_i``, over ``sum w_i`` if
    ``normalize``."""

    name: ClassVar[str] = "linear"
    weighted: ClassVar[bool] = True
    normalize: Parameter = True

    def coefficients(self, read: Reader, models: int) -> Coefficients:
        weights = [read.weight(i) for i in range(models)]
        return Coefficients(_normalised(weights, read, default=True))


@dataclass(frozen=True, slots=True)
class TaskArithmetic(LinearMethod):
    """``B + lambda sum w_i (x_i - B)`` (arXiv 2212.04089)."""

    name: ClassVar[str] = "task_arithmetic"
    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    normalize: Parameter = False
    lambda_: Parameter = 1.0

    def coefficients(self, read: Reader, models: int) -> Coefficients:
        weights = [read.weight(i) for i in range(models)]
        scale = read.value("lambda", 1.0)
        return Coefficients(
            [scale * w for w in _normalised(weights, read, default=False)], differences=True
        )

    def plan(self, read: Reader, models: int) -> Json:
        # Nothing is dropped; but the steps are mergekit's, and can be rounded.
        return {
            "kind": "dare",
            "density": [1.0] * models,
            "normalize": _flag(read, "normalize", False),
            "lambda": read.value("lambda", 1.0),
        }


@dataclass(frozen=True, slots=True)
class Lines(LinearMethod):
    """Task arithmetic whose scale grows with depth (LiNeS, arXiv 2410.17146):
    ``B + (alpha + beta l / (L - 1)) sum w_i (x_i - B)`` in layer l; embeddings take ``alpha``, the
    final norm and the head ``alpha + beta``."""

    name: ClassVar[str] = "lines"
    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    alpha: Parameter = 0.5
    beta: Parameter = 0.5

    def coefficients(self, read: Reader, models: int) -> Coefficients:
        scale = read.value("alpha", 0.5) + read.value("beta", 0.5) * read.ramp
        return Coefficients([scale * read.weight(i) for i in range(models)], differences=True)


@dataclass(frozen=True, slots=True)
class Passthrough(LinearMethod):
    """A copy, times ``scale``."""

    name: ClassVar[str] = "passthrough"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    scale: Parameter = 1.0

    def coefficients(self, read: Reader, models: int) -> Coefficients:
        return Coefficients([read.value("scale", 1.0, 0)])


# ---- gram: the coefficients come out of the inputs' Gram matrix


@dataclass(frozen=True, slots=True)
class Slerp(Method):
    """The great circle from a to b (Shoemake 1985), of the flattened tensors."""

    name: ClassVar[str] = "slerp"
    base: ClassVar[BaseRule] = "model"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    t: Parameter | None = None

    def plan(self, read: Reader, models: int) -> Json:
        return {"kind": "slerp", "t": _asked(read, "t", self.name)}


@dataclass(frozen=True, slots=True)
class Nuslerp(Method):
    """Slerp at ``t = w_2 / (w_1 + w_2)``, of the models or of their task vectors; flattened, or row
    by row (``nuslerp_row_wise`` false, as mergekit has it) or column by column."""

    name: ClassVar[str] = "nuslerp"
    base: ClassVar[BaseRule] = "optional"
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    weighted: ClassVar[bool] = True
    nuslerp_flatten: Parameter = True
    nuslerp_row_wise: Parameter = False

    def plan(self, read: Reader, models: int) -> Json:
        if read.weight(0) + read.weight(1) == 0.0:
            raise ReasonvecError("nuslerp: the two weights sum to 0, and t is a share of their sum")
        # What mergekit calls row-wise normalises along the rows' dimension: its vectors are the
        # columns. A bias is one vector either way.
        return {
            "kind": "nuslerp",
            "row_wise": not _flag(read, "nuslerp_row_wise", False),
            "flatten": read.dimensions < 2 or _flag(read, "nuslerp_flatten", True),
        }


@dataclass(frozen=True, slots=True)
class Multislerp(Method):
    """The barycentre on the sphere, in the tangent space at the weighted mean, times the weighted
    mean of the norms."""

    name: ClassVar[str] = "multislerp"
    base: ClassVar[BaseRule] = "optional"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    weighted: ClassVar[bool] = True
    normalize_weights: Parameter = True
    eps: Parameter = 1e-8

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "multislerp",
            "normalize_weights": _flag(read, "normalize_weights", True),
            "eps": read.value("eps", 1e-8),
        }


@dataclass(frozen=True, slots=True)
class Karcher(Method):
    """The Riemannian mean of the unit vectors, times the mean of the norms."""

    name: ClassVar[str] = "karcher"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    max_iter: Parameter = 10
    tol: Parameter = 1e-5

    def plan(self, read: Reader, models: int) -> Json:
        rounds = read.value("max_iter", 10.0)
        if rounds < 1 or rounds != int(rounds):
            raise ReasonvecError(f"max_iter is {rounds:g}, expected a whole number from 1")
        return {"kind": "karcher", "max_iter": int(rounds), "tol": read.value("tol", 1e-5)}


@dataclass(frozen=True, slots=True)
class ModelStock(Method):
    """Between the base and the mean of the models, by the angle between them (arXiv 2403.19522)."""

    name: ClassVar[str] = "model_stock"
    base: ClassVar[BaseRule] = "needed"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    filter_wise: Parameter = False

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "model_stock",
            "filter_wise": _flag(read, "filter_wise", False),
            **_floor(read),
        }


# ---- mask: each element is kept or not


@dataclass(frozen=True, slots=True)
class Ties(Method):
    """Trim, elect sign, merge (arXiv 2306.01708)."""

    name: ClassVar[str] = "ties"
    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    density: Parameter = 1.0
    normalize: Parameter = True
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "ties",
            "density": _shares(read, "density", 1.0, models),
            "normalize": _flag(read, "normalize", True),
            "lambda": read.value("lambda", 1.0),
        }


@dataclass(frozen=True, slots=True)
class DareLinear(Method):
    """Drop elements at random and rescale (arXiv 2311.03099), then the weighted sum."""

    name: ClassVar[str] = "dare_linear"
    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    density: Parameter = 1.0
    normalize: Parameter = False
    rescale: Parameter = True
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "dare",
            "density": _shares(read, "density", 1.0, models),
            "seed": read.seed,
            "rescale": _rescale(read),
            "consensus": self.name == "dare_ties",
            "normalize": _flag(read, "normalize", False),
            "lambda": read.value("lambda", 1.0),
        }


@dataclass(frozen=True, slots=True)
class DareTies(DareLinear):
    """As `DareLinear`, with the sign election of TIES."""

    name: ClassVar[str] = "dare_ties"


@dataclass(frozen=True, slots=True)
class DellaLinear(Method):
    """Drop elements at random, the less probably the larger they are in their row (arXiv
    2406.11617): each is kept with a probability from ``density - epsilon`` to
    ``density + epsilon``."""

    name: ClassVar[str] = "della_linear"
    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    density: Parameter = 1.0
    epsilon: Parameter = 0.15
    normalize: Parameter = False
    rescale: Parameter = True
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        consensus = self.name == "della"
        return {
            "kind": "della",
            "density": _shares(read, "density", 1.0, models),
            "epsilon": _shares(read, "epsilon", 0.15, models),
            "seed": read.seed,
            "rescale": _rescale(read),
            "consensus": consensus,
            "normalize": _flag(read, "normalize", consensus),
            "lambda": read.value("lambda", 1.0),
        }


@dataclass(frozen=True, slots=True)
class Della(DellaLinear):
    """As `DellaLinear`, with the sign election of TIES."""

    name: ClassVar[str] = "della"
    normalize: Parameter = True


@dataclass(frozen=True, slots=True)
class Breadcrumbs(Method):
    """Without the ``gamma N`` largest elements and enough of the smallest to leave ``density N``
    (arXiv 2312.06795)."""

    name: ClassVar[str] = "breadcrumbs"
    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    density: Parameter = 1.0
    gamma: Parameter = 0.01
    normalize: Parameter = False
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        consensus = self.name == "breadcrumbs_ties"
        return {
            "kind": "breadcrumbs",
            "density": _shares(read, "density", 1.0, models),
            "gamma": _shares(read, "gamma", 0.01, models),
            "consensus": consensus,
            "normalize": _flag(read, "normalize", False),
            "lambda": read.value("lambda", 1.0),
        }


@dataclass(frozen=True, slots=True)
class BreadcrumbsTies(Breadcrumbs):
    """As `Breadcrumbs`, with the sign election of TIES."""

    name: ClassVar[str] = "breadcrumbs_ties"


@dataclass(frozen=True, slots=True)
class Sce(Method):
    """Select by variance, calculate by energy, erase by sign (FuseChat-3.0, arXiv 2408.07990)."""

    name: ClassVar[str] = "sce"
    base: ClassVar[BaseRule] = "needed"
    models: ClassVar[tuple[int, int | None]] = (1, None)
    select_topk: Parameter = 1.0
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "sce",
            "select_topk": _share(read, "select_topk", 1.0),
            "lambda": read.value("lambda", 1.0),
            **_floor(read),
        }


@dataclass(frozen=True, slots=True)
class Ram(Method):
    """What one model alone moved is kept whole, what several moved is averaged over those."""

    name: ClassVar[str] = "ram"
    base: ClassVar[BaseRule] = "needed"
    epsilon: Parameter = 1e-5

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "ram",
            "plus": False,
            "epsilon": read.value("epsilon", 1e-5),
            "r": 0.1,
            "alpha": 0.2,
        }


@dataclass(frozen=True, slots=True)
class RamPlusTl(Method):
    """As `Ram`, with the unique part of each model times ``1 + r clip(shared / unique, 0,
    alpha)``."""

    name: ClassVar[str] = "ramplus_tl"
    base: ClassVar[BaseRule] = "needed"
    epsilon: Parameter = 1e-5
    r: Parameter = 0.1
    alpha: Parameter = 0.2

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "ram",
            "plus": True,
            "epsilon": read.value("epsilon", 1e-5),
            "r": read.value("r", 0.1),
            "alpha": read.value("alpha", 0.2),
        }


@dataclass(frozen=True, slots=True)
class Nearswap(Method):
    """b where it is near a, within ``t``; between them beyond it."""

    name: ClassVar[str] = "nearswap"
    base: ClassVar[BaseRule] = "model"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    t: Parameter | None = None

    def plan(self, read: Reader, models: int) -> Json:
        t = _asked(read, "t", self.name)
        if t < 0.0:
            raise ReasonvecError(f"nearswap: t is {t:g}, expected at least 0")
        return {"kind": "nearswap", "t": t}


@dataclass(frozen=True, slots=True)
class ArceeFusion(Method):
    """Only the elements whose change is important: magnitude times the divergence of the rows'
    softmaxes, above the median by 1.5 interquartile ranges."""

    name: ClassVar[str] = "arcee_fusion"
    base: ClassVar[BaseRule] = "needed"
    models: ClassVar[tuple[int, int | None]] = (1, 1)

    def plan(self, read: Reader, models: int) -> Json:
        return {"kind": "arcee_fusion"}


# ---- spectral: singular vectors of the task vectors of a matrix


@dataclass(frozen=True, slots=True)
class Spectral(Method):
    """A method for matrices. What is none (norms, biases), and the vocabulary's, whose rows are
    tokens, gets the mean of the task vectors, times ``lambda``."""

    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    usual_weight: ClassVar[float | None] = 1.0
    mean: ClassVar[bool] = True
    """Whether the weights are divided by their sum where the method proper is not used."""

    def aside(self, read: Reader, models: int) -> Coefficients | None:
        if read.matrix:
            return None
        weights = [read.weight(i) for i in range(models)]
        scale = read.value("lambda", 1.0)
        return Coefficients([scale * w / _total(weights, self.mean) for w in weights], True)


def _total(weights: Sequence[float], mean: bool) -> float:
    if not mean:
        return 1.0
    if sum(weights) == 0.0:
        raise ReasonvecError("the weights sum to 0, so there is no mean: give other weights")
    return sum(weights)


@dataclass(frozen=True, slots=True)
class IsoC(Spectral):
    """The sum of the task vectors with all singular values set to their mean (arXiv 2502.04959)."""

    name: ClassVar[str] = "iso_c"
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {"kind": "iso_c", "lambda": read.value("lambda", 1.0)}


@dataclass(frozen=True, slots=True)
class IsoCts(Spectral):
    """As `IsoC`, with a share ``common`` of the directions from the sum and the others from the
    single tasks (arXiv 2502.04959)."""

    name: ClassVar[str] = "iso_cts"
    common: Parameter = 0.8
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "iso_cts",
            "common": _share(read, "common", 0.8),
            "lambda": read.value("lambda", 1.0),
        }


@dataclass(frozen=True, slots=True)
class TsvM(Spectral):
    """The first singular vectors of every task, a share ``rank`` of them each (if nothing is said,
    1 / models), made orthogonal to each other (arXiv 2412.00081)."""

    name: ClassVar[str] = "tsv_m"
    rank: Parameter | None = None
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        rank = read.value("rank", math.nan)
        if not math.isnan(rank) and not 0.0 < rank <= 1.0 / models + 1e-9:
            message = (
                f"rank is {rank:g} for each of {models} models, expected a share of the directions "
                f"above 0 and at most 1 / {models}"
            )
            raise ReasonvecError(message)
        return {
            "kind": "tsv_m",
            "rank": None if math.isnan(rank) else rank,
            "lambda": read.value("lambda", 1.0),
        }


@dataclass(frozen=True, slots=True)
class Star(Spectral):
    """Task vectors cut to the first singular values that make up a share ``eta`` of their sum, or
    to the first ``rank``, rescaled to the sum that they had, then averaged (arXiv 2502.10339)."""

    name: ClassVar[str] = "star"
    eta: Parameter = 0.4
    rank: Parameter | None = None
    normalize: Parameter = True
    lambda_: Parameter = 1.0

    def aside(self, read: Reader, models: int) -> Coefficients | None:
        if read.matrix:
            return None
        weights = [read.weight(i) for i in range(models)]
        scale = read.value("lambda", 1.0) / _total(weights, _flag(read, "normalize", True))
        return Coefficients([scale * w for w in weights], True)

    def plan(self, read: Reader, models: int) -> Json:
        rank = read.value("rank", math.nan)
        if not math.isnan(rank) and (rank < 1 or rank != int(rank)):
            raise ReasonvecError(f"rank is {rank:g}, expected a whole number from 1")
        weights = [read.weight(i) for i in range(models)]
        total = _total(weights, _flag(read, "normalize", True))
        return {
            "kind": "star",
            "eta": _share(read, "eta", 0.4),
            "rank": None if math.isnan(rank) else int(rank),
            "lambda": read.value("lambda", 1.0) / total,
        }


@dataclass(frozen=True, slots=True)
class SubspaceBoosting(Spectral):
    """The weighted sum of the task vectors with small singular values raised: to the one at which
    the sum of those so far reaches a share ``beta`` of all (arXiv 2506.16506). On top of another
    method: with that merge as the only model."""

    name: ClassVar[str] = "subspace_boosting"
    mean: ClassVar[bool] = False
    beta: Parameter = 0.01
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "boost",
            "beta": _share(read, "beta", 0.01),
            "lambda": read.value("lambda", 1.0),
        }


@dataclass(frozen=True, slots=True)
class Knots(Spectral):
    """TIES in the space that the task vectors side by side span (arXiv 2410.19735); where there is
    no matrix, TIES. Without ``elect`` no signs are elected."""

    name: ClassVar[str] = "knots"
    density: Parameter = 1.0
    elect: Parameter = True
    normalize: Parameter = True
    lambda_: Parameter = 1.0

    def aside(self, read: Reader, models: int) -> Coefficients | None:
        if read.matrix or _flag(read, "elect", True):
            return None
        weights = [read.weight(i) for i in range(models)]
        scale = read.value("lambda", 1.0) / _total(weights, _flag(read, "normalize", True))
        return Coefficients([scale * w for w in weights], True)

    def plan(self, read: Reader, models: int) -> Json:
        shared: Json = {
            "density": _shares(read, "density", 1.0, models),
            "normalize": _flag(read, "normalize", True),
            "lambda": read.value("lambda", 1.0),
        }
        if not read.matrix:
            return {"kind": "ties", **shared}
        return {"kind": "knots", "elect": _flag(read, "elect", True), **shared}


def _floor(read: Reader) -> Json:
    # What mergekit takes for zero: products of norms (model_stock), mean squares (sce).
    return {"floor": 1e-6} if read.numerics == "mergekit" else {}


def _rescale(read: Reader) -> str:
    # mergekit restores the L1 norm of what is left, the paper divides by the density.
    if not _flag(read, "rescale", True):
        return "none"
    return "l1" if read.numerics == "mergekit" else "density"


METHODS: Mapping[str, type[Method]] = {
    method.name: method
    for method in (
        Linear, TaskArithmetic, Lines, Passthrough, Slerp, Nuslerp, Multislerp, Karcher, ModelStock,
        Ties, DareLinear, DareTies, DellaLinear, Della, Breadcrumbs, BreadcrumbsTies, Sce, Ram,
        RamPlusTl, Nearswap, ArceeFusion, TsvM, IsoC, IsoCts, Knots, Star, SubspaceBoosting,
    )
}  # fmt: skip
"""Every method by its name in a YAML."""
