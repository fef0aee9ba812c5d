"""Weighted sums of tensors, as terms of the core's plan."""

from __future__ import annotations

from collections.abc import Sequence

from reasonvec.json_values import Json

__all__ = ["gathered", "moved", "plain", "times"]


def times(c: float, term: Json) -> Json:
    return term | {"coefficient": c * float(str(term["coefficient"]))}


def plain(term: Json) -> object:
    """The tensor that a term is, element for element, or None."""
    source = term.get("source")
    if term["coefficient"] == 1.0 and isinstance(source, dict) and "tensor" in source:
        return source["tensor"]
    return None


def gathered(terms: list[Json]) -> list[Json]:
    """One term for each source: a base that is subtracted from several models is read once."""
    found: dict[str, Json] = {}
    for term in terms:
        key = repr({k: v for k, v in term.items() if k != "coefficient"})
        if key in found:
            total = float(str(found[key]["coefficient"])) + float(str(term["coefficient"]))
            found[key] = found[key] | {"coefficient": total}
        else:
            found[key] = term
    return [term for term in found.values() if term["coefficient"] != 0.0]


def moved(
    base: list[Json], values: Sequence[float], models: Sequence[list[Json]]
) -> tuple[object, list[Json]]:
    """Base plus scaled differences from it."""
    target = plain(base[0])
    terms: list[Json] = [] if target is not None else [dict(term) for term in base]
    rest = base[1:] if target is not None else []
    terms += rest
    for c, model in zip(values, models, strict=True):
        if c == 0.0:
            continue
        own = plain(model[0])
        if target is not None and own is not None:
            if own != target:
                terms.append({"coefficient": c, "source": {"difference": [own, target]}})
            terms += [times(c, term) for term in model[1:]]
            terms += [times(-c, term) for term in rest]
        else:
            terms += [times(c, term) for term in model]
            terms += [times(-c, term) for term in base]
    return target, gathered(terms)
