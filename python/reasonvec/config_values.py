"""The values of a mergekit YAML, checked: what is wrong is noted, and reading goes on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reasonvec.compat.problem import Problem, shorten
from reasonvec.merging.method import Method
from reasonvec.merging.parameters import Conditions, Setting

__all__ = ["CONDITION", "ConfigValues"]

CONDITION = ("filter", "value")
_DTYPES = {
    "float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "float": "float32",
    "half": "float16", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
}  # fmt: skip
# How mergekit holds its masks in memory: means nothing where none is held.
_IDLE_PARAMETERS = frozenset({"int8_mask"})


@dataclass
class ConfigValues:
    """One file, and what is wrong with it."""

    path: Path
    strict: bool
    problems: list[Problem] = field(default_factory=list)

    # ---- saying what is wrong

    def error(self, where: str, message: str) -> None:
        at = f"{self.path}: {where}: " if where else f"{self.path}: "
        self.problems.append(Problem("config", at + message))

    def unknown(self, where: str, key: object, known: Iterable[str], what: str = "key") -> None:
        near = difflib.get_close_matches(str(key), list(known), 1, 0.5)
        meant = (
            f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
        )
        at = f"{self.path}: {where}: " if where else f"{self.path}: "
        message = f"{at}the {what} {shorten(key)} is not known, and changes nothing{meant}"
        self.problems.append(
            Problem("key", message, severity="error" if self.strict else "warning")
        )

    def keys(self, where: str, value: Mapping[object, object], known: Sequence[str]) -> None:
        for key in value:
            if key not in known:
                self.unknown(where, key, known)

    def mapping(self, where: str, value: object) -> Mapping[object, object] | None:
        if isinstance(value, Mapping):
            return value
        self.error(where, f"expected a mapping, found {shorten(value)}")
        return None

    def items(self, where: str, value: object) -> list[object]:
        if isinstance(value, list) and value:
            return value
        self.error(where, f"expected a list with something in it, found {shorten(value)}")
        return []

    def layers(self, where: str, value: object) -> tuple[int, int] | None:
        whole = isinstance(value, list) and len(value) == 2
        if (
            whole
            and isinstance(value, list)
            and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        ):
            return value[0], value[1]
        self.error(where, f"expected [first layer, one past the last], found {shorten(value)}")
        return None

    def dtype(self, where: str, value: object) -> str | None:
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            self.error(where, f"expected float32, float16 or bfloat16, found {shorten(value)}")
            return None
        return _DTYPES[name]

    # ---- parameters

    def settings(
        self, where: str, value: object, method: type[Method] | None, known: frozenset[str]
    ) -> dict[str, Setting]:
        if value is None:
            return {}
        said = self.mapping(where, value)
        found: dict[str, Setting] = {}
        for key, one in (said or {}).items():
            if method is not None and key not in known and key not in _IDLE_PARAMETERS:
                self.unknown(where, key, known, f"parameter of {method.name}")
                continue
            setting = self.conditions(f"{where}.{key}", one)
            if setting is not None and key in known:
                found[str(key)] = setting
        return found

    def conditions(self, where: str, value: object) -> Setting | None:
        entries = value if isinstance(value, list) else [value]
        if not any(isinstance(entry, Mapping) for entry in entries):
            level = self.level(where, value)
            return None if level is None else Conditions(((None, level),))
        rules: list[tuple[str | None, float | tuple[float, ...]]] = []
        for i, entry in enumerate(entries):
            at = f"{where}[{i}]" if isinstance(value, list) else where
            if not isinstance(entry, Mapping):
                level = self.level(at, entry)
                if level is not None:
                    rules.append((None, level))
                continue
            self.keys(at, entry, CONDITION)
            text = entry.get("filter")
            if text is not None and not isinstance(text, str):
                self.error(at, f"filter: expected a part of a tensor's name, found {shorten(text)}")
                continue
            level = self.level(f"{at}.value", entry.get("value"))
            if level is not None:
                rules.append((text, level))
        return Conditions(tuple(rules)) if rules else None

    def level(self, where: str, value: object) -> float | tuple[float, ...] | None:
        if isinstance(value, list) and value:
            numbers = [self.number(f"{where}[{i}]", one) for i, one in enumerate(value)]
            return None if None in numbers else tuple(n for n in numbers if n is not None)
        return self.number(where, value)

    def number(self, where: str, value: object) -> float | None:
        # YAML 1.1 reads 1e-5, without a point, as a word.
        try:
            number = float(value) if isinstance(value, (bool, int, float, str)) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
        self.error(where, f"expected a finite number, found {shorten(value)}")
        return None
