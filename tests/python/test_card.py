"""The card of a vector folder, from manifests as they are and as they should not be."""

from __future__ import annotations

import re

import pytest
import yaml

from reasonvec.card import vector_card
from reasonvec.errors import FormatError


def row(name: str, encoding: str = "sparse", **changed: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "name": name,
        "shape": [8, 16],
        "dtype": "BF16",
        "encoding": encoding,
        "elements": 128,
        "moved": 0 if encoding == "zero" else 16,
        "norm": 0.0 if encoding == "zero" else 3.0,
        "max": 0.0 if encoding == "zero" else 0.5,
        "max_at": None if encoding == "zero" else 5,
        "inexact": 0,
        "wide": 0,
        "bytes": 0 if encoding == "zero" else 48,
        "parts": {},
    }
    return plain | changed


def manifest(*rows: dict[str, object], **changed: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "format": 1,
        "reasonvec": "0.1.0",
        "recipe": "qwen-grpo - qwen-sft",
        "donors": {
            "positive": {"path": "/home/someone/models/qwen-grpo", "digest": "ab" * 16},
            "negative": {"path": "qwen-sft"},
        },
        "tensors": list(rows),
    }
    return plain | changed


MODEL = (
    row("model.embed_tokens.weight", "zero"),
    row("model.layers.0.self_attn.q_proj.weight"),
    row("model.layers.1.self_attn.q_proj.weight", norm=4.0, max=0.75),
    row("model.layers.0.input_layernorm.weight", "dense", elements=8, shape=[8], moved=8, bytes=16),
)


def parts(card: str) -> tuple[dict[str, object], str]:
    opening, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert opening == ""
    read = yaml.safe_load(front)
    assert isinstance(read, dict)
    return read, body


def cells(card: str, label: str) -> list[str]:
    found = [line for line in card.splitlines() if line.startswith(f"| {label} |")]
    assert len(found) == 1
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_front_matter() -> None:
    front, _ = parts(vector_card(manifest(*MODEL)))
    assert front["library_name"] == "reasonvec"
    assert "reasoning-vector" in front["tags"]  # type: ignore[operator]
    assert "base_model" not in front


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Qwen/Qwen2.5-1.5B", ["Qwen/Qwen2.5-1.5B"]),
        (["a/b", "a/b", "c/d"], ["a/b", "c/d"]),
        ("no: repository\nlicense: x", None),
        (7, None),
    ],
)
def test_base_model_only_when_it_is_a_repository(said: object, read: object) -> None:
    front, _ = parts(vector_card(manifest(*MODEL, base_model=said)))
    assert front.get("base_model") == read
    assert "license" not in front


def test_figures_by_kind() -> None:
    card = vector_card(manifest(*MODEL))
    assert cells(card, "`q_proj`") == [
        *("`q_proj`", "2", "256", "12.5 %", "5.00", "0.750", "96 B", "0.375", "2 `sparse`")
    ]
    assert cells(card, "`embed`")[3:7] == ["0 %", "0", "0", "0 B"]
    total = cells(card, "**all**")
    assert total[1:4] == ["4", "392", "10.2 %"]
    assert total[-1] == "2 `sparse`, 1 `dense`, 1 `zero`"


def test_exact() -> None:
    card = vector_card(manifest(*MODEL))
    assert "bit for bit, in all 392 elements of 4 tensors" in card
    assert "f64" not in card


def test_exact_with_corrections() -> None:
    card = vector_card(manifest(row("a", wide=3), row("b", wide=1)))
    assert "In 4 of them" in card


def test_inexact_names_the_tensors() -> None:
    rows = [row(f"t{i}", inexact=2) for i in range(12)]
    card = vector_card(manifest(*rows, row("fine")))
    assert "**Not exact**" in card
    assert "in 24 of 1,664 elements" in card
    assert "`t9` and 2 more" in card
    assert "bit for bit" not in card


def test_no_claim_without_two_donors() -> None:
    card = vector_card(manifest(*MODEL, donors={}))
    assert "bit for bit" not in card
    assert "no test to report" in card


def test_apply_lines_and_origin() -> None:
    card = vector_card(manifest(*MODEL))
    assert "reasonvec apply VECTOR --to TARGET -o OUTPUT --alpha 1.0" in card
    assert '(rv.open("TARGET") + 1.0 * rv.load("VECTOR")).save("OUTPUT")' in card
    assert cells(card, "positive")[1] == "`qwen-grpo` `abababababab…`"
    assert cells(card, "written by")[1] == "reasonvec `0.1.0`, format 1"


def test_a_published_card_does_not_tell_where_the_disk_was_mounted() -> None:
    donors = {
        "positive": {"path": "/home/someone/qwen-grpo"},
        "negative": {"path": "C:\\Users\\someone\\qwen-sft"},
    }
    card = vector_card(manifest(*MODEL, donors=donors, recipe=None))
    assert "someone" not in card
    assert "# Reasoning vector `qwen-grpo - qwen-sft`" in card


def test_hostile_names_stay_in_their_code_spans() -> None:
    evil = "a`b``c|d\n---\n# e <script>alert(1)</script>\u202e"
    card = vector_card(
        manifest(
            row(evil, encoding=evil, inexact=1),
            recipe=evil,
            donors={"positive": {"path": evil, "digest": evil}, "negative": evil, evil: {}},
            reasonvec=evil,
            base_model=evil,
        )
    )
    front, body = parts(card)
    assert set(front) == {"library_name", "tags"}
    assert "\u202e" not in card
    assert not re.search(r"^(---|# e)", body, re.MULTILINE)
    for line in body.splitlines():
        outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", line)
        assert "<script>" not in outside
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line[:1] == "|"]
    assert set(widths) == {10, 3}


def test_a_norm_that_is_not_finite_is_said() -> None:
    card = vector_card(manifest(row("a", norm=None, max=None)))
    assert cells(card, "**all**")[4:6] == ["NaN", "NaN"]


def test_an_empty_vector_has_a_card() -> None:
    assert "holds no elements" in vector_card(manifest())


def test_the_same_manifest_gives_the_same_card() -> None:
    assert vector_card(manifest(*MODEL)) == vector_card(manifest(*MODEL))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, '"tensors": expected a list, found nothing'),
        ({"tensors": [3]}, r"tensors\[0\]: expected an object, found int"),
        ({"tensors": [row("a", elements=-1)]}, '"elements": expected a whole number, found -1'),
        ({"tensors": [row("a", moved=True)]}, '"moved": expected a whole number, found True'),
        ({"tensors": [row("a", norm="1")]}, '"norm": expected a number or null'),
        ({"tensors": [row("a", shape=[1.5])]}, '"shape": expected a list of whole numbers'),
        ({"tensors": [row("a") | {"name": None}]}, '"name": expected a string, found None'),
    ],
)
def test_a_broken_manifest_is_named(broken: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        vector_card(broken)
