"""Mask methods: each element of a task vector is kept or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reasonvec.errors import ReasonvecError
from reasonvec.json_values import Json
from reasonvec.merging.method import BaseRule, Method, Reader, zero_floor
from reasonvec.merging.parameters import Parameter

__all__ = [
    "ArceeFusion",
    "Breadcrumbs",
    "BreadcrumbsTies",
    "DareLinear",
    "DareTies",
    "Della",
    "DellaLinear",
    "Nearswap",
    "Ram",
    "RamPlusTl",
    "Sce",
    "Ties",
    "Trimmed",
]


@dataclass(frozen=True, slots=True)
class Trimmed(Method):
    """A method that drops elements of weighted task vectors, and then adds the vectors up."""

    base: ClassVar[BaseRule] = "needed"
    weighted: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True
    consensus: ClassVar[bool] = False
    """Whether a sign is elected first, as in TIES."""


@dataclass(frozen=True, slots=True)
class Ties(Trimmed):
    """Trim, elect sign, merge (arXiv 2306.01708)."""

    name: ClassVar[str] = "ties"
    by_model: ClassVar[frozenset[str]] = frozenset({"density"})
    density: Parameter = 1.0
    normalize: Parameter = True
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "ties",
            "density": self.shares(read, "density", models),
            "normalize": self.flag(read, "normalize"),
            "lambda": self.number(read, "lambda"),
        }


@dataclass(frozen=True, slots=True)
class DareLinear(Trimmed):
    """Drop elements at random and rescale (arXiv 2311.03099), then the weighted sum."""

    name: ClassVar[str] = "dare_linear"
    by_model: ClassVar[frozenset[str]] = frozenset({"density"})
    density: Parameter = 1.0
    normalize: Parameter = False
    rescale: Parameter = True
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "dare",
            "density": self.shares(read, "density", models),
            "seed": read.seed,
            "rescale": _rescale(self, read),
            "consensus": self.consensus,
            "normalize": self.flag(read, "normalize"),
            "lambda": self.number(read, "lambda"),
        }


@dataclass(frozen=True, slots=True)
class DareTies(DareLinear):
    """As `DareLinear`, with the sign election of TIES."""

    name: ClassVar[str] = "dare_ties"
    consensus: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class DellaLinear(Trimmed):
    """Drop elements at random, the less probably the larger they are in their row (arXiv
    2406.11617): each is kept with a probability from ``density - epsilon`` to
    ``density + epsilon``."""

    name: ClassVar[str] = "della_linear"
    by_model: ClassVar[frozenset[str]] = frozenset({"density", "epsilon"})
    density: Parameter = 1.0
    epsilon: Parameter = 0.15
    normalize: Parameter = False
    rescale: Parameter = True
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "della",
            "density": self.shares(read, "density", models),
            "epsilon": self.shares(read, "epsilon", models),
            "seed": read.seed,
            "rescale": _rescale(self, read),
            "consensus": self.consensus,
            "normalize": self.flag(read, "normalize"),
            "lambda": self.number(read, "lambda"),
        }


@dataclass(frozen=True, slots=True)
class Della(DellaLinear):
    """As `DellaLinear`, with the sign election of TIES."""

    name: ClassVar[str] = "della"
    consensus: ClassVar[bool] = True
    normalize: Parameter = True


@dataclass(frozen=True, slots=True)
class Breadcrumbs(Trimmed):
    """Without the ``gamma N`` largest elements and enough of the smallest to leave ``density N``
    (arXiv 2312.06795)."""

    name: ClassVar[str] = "breadcrumbs"
    by_model: ClassVar[frozenset[str]] = frozenset({"density", "gamma"})
    density: Parameter = 1.0
    gamma: Parameter = 0.01
    normalize: Parameter = False
    lambda_: Parameter = 1.0

    def plan(self, read: Reader, models: int) -> Json:
        return {
            "kind": "breadcrumbs",
            "density": self.shares(read, "density", models),
            "gamma": self.shares(read, "gamma", models),
            "consensus": self.consensus,
            "normalize": self.flag(read, "normalize"),
            "lambda": self.number(read, "lambda"),
        }


@dataclass(frozen=True, slots=True)
class BreadcrumbsTies(Breadcrumbs):
    """As `Breadcrumbs`, with the sign election of TIES."""

    name: ClassVar[str] = "breadcrumbs_ties"
    consensus: ClassVar[bool] = True


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
            "select_topk": self.share(read, "select_topk"),
            "lambda": self.number(read, "lambda"),
            **zero_floor(read),
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
            "epsilon": self.number(read, "epsilon"),
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
            "epsilon": self.number(read, "epsilon"),
            "r": self.number(read, "r"),
            "alpha": self.number(read, "alpha"),
        }


@dataclass(frozen=True, slots=True)
class Nearswap(Method):
    """b where it is near a, within ``t``; between them beyond it."""

    name: ClassVar[str] = "nearswap"
    base: ClassVar[BaseRule] = "model"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    t: Parameter | None = None

    def plan(self, read: Reader, models: int) -> Json:
        t = self.asked(read, "t")
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


def _rescale(method: Method, read: Reader) -> str:
    # mergekit restores the L1 norm of what is left, the paper divides by the density.
    if not method.flag(read, "rescale"):
        return "none"
    return "l1" if read.numerics == "mergekit" else "density"
