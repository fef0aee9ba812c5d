"""Readable NumPy versions of the spectral engine: the specification, and the oracle of its tests.

`krylov` is the algorithm of ``rust/linalg/rsvd.rs`` in f64 and with NumPy's own SVD; `flipped` and
`noise_floor` make the same signs as the core, so that floors and ranks can be compared.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from reasonvec.reference.philox import key64, words

__all__ = ["bottom", "flipped", "krylov", "noise_floor", "noise_rank", "signs"]

Array: TypeAlias = NDArray[np.float64]
SIGNS_STREAM = 17


def signs(elements: int, name: str, seed: int = 0) -> Array:
    """+1 or -1 per element: -1 where bit ``i % 32`` of word ``i // 32 % 4`` at counter ``i // 128``
    of the tensor's generator (stream 17) is set."""
    drawn = words(key64(seed, name, SIGNS_STREAM), np.arange(-(-elements // 128), dtype=np.uint64))
    bits = (drawn[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return 1.0 - 2.0 * bits.reshape(-1)[:elements].astype(np.float64)


def flipped(a: Array, name: str, seed: int = 0) -> Array:
    """The matrix with random signs."""
    return a * signs(a.size, name, seed).reshape(a.shape)


def noise_floor(a: Array, name: str, seed: int = 0) -> float:
    """The largest singular value of the matrix with random signs: what entries of these sizes make
    without any structure."""
    return float(np.linalg.norm(flipped(a, name, seed), 2))


def noise_rank(a: Array, name: str, seed: int = 0) -> int:
    """How many singular values stand above the noise floor."""
    values = np.linalg.svd(a, compute_uv=False)
    return int((values > noise_floor(a, name, seed)).sum())


def krylov(a: Array, start: Array, rank: int, depth: int) -> tuple[Array, Array, Array]:
    """U, S and V^T of the projection of ``a`` on the range of ``a V``, with ``V`` an orthonormal
    basis of ``start, (a^T a) start, ..., (a^T a)^(depth - 1) start`` (Musco and Musco, NeurIPS
    2015)."""
    blocks: list[Array] = []
    block = start
    for _ in range(depth):
        for _ in range(2):
            for v in blocks:
                block = block - v @ (v.T @ block)
            block = np.linalg.qr(block)[0]
        blocks.append(block)
        block = a.T @ (a @ block)
    q = np.linalg.qr(a @ np.concatenate(blocks, axis=1))[0]
    u, s, vt = np.linalg.svd(q.T @ a, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank]


def bottom(a: Array, rank: int) -> Array:
    """The part of the matrix in its ``rank`` smallest singular triplets."""
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    part: Array = (u[:, -rank:] * s[-rank:]) @ vt[-rank:]
    return part
