"""Capabilities of language models as vectors in weight space: extract, check, apply, verify.

    import reasonvec as rv

    reason = rv.open("qwen-grpo") - rv.open("qwen-sft")     # nothing is read yet
    reason.save("reason")                                    # a vector folder, exact
    (rv.open("qwen-instruct") + 0.8 * rv.load("reason")).save("qwen-reasoning")

Importing this package imports neither torch nor transformers nor numpy; `reasonvec.torch` does.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from reasonvec._reasonvec import is_debug_build, simd_level, simd_levels, version
from reasonvec.algebra import (
    Checkpoint,
    Point,
    Vector,
    adapter,
    lerp,
    load,
    mean,
    open,  # noqa: A004
)
from reasonvec.errors import (
    DamageError,
    FormatError,
    MismatchError,
    NonFiniteError,
    ReasonvecError,
)

if TYPE_CHECKING:
    from reasonvec.config import read_config
    from reasonvec.factor_cache import factors, write_factors
    from reasonvec.merging.constructors import (
        arcee_fusion,
        breadcrumbs,
        breadcrumbs_ties,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        iso_c,
        iso_cts,
        karcher,
        knots,
        linear,
        lines,
        model_stock,
        multislerp,
        nearswap,
        nuslerp,
        passthrough,
        ram,
        ramplus_tl,
        sce,
        slerp,
        stack,
        star,
        subspace_boosting,
        task_arithmetic,
        ties,
        tsv_m,
    )
    from reasonvec.merging.custom import method
    from reasonvec.merging.merge import Merge

__all__ = [
    "Checkpoint",
    "DamageError",
    "FormatError",
    "Merge",
    "MismatchError",
    "NonFiniteError",
    "Point",
    "ReasonvecError",
    "Vector",
    "__version__",
    "adapter",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "factors",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "lerp",
    "linear",
    "lines",
    "load",
    "mean",
    "method",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "open",
    "passthrough",
    "ram",
    "ramplus_tl",
    "read_config",
    "sce",
    "simd_level",
    "simd_levels",
    "slerp",
    "stack",
    "star",
    "subspace_boosting",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "write_factors",
]

__version__: str = version()

if not TYPE_CHECKING:
    # Merging is more than half of the package, and a program that applies a vector needs none of
    # it: what is named here is imported when somebody asks for it.
    _METHODS = "reasonvec.merging.constructors"
    _ELSEWHERE = {
        "Merge": "reasonvec.merging.merge",
        "factors": "reasonvec.factor_cache",
        "method": "reasonvec.merging.custom",
        "read_config": "reasonvec.config",
        "write_factors": "reasonvec.factor_cache",
    }

    def __getattr__(name: str) -> object:
        if name in __all__:
            globals()[name] = getattr(import_module(_ELSEWHERE.get(name, _METHODS)), name)
            return globals()[name]
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


if is_debug_build():
    warnings.warn(
        "reasonvec's core was built without optimisation and is very slow; build it with "
        "`make build`",
        RuntimeWarning,
        stacklevel=2,
    )
