"""The rows of embeddings and head: how many there are, and which token each of them is.

They are two questions. Qwen2.5-14B has 152,064 rows for 151,665 tokens, the 7B of the same tokens
has another padding, and a fine-tune that added one token has another tokenizer in the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from reasonvec.compat.layout import Layout, TensorInfo
from reasonvec.compat.placement import Found, Pair, Placement, Segment
from reasonvec.compat.problem import Problem, Severity
from reasonvec.compat.tokenizer import TokenDifference, compare_tokens, same_bytes
from reasonvec.errors import FormatError

__all__ = ["Rows", "TokenVerdict", "VocabPolicy", "compare_tokenizers"]

VocabPolicy: TypeAlias = Literal["strict", "skip", "match-tokens"]


class TokenVerdict(NamedTuple):
    """Two folders' token maps side by side. ``difference`` is None where they could not be
    compared; ``message`` says why not, or how they differ."""

    difference: TokenDifference | None
    first: Mapping[str, int]
    second: Mapping[str, int]
    message: str = ""
    broken: bool = False


def compare_tokenizers(first: Layout, second: Layout) -> TokenVerdict:
    """The maps themselves are only there if the two files differ."""
    ours, theirs = first.tokenizer, second.tokenizer
    if ours is None or theirs is None:
        absent = [str(layout.path) for layout in (first, second) if layout.tokenizer is None]
        return TokenVerdict(None, {}, {}, f"no tokenizer.json in {' and '.join(absent)}")
    if same_bytes(ours, theirs):
        return TokenVerdict(TokenDifference(0, 0, 0, 0, None, None), {}, {})
    try:
        one, other = first.tokens() or {}, second.tokens() or {}
    except FormatError as error:
        return TokenVerdict(None, {}, {}, str(error), broken=True)
    difference = compare_tokens(one, other)
    message = "" if difference.same else _describe(first, second, difference)
    return TokenVerdict(difference, one, other, message)


class Rows:
    """Places embeddings and head under one policy. Tokenizers are read once, when first needed."""

    def __init__(self, pair: Pair, vocab: VocabPolicy) -> None:
        self.pair = pair
        self.vocab = vocab
        self._verdict: TokenVerdict | None = None
        self._by_token: dict[int, int] | None = None  # None: the identity
        self._doubtful = 0

    def place(self, source: str, info: TensorInfo, delta: TensorInfo) -> Found:
        """The placement of one tensor whose rows are tokens."""
        if not info.shape or not delta.shape or info.shape[1:] != delta.shape[1:]:
            return self.pair.refuse_shape(info, delta, source)
        ours, theirs = info.shape[0], delta.shape[0]
        difference = self._compare().difference
        if self.vocab == "strict":
            if ours != theirs:
                return self.pair.refuse("vocab", self._rows_differ(info, delta), info, source)
            if difference is not None and difference.harmful:
                return Found(reason="refused: tokenizer", used={source})
            return Found(Placement(delta.name), used={source})
        if difference is None:
            return Found(reason="refused: tokenizer", used={source})
        if self._by_token is None and ours == theirs:
            return Found(Placement(delta.name), used={source})
        runs = (
            [(0, 0, min(ours, theirs))]
            if self._by_token is None
            else _runs((i, j) for i, j in self._by_token.items() if i < ours and j < theirs)
        )
        width = math.prod(info.shape[1:])
        segments = tuple(
            Segment(row * width, count * width, delta.name, other * width)
            for row, other, count in runs
            if count * width
        )
        matched = sum(count for _, _, count in runs)
        message = (
            f"{self.pair.at(info)}: match-tokens updates {matched} of {ours} rows, from {theirs} "
            f"rows of {self.pair.of(delta)}; the other {ours - matched} are padding, or tokens the "
            "vector does not know, and stay as they are"
        )
        problem = Problem("vocab", message, info.name, "warning")
        return Found(Placement(delta.name, segments), problems=[problem], used={source})

    def problems(self) -> list[Problem]:
        """What there is to say of the tokenizers themselves, if they were compared."""
        verdict = self._verdict
        if verdict is None or not verdict.message:
            return []
        severity: Severity = "error"
        advice = ""
        if verdict.difference is None:
            if verdict.broken:
                pass
            elif self.vocab == "match-tokens":
                advice = ": match-tokens needs both; put it there, or take --vocab skip"
            else:
                severity = "warning"
                advice = (
                    ": only the number of rows was compared; put it there to have the ids compared"
                )
        elif self.vocab == "match-tokens":
            severity = "warning"
            if self._doubtful:
                advice = f"; {self._doubtful} rows that several tokens share stay as they are"
        elif verdict.difference.harmful:
            advice = (
                "; a row would get the delta of another token: --vocab match-tokens matches rows "
                "by token, --vocab skip leaves embeddings and head as they are"
            )
        else:
            severity = "warning"
            advice = "; their rows are padding on the other side, where a delta does nothing"
        return [Problem("tokenizer", verdict.message + advice, severity=severity)]

    def _compare(self) -> TokenVerdict:
        if self._verdict is None:
            self._verdict = compare_tokenizers(self.pair.vector, self.pair.target)
            difference = self._verdict.difference
            if difference is not None and not difference.same:
                self._by_token, self._doubtful = _rows_by_token(
                    self._verdict.first, self._verdict.second
                )
        return self._verdict

    def _rows_differ(self, info: TensorInfo, delta: TensorInfo) -> str:
        difference = self._compare().difference
        if difference is None:
            tokens = (
                "whether the tokens are the same is not known without both tokenizer.json files"
            )
        elif difference.same:
            tokens = "the tokens are the same, so only the padding of the rows differs"
        else:
            tokens = "the tokens differ too"
        return (
            f"{self.pair.at(info)} has {info.shape[0]} rows, but {self.pair.of(delta)} has "
            f"{delta.shape[0]}; {tokens}; nothing is resized: --vocab match-tokens updates the "
            "rows of the tokens both have, --vocab skip leaves embeddings and head as they are"
        )


def _describe(first: Layout, second: Layout, difference: TokenDifference) -> str:
    says: list[str] = []
    if difference.example is not None:
        token, one, other = difference.example
        says.append(
            f"{difference.moved} tokens have another id, {token[:40]!r} is {one} and {other}"
        )
    if difference.clash is not None:
        number, left, right = difference.clash
        says.append(
            f"{difference.clashing} ids are another token, {number} is {left[:40]!r} and "
            f"{right[:40]!r}"
        )
    for count, layout in ((difference.only_first, first), (difference.only_second, second)):
        if count:
            says.append(f"{count} tokens are only in {layout.path}")
    return f"the tokenizers of {first.path} and {second.path} differ: {'; '.join(says)}"


def _rows_by_token(
    vector: Mapping[str, int], target: Mapping[str, int]
) -> tuple[dict[int, int], int]:
    """Target row to vector row by token string, and how many rows are left out because their tokens
    disagree on the row."""
    rows: dict[int, int] = {}
    doubtful: set[int] = set()
    for token, row in target.items():
        other = vector.get(token)
        if other is not None and rows.setdefault(row, other) != other:
            doubtful.add(row)
    for row in doubtful:
        del rows[row]
    return rows, len(doubtful)


def _runs(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(target row, vector row, count) of every run where both sides go up by one, by target row."""
    runs: list[tuple[int, int, int]] = []
    for row, other in sorted(pairs):
        if runs:
            at, start, count = runs[-1]
            if row == at + count and other == start + count:
                runs[-1] = (at, start, count + 1)
                continue
        runs.append((row, other, 1))
    return runs
