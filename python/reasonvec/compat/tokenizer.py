"""The token map of a folder, read from tokenizer.json and from nothing else.

A tokenizer of a large vocabulary is 10 to 35 MB, most of it merge rules, which would be ten times
that as Python objects: more than the whole budget of a run. So the file is walked as bytes,
everything but the two tables is skipped, and two files with the same bytes are never parsed at all.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from reasonvec.errors import FormatError

__all__ = ["TokenDifference", "compare_tokens", "read_tokens", "same_bytes"]

_LARGEST = 256 * 2**20  # bytes; the largest known is 35 MB
_DEEPEST = 64
_IDS = 2**31

_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,\]}]++")
_ATOMS = rb'[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+"'
# As far as no bracket opens or closes, but for lists of atoms: merges are half a million of them.
_FLAT = re.compile(rb"(?:%b|\[(?:%b)*+\])*+" % (_ATOMS, _ATOMS), re.DOTALL)


class TokenDifference(NamedTuple):
    """How two token maps differ: the count of each sort, and the first of it as an example."""

    moved: int  # tokens that have another id in the other map
    clashing: int  # ids that are another token in the other map
    only_first: int
    only_second: int
    example: tuple[str, int, int] | None  # token, first id, second id
    clash: tuple[int, str, str] | None  # id, first token, second token

    @property
    def same(self) -> bool:
        return not (self.moved or self.clashing or self.only_first or self.only_second)

    @property
    def harmful(self) -> bool:
        return bool(self.moved or self.clashing)


def compare_tokens(first: Mapping[str, int], second: Mapping[str, int]) -> TokenDifference:
    """Every token by its string, and every id by its token."""
    moved = only_first = clashing = 0
    example: tuple[str, int, int] | None = None
    clash: tuple[int, str, str] | None = None
    names = {number: token for token, number in second.items()}
    for token, number in first.items():
        other = second.get(token)
        if other is None:
            only_first += 1
            if number in names:
                clashing += 1
                clash = clash or (number, token, names[number])
        elif other != number:
            moved += 1
            example = example or (token, number, other)
    only_second = sum(token not in first for token in second)
    return TokenDifference(moved, clashing, only_first, only_second, example, clash)


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two files hold the same bytes, at the cost of reading them once."""
    with first.open("rb") as left, second.open("rb") as right:
        while True:
            piece = left.read(2**20)
            if piece != right.read(2**20):
                return False
            if not piece:
                return True


def read_tokens(path: Path) -> dict[str, int]:
    """Token string to id: `model.vocab` and `added_tokens` of a tokenizer.json.

    Raises FormatError, naming the path, for whatever is not such a file, and OSError if it cannot
    be read."""
    try:
        return _tokens(_content(path))
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: not a tokenizer.json that can be read: {error}; "
            "fetch the file again, or leave the vocabulary alone with --vocab skip"
        ) from error


def _content(path: Path) -> bytes:
    # A pipe or a device under this name would block, or never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("expected a regular file")
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"expected at most {_LARGEST} bytes, the file is larger")
    return data


def _tokens(data: bytes) -> dict[str, int]:
    vocabulary: tuple[int, int] | None = None
    added: tuple[int, int] | None = None
    start = _skip_space(data, 3 if data.startswith(b"\xef\xbb\xbf") else 0)
    for key, at, end in _members(data, start):
        if key == "added_tokens":
            added = (at, end)
        elif key == "model":
            for inner, inner_at, inner_end in _members(data, at):
                if inner == "vocab":
                    vocabulary = (inner_at, inner_end)
    if vocabulary is None:
        raise ValueError("expected an object model.vocab, found none")
    tokens = _vocabulary(json.loads(data[slice(*vocabulary)], object_pairs_hook=_once))
    if added is not None:
        for token, number in _added(json.loads(data[slice(*added)])):
            # The tokenizers library keeps the model's own id where an added token is also in it.
            tokens.setdefault(token, number)
    return tokens


def _vocabulary(found: object) -> dict[str, int]:
    if isinstance(found, dict):
        return {token: _id(token, number) for token, number in found.items()}
    if not isinstance(found, list):
        raise ValueError(f"expected model.vocab to be an object or a list, found {_type(found)}")
    tokens: dict[str, int] = {}  # Unigram: a list of [token, score], the id is the place
    for number, entry in enumerate(found):
        if not (isinstance(entry, list) and entry and isinstance(entry[0], str)):
            raise ValueError(f"expected entry {number} of model.vocab to be [token, score]")
        tokens.setdefault(entry[0], number)
    return tokens


def _added(found: object) -> Iterator[tuple[str, int]]:
    if not isinstance(found, list):
        raise ValueError(f"expected added_tokens to be a list, found {_type(found)}")
    for entry in found:
        token = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(token, str):
            raise ValueError("expected every added token to be an object with content and id")
        yield token, _id(token, entry.get("id"))


def _id(token: str, number: object) -> int:
    if type(number) is not int or not 0 <= number < _IDS:
        raise ValueError(
            f"expected an id from 0 to {_IDS - 1} for {token[:40]!r}, found {number!r}"
        )
    return number


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a token stands in model.vocab twice")
    return members


def _type(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _members(data: bytes, at: int) -> Iterator[tuple[str, int, int]]:
    """Key, start and end of every member of the object that starts at `at`."""
    if data[at : at + 1] != b"{":
        raise ValueError(f"expected an object at byte {at}")
    seen: set[str] = set()
    at = _skip_space(data, at + 1)
    if data[at : at + 1] == b"}":
        return
    while True:
        name = _STRING.match(data, at)
        if name is None:
            raise ValueError(f"expected a key at byte {at}")
        key = json.loads(name[0])
        if key in seen:
            raise ValueError(f"the key {key[:40]!r} stands twice")
        seen.add(key)
        at = _skip_space(data, name.end())
        if data[at : at + 1] != b":":
            raise ValueError(f"expected a colon at byte {at}")
        at = _skip_space(data, at + 1)
        end = _end(data, at)
        yield key, at, end
        at = _skip_space(data, end)
        if data[at : at + 1] == b"}":
            return
        if data[at : at + 1] != b",":
            raise ValueError(f"expected a comma or the end of the object at byte {at}")
        at = _skip_space(data, at + 1)


def _end(data: bytes, at: int) -> int:
    """One past the value that starts at `at`: brackets are counted, their inside is not judged."""
    if data[at : at + 1] not in (b"{", b"["):
        value = _STRING.match(data, at) or _SCALAR.match(data, at)
        if value is None:
            raise ValueError(f"expected a value at byte {at}")
        return value.end()
    depth = 0
    while True:
        bracket = data[at : at + 1]
        if bracket in (b"{", b"["):
            depth += 1
        elif bracket in (b"}", b"]"):
            depth -= 1
        else:
            raise ValueError(f"a string or a bracket is never closed before byte {at}")
        if depth == 0:
            return at + 1
        if depth > _DEEPEST:
            raise ValueError(f"brackets nest deeper than {_DEEPEST} at byte {at}")
        run = _FLAT.match(data, at + 1)
        at = run.end() if run else at + 1


def _skip_space(data: bytes, at: int) -> int:
    space = _SPACE.match(data, at)
    return space.end() if space else at
