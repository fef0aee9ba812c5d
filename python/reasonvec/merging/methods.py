"""Every merge method by its name in a YAML."""

from __future__ import annotations

from collections.abc import Mapping

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
from reasonvec.merging.method import Method
from reasonvec.merging.spectral import IsoC, IsoCts, Knots, Star, SubspaceBoosting, TsvM

__all__ = ["METHODS"]

METHODS: Mapping[str, type[Method]] = {
    method.name: method
    for method in (
        Linear, TaskArithmetic, Lines, Passthrough, Slerp, Nuslerp, Multislerp, Karcher, ModelStock,
        Ties, DareLinear, DareTies, DellaLinear, Della, Breadcrumbs, BreadcrumbsTies, Sce, Ram,
        RamPlusTl, Nearswap, ArceeFusion, TsvM, IsoC, IsoCts, Knots, Star, SubspaceBoosting,
    )
}  # fmt: skip
"""Every method by its name in a YAML."""
