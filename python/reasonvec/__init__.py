"""Capabilities of language models as vectors in weight space: extract, check, apply, verify.

    import reasonvec as rv

    reason = rv.open("qwen-grpo") - rv.open("qwen-sft")     # nothing is read yet
    reason.save("reason")                                    # a vector folder, exact
    (rv.open("qwen-instruct") + 0.8 * rv.load("reason")).save("qwen-reasoning")

Importing this package imports neither torch nor transformers nor numpy; `reasonvec.torch` does.
"""

import warnings

from reasonvec._reasonvec import is_debug_build, simd_level, simd_levels, version
from reasonvec.algebra import Checkpoint, Point, Vector, lerp, load, mean, open  # noqa: A004
from reasonvec.errors import (
    DamageError,
    FormatError,
    MismatchError,
    NonFiniteError,
    ReasonvecError,
)
from reasonvec.factors import factors, write_factors

__all__ = [
    "Checkpoint",
    "DamageError",
    "FormatError",
    "MismatchError",
    "NonFiniteError",
    "Point",
    "ReasonvecError",
    "Vector",
    "__version__",
    "factors",
    "lerp",
    "load",
    "mean",
    "open",
    "simd_level",
    "simd_levels",
    "write_factors",
]

__version__: str = version()

if is_debug_build():
    warnings.warn(
        "reasonvec's core was built without optimisation and is very slow; build it with "
        "`make build`",
        RuntimeWarning,
        stacklevel=2,
    )
