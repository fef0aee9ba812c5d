"""The inspection page: structure, numbers, and that no string from a file becomes a tag."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import HOSTILE, Page, skeleton

from reasonvec.inspection import Inspection, TensorMeasure
from reasonvec.page import inspection_page
from reasonvec.page.colour_scale import DARK, LIGHT, STEPS, Scale


def model(
    layers: int, kinds: tuple[str, ...] = ("q_proj", "down_proj", "norm"), experts: int = 0
) -> Iterator[TensorMeasure]:
    def one(name: str, kind: str, layer: int | None, shape: tuple[int, ...]) -> TensorMeasure:
        elements = math.prod(shape)
        moved = 0 if kind == "norm" else elements // 8
        size = 1e-5 * (1 + (layer or 0) / layers)
        return TensorMeasure(
            name=name,
            kind=kind,
            layer=layer,
            dtype="BF16",
            shape=shape,
            elements=elements,
            moved=moved,
            norm=size * math.sqrt(elements) if moved else 0.0,
            max=20 * size if moved else 0.0,
            max_at=elements - 1 if moved else None,
            stored_bytes=elements // 8 + moved,
            encoding="sparse" if moved else "zero",
        )

    yield one("model.embed_tokens.weight", "embed", None, (100, 16))
    for layer in range(layers):
        for kind in kinds:
            shape = (16,) if kind == "norm" else (16, 16)
            yield one(f"model.layers.{layer}.{kind}.weight", kind, layer, shape)
        for expert in range(experts):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            yield one(name, "experts.up_proj", layer, (8, 16))
    yield one("model.norm.weight", "norm", None, (16,))


def report(*tensors: TensorMeasure, checkpoint: bool = False) -> Inspection:
    return Inspection(
        title="reason",
        path="out/reason",
        what="checkpoint" if checkpoint else "vector",
        tensors=tensors,
        recipe=None if checkpoint else "qwen-grpo - qwen-sft",
        donors={"positive": "qwen-grpo", "positive digest": "ab" * 16, "negative": "qwen-sft"},
    )


@pytest.mark.parametrize("layers", [4, 28, 126])
def test_every_layer_and_kind_has_its_cell_in_all_three_maps(layers: int) -> None:
    page = Page(inspection_page(report(*model(layers))))
    tables = page.heat()
    assert len(tables) == 6
    for table in tables[::2]:
        assert [row[0] for row in table[1:]] == [*map(str, range(layers)), "all"]
        assert table[0][1:] == ["q_proj", "down_proj", "norm", "all"]
        assert {len(row) for row in table} == {5}
    for strip in tables[1::2]:
        assert strip[0][1:] == ["embed", "norm"]
    moved, rms, largest = tables[::2]
    assert moved[1] == ["0", "12.5", "12.5", "0", "12.1"]
    assert rms[1][1] == "1.0e-5"
    assert largest[1][1] == "2.0e-4"


def test_experts_of_a_layer_share_a_cell() -> None:
    page = Page(inspection_page(report(*model(4, ("q_proj", "router"), experts=8))))
    table = page.heat()[0]
    assert table[0][1:] == ["q_proj", "router", "experts.up_proj", "all"]
    assert "By kind of module" in page.text


def test_many_kinds_go_on_in_a_second_table() -> None:
    kinds = tuple(f"kind{i}" for i in range(30))
    tables = Page(inspection_page(report(*model(2, kinds)))).heat()
    assert len(tables) == 9
    assert tables[0][0][1:] == list(kinds[:24])
    assert tables[1][0][1:] == [*kinds[24:], "all"]


def test_a_missing_module_is_an_empty_cell_and_nan_is_said() -> None:
    rows = list(model(2))
    broken = rows[1]
    rows[1] = TensorMeasure(
        broken.name, "q_proj", 0, "F32", (16, 16), 256, 256, math.nan, math.inf, 3
    )
    del rows[4]
    tables = Page(inspection_page(report(*rows))).heat()
    assert tables[0][2][1] == ""
    assert tables[2][1][1] == "NaN"
    assert tables[4][1][1] == "inf"


def test_totals_and_ranking_are_on_the_page() -> None:
    page = Page(inspection_page(report(*model(28))))
    total = report(*model(28)).totals()
    assert f"{total.elements:,} in all" in page.text
    assert f"{total.stored_bytes:,} bytes" in page.text
    ranked = page.tables[6]
    assert len(ranked) == 21
    largest = report(*model(28)).largest()
    assert [row[1] for row in ranked[1:]] == [row.name for row in largest]
    assert "abababababab…" in page.text
    assert "ab" * 16 not in page.text


def test_a_checkpoint_speaks_of_values_and_shows_norms_first() -> None:
    page = Page(inspection_page(report(*model(4), checkpoint=True)))
    assert "moved" not in page.text.lower().replace("moved or not", "")
    chosen = [attrs["id"] for tag, attrs in page.tags if tag == "input" and "checked" in attrs]
    assert chosen == ["measure-1"]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_nothing_is_a_page_too(checkpoint: bool) -> None:
    page = Page(inspection_page(report(checkpoint=checkpoint)))
    assert "It holds no elements." in page.text
    empty = TensorMeasure("e", "q_proj", 0, "F32", (0, 4), 0, 0, 0.0, 0.0, None)
    Page(inspection_page(report(empty, checkpoint=checkpoint)))


def hostile(string: str) -> str:
    row = TensorMeasure(string, string, 0, string, (2, 3), 6, 6, 2.0, 1.0, 5, 7, string)
    loose = TensorMeasure(string, string, None, string, (2, 3), 6, 6, 2.0, 1.0, 5, 7, string)
    return inspection_page(
        Inspection(string, string, "vector", (row, loose), string, {string: string})
    )


def test_hostile_strings_change_no_tag() -> None:
    page = hostile(HOSTILE)
    page.encode()
    assert skeleton(page) == skeleton(hostile("plain"))
    read = Page(page)
    assert len(read.scripts) == 1
    assert "<script>alert(1)</script>" in read.text
    assert "\\u202e\\u0000\\u000a\\ud800" in read.text
    for tag, attrs in read.tags:
        assert tag != "img"
        assert not any(key.startswith("on") for key in attrs)


@given(st.text(min_size=1, max_size=300))
def test_no_string_changes_a_tag(string: str) -> None:
    assert skeleton(hostile(string)) == skeleton(hostile("plain"))


def test_names_without_end_are_cut() -> None:
    assert len(hostile("x" * 1_000_000)) < 200_000


def test_the_policy_lets_only_the_one_script_run() -> None:
    page = Page(inspection_page(report(*model(4))))
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert re.findall(r"script-src ([^;]*)", policy) == [f"'sha256-{digest}'"]


def test_nothing_is_loaded_from_anywhere() -> None:
    page = inspection_page(report(*model(4)))
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|\bimport\(", page)
    for _, attrs in Page(page).tags:
        assert not {"src", "href", "srcset", "data", "action", "ping"} & attrs.keys()


def test_the_same_report_gives_the_same_bytes_whatever_the_hash_seed() -> None:
    program = (
        "from reasonvec.inspection import *; from reasonvec.page import *; import hashlib\n"
        "rows = tuple(TensorMeasure(f't{i}', f'k{i % 7}', i % 3 or None, 'F32', (4, 4), 16, i, "
        "float(i), 1.0, 0, 8, f'e{i % 5}') for i in range(16))\n"
        "page = inspection_page(Inspection('t', 'p', 'vector', rows, None, {}))\n"
        "print(hashlib.sha256(page.encode()).hexdigest())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(said) == 1


def test_every_table_has_headings_with_scope() -> None:
    page = Page(inspection_page(report(*model(4))))
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert sum(tag == "caption" for tag, _ in page.tags) == tables


def luminance(colour: str) -> float:
    def linear(channel: int) -> float:
        x = channel / 255
        return x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("ramp", [LIGHT, DARK])
def test_values_stand_out_from_their_cells_and_steps_from_each_other(
    ramp: tuple[tuple[str, str], ...],
) -> None:
    assert len(ramp) == STEPS
    for fill, ink in ramp:
        dark, light = sorted((luminance(fill), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    order = [luminance(fill) for fill, _ in ramp]
    if ramp is LIGHT:
        order.reverse()
    assert all(b > 1.2 * a for a, b in pairwise(order))


positive = st.floats(min_value=5e-324, max_value=1.7e308, exclude_min=False)


@given(st.lists(positive, min_size=1, max_size=40))
def test_a_scale_covers_its_values_in_few_round_steps(values: list[float]) -> None:
    scale = Scale.over(values)
    assert scale is not None
    assert 1 <= scale.steps <= STEPS
    assert scale.edges[0] <= min(values)
    assert scale.edges[-1] >= max(values)
    assert list(scale.edges) == sorted(set(scale.edges))
    assert all(len(edge.normalize().as_tuple().digits) <= 4 for edge in scale.edges)
    for value in values:
        step = scale.step(value)
        assert scale.edges[step] <= value <= scale.edges[step + 1]
        assert 0 <= scale.shade(step) < STEPS


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([3.1, 23.6], ("2.5", "5", "7.5", "10", "12.5", "15", "17.5", "20", "22.5", "25")),
        ([100.0, 100.0], ("98", "100")),
        ([1e-5, 4e-4], ("1e-5", "2e-5", "5e-5", "1e-4", "2e-4", "5e-4")),
        ([1e-5, 1.0], ("1e-5", "1e-4", "0.001", "0.01", "0.1", "1")),
    ],
)
def test_scales_one_would_draw_by_hand(values: list[float], labels: tuple[str, ...]) -> None:
    scale = Scale.over(values)
    assert scale is not None
    assert scale.labels() == labels


def test_no_values_no_scale() -> None:
    assert Scale.over([0.0, math.nan, math.inf]) is None
