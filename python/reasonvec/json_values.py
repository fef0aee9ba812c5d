"""JSON objects out of files, read and taken apart with their types checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, TypeAlias

from reasonvec.errors import FormatError

__all__ = ["Json", "json_bytes", "object_in", "objects_in", "read_json", "string_in", "strings_in"]

Json: TypeAlias = dict[str, object]

_LONGEST = 64 << 20


def read_json(path: Path) -> Json:
    """A small JSON object.

    Raises:
        FormatError: it is too large to be one, no JSON, or no object.
        OSError: it cannot be read.
    """
    if path.stat().st_size > _LONGEST:
        message = f"{path}: expected a JSON file of at most {_LONGEST} bytes; it is no config"
        raise FormatError(message)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        message = f"{path}: expected JSON: {error}"
        raise FormatError(message) from None
    if not isinstance(value, dict):
        message = f"{path}: expected a JSON object, found {type(value).__name__}"
        raise FormatError(message)
    return value


def json_bytes(value: object, *, ascii_only: bool = False) -> bytes:
    """A JSON file as people read it.

    >>> json_bytes({"token": "\\ud83d"})
    b'{\\n  "token": "\\\\ud83d"\\n}\\n'
    """
    # Half a surrogate pair, which JSON can escape and UTF-8 cannot hold, stays escaped.
    text = json.dumps(value, indent=2, ensure_ascii=ascii_only)
    return f"{text}\n".encode(errors="backslashreplace")


def object_in(parent: Mapping[str, object], key: str, path: Path) -> Json:
    """The member ``key``, which must be an object; ``path`` is the file that a complaint names."""
    value = parent.get(key)
    return value if isinstance(value, dict) else _refuse(path, key, "an object", value)


def objects_in(parent: Mapping[str, object], key: str, path: Path) -> list[Json]:
    """The member ``key``, which must be a list of objects."""
    value = parent.get(key)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    return _refuse(path, key, "a list of objects", value)


def string_in(parent: Mapping[str, object], key: str, path: Path) -> str:
    """The member ``key``, which must be a string."""
    value = parent.get(key)
    return value if isinstance(value, str) else _refuse(path, key, "a string", value)


def strings_in(parent: Mapping[str, object], key: str, path: Path) -> dict[str, str]:
    """The member ``key``, which must be an object of strings."""
    value = object_in(parent, key, path)
    return {name: string_in(value, name, path) for name in value}


def _refuse(path: Path, key: str, expected: str, found: object) -> NoReturn:
    kind = "nothing" if found is None else type(found).__name__
    message = f"{path}: expected {key!r} to be {expected}, found {kind}; the file is damaged"
    raise FormatError(message)
