"""Merges that are one sum with constant coefficients; and the rounding that ends every merge.

A merge of one tensor takes its models as flat ``Work`` arrays [n], all of one work type W (float64
if any operand or the output is F64, else float32), in the order of the recipe, and gives the update
``u`` [n]. `merged` rounds it: ``base + u`` for the methods that work on task vectors
``d_i = x_i - base``, and ``u`` itself for those that work on the models.

Every operation on elements is rounded to W. Weights and other scalars are Python floats (F64);
what is computed from scalars alone is computed in F64, from left to right, and rounded to W where
it first meets an element.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reasonvec.reference.formats import Bits, Dtype, Work, as_work, narrow, widen, work_of
from reasonvec.reference.measures import in_order
from reasonvec.reference.update import combine, finish

__all__ = [
    "linear",
    "lines",
    "merged",
    "normalized",
    "passthrough",
    "step",
    "task_arithmetic",
    "tasks",
]


def merged(u: Work, out_dtype: Dtype, base: Bits | None = None, dtype: Dtype = "F32") -> Bits:
    """The output [n] of a merge, rounded once: ``base`` (bits of ``dtype``) plus u, or u alone.

    >>> merged(np.array([1.00390625], np.float32), "BF16")
    array([16256], dtype=uint16)
    """
    return narrow(u, out_dtype) if base is None else finish(base, dtype, u, out_dtype)


def step(x: Work, steps: Dtype | None) -> Work:
    """What a step of a merge leaves [n]: as it is, or rounded to a format and widened again.

    >>> step(np.float32([1.001]), "BF16")
    array([1.], dtype=float32)
    """
    if steps is None:
        return x
    return widen(narrow(x, steps), steps, "F64" if x.dtype == np.float64 else "F32")


def tasks(models: Sequence[Work], base: Work, steps: Dtype | None = None) -> list[Work]:
    """The task vectors d_i = x_i - base [n], subtracted in W (arXiv 2212.04089).

    With ``steps``, models, base and differences are each rounded to that format.
    """
    with np.errstate(all="ignore"):
        start = step(base, steps)
        return [step(as_work(step(x, steps) - start, work_of(base)), steps) for x in models]


def normalized(weights: Sequence[float]) -> list[float]:
    """w_i / sum of w, in F64. ValueError if the sum is zero.

    >>> normalized([1.0, 3.0])
    [0.25, 0.75]
    """
    total = in_order(weights)
    if total == 0:
        raise ValueError(f"the weights {list(weights)} add up to zero, so they have no mean")
    return [w / total for w in weights]


def linear(models: Sequence[Work], weights: Sequence[float], normalize: bool = True) -> Work:
    """The weighted mean sum(w_i x_i) / sum(w_i), or the sum itself (arXiv 2203.05482).

    >>> linear([np.float32([1, 2]), np.float32([3, 6])], [1.0, 1.0])
    array([2., 4.], dtype=float32)
    """
    return combine(models, normalized(weights) if normalize else weights, work_of(models[0]))


def task_arithmetic(
    models: Sequence[Work],
    base: Work,
    weights: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Work:
    """lambda * sum(w_i d_i), over the base (arXiv 2212.04089).

    One coefficient for each model, lambda * w_i, with w_i divided by their sum if ``normalize``.

    >>> task_arithmetic([np.float32([1, 2]), np.float32([3, 6])], np.float32([1, 1]), [1.0, 0.5])
    array([1. , 3.5], dtype=float32)
    """
    found = normalized(weights) if normalize else weights
    return combine(tasks(models, base), [lambda_ * w for w in found], work_of(base))


def passthrough(model: Work, scale: float = 1.0) -> Work:
    """scale * x. With a scale of 1 the output is a copy, bit for bit.

    >>> passthrough(np.float32([1, 2]), 0.5)
    array([0.5, 1. ], dtype=float32)
    """
    return combine([model], [scale], work_of(model))


def lines(layer: int, layers: int, alpha: float, beta: float) -> float:
    """The scale of a task vector in a layer, alpha + beta * l / (L - 1) (arXiv 2410.17146).

    Layers count from 0; what lies before the first takes alpha, as does the only layer of one.

    >>> [lines(layer, 3, 0.5, 1.0) for layer in range(3)]
    [0.5, 1.0, 1.5]
    """
    return alpha if layers <= 1 else alpha + beta * (layer / (layers - 1))
