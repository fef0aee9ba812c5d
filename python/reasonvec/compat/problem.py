"""One thing that does not fit, in words a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from reasonvec.errors import MismatchError

__all__ = ["Problem", "Severity", "demand", "fold", "shorten"]

Severity: TypeAlias = Literal["error", "warning"]

_NUMBER = re.compile(r"\d+")
# A model of other depth has hundreds of missing tensors; their kinds are what one reads.
_SHOWN = 20


class Problem(NamedTuple):
    """``kind`` is for machines: alias, config, dtype, experts, missing, prefix, quantised, shape,
    tied, tokenizer, unused or vocab. ``message`` says where, what was expected and found, and what
    to do."""

    kind: str
    message: str
    tensor: str | None = None
    severity: Severity = "error"


def shorten(value: object, limit: int = 80) -> str:
    """The value as a message shows it: a stranger's config may hold a string of any length."""
    text = str(value) if isinstance(value, float) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def fold(problems: Iterable[Problem]) -> list[tuple[Problem, int]]:
    """The first problem of each sort and how many there are: tensors that differ only in a number
    (the layer, the expert) with the same kind and severity are one sort."""
    groups: dict[tuple[str, str, str], tuple[Problem, int]] = {}
    for number, problem in enumerate(problems):
        sort = str(number) if problem.tensor is None else _NUMBER.sub("*", problem.tensor)
        key = (problem.kind, problem.severity, sort)
        first, count = groups.get(key, (problem, 0))
        groups[key] = (first, count + 1)
    return list(groups.values())


def demand(problems: Iterable[Problem]) -> None:
    """Raise one MismatchError that tells every error among the problems; warnings pass."""
    folded = fold(problem for problem in problems if problem.severity == "error")
    if not folded:
        return
    lines = [
        problem.message if count == 1 else f"{problem.message} (and {count - 1} more like it)"
        for problem, count in folded[:_SHOWN]
    ]
    if len(folded) > _SHOWN:
        lines.append(f"... and {len(folded) - _SHOWN} more sorts of problem")
    raise MismatchError("\n".join(lines))
