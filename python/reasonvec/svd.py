"""Singular triplets of a matrix that is read tile by tile: the one way into the core's engine."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Unpack

from reasonvec import _reasonvec as core
from reasonvec._reasonvec import Tensor
from reasonvec.json_values import Json
from reasonvec.run import RunOptions, settings

if TYPE_CHECKING:
    from reasonvec.matrices import Matrices
    from reasonvec.spectrum import Spectra
    from reasonvec.terms import Operands

__all__ = ["Decomposable", "Svd", "check_seed", "rank_rule", "recompress", "svd"]


@dataclass(frozen=True, slots=True)
class Svd:
    """Singular triplets of a matrix ``[m, n]``: ``u`` ``[m, r]``, ``s`` ``[r]`` (F64), ``vt``
    ``[r, n]``, singular values descending.

    ``squares`` is the sum of squares of the whole matrix, ``residual`` the Frobenius norm of what
    the triplets leave.
    ``floor``, where the rank was ``"auto"``, is the singular value that the others had to exceed.
    The tensors go to ``numpy.asarray`` and ``torch.from_dlpack`` without a copy.
    """

    name: str
    u: Tensor
    s: Tensor
    vt: Tensor
    rank: int
    squares: float
    residual: float
    floor: float | None

    @property
    def norm(self) -> float:
        """The matrix's Frobenius norm."""
        return math.sqrt(self.squares)


def rank_rule(
    rank: int | str | None, energy: float | None = None, error: float | None = None
) -> object:
    """The core's word for how many triplets to take.

    Raises:
        ValueError: not exactly one rule is given, or it makes no sense.
    """
    if sum(x is not None for x in (rank, energy, error)) != 1:
        message = "give one of rank=N, rank='auto', energy=SHARE and error=SHARE"
        raise ValueError(message)
    for key, share in (("energy", energy), ("error", error)):
        if share is not None:
            if not 0.0 <= share <= 1.0:
                message = f"{key} is a share from 0 to 1, not {share}"
                raise ValueError(message)
            return {key: float(share)}
    if rank == "auto":
        return "noise"
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        message = f"rank is a number of singular values from 1 on, or 'auto', not {rank!r}"
        raise ValueError(message)
    # More than a matrix has is all of them, and the core's numbers end somewhere.
    return {"fixed": min(rank, 1 << 32)}


def check_seed(seed: int) -> None:
    """Raise ValueError if it is no seed: a number of 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        message = f"seed is a whole number from 0 to 2**64 - 1, not {seed!r}"
        raise ValueError(message)


def svd(
    matrix: Json,
    operands: Operands,
    *,
    rule: object,
    which: Literal["top", "bottom"] = "top",
    seed: int = 0,
    double: bool = False,
    options: RunOptions | None = None,
) -> Svd:
    """Singular triplets of the matrix that a `Matrices.plan` names; see `Decomposable.svd`."""
    check_seed(seed)
    options = {} if options is None else options
    plan = matrix | {"rank": rule, "which": which, "seed": seed, "settings": settings(options)}
    found = core.svd(json.dumps(plan), operands.handles, options.get("progress"), double)
    name, number = matrix["name"], matrix.get("number")
    return _found(str(name) if number is None else f"{name}[{number}]", found)


def recompress(name: str, u: bytes, v: bytes, size: tuple[int, int, int], *, rule: object) -> Svd:
    """Singular triplets of ``u @ v.T`` from the factors alone: ``u`` ``[m, k]`` and ``v``
    ``[n, k]`` as float32 in row-major order, ``size`` ``(m, n, k)``."""
    return _found(name, core.recompress(u, v, *size, json.dumps(rule)))


def _found(name: str, found: tuple[Tensor, Tensor, Tensor, str]) -> Svd:
    u, s, vt, said = found
    rest: dict[str, float | None] = json.loads(said)
    return Svd(
        name,
        u,
        s,
        vt,
        int(rest["rank"] or 0),
        rest["squares"] or 0.0,
        rest["residual"] or 0.0,
        rest["floor"],
    )


class Decomposable(ABC):
    """An expression whose matrices have singular values: a vector, a checkpoint, a point."""

    __slots__ = ()

    @abstractmethod
    def _matrices(self) -> Matrices:
        """Its matrices, by name, and what they are made of."""

    def svd(
        self,
        name: str,
        rank: int | Literal["auto"] | None = None,
        *,
        energy: float | None = None,
        error: float | None = None,
        number: int | None = None,
        which: Literal["top", "bottom"] = "top",
        seed: int = 0,
        double: bool = False,
        **options: Unpack[RunOptions],
    ) -> Svd:
        """Singular triplets of one matrix of the expression, read in a few passes and never held.

        Args:
            name: a tensor of shape ``[m, n]``, or ``[E, m, n]`` with ``number``.
            rank: how many, or ``"auto"``: those above the noise floor, the largest singular value
                of the same matrix with random signs.
            energy: as few as hold this share of the sum of squares.
            error: as few as leave this share of the norm at most.
            number: which matrix of a stack.
            which: the largest (randomised, nearly optimal) or the smallest (from the Gram matrix in
                f64, exact; by ``rank`` alone).
            seed: of the random test matrix; the same seed gives the same bits everywhere.
            double: vectors in F64 (for the smallest), not F32.

        Raises:
            MismatchError: there is no such matrix.
            NonFiniteError: NaN or infinity in it.
            ValueError: a rank, share or seed that makes no sense.

        Examples:
            >>> import reasonvec as rv
            >>> reason = rv.open(family.rl) - rv.open(family.sft)
            >>> found = reason.svd("model.layers.0.mlp.up_proj.weight", rank=4)
            >>> found.u, found.vt
            (Tensor(F32, [176, 4]), Tensor(F32, [4, 64]))
        """
        matrices = self._matrices()
        return svd(
            matrices.plan(name, number),
            matrices.operands,
            rule=rank_rule(rank, energy, error),
            which=which,
            seed=seed,
            double=double,
            options=options,
        )

    def spectrum(
        self, *, count: int | None = 64, seed: int = 0, **options: Unpack[RunOptions]
    ) -> Spectra:
        """Leading singular values of every matrix against its noise floor; ``count=None`` for
        all.

        Raises:
            NonFiniteError: NaN or infinity in a matrix.
            ValueError: ``count`` is less than 1, or ``seed`` is none.
        """
        from reasonvec.spectrum import spectra

        return spectra(self._matrices(), count=count, seed=seed, options=options)
