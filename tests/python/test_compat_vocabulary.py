"""Rows and tokens: padded vocabularies, vocabularies that differ, and tokenizer.json."""

from __future__ import annotations

import json
import string
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    DENSE,
    EMBED,
    HEAD,
    JSON,
    UNTIED,
    UP,
    assert_sound,
    elements,
    errors,
    layout,
    only_error,
    write_tokenizer,
)

from reasonvec.compat.alignment import align
from reasonvec.compat.donors import donor_problems
from reasonvec.compat.layout import Layout
from reasonvec.compat.placement import Placement, Segment
from reasonvec.compat.tokenizer import compare_tokens, read_tokens, same_bytes
from reasonvec.errors import FormatError

# Trap: padded vocabulary. Rows and tokenizer are separate questions.


def padded(tmp_path: Path, rows: int, target_rows: int) -> tuple[Layout, Layout]:
    vocab = {letter: number for number, letter in enumerate("abcdefghij")}
    write_tokenizer(tmp_path / "v", vocab)
    write_tokenizer(tmp_path / "t", vocab, version="other bytes, same tokens")
    return (
        layout(tmp_path / "v", {**UNTIED, EMBED: (rows, 4), HEAD: (rows, 4)}, config={}),
        layout(
            tmp_path / "t", {**UNTIED, EMBED: (target_rows, 4), HEAD: (target_rows, 4)}, config={}
        ),
    )


@pytest.mark.parametrize(("rows", "target_rows"), [(12, 16), (16, 12)])
def test_padded_vocabulary_is_never_resized(tmp_path: Path, rows: int, target_rows: int) -> None:
    vector, target = padded(tmp_path, rows, target_rows)
    strict = align(vector, target)
    assert [problem.tensor for problem in strict.errors] == [EMBED, HEAD]
    message = strict.errors[0].message
    for words in (
        str(tmp_path / "v"),
        str(tmp_path / "t"),
        f"{target_rows} rows",
        f"has {rows}",
        "the tokens are the same, so only the padding",
        "--vocab match-tokens",
        "--vocab skip",
    ):
        assert words in message
    assert strict.sources[EMBED] is None
    assert strict.sources[UP] == Placement(UP)

    skipped = align(vector, target, vocab="skip")
    assert not skipped.errors
    assert "--vocab skip" in skipped.untouched[EMBED]
    assert "--vocab skip" in skipped.untouched[HEAD]

    matched = align(vector, target, vocab="match-tokens")
    assert not matched.errors
    for name in (EMBED, HEAD):
        assert matched.sources[name] == Placement(name, (Segment(0, 48, name, 0),))
    assert any("updates 12 of" in problem.message for problem in matched.problems)
    for alignment in (strict, skipped, matched):
        assert_sound(alignment, vector, target)


def test_same_rows_and_tokens_match_whole(tmp_path: Path) -> None:
    vector, target = padded(tmp_path, 16, 16)
    alignment = align(vector, target, vocab="match-tokens")
    assert alignment.sources[EMBED] == Placement(EMBED)
    assert not alignment.errors


def test_donors_with_other_padding_are_an_error(tmp_path: Path) -> None:
    positive, negative = padded(tmp_path, 12, 16)
    found = errors(donor_problems(positive, negative))
    assert [(problem.kind, problem.tensor) for problem in found] == [
        ("shape", EMBED),
        ("shape", HEAD),
    ]
    assert "nothing is resized" in found[0].message
    assert "exclude embeddings" in found[0].message


# Trap: vocabularies differ.


def test_strict_refuses_tokens_with_other_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0, "b": 1, "c": 2})
    write_tokenizer(tmp_path / "t", {"a": 0, "b": 2, "c": 1})
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    alignment = align(vector, target)
    message = only_error(alignment.problems, "tokenizer")
    for words in (
        "2 tokens have another id",
        "'b' is 1 and 2",
        str(tmp_path / "v"),
        "match-tokens",
    ):
        assert words in message
    assert alignment.sources[EMBED] is None
    assert alignment.sources[UP] == Placement(UP)
    assert "difference of two tokens" in only_error(donor_problems(vector, target), "tokenizer")


def test_one_id_that_is_two_tokens_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0}, [("<think>", 1)])
    write_tokenizer(tmp_path / "t", {"a": 0}, [("<tool>", 1)])
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    message = only_error(align(vector, target).problems, "tokenizer")
    assert "1 is '<think>' and '<tool>'" in message
    assert "1 is '<think>' and '<tool>'" in only_error(donor_problems(vector, target), "tokenizer")


def test_extra_tokens_are_a_warning(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0}, [("<pad>", 1)])
    write_tokenizer(tmp_path / "t", {"a": 0})
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    for problems in (align(vector, target).problems, donor_problems(vector, target)):
        assert [(problem.kind, problem.severity) for problem in problems] == [
            ("tokenizer", "warning")
        ]
        assert f"1 tokens are only in {tmp_path / 'v'}" in problems[0].message


def test_skip_leaves_embeddings_and_head_and_nothing_else(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0, "b": 1})
    write_tokenizer(tmp_path / "t", {"b": 0, "a": 1})
    vector = layout(tmp_path / "v", {**UNTIED, EMBED: (9, 4), HEAD: (9, 4)}, config={})
    target = layout(tmp_path / "t", UNTIED, config={})
    alignment = align(vector, target, vocab="skip")
    assert not alignment.errors
    assert set(alignment.untouched) == {EMBED, HEAD}
    assert_sound(alignment, vector, target)


def test_match_tokens_by_hand(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0, "b": 1, "c": 2, "x": 3, "d": 4})
    write_tokenizer(tmp_path / "t", {"c": 0, "a": 2, "b": 3, "y": 4, "d": 5})
    vector = layout(tmp_path / "v", {EMBED: (6, 4)})
    target = layout(tmp_path / "t", {EMBED: (8, 4)})
    alignment = align(vector, target, vocab="match-tokens")
    assert not alignment.errors
    assert alignment.sources[EMBED] == Placement(
        EMBED,
        (Segment(0, 4, EMBED, 8), Segment(8, 8, EMBED, 0), Segment(20, 4, EMBED, 16)),
    )
    said = " ".join(problem.message for problem in alignment.problems)
    assert "updates 4 of 8 rows" in said
    assert "1 tokens are only in" in said


def test_match_tokens_wants_both_tokenizers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t", {"a": 0})
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    alignment = align(vector, target, vocab="match-tokens")
    message = only_error(alignment.problems, "tokenizer")
    assert str(tmp_path / "v") in message
    assert "--vocab skip" in message
    assert alignment.sources[EMBED] is None
    strict = align(vector, target)
    assert not strict.errors
    assert strict.sources[EMBED] == Placement(EMBED)
    assert any("no tokenizer.json" in problem.message for problem in strict.problems)


def test_a_token_row_shared_in_disagreement_is_left_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0, "b": 1, "c": 2})
    write_tokenizer(tmp_path / "t", {"a": 0, "b": 0, "c": 1})
    vector, target = (
        layout(tmp_path / "v", {EMBED: (3, 2)}),
        layout(tmp_path / "t", {EMBED: (3, 2)}),
    )
    alignment = align(vector, target, vocab="match-tokens")
    assert alignment.sources[EMBED] == Placement(EMBED, (Segment(2, 2, EMBED, 4),))
    assert any("1 rows that several tokens share" in p.message for p in alignment.problems)


TOKENS = st.dictionaries(
    st.text(string.ascii_lowercase[:6], min_size=1, max_size=2),
    st.integers(0, 30),
    max_size=24,
)


@st.composite
def token_maps(draw: st.DrawFn) -> dict[str, int]:
    tokens = draw(st.lists(st.text("abcd", min_size=1, max_size=2), unique=True, max_size=16))
    ids = draw(st.permutations(range(len(tokens) + 4)))
    return dict(zip(tokens, draw(st.sampled_from([ids, sorted(ids)])), strict=False))


@settings(max_examples=150, deadline=None)
@given(
    ours=token_maps(),
    theirs=token_maps(),
    rows=st.integers(0, 22),
    target_rows=st.integers(0, 22),
    width=st.integers(0, 3),
)
def test_match_tokens_is_the_row_map(
    tmp_path_factory: pytest.TempPathFactory,
    ours: dict[str, int],
    theirs: dict[str, int],
    rows: int,
    target_rows: int,
    width: int,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    write_tokenizer(folder / "v", theirs)
    write_tokenizer(folder / "t", ours)
    vector = layout(folder / "v", {EMBED: (rows, width), HEAD: (rows, width)}, config={})
    target = layout(
        folder / "t", {EMBED: (target_rows, width), HEAD: (target_rows, width)}, config={}
    )
    alignment = align(vector, target, vocab="match-tokens")
    assert not alignment.errors
    assert_sound(alignment, vector, target)
    wanted: dict[int, int] = {}
    if ours == theirs:
        wanted = {row: row for row in range(min(rows, target_rows))}
    else:
        for token, row in ours.items():
            if token in theirs and row < target_rows and theirs[token] < rows:
                wanted[row] = theirs[token]
    for name in (EMBED, HEAD):
        placement = alignment.sources[name]
        assert elements(placement, target_rows * width) == [
            (name, wanted[row] * width + column) if row in wanted else None
            for row in range(target_rows)
            for column in range(width)
        ]
        segments = (placement.segments or ()) if placement else ()
        for left, right in pairwise(segments):
            touching = left.at + left.length == right.at
            assert not (touching and left.start + left.length == right.start), "not coalesced"


# tokenizer.json.


def test_tokens_come_from_the_model_and_the_added(tmp_path: Path) -> None:
    vocab = {"a": 0, 'q"\\': 1, "}{": 2, "é😀": 3}
    write_tokenizer(tmp_path, vocab, [("<eos>", 9), ("a", 12)])
    assert layout(tmp_path, DENSE).tokens() == {**vocab, "<eos>": 9}
    assert layout(tmp_path / "none", DENSE).tokens() is None


def test_unigram_vocabularies_are_lists(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path, [["<unk>", 0.0], ["a", -1.5], ["b", -2]])
    assert read_tokens(path) == {"<unk>": 0, "a": 1, "b": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        b"null",
        b'{"model": []}',
        b'{"model": {"vocab": 3}}',
        b'{"model": {"vocab": {"a": -1}}}',
        b'{"model": {"vocab": {"a": true}}}',
        b'{"model": {"vocab": {"a": 1.5}}}',
        b'{"model": {"vocab": {"a": "1"}}}',
        b'{"model": {"vocab": {"a": 99999999999999999999}}}',
        b'{"model": {"vocab": {"a": 0, "a": 1}}}',
        b'{"model": {"vocab": {"a": 0}, "vocab": {"a": 1}}}',
        b'{"model": {"vocab": {"a": 0}}, "model": {"vocab": {}}}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": {}}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [3]}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}',
        b'{"model": {"vocab": [["a"], [3]]}}',
        b'{"model": {"vocab": {"a": 0}, "merges": ["unclosed]}}',
        b'{"model": {"vocab": {"\xff\xfe": 0}}}',
        b'{"model": {"vocab": ' + b"[" * 100_000,
        b'{"x": ' + b'{"a":' * 100_000,
    ],
)
def test_a_broken_tokenizer_is_a_format_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="tokenizer"):
        read_tokens(path)
    write_tokenizer(tmp_path / "t", {"a": 0})
    broken, sound = layout(tmp_path, DENSE), layout(tmp_path / "t", DENSE)
    for problems in (align(broken, sound).problems, donor_problems(sound, broken)):
        assert str(path) in only_error(problems, "tokenizer")


def test_a_tokenizer_that_is_a_folder_is_a_format_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(FormatError, match="regular file"):
        layout(tmp_path, DENSE).tokens()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tokenizers_are_read_as_json_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    vocab = data.draw(st.dictionaries(st.text(max_size=6), st.integers(0, 99), max_size=8))
    more = data.draw(st.dictionaries(st.text("abc", min_size=1, max_size=3), JSON, max_size=4))
    document = {**more, "model": {**more, "vocab": vocab}, "added_tokens": []}
    text = json.dumps(
        document, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.none() | st.just(2))
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:  # a lone surrogate cannot be in a file
        return
    assert read_tokens(path) == vocab
    broken = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(broken[: data.draw(st.integers(0, len(broken)))]))
    # What the walk does not judge may be broken and pass; what it refuses has to say where.
    with suppress(FormatError):
        assert all(type(number) is int for number in read_tokens(path).values())


@settings(max_examples=100)
@given(TOKENS, TOKENS)
def test_token_maps_are_compared_by_token_and_by_id(
    first: dict[str, int], second: dict[str, int]
) -> None:
    difference = compare_tokens(first, second)
    assert difference.same == (first == second)
    assert difference.moved == sum(
        token in second and second[token] != number for token, number in first.items()
    )
    assert difference.only_first == len(first.keys() - second.keys())
    assert difference.only_second == len(second.keys() - first.keys())


def test_same_bytes_are_not_parsed(tmp_path: Path) -> None:
    for folder in ("v", "t"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_bytes(b"not JSON, and nobody looks")
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    assert align(vector, target).problems == []
    assert donor_problems(vector, target) == []
    assert same_bytes(tmp_path / "v/tokenizer.json", tmp_path / "t/tokenizer.json")
