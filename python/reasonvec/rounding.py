"""What rounding made of an update: realised change against intended change (design: numerics)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Rounding"]


@dataclass(frozen=True, slots=True)
class Rounding:
    """Sums over elements, with ``u`` the intended update of an element and ``r`` what its output
    changed by: ``intended`` is the sum of u*u, ``realised`` of r*r, ``dot`` of u*r; ``updated``
    counts u != 0, ``lost`` those of them whose output equals the target."""

    intended: float = 0.0
    realised: float = 0.0
    dot: float = 0.0
    updated: int = 0
    lost: int = 0

    @classmethod
    def of(cls, row: Mapping[str, float | None]) -> Rounding:
        """From the core's report; a sum that is not finite comes as None, and is NaN here."""
        sums = (row[key] for key in ("intended", "realised", "dot"))
        intended, realised, dot = (math.nan if x is None else x for x in sums)
        return cls(intended, realised, dot, int(row["updated"] or 0), int(row["lost"] or 0))

    @classmethod
    def total(cls, parts: Iterable[Rounding]) -> Rounding:
        total = cls()
        for part in parts:
            total = cls(
                total.intended + part.intended,
                total.realised + part.realised,
                total.dot + part.dot,
                total.updated + part.updated,
                total.lost + part.lost,
            )
        return total

    @property
    def cosine(self) -> float | None:
        """Cosine between realised and intended change; None if one of them is zero."""
        length = math.sqrt(self.intended) * math.sqrt(self.realised)
        return self.dot / length if length > 0 else None

    @property
    def norm_ratio(self) -> float | None:
        """Length of the realised change over the intended one's; None if nothing was intended."""
        return math.sqrt(self.realised / self.intended) if self.intended > 0 else None

    @property
    def lost_share(self) -> float | None:
        """Share of updates that rounding swallowed whole; None if there were none."""
        return self.lost / self.updated if self.updated else None

    def as_json(self) -> dict[str, object]:
        """For a manifest: None where there is no number, because JSON has no NaN."""

        def number(x: float | None) -> float | None:
            return x if x is not None and math.isfinite(x) else None

        return {
            "intended_norm": number(math.sqrt(self.intended)),
            "realised_norm": number(math.sqrt(self.realised)),
            "cosine": number(self.cosine),
            "norm_ratio": number(self.norm_ratio),
            "updated": self.updated,
            "lost": self.lost,
            "lost_share": self.lost_share,
        }
