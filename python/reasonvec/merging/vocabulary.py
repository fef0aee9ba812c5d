"""One vocabulary for models that have several: which token each row of the output is, and which row
of which model it is made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from reasonvec.compat.problem import Problem
from reasonvec.errors import FormatError, ReasonvecError
from reasonvec.json_values import Json
from reasonvec.merging.inputs import Input
from reasonvec.terms import Operands

__all__ = ["TokenRule", "Tokenizer", "Vocabulary", "lay_rows"]

Source: TypeAlias = "Literal['union', 'base'] | object"


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Where a token's row comes from: the row of a token (its own, another by its string, or a row
    by its number) in ``model``, or zeros if ``zero``; for the models that lack the token, or for
    all if ``force``."""

    model: object | None = None
    token: str | None = None
    row: int | None = None
    zero: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Whose tokens the output has: ``source`` is "union" (the base's, then what only others have),
    "base" (or the first model's, without one), or a model.

    A token that a model lacks takes the row of its rule in ``tokens``, else the base's, else that
    of the only model that has it, else the mean of those that do. ``pad_to_multiple_of`` adds rows
    of zeros.
    """

    source: Source = "base"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


# Rows that padding may add to a small vocabulary; a large one it may double.
_PADDING = 1 << 16

# One row: (index of the input, its row); none for zeros; several for their mean.
_Row: TypeAlias = tuple[tuple[int, int], ...]


@dataclass
class Vocabulary:
    """The rows of the output. ``tokenizer`` is the input whose tokenizer files are taken, ``added``
    are the tokens that are new to them."""

    tokenizer: Input
    rows: int
    tokens: dict[str, int]
    added: dict[str, int]
    owners: dict[str, Input]
    inputs: list[Input]
    maps: dict[int, list[_Row]]
    identical: frozenset[int]
    problems: list[Problem]

    @property
    def moves(self) -> bool:
        """Whether any model's rows lie elsewhere than in the output."""
        return len(self.identical) < len(self.inputs)

    @classmethod
    def of(
        cls,
        spec: Tokenizer,
        donor: Input,
        used: Sequence[Input],
        opened: Callable[[object], Input],
    ) -> Vocabulary:
        """Lay out the rows.

        Whatever stands in the way (a folder without tokenizer.json, a model without embeddings) is
        among the problems.
        """
        return _lay_out(cls, spec, donor, used, opened)


def _lay_out(
    make: type[Vocabulary],
    spec: Tokenizer,
    donor: Input,
    used: Sequence[Input],
    opened: Callable[[object], Input],
) -> Vocabulary:
    problems: list[Problem] = []
    chosen = donor if spec.source in ("union", "base") else opened(spec.source)
    inputs = list({id(source): source for source in (donor, chosen, *used)}.values())
    for rule in spec.tokens.values():
        if rule.model is not None and opened(rule.model) not in inputs:
            inputs.append(opened(rule.model))
    maps: list[dict[str, int]] = []
    rows: list[int] = []
    for source in inputs:
        tokens: Mapping[str, int] | None = None
        try:
            tokens = source.layout.tokens()
        except FormatError as error:
            problems.append(Problem("tokenizer", str(error)))
        else:
            if tokens is None:
                message = (
                    f"{source.label}: no tokenizer.json, so its rows cannot be told apart; put the "
                    "model's tokenizer.json beside its weights"
                )
                problems.append(Problem("tokenizer", message))
        embedding = source.layout.vocabulary()[0]
        if embedding is None:
            message = f"{source.label}: has no token embeddings, or more than one matrix of them"
            problems.append(Problem("vocab", message))
            rows.append(0)
        else:
            names = source.names
            rows.append(source.layout.tensors[names[embedding]].shape[0])
        maps.append(dict(tokens or {}))
        problem = _beyond(source, maps[-1], rows[-1])
        if problem is not None:
            problems.append(problem)
    if problems:
        return make(chosen, 0, {}, {}, {}, [], {}, frozenset(), problems)

    at = inputs.index(chosen)
    final = dict(maps[at])
    following = max(final.values(), default=-1) + 1
    added: dict[str, int] = {}
    owners: dict[str, Input] = {}
    wanted: list[str] = []
    if spec.source == "union":
        members = [inputs.index(source) for source in used]
        wanted += [token for k in members for token in sorted(maps[k], key=maps[k].__getitem__)]
    for token in [*wanted, *spec.tokens]:
        if token in final:
            continue
        owner = next((s for s, tokens in zip(inputs, maps, strict=True) if token in tokens), None)
        final[token] = added[token] = following
        if owner is not None:
            owners[token] = owner
        following += 1
    total = max(following, rows[at])
    if spec.pad_to_multiple_of:
        padded = -(-total // spec.pad_to_multiple_of) * spec.pad_to_multiple_of
        if padded - total > max(total, _PADDING):
            message = (
                f"tokenizer: pad_to_multiple_of: {spec.pad_to_multiple_of} makes {padded} rows of "
                f"{total}; usual multiples are 8 to 512"
            )
            problems.append(Problem("tokenizer", message))
            return make(chosen, 0, {}, {}, {}, [], {}, frozenset(), problems)
        total = padded

    by_row: dict[int, str] = {}
    for token, number in final.items():
        by_row.setdefault(number, token)
    result: dict[int, list[_Row]] = {}
    identical: set[int] = set()
    base = inputs.index(donor)
    named = [set(tokens.values()) for tokens in maps]
    rules: dict[str, tuple[_Row, bool]] = {}
    for token, rule in spec.tokens.items():
        row = _ruled(token, rule, inputs, maps, rows, opened, problems)
        if row is not None:
            rules[token] = (row, rule.force)
    for k in range(len(inputs)):
        laid: list[_Row] = []
        for number in range(total):
            token = by_row.get(number, "")
            if number not in by_row:
                # Padding: what a model has in the same place, if that is no token there.
                if number < rows[k] and number not in named[k]:
                    laid.append(((k, number),))
                elif number < rows[at] and number not in named[at]:
                    laid.append(((at, number),))
                else:
                    laid.append(())
                continue
            rule_row = rules.get(token)
            own = maps[k].get(token)
            if rule_row is not None and (rule_row[1] or own is None):
                laid.append(rule_row[0])
            elif own is not None and own < rows[k]:
                laid.append(((k, own),))
            elif token in maps[base] and maps[base][token] < rows[base]:
                laid.append(((base, maps[base][token]),))
            else:
                having = [
                    (j, m[token]) for j, m in enumerate(maps) if m.get(token, rows[j]) < rows[j]
                ]
                laid.append(tuple(having))
        result[id(inputs[k])] = laid
        if total == rows[k] and all(row == ((k, i),) for i, row in enumerate(laid)):
            identical.add(id(inputs[k]))
    return make(chosen, total, final, added, owners, inputs, result, frozenset(identical), problems)


def _beyond(source: Input, tokens: Mapping[str, int], rows: int) -> Problem | None:
    """What is wrong with a token whose row would lie far behind all others: every row up to it
    would have to be made."""
    token = max(tokens, key=tokens.__getitem__, default="")
    if not tokens or tokens[token] < rows + max(len(tokens), _PADDING):
        return None
    return Problem(
        "tokenizer",
        f"{source.layout.tokenizer}: {token[:40]!r} has the id {tokens[token]}, and the model has "
        f"{len(tokens)} tokens and {rows} rows of embeddings: the file is not this model's, or "
        "damaged; fetch it again",
    )


def _ruled(
    token: str,
    rule: TokenRule,
    inputs: Sequence[Input],
    maps: Sequence[Mapping[str, int]],
    rows: Sequence[int],
    opened: Callable[[object], Input],
    problems: list[Problem],
) -> _Row | None:
    if rule.zero:
        return ()
    if rule.model is None:
        if not any(token in tokens for tokens in maps):
            message = (
                f"tokenizer: the token {token!r} is in none of the models, and no source is named "
                "for it"
            )
            problems.append(Problem("tokenizer", message))
        return None
    k = inputs.index(opened(rule.model))
    row = rule.row if rule.row is not None else maps[k].get(rule.token or token)
    if row is None or row >= rows[k]:
        asked = f"row {rule.row}" if rule.row is not None else f"token {rule.token or token!r}"
        message = f"tokenizer: {inputs[k].label} has no {asked}, which {token!r} is to be made from"
        problems.append(Problem("tokenizer", message))
        return None
    return ((k, row),)


def lay_rows(
    vocabulary: Vocabulary, source: Input, name: str, terms: list[Json], operands: Operands
) -> list[Json]:
    """The terms of a model's embeddings or head, its rows laid out as the output's are.

    Raises:
        ReasonvecError: a model is a sum, whose rows cannot be moved.
    """
    if id(source) in vocabulary.identical:
        return terms or source.terms(name, operands)
    laid = vocabulary.maps[id(source)]
    width = math.prod(source.layout.tensors[source.names[name]].shape[1:])
    whole: dict[int, Json] = {}

    def read(k: int) -> Json:
        if k not in whole:
            model = vocabulary.inputs[k]
            found = model.whole(name, operands) if name in model.names else None
            if found is None:
                message = (
                    f"{model.label}: its rows have to be laid out by token, and it is a sum or has "
                    f"no {name}: save it first, and name its folder instead"
                )
                raise ReasonvecError(message)
            whole[k] = found
        return whole[k]

    single: list[Json] = []
    means: dict[tuple[int, int], list[Json]] = {}
    for number, row in enumerate(laid):
        if len(row) == 1:
            k, start = row[0]
            last = single[-1] if single else None
            if last is not None and (last["k"], last["at"], last["start"]) == (
                k,
                number - _count(last),
                start - _count(last),
            ):
                last["rows"] = _count(last) + 1
            else:
                single.append({"k": k, "at": number, "start": start, "rows": 1})
        for j, (k, start) in enumerate(row if len(row) > 1 else ()):
            means.setdefault((j, len(row)), []).append(
                {"k": k, "at": number, "start": start, "rows": 1}
            )

    def segments(runs: list[Json]) -> list[Json]:
        return [
            {
                "at": int(str(run["at"])) * width,
                "length": _count(run) * width,
                "start": int(str(run["start"])) * width,
                "source": read(int(str(run["k"]))),
            }
            for run in runs
        ]

    result: list[Json] = [{"coefficient": 1.0, "segments": segments(single)}]
    for (_, owners), runs in means.items():
        result.append({"coefficient": 1.0 / owners, "segments": segments(runs)})
    return result


def _count(run: Json) -> int:
    return int(str(run["rows"]))
