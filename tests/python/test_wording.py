"""Numbers and names as people read them."""

from __future__ import annotations

import math

import pytest

from reasonvec.wording import (
    legible,
    magnitude,
    percent,
    place,
    short_count,
    short_digests,
    shortened,
    size,
)


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (999_499, "999 K"),
        (999_500, "1.00 M"),
        (1_543_714_304, "1.54 B"),
        (405_000_000_000, "405 B"),
    ],
)
def test_short_count(n: int, said: str) -> None:
    assert short_count(n) == said


def test_size_is_decimal() -> None:
    assert size(467_000_000) == "467 MB"
    assert size(12) == "12 B"


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 7, "0"),
        (7, 7, "100"),
        (1, 10**9, "<0.01"),
        (10**9 - 1, 10**9, ">99.9"),
        (12, 100, "12.0"),
        (3, 100, "3.00"),
        (9996, 100_000, "10.0"),
        (3, 0, "0"),
    ],
)
def test_percent_says_zero_and_all_only_when_it_is_so(part: int, whole: int, said: str) -> None:
    assert percent(part, whole) == said


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.234e-5, "1.23e-5"),
        (0.00999, "0.00999"),
        (0.9996, "1.00"),
        (12.34, "12.3"),
        (9999.6, "1.00e4"),
        (1e300, "1.00e300"),
        (5e-324, "4.94e-324"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
    ],
)
def test_magnitude(x: float, said: str) -> None:
    assert magnitude(x) == said


def test_what_is_not_seen_is_spelled_out() -> None:
    assert legible("a\u202eb\x1b[0m\n\u200b\ud800") == "a\\u202eb\\u001b[0m\\u000a\\u200b\\ud800"
    assert legible("层.q_proj é") == "层.q_proj é"


def test_shortened_keeps_both_ends() -> None:
    assert shortened("model.layers.0.weight", 11) == "model…eight"
    assert shortened("short", 5) == "short"
    assert len(shortened("x" * 100, 10)) == 10


def test_digests_are_cut() -> None:
    assert short_digests(f"xxh3:{'ab' * 16} model-00001") == "xxh3:abababababab… model-00001"


def test_place() -> None:
    assert place(345 + 12 * 1000, (64, 1000)) == "[12, 345]"
    assert place(0, ()) == "[]"
    assert place(0, (3, 0)) == "[]"
