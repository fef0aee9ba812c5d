"""Experts of a target from a vector that stores them in the other way.

Which way is which, and for whom, is the table of `experts`; here are the element ranges.
"""

from __future__ import annotations

import math

from reasonvec.compat.configs import family_of
from reasonvec.compat.experts import REFUSED, ExpertLayout, layout_of, packed_part, split_part
from reasonvec.compat.layout import FLOATS, TensorInfo
from reasonvec.compat.placement import Found, Pair, Placement, Segment
from reasonvec.compat.problem import Problem, Severity

__all__ = ["Mixtures"]


class Mixtures:
    """``lenient`` is how bad it is that the vector lacks an expert."""

    def __init__(self, pair: Pair, lenient: Severity) -> None:
        self.pair = pair
        self.lenient = lenient
        self.table, self.refusal = self._choose()
        # The mixtures of the vector, by where they are: how many single matrices, or packed.
        self.split: dict[str, int] = {}
        self.packed: set[str] = set()
        for name in pair.deltas:
            if part := split_part(name):
                self.split[_block(part[0])] = self.split.get(_block(part[0]), 0) + 1
            elif whole := packed_part(name):
                self.packed.add(_block(whole[0]))

    def place(self, source: str, info: TensorInfo) -> Found | None:
        """For a name that the vector lacks; None if it has nothing for it in any storage."""
        packed, split = packed_part(source), split_part(source)
        if packed is not None and _block(packed[0]) in self.split:
            if self.table is None:
                return self._refuse(info)
            return self._pack(self.table, *packed, info)
        if split is not None and _block(split[0]) in self.packed:
            if self.table is None:
                return self._refuse(info)
            return self._unpack(self.table, *split, info)
        if packed is None and split is None and self.table is not None:
            for other in self.table.other_names(source):
                delta = self.pair.delta(other)
                if delta is None:
                    continue
                if delta.dtype not in FLOATS:
                    return self.pair.refuse_dtype(info, delta, other)
                if delta.shape != info.shape:
                    return self.pair.refuse_shape(info, delta, other)
                return Found(Placement(delta.name), used={other})
        return None

    def _choose(self) -> tuple[ExpertLayout | None, str]:
        configs = (self.pair.target.config, self.pair.vector.config)
        families = [family for family in map(family_of, configs) if family is not None]
        for family in families:
            if family in REFUSED:
                return None, f"{family} {REFUSED[family]}"
        tables = {layout_of(family) for family in families}
        if not tables:
            return None, "no config.json on either side names its model_type"
        if None in tables or len(tables) > 1:
            named = " and ".join(dict.fromkeys(families))
            return None, f"{named} is not in the table of expert layouts as one family"
        return tables.pop(), ""

    def _refuse(self, info: TensorInfo) -> Found:
        message = (
            f"{self.pair.at(info)}: {self.pair.target.path} and {self.pair.vector.path} store "
            f"their experts differently, one by one against packed, and {self.refusal}; shapes "
            "cannot tell how to convert them, so save both in one layout with transformers first"
        )
        found = self.pair.refuse("experts", message, info)
        # They are not dropped for want of a place: one refusal says it all.
        found.used = {name for name in self.pair.deltas if packed_part(name) or split_part(name)}
        return found

    def _pack(self, table: ExpertLayout, stem: str, part: str, info: TensorInfo) -> Found:
        """A packed tensor of the target from the matrices of single experts."""
        split = table.split_stem(stem)
        projections = (table.gate, table.up) if part == "gate_up_proj" else (table.down,)
        if split is None or len(info.shape) != 3 or info.shape[1] % len(projections):
            message = (
                f"{self.pair.at(info)} is {list(info.shape)}: expected (experts, rows, columns) "
                f"under {table.packed}; save the target with transformers first"
            )
            return self.pair.refuse("experts", message, info)
        experts, rows, columns = info.shape
        shape = (rows // len(projections), columns)
        length = math.prod(shape)
        found = Found(reason="refused: experts")
        segments: list[Segment] = []
        absent: list[str] = []
        # A file says how many experts there are: one more than there can be shows that some lack.
        for expert in range(min(experts, self.split[_block(stem)] + 1)):
            for place, projection in enumerate(projections):
                name = f"{split}.{expert}.{projection}.weight"
                delta = self.pair.delta(name)
                if delta is None:
                    absent.append(name)
                    continue
                found.used.add(name)
                if delta.shape != shape or delta.dtype not in FLOATS:
                    found.problems.append(self._unfit(info, delta, shape))
                elif length:
                    at = (expert * len(projections) + place) * length
                    segments.append(Segment(at, length, delta.name, 0))
        if absent:
            found.problems.append(self._absent(info, absent[0], experts))
        if any(problem.severity == "error" for problem in found.problems):
            return found
        if segments:
            found.placement = Placement(segments[0].name, tuple(segments))
        else:
            found.reason = "the vector has none of its experts"
        return found

    def _unpack(
        self, table: ExpertLayout, stem: str, expert: int, projection: str, info: TensorInfo
    ) -> Found | None:
        """The matrix of a single expert of the target from a packed tensor."""
        places = {table.gate: (0, 2), table.up: (1, 2), table.down: (0, 1)}
        packed = table.packed_stem(stem)
        if packed is None or projection not in places:
            return None
        place, of = places[projection]
        name = f"{packed}.{'down_proj' if of == 1 else 'gate_up_proj'}"
        delta = self.pair.delta(name)
        if delta is None:
            return None
        found = Found(reason="refused: experts", used={name})
        if len(info.shape) != 2 or len(delta.shape) != 3:
            return self.pair.refuse_shape(info, delta, name)
        rows, columns = info.shape
        expected = (delta.shape[0], rows * of, columns)
        if delta.shape != expected or delta.dtype not in FLOATS:
            found.problems.append(self._unfit(info, delta, expected))
        elif expert >= delta.shape[0]:
            found.reason = "the vector has fewer experts"
            found.problems.append(self._absent(info, f"{name}[{expert}]", expert + 1))
        else:
            length = rows * columns
            start = (expert * of + place) * length
            segments = (Segment(0, length, delta.name, start),) if length else ()
            found.placement = Placement(delta.name, segments)
        return found

    def _unfit(self, info: TensorInfo, delta: TensorInfo, expected: tuple[int, ...]) -> Problem:
        return Problem(
            "shape",
            f"{self.pair.of(delta)} is {list(delta.shape)} of {delta.dtype}: expected floats of "
            f"{list(expected)} for {self.pair.at(info)}, which is {list(info.shape)}; take donors "
            "of the target's size, or save both in one layout with transformers first",
            info.name,
        )

    def _absent(self, info: TensorInfo, first: str, experts: int) -> Problem:
        return Problem(
            "missing",
            f"{self.pair.at(info)} needs {experts} experts, but {self.pair.vector.path} "
            f"has no {first}; take donors with the same experts, or pass missing=skip to leave the "
            "others as they are",
            info.name,
            self.lenient,
        )


def _block(stem: str) -> str:
    """Where a mixture is: its stem without the module's own name, which storages spell apart."""
    return stem.rpartition("experts")[0].rstrip(".").rpartition(".")[0]
