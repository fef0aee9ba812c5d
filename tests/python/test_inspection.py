"""The arithmetic of an inspection: sums, groups, and what JSON may hold."""

from __future__ import annotations

import json
import math

import pytest

from reasonvec.inspection import GroupMeasure, Inspection, TensorMeasure, in_order


def tensor(
    name: str,
    kind: str = "q_proj",
    layer: int | None = 0,
    *,
    elements: int = 4,
    moved: int = 1,
    norm: float = 1.0,
    largest: float = 1.0,
    stored: int | None = 8,
    encoding: str | None = "sparse",
) -> TensorMeasure:
    return TensorMeasure(
        name=name,
        kind=kind,
        layer=layer,
        dtype="BF16",
        shape=(elements,),
        elements=elements,
        moved=moved,
        norm=norm,
        max=largest,
        max_at=0 if elements else None,
        stored_bytes=stored,
        encoding=encoding,
    )


def inspection(*tensors: TensorMeasure) -> Inspection:
    return Inspection("title", "path", "vector", tensors, "p - n", {"positive": "p"})


def test_counts_add_norms_join_in_quadrature_and_the_largest_is_the_largest() -> None:
    small = tensor("a", norm=3.0, largest=2.0, moved=1, elements=4, stored=5)
    large = tensor("b", norm=4.0, largest=7.0, moved=3, elements=12, stored=11)
    total = inspection(small, large).totals()
    assert total == GroupMeasure(2, 16, 4, 5.0, 7.0, large, 16)
    assert total.moved_share == 0.25
    assert total.rms == 1.25
    assert total.bytes_per_parameter == 1.0


def test_norms_of_any_size_join_without_overflow() -> None:
    for scale in (1e200, 1e-200):
        total = inspection(tensor("a", norm=3 * scale), tensor("b", norm=4 * scale)).totals()
        assert total.norm == pytest.approx(5 * scale, rel=1e-15, abs=0)


def test_an_unknown_size_makes_the_sum_unknown() -> None:
    total = inspection(tensor("a", stored=8), tensor("b", stored=None)).totals()
    assert total.stored_bytes is None
    assert total.bytes_per_parameter is None


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_nan_anywhere_is_a_nan_in_the_sum(order: int) -> None:
    rows = [tensor("a"), tensor("b", largest=math.inf, norm=math.inf)]
    rows.insert(order, tensor("c", norm=math.nan, largest=math.nan))
    total = inspection(*rows).totals()
    assert math.isnan(total.norm)
    assert math.isnan(total.max)
    assert total.max_in is not None
    assert total.max_in.name == "c"


def test_nothing_sums_to_zero() -> None:
    assert GroupMeasure.of(()) == GroupMeasure(0, 0, 0, 0.0, 0.0, None, 0)
    assert GroupMeasure.of((tensor("a", elements=0, moved=0),)).moved_share == 0.0


def test_groups_hold_every_tensor_once() -> None:
    report = inspection(
        tensor("head", "lm_head", None),
        tensor("d1", "down_proj", 10),
        tensor("q1", "q_proj", 10),
        tensor("bias", "q_proj", 10, norm=math.sqrt(3)),
        tensor("q0", "q_proj", 2),
        tensor("odd", "conv1d", 2),
    )
    assert list(report.by_kind()) == ["q_proj", "down_proj", "lm_head", "conv1d"]
    assert list(report.by_layer()) == [2, 10, None]
    cells = report.by_layer_and_kind()
    assert cells[(10, "q_proj")].tensors == 2
    assert cells[(10, "q_proj")].norm == pytest.approx(2.0, rel=1e-15)
    for groups in (report.by_kind(), report.by_layer(), cells):
        assert sum(group.tensors for group in groups.values()) == len(report.tensors)
        joined = math.hypot(*(group.norm for group in groups.values()))
        assert joined == pytest.approx(report.totals().norm, rel=1e-15)


def test_largest_is_by_norm_then_by_name() -> None:
    rows = [tensor(name, norm=norm) for name, norm in (("b", 1.0), ("a", 1.0), ("c", 2.0))]
    rows.append(tensor("n", norm=math.nan))
    report = inspection(*rows)
    assert [row.name for row in report.largest()] == ["n", "c", "a", "b"]
    assert len(report.largest(2)) == 2


def test_encodings_are_counted_most_first() -> None:
    held = ("zero", "sparse", "sparse", None)
    report = inspection(*(tensor(f"t{i}", encoding=one) for i, one in enumerate(held)))
    assert list(report.encodings().items()) == [("sparse", 2), ("zero", 1)]


def test_known_kinds_come_first() -> None:
    assert in_order(["x", "norm", "experts.up_proj", "q_proj", "x"]) == [
        "q_proj",
        "experts.up_proj",
        "norm",
        "x",
    ]


def test_json_holds_everything_and_no_nan() -> None:
    report = inspection(tensor("a", norm=math.nan, largest=math.inf), tensor("b", "norm", None))
    read = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert read["totals"]["norm"] is None
    assert read["totals"]["elements"] == 8
    assert [row["name"] for row in read["tensors"]] == ["a", "b"]
    assert read["tensors"][0]["max"] is None
    assert [row["layer"] for row in read["layers"]] == [0, None]
    assert read["donors"] == {"positive": "p"}
