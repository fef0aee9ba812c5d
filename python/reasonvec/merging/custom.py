"""Methods that a caller writes in Python, on tiles of NumPy arrays.

They stream as the built-in ones do, within the same memory: a tile of every model is read by the
core, the function makes a tile of it, and that is written to a file of float32 beside the output,
from which the output is rounded. So a method in Python takes twice the output's bytes of disk while
it runs, and the time of its own arithmetic, on one thread.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Concatenate, ParamSpec, Protocol, TypeAlias, cast

from reasonvec import _reasonvec as core
from reasonvec.errors import NonFiniteError, ReasonvecError
from reasonvec.json_values import Json
from reasonvec.merging.method import BaseRule, Method, Reader
from reasonvec.merging.parameters import Parameter, setting
from reasonvec.terms import elements

if TYPE_CHECKING:
    import numpy as np

    from reasonvec.merging.merge import AnyPoint, Merge

__all__ = ["Computation", "Custom", "MadeMethod", "method", "write_computed"]

Array: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float32]]"
_P = ParamSpec("_P")


class Function(Protocol):
    """What computes a tile."""

    def __call__(
        self, models: list[Array], base: Array | None, /, **parameters: float
    ) -> Array: ...


class MadeMethod(Protocol):
    """What `method` makes of a function."""

    def __call__(
        self,
        models: Sequence[AnyPoint],
        *,
        base: AnyPoint | None = None,
        **parameters: Parameter,
    ) -> Merge:
        """The models merged."""


TILE = 1 << 18
"""Elements of a tile, counted from the start of each tensor: the core's own block."""


@dataclass(frozen=True, slots=True)
class Custom(Method):
    """A method of the caller's own."""

    name: ClassVar[str] = "custom"
    base: ClassVar[BaseRule] = "optional"
    function: Function | None = None
    given: tuple[tuple[str, Parameter], ...] = ()

    def parameters(self) -> dict[str, Parameter]:
        return dict(self.given)

    def plan(self, read: Reader, models: int) -> Json:
        # What the function makes is written first, and copied.
        return {"kind": "linear"}

    def values(self, read: Reader) -> dict[str, float]:
        """The keywords of the function at one tensor."""
        return {key: read.value(key, float("nan")) for key, _ in self.given}


@dataclass(frozen=True, slots=True)
class Computation:
    """One tensor that a function makes: of sums of terms, a list for each model and the base."""

    function: Function
    name: str
    shape: tuple[int, ...]
    models: tuple[list[Json], ...]
    base: list[Json] | None
    values: Mapping[str, float]

    def tile(
        self, start: int, stop: int, handles: Sequence[core.Checkpoint | core.VectorFolder]
    ) -> Array:
        """Elements ``start`` to ``stop`` of the tensor.

        Raises:
            ReasonvecError: the function returns something else than one real number for each
                element.
        """
        import numpy as np

        def read(terms: list[Json]) -> Array:
            text, n = json.dumps(terms), elements(self.shape)
            return np.asarray(core.values(text, self.name, n, start, stop, handles))

        models = [read(terms) for terms in self.models]
        base = None if self.base is None else read(self.base)
        made = np.asarray(self.function(models, base, **self.values))
        if made.shape != (stop - start,):
            name = getattr(self.function, "__name__", "the function")
            message = (
                f"{name}: {self.name}: expected an array of {stop - start} elements, found "
                f"{list(made.shape)}; a method makes one number of each element of a tile"
            )
            raise ReasonvecError(message)
        if made.dtype.kind not in "fiub" and made.dtype.name != "bfloat16":
            name = getattr(self.function, "__name__", "the function")
            message = (
                f"{name}: {self.name}: expected real numbers, found an array of {made.dtype}; a "
                "method makes one number of each element of a tile"
            )
            raise ReasonvecError(message)
        return made.astype(np.float32)


def write_computed(
    path: Path,
    tensors: Sequence[Computation],
    handles: Sequence[core.Checkpoint | core.VectorFolder],
    *,
    allow_nonfinite: bool,
) -> None:
    """Make the tensors, tile by tile, into one safetensors file of float32.

    Raises:
        NonFiniteError: the function makes NaN or infinity.
        ReasonvecError: it makes something else than a tile.
        OSError: the file cannot be written.
    """
    import numpy as np

    entries: Json = {}
    end = 0
    for tensor in tensors:
        size = 4 * elements(tensor.shape)
        offsets = [end, end + size]
        entries[tensor.name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors:
            n = elements(tensor.shape)
            for start in range(0, n, TILE):
                made = tensor.tile(start, min(n, start + TILE), handles)
                finite = np.isfinite(made)
                if not allow_nonfinite and not finite.all():
                    at = start + int(np.argmin(finite))
                    message = f"{tensor.name}: element {at} of what the method makes is not finite"
                    raise NonFiniteError(message)
                file.write(np.ascontiguousarray(made, dtype="<f4").tobytes())


def method(
    function: Callable[Concatenate[list[Array], Array | None, _P], Array],
) -> MadeMethod:
    """Make a merge method of a function of NumPy arrays.

    The function gets ``models``, a list of one-dimensional float32 arrays (the same elements of the
    same tensor in each model), ``base`` (an array too, or None) and its parameters as keywords, and
    returns an array of the same length. It must be elementwise: a tile is any 262,144 elements of a
    tensor. Called with ``(models, base=None, **parameters)``, what is returned here gives a
    `Merge`; each parameter may be a number, a gradient, a mapping by name or a function of the
    name.

    Raises:
        ReasonvecError: (when saved) the function returns something else than a tile.
        NonFiniteError: (when saved) it makes NaN or infinity.

    Examples:
        >>> import numpy as np
        >>> import reasonvec as rv
        >>> @rv.method
        ... def larger(models, base, *, scale):
        ...     a, b = (model - base for model in models)
        ...     return base + scale * np.where(np.abs(a) > np.abs(b), a, b)
        >>> base, a, b = (rv.open(p) for p in (family.base, family.sft, family.instruct))
        >>> print(larger([a, b], base=base, scale=0.5).save("larger").recipe)
        larger(base base, sft, instruct, scale 0.5)
    """

    def merge(
        models: Sequence[AnyPoint], *, base: AnyPoint | None = None, **parameters: Parameter
    ) -> Merge:
        from reasonvec.merging.merge import Merge, Model, Module, Slice

        label = getattr(function, "__name__", "method")
        settings = {key: setting(value, f"{label}: {key}") for key, value in parameters.items()}
        own = Custom(cast("Function", function), tuple(parameters.items()))
        inputs = tuple(Model(point) for point in models)
        return Merge(own, (Module((Slice(inputs),)),), base, settings, called=label)

    merge.__name__ = getattr(function, "__name__", "method")
    merge.__doc__ = function.__doc__
    return merge
