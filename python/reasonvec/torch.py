"""Vectors on a live `torch.nn.Module`: what an alpha sweep needs.

    from reasonvec.torch import add_, subtract_

    for alpha in (0.2, 0.4, 0.6, 0.8, 1.0):
        add_(model, reason, alpha)
        scores[alpha] = evaluate(model)
        subtract_(model, reason, alpha)      # bit for bit what it was

No other module of the package imports torch.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from reasonvec import _reasonvec as core
from reasonvec.algebra import Vector
from reasonvec.compat.layout import Layout, TensorInfo
from reasonvec.compat.problem import Problem, demand
from reasonvec.errors import MismatchError, NonFiniteError
from reasonvec.json_values import Json
from reasonvec.reference import Dtype, narrow
from reasonvec.terms import Operands, place_term

__all__ = ["add_", "subtract_", "to_torch"]

_NAMES: dict[torch.dtype, Dtype] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements that are updated at a time: 16 MiB of float32.
_CHUNK = 1 << 22


@dataclass
class _Kept:
    """The originals of one `add_`: per tensor and chunk the elements that changed, or all."""

    vector: Vector
    alpha: float
    chunks: list[tuple[str, int, torch.Tensor | None, torch.Tensor]] = field(default_factory=list)


_kept: weakref.WeakKeyDictionary[torch.nn.Module, list[_Kept]] = weakref.WeakKeyDictionary()


def add_(module: torch.nn.Module, vector: Vector, alpha: float = 1.0) -> None:
    """Add ``alpha * vector`` to a module's parameters and buffers in place, rounding once, as
    `apply` does, and keep what changed for `subtract_`.

    Args:
        module: its parameter names must be those of the vector's donors; tied parameters are
            changed once.
        vector: any expression of `reasonvec`.
        alpha: times the vector.

    Raises:
        MismatchError: the vector does not fit the module; every problem is told and nothing is
            changed.
        NonFiniteError: an update makes a parameter NaN or infinite; everything is put back.
    """
    kept = _Kept(vector, float(alpha))
    tensors = dict(_tensors(module))
    operands, terms = _terms(module, tensors, vector * float(alpha))
    try:
        with torch.no_grad():
            for name, term in terms.items():
                _add_tensor(name, tensors[name], term, operands, kept)
    except BaseException:
        _put_back(tensors, kept)
        raise
    _kept.setdefault(module, []).append(kept)


def subtract_(module: torch.nn.Module, vector: Vector, alpha: float = 1.0) -> None:
    """Take back the last `add_` of the same vector and alpha, bit for bit, from the originals it
    kept.

    Raises:
        MismatchError: the last `add_` on this module was another one, or there was none. For the
            opposite direction, which is not the way back, use ``add_(module, vector, -alpha)``.
    """
    stack = _kept.get(module, [])
    if not stack or stack[-1].alpha != float(alpha) or stack[-1].vector.terms != vector.terms:
        last = (
            f"the last was {stack[-1].alpha:g} * ({stack[-1].vector})"
            if stack
            else "there was none"
        )
        message = (
            f"subtract_ takes back the last add_ of the same vector and alpha, and {last}; for the "
            f"opposite direction call add_(module, vector, {-alpha:g})"
        )
        raise MismatchError(message)
    _put_back(dict(_tensors(module)), stack.pop())


def to_torch(
    tensor: core.Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """A tensor of a checkpoint or of a factor file, copied: it may be changed and moved, which one
    that shares a file's bytes (`torch.from_dlpack`) may not.

    Args:
        tensor: of any dtype that torch has; bf16 stays bf16.
        dtype: the tensor's own by default.
        device: the processor by default.
    """
    there = from_dlpack(tensor)
    return there.to(
        device=there.device if device is None else device,
        dtype=there.dtype if dtype is None else dtype,
        copy=True,
    )


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    persistent = set(module.state_dict(keep_vars=True))
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _config(module: torch.nn.Module) -> Mapping[str, object]:
    config = getattr(module, "config", None)
    to_dict = getattr(config, "to_dict", None)
    found = to_dict() if callable(to_dict) else {}
    return found if isinstance(found, dict) else {}


def _terms(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], vector: Vector
) -> tuple[Operands, dict[str, list[Json]]]:
    infos = {
        name: TensorInfo(name, _NAMES.get(t.dtype, "I64"), tuple(t.shape), type(module).__name__)
        for name, t in tensors.items()
    }
    layout = Layout(Path(type(module).__name__), infos, _config(module))
    operands = Operands()
    terms: dict[str, list[Json]] = {}
    problems: list[Problem] = []
    for scaled in vector.terms:
        # A module has no tokenizer; its rows are compared by count.
        placed = place_term(scaled, layout, operands)
        problems += placed.problems
        for name, term in placed.terms.items():
            terms.setdefault(name, []).append(term)
    demand(problems)
    return operands, terms


def _add_tensor(
    name: str, tensor: torch.Tensor, terms: list[Json], operands: Operands, kept: _Kept
) -> None:
    flat = tensor.data.view(-1) if tensor.is_contiguous() else tensor.data.reshape(-1)
    n = flat.numel()
    text = json.dumps(terms)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        update = from_dlpack(
            core.values(text, name, n, start, stop, operands.handles, tensor.dtype == torch.float64)
        )
        update = update.to(flat.device)
        old = flat[start:stop]
        wide = torch.float64 if old.dtype == torch.float64 else torch.float32
        moved = update != 0
        new = torch.where(moved, (old.to(wide) + update.to(wide)).to(old.dtype), old)
        for at, lo in core.corrections(text, name, n, start, stop, operands.handles):
            new[at] = _corrected(float(old[at]), float(update[at]), lo, new[at])
        if not torch.isfinite(new).all():
            message = f"{name}: the update makes elements NaN or infinite; use a smaller alpha"
            raise NonFiniteError(message)
        bits = _BITS[old.element_size()]
        changed = new.view(bits) != old.view(bits)  # not `new != old`, which takes -0 for +0
        count = int(changed.sum())
        if count == 0:
            continue
        if count * 4 < (stop - start):
            kept.chunks.append(
                (name, start, changed.nonzero().view(-1).to(torch.int32), old[changed].clone())
            )
        else:
            kept.chunks.append((name, start, None, old.clone()))
        old.copy_(new)
    if not tensor.is_contiguous():
        tensor.data.copy_(flat.view(tensor.shape))


def _corrected(t: float, u: float, correction: float, like: torch.Tensor) -> torch.Tensor:
    """``(t + u) + correction`` in float64, rounded once; a zero takes the correction's sign."""
    total = (t + u) + correction
    if total == 0.0:
        total = math.copysign(0.0, correction)
    # torch takes float64 to a short format by way of float32, which rounds twice.
    bits = narrow(np.array([total]), _NAMES[like.dtype])
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(like.dtype)[0]


def _put_back(tensors: dict[str, torch.Tensor], kept: _Kept) -> None:
    with torch.no_grad():
        for name, start, positions, values in reversed(kept.chunks):
            tensor = tensors[name]
            flat = tensor.data.view(-1) if tensor.is_contiguous() else tensor.data.reshape(-1)
            if positions is None:
                flat[start : start + values.numel()] = values
            else:
                flat[start + positions.to(torch.int64)] = values
            if not tensor.is_contiguous():
                tensor.data.copy_(flat.view(tensor.shape))
