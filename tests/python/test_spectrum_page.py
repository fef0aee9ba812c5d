"""The page of spectra: its numbers, its curves, and that no string from a file becomes a tag."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pages import HOSTILE, Page, skeleton

import reasonvec as rv
from reasonvec.cli.app import main
from reasonvec.family import Family
from reasonvec.page import spectrum_page
from reasonvec.spectrum import Spectra, TensorSpectrum

KINDS = ("q_proj", "down_proj")


def matrix(
    name: str, kind: str, layer: int | None, above: tuple[float, ...], floor: float = 0.01
) -> TensorSpectrum:
    """Values over the floor as they are given, then 20 below it."""
    values = tuple(floor * v for v in (*above, *(0.9 - 0.01 * i for i in range(20))))
    norm = math.sqrt(sum(v * v for v in values))
    return TensorSpectrum(name, kind, layer, (64, 32), values, norm, floor, False)


def model(layers: int) -> list[TensorSpectrum]:
    """Ranks are layer + 1 for the first kind, and twice that for the second."""
    rows = [matrix("model.embed_tokens.weight", "embed", None, (3.0,))]
    for layer in range(layers):
        for times, kind in enumerate(KINDS, 1):
            above = tuple(8.0 / (i + 1) ** 0.3 for i in range(times * (layer + 1)))
            rows.append(matrix(f"model.layers.{layer}.{kind}.weight", kind, layer, above))
    return rows


def page(*rows: TensorSpectrum, checkpoint: bool = False) -> str:
    what = "checkpoint" if checkpoint else "vector"
    return spectrum_page(Spectra("rl - sft", what, rows, ("model.norm.weight",)))


def pictures(text: str) -> list[ElementTree.Element]:
    """The plots, which must be well-formed XML; the legend's swatches are not among them."""
    found = re.findall(r"<svg viewBox.*?</svg>", text, re.DOTALL)
    return [ElementTree.fromstring(svg.replace("<wbr>", "")) for svg in found]


def curves(picture: ElementTree.Element) -> list[ElementTree.Element]:
    return [g for g in picture.iter("g") if (g.get("class") or "").startswith("curve")]


def points(curve: ElementTree.Element) -> list[tuple[float, float]]:
    path = next(iter(curve.iter("path"))).get("d") or ""
    pairs = [point.split() for point in path.removeprefix("M").removesuffix("h0").split("L")]
    return [(float(x), float(y)) for x, y in pairs]


@pytest.mark.parametrize("layers", [1, 3, 28])
def test_the_maps_hold_the_ranks(layers: int) -> None:
    tables = Page(page(*model(layers))).heat()
    assert len(tables) == 6
    rank = tables[0]
    assert rank[0][1:] == [*KINDS, "all"]
    for layer in range(layers):
        r = layer + 1
        assert rank[1 + layer] == [str(layer), str(r), str(2 * r), f"{1.5 * r:g}"]
    assert rank[-1][:2] == ["all", f"{(layers + 1) / 2:g}"]
    assert tables[1][1][1:] == ["1"]
    row = model(layers)[1]
    effective, share = tables[2][1][1], tables[4][1][1]
    assert float(effective) == pytest.approx(row.stable_rank, rel=0.05)
    assert float(share) == pytest.approx(100 * row.energy, rel=0.05)


def test_curves_cross_the_floor_where_their_rank_is() -> None:
    embed, first, second = pictures(page(*model(5)))
    assert [len(curves(p)) for p in (embed, first, second)] == [1, 5, 5]
    for picture, times in ((first, 1), (second, 2)):
        floor = next(p for p in picture.iter("path") if p.get("class") == "floor")
        line = float((floor.get("d") or "").split()[1].partition("H")[0])
        for layer, curve in enumerate(curves(picture)):
            rank = times * (layer + 1)
            drawn = points(curve)
            assert len(drawn) == rank + 20
            assert [y < line for _, y in drawn] == [True] * rank + [False] * 20
            dot = next(iter(curve.iter("circle")))
            assert (float(dot.get("cx") or 0), float(dot.get("cy") or 0)) == drawn[rank - 1]
            said = curve.find("title")
            assert said is not None
            assert said.text == f"layer {layer}: rank {rank}, largest 8 times the floor"
        x, y = zip(*points(curves(picture)[-1]), strict=True)
        assert list(x) == sorted(x)
        assert list(y) == sorted(y)
        assert 0 <= min(y) <= max(y) <= 236
        assert 0 <= min(x) <= max(x) <= 360


def test_every_picture_says_what_it_shows() -> None:
    for picture in pictures(page(*model(5))):
        assert picture.get("role") == "img"
        named = {part.get("id"): part.text for part in picture.iter() if part.get("id")}
        title, about = (named[i] for i in (picture.get("aria-labelledby") or "").split())
        assert title in ("embed", *KINDS)
        assert about
    assert "the largest is 8 times the floor, and 2 to 10 of them are above it." in (about or "")


def test_long_spectra_are_thinned_but_keep_their_ends_and_ranks() -> None:
    values = tuple(50.0 * (1 + i) ** -0.8 for i in range(1536))
    row = TensorSpectrum(
        "model.layers.0.q.weight", "q_proj", 0, (1536, 1536), values,
        math.sqrt(sum(v * v for v in values)), 1.0, True,
    )  # fmt: skip
    (picture,) = pictures(page(row))
    (curve,) = curves(picture)
    drawn = points(curve)
    assert 30 < len(drawn) < 100
    dot = next(iter(curve.iter("circle")))
    assert (float(dot.get("cx") or 0), float(dot.get("cy") or 0)) in drawn
    assert drawn[-1][0] == pytest.approx(346, abs=0.2)
    labels = [text.text for text in picture.iter("text") if text.get("class") == "under"]
    assert labels[:4] == ["1", "10", "100", "1000"]


def test_experts_are_medians_and_zero_matrices_are_counted() -> None:
    kind = "experts.up_proj"
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    rows = [matrix(name.format(i), kind, 0, (9.0,) * r) for i, r in enumerate((1, 2, 5))]
    rows.append(TensorSpectrum(name.format(3), kind, 0, (64, 32), (0.0,) * 32, 0.0, 0.0, True))
    text = page(*rows)
    assert Page(text).heat()[0][1] == ["0", "1.5", "1.5"]
    (picture,) = pictures(text)
    (curve,) = curves(picture)
    assert len(points(curve)) == 21
    said = curve.find("title")
    assert said is not None
    assert said.text == "layer 0: rank 2, largest 9 times the floor"
    assert "1 of 4 zero" in text
    assert "the curve is the median" in text


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_lead_says_what_is_learned(checkpoint: bool) -> None:
    lead = "Half of the 11 matrices have at most 4 singular values above the noise floor."
    text = Page(page(*model(5), checkpoint=checkpoint)).text
    assert lead in text
    assert ("the rest looks like noise" in text) is not checkpoint
    same = [matrix(f"model.layers.{i}.q.weight", "q_proj", i, (4.0,)) for i in range(3)]
    assert "All 3 matrices have 1 singular value above" in Page(page(*same)).text
    none = [matrix("model.layers.0.q.weight", "q_proj", 0, ())]
    assert "No matrix has a singular value above" in Page(page(*none)).text
    assert "It holds no matrices." in Page(page()).text
    zero = TensorSpectrum("z", "q_proj", 0, (2, 2), (0.0, 0.0), 0.0, 0.0, True)
    assert "No matrix has" in Page(page(zero)).text


def test_tables_rank_the_matrices() -> None:
    read = Page(page(*model(12)))
    kinds, highest = read.tables[6:]
    assert [row[0] for row in kinds[1:]] == ["embed", *KINDS, "all"]
    assert kinds[2][1:4] == ["12", "6.5", "1 to 12"]
    assert len(highest) == 21
    assert highest[1][1] == "model.layers.11.down_proj.weight"
    assert highest[1][3] == "24"
    assert "more than three are left out: 1." in read.text


def hostile(string: str) -> str:
    rows = [matrix(string, string, layer, (3.0, 2.0)) for layer in (0, 1, None)]
    return spectrum_page(Spectra(string, "vector", tuple(rows), (string,)))


def test_hostile_strings_change_no_tag() -> None:
    text = hostile(HOSTILE)
    text.encode()
    assert skeleton(text) == skeleton(hostile("plain"))
    read = Page(text)
    assert len(read.scripts) == 1
    assert "<script>alert(1)</script>" in read.text
    for tag, attrs in read.tags:
        assert tag != "img"
        assert not any(key.startswith("on") for key in attrs)
    assert len(pictures(text)) == 1


@given(st.text(min_size=1, max_size=300))
def test_no_string_changes_a_tag(string: str) -> None:
    assert skeleton(hostile(string)) == skeleton(hostile("plain"))


def test_nothing_is_loaded_from_anywhere_and_only_its_own_script_runs() -> None:
    text = page(*model(4))
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|\bimport\(", text)
    read = Page(text)
    for _, attrs in read.tags:
        assert not {"src", "href", "xlink:href", "srcset", "data", "action", "ping"} & attrs.keys()
    policy = next(attrs["content"] for _, attrs in read.tags if "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(read.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_command_writes_it(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    command = ["spectrum", "--from", str(family.rl), str(family.sft), "--html", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert f"page written to {out}" in done.output.replace("\n", "")
    read = Page(out.read_text("utf-8"))
    spectra = (rv.open(family.rl) - rv.open(family.sft)).spectrum()
    ranks = {(row.layer, row.kind): row.rank for row in spectra.tensors}
    rank = read.heat()[0]
    for row in rank[1:-1]:
        for kind, cell in zip(rank[0][1:-1], row[1:-1], strict=True):
            assert cell == str(ranks[int(row[0]), kind])
