"""What can go wrong, by what the caller can do about it.

The extension raises these same classes: it looks them up here. A file that cannot be read or
written is the builtin OSError of that reason, with its filename, as everywhere else in Python."""

from __future__ import annotations

__all__ = ["DamageError", "FormatError", "MismatchError", "NonFiniteError", "ReasonvecError"]


class ReasonvecError(Exception):
    """Any refusal of reasonvec."""


class FormatError(ReasonvecError, ValueError):
    """A file breaks its own format, or tries to."""


class MismatchError(ReasonvecError, ValueError):
    """Checkpoints, vectors or their configs do not fit together."""


class NonFiniteError(ReasonvecError, ValueError):
    """NaN or infinity in an input, or an output that overflowed."""


class DamageError(ReasonvecError):
    """Bytes are not those that a digest was taken of."""
