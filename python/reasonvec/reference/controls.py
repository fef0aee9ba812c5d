"""Controls: what a vector must beat before its direction gets the credit. They take and give the
values of one vector on one tensor, before any coefficient."""

from __future__ import annotations

import math

import numpy as np

from reasonvec.reference.formats import Index, Work, as_work, work_of
from reasonvec.reference.measures import BLOCK, fixed_dot
from reasonvec.reference.philox import (
    RANDOM_STREAM,
    SHUFFLE_STREAM,
    key64,
    normal,
    splitmix64,
    words,
)

__all__ = [
    "permutation",
    "random",
    "reverse",
    "shuffle",
]


def reverse(v: Work) -> Work:
    """The opposite vector [n]: if v helps, this should hurt. Second parts change sign with it."""
    return -v


def random(v: Work, seed: int, name: str) -> Work:
    """Noise [n] with the norm of ``v``: would any push of that length have done?

    Second parts are ignored and none are made; ``shuffle`` does the same.
    """
    z = normal(key64(seed, name, RANDOM_STREAM), np.arange(v.size, dtype=np.uint64))
    energy = fixed_dot(v, v)
    scale = math.sqrt(energy / fixed_dot(z, z)) if energy > 0 else 0.0
    return as_work(z * scale, work_of(v))


def shuffle(v: Work, seed: int, name: str) -> Work:
    """The same values [n] at other places: does it matter which element gets which change?"""
    return v[permutation(v.size, seed, name)]


def permutation(n: int, seed: int, name: str) -> Index:
    """The source index [n] of every destination.

    Whole blocks change places, then elements change places inside each block, so that memory for
    one block is enough. A shorter last block stays where it is.
    """
    whole = n // BLOCK
    order = [*_fisher_yates(whole, key64(seed, name, SHUFFLE_STREAM)).tolist(), whole]
    perm = np.empty(n, np.int64)
    for b in range(-(-n // BLOCK)):
        inside = perm[b * BLOCK : (b + 1) * BLOCK]
        key = key64(seed ^ splitmix64(b + 1), name, SHUFFLE_STREAM)
        inside[:] = order[b] * BLOCK + _fisher_yates(inside.size, key)
    return perm


def _fisher_yates(n: int, key: int) -> Index:
    a = list(range(n))
    drawn = words(key, np.arange((n + 3) // 4, dtype=np.uint64)).ravel().tolist()
    for i, r in zip(range(n - 1, 0, -1), drawn, strict=False):
        j = (r * (i + 1)) >> 32
        a[i], a[j] = a[j], a[i]
    return np.array(a, np.int64)
