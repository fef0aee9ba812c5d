"""Random numbers: value = f(seed, tensor name, index), so that any block can be made anywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reasonvec.reference.elementary import cos_sin_turns, ln
from reasonvec.reference.formats import as_f64

__all__ = [
    "RANDOM_STREAM",
    "SHUFFLE_STREAM",
    "fnv1a64",
    "key64",
    "normal",
    "philox4x32",
    "splitmix64",
    "words",
]

RANDOM_STREAM = 1
SHUFFLE_STREAM = 2
_LOW32 = np.uint64(0xFFFFFFFF)
_MASK64 = 2**64 - 1


def splitmix64(x: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood 2014): spreads 64 bits over all 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def fnv1a64(data: bytes) -> int:
    """The 64-bit FNV-1a hash.

    >>> hex(fnv1a64(b"a"))
    '0xaf63dc4c8601ec8c'
    """
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & _MASK64
    return h


def key64(seed: int, name: str, stream: int) -> int:
    """The Philox key of one use (``stream``) of a seed on a tensor; its low word comes first."""
    purpose = splitmix64(stream ^ 0x5265617356656300)
    return splitmix64(fnv1a64(name.encode()) ^ splitmix64(seed) ^ purpose)


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: counters [n, 4] to random words [n, 4].

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    >>> [hex(x) for x in philox4x32(np.zeros((1, 4), np.uint32), (0, 0))[0]]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    x0, x1, x2, x3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        a = x0 * np.uint64(0xD2511F53)
        b = x2 * np.uint64(0xCD9E8D57)
        x0, x1 = (b >> np.uint64(32)) ^ x1 ^ np.uint64(k0), b & _LOW32
        x2, x3 = (a >> np.uint64(32)) ^ x3 ^ np.uint64(k1), a & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32)


def words(key: int, counters: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The random words [n, 4] of 64-bit counters [n]: low word first, then two words of zero."""
    counter = np.zeros((counters.size, 4), np.uint32)
    counter[:, 0] = (counters & _LOW32).astype(np.uint32)
    counter[:, 1] = (counters >> np.uint64(32)).astype(np.uint32)
    return philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))


def normal(key: int, index: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal deviates [n] at the given indices [n] (Box and Muller 1958).

    Indices 2j and 2j + 1 are the cosine and the sine of counter j. Its words make two numbers of
    52 bits, the first in the middle of its step so that the logarithm never sees zero.
    """
    x = words(key, index >> np.uint64(1)).astype(np.uint64)
    u1 = (as_f64((x[:, 0] << np.uint64(20)) | (x[:, 1] >> np.uint64(12))) + 0.5) * 2.0**-52
    u2 = as_f64((x[:, 2] << np.uint64(20)) | (x[:, 3] >> np.uint64(12))) * 2.0**-52
    cos, sin = cos_sin_turns(u2)
    return np.sqrt(-2.0 * ln(u1)) * np.where(index % np.uint64(2) == 0, cos, sin)
