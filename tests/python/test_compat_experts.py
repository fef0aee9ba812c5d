"""Mixtures of experts in their two storages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DENSE, QWEN_MOE, Shape, assert_sound, elements, errors, layout, only_error

from reasonvec.compat.alignment import align
from reasonvec.compat.donors import donor_problems
from reasonvec.compat.experts import LAYOUTS, REFUSED
from reasonvec.compat.layout import Layout
from reasonvec.compat.placement import Placement, Segment

# Trap: mixtures of experts in two storages.

EXPERTS, HIDDEN, INNER = 3, 4, 5
LAYER = "model.layers.0."


def split_names(
    family: str, experts: int = EXPERTS, inner: int = INNER, hidden: int = HIDDEN
) -> dict[str, Shape]:
    table = next(row for row in LAYOUTS if family in row.families)
    shapes: dict[str, Shape] = {}
    for expert in range(experts):
        stem = f"{LAYER}{table.split}.{expert}"
        shapes[f"{stem}.{table.gate}.weight"] = (inner, hidden)
        shapes[f"{stem}.{table.up}.weight"] = (inner, hidden)
        shapes[f"{stem}.{table.down}.weight"] = (hidden, inner)
    for split, _ in table.renamed:
        shapes[f"{LAYER}{split}"] = (experts, hidden)
    return shapes


def packed_names(
    family: str, experts: int = EXPERTS, inner: int = INNER, hidden: int = HIDDEN
) -> dict[str, Shape]:
    table = next(row for row in LAYOUTS if family in row.families)
    shapes: dict[str, Shape] = {
        f"{LAYER}{table.packed}.gate_up_proj": (experts, 2 * inner, hidden),
        f"{LAYER}{table.packed}.down_proj": (experts, hidden, inner),
    }
    for _, packed in table.renamed:
        shapes[f"{LAYER}{packed}"] = (experts, hidden)
    return shapes


def moe(path: str, shapes: Mapping[str, Shape], family: str) -> Layout:
    return layout(path, shapes, config={**QWEN_MOE, "model_type": family})


def numbered(shapes: Mapping[str, Shape]) -> dict[str, npt.NDArray[np.int64]]:
    arrays: dict[str, npt.NDArray[np.int64]] = {}
    count = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        arrays[name] = np.arange(count, count + size).reshape(shape)
        count += size
    return arrays


def gather(
    placement: Placement | None, shape: Shape, arrays: Mapping[str, npt.NDArray[np.int64]]
) -> npt.NDArray[np.int64]:
    size = int(np.prod(shape))
    taken = elements(placement, size)
    return np.array(
        [-1 if at is None else arrays[at[0]].reshape(-1)[at[1]] for at in taken]
    ).reshape(shape)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "phimoe", "jamba", "lfm2_moe"]
)
@settings(max_examples=15, deadline=None)
@given(experts=st.integers(1, 4), inner=st.integers(0, 4), hidden=st.integers(1, 4))
def test_experts_go_where_transformers_puts_them(
    family: str, experts: int, inner: int, hidden: int
) -> None:
    """Against what its conversion does: merge the experts, concatenate gate and up (dim=1)."""
    table = next(row for row in LAYOUTS if family in row.families)
    split, packed = (names(family, experts, inner, hidden) for names in (split_names, packed_names))
    one_by_one, together = moe("v", split, family), moe("t", packed, family)
    assert not errors(align(one_by_one, together).problems)

    arrays = numbered(split)
    stem = f"{LAYER}{table.split}"
    gate, up, down = (
        np.stack([arrays[f"{stem}.{e}.{part}.weight"] for e in range(experts)])
        for part in (table.gate, table.up, table.down)
    )
    converted = {
        f"{LAYER}{table.packed}.gate_up_proj": np.concatenate([gate, up], axis=1),
        f"{LAYER}{table.packed}.down_proj": down,
    }
    for old, new in table.renamed:
        converted[f"{LAYER}{new}"] = arrays[f"{LAYER}{old}"]

    pack = align(one_by_one, together, missing="skip")
    assert_sound(pack, one_by_one, together)
    for name, wanted in converted.items():
        if wanted.size:
            assert (gather(pack.sources[name], wanted.shape, arrays) == wanted).all()

    unpack = align(together, one_by_one)
    assert not unpack.errors
    assert_sound(unpack, together, one_by_one)
    for name, wanted in arrays.items():
        assert (gather(unpack.sources[name], wanted.shape, converted) == wanted).all()


def test_packed_experts_of_mixtral_by_hand() -> None:
    vector = moe("v", split_names("mixtral"), "mixtral")
    target = moe("t", packed_names("mixtral"), "mixtral")
    alignment = align(vector, target)
    assert not alignment.problems or not alignment.errors
    placement = alignment.sources[f"{LAYER}mlp.experts.gate_up_proj"]
    assert placement is not None
    assert placement.segments is not None
    stem = f"{LAYER}block_sparse_moe.experts"
    assert placement.segments[:3] == (
        Segment(0, 20, f"{stem}.0.w1.weight", 0),
        Segment(20, 20, f"{stem}.0.w3.weight", 0),
        Segment(40, 20, f"{stem}.1.w1.weight", 0),
    )
    assert alignment.sources[f"{LAYER}mlp.gate.weight"] == Placement(
        f"{LAYER}block_sparse_moe.gate.weight"
    )
    assert placement.names[:2] == (f"{stem}.0.w1.weight", f"{stem}.0.w3.weight")


@pytest.mark.parametrize("family", [*REFUSED, "a_family_of_next_year"])
def test_other_families_are_refused_by_name(family: str) -> None:
    split, packed = split_names("qwen3_moe"), packed_names("qwen3_moe")
    for vector, target in (
        (moe("v", split, family), moe("t", packed, family)),
        (moe("v", packed, family), moe("t", split, family)),
    ):
        alignment = align(vector, target)
        assert {problem.kind for problem in alignment.errors} == {"experts"}
        for words in (family, "shapes cannot tell", "v store their experts differently"):
            assert words in alignment.errors[0].message
        assert_sound(alignment, vector, target)
        assert not errors(align(vector, vector).problems), "without a conversion nothing is refused"


def test_experts_without_a_model_type_are_refused() -> None:
    vector = layout("v", split_names("qwen3_moe"), config={})
    target = layout("t", packed_names("qwen3_moe"), config={})
    alignment = align(vector, target)
    assert {problem.kind for problem in alignment.errors} == {"experts"}
    assert "model_type" in alignment.errors[0].message


def test_a_transposed_pack_is_refused() -> None:
    shapes = {
        name: (shape[0], shape[2], shape[1]) for name, shape in packed_names("qwen3_moe").items()
    }
    turned = moe("t", shapes, "qwen3_moe")
    message = align(moe("v", packed_names("qwen3_moe"), "qwen3_moe"), turned).errors[0].message
    assert "transpose" in message
    split = align(moe("v", split_names("qwen3_moe"), "qwen3_moe"), turned)
    assert split.errors
    assert split.sources == dict.fromkeys(shapes)


def test_missing_experts_are_told() -> None:
    split = split_names("qwen3_moe")
    lost = f"{LAYER}mlp.experts.1.up_proj.weight"
    del split[lost]
    vector, target = moe("v", split, "qwen3_moe"), moe("t", packed_names("qwen3_moe"), "qwen3_moe")
    alignment = align(vector, target)
    assert lost in only_error(alignment.problems, "missing")
    lenient = align(vector, target, missing="skip")
    assert not lenient.errors
    placement = lenient.sources[f"{LAYER}mlp.experts.gate_up_proj"]
    assert placement is not None
    assert placement.segments is not None
    assert len(placement.segments) == 5
    assert_sound(lenient, vector, target)


@pytest.mark.parametrize(("ours", "theirs"), [(2, 3), (3, 2)])
def test_expert_counts_have_to_agree(ours: int, theirs: int) -> None:
    for target, vector in (
        (packed_names("qwen3_moe", ours), split_names("qwen3_moe", theirs)),
        (split_names("qwen3_moe", ours), packed_names("qwen3_moe", theirs)),
    ):
        alignment = align(moe("v", vector, "qwen3_moe"), moe("t", target, "qwen3_moe"))
        assert alignment.errors


def test_a_hostile_number_of_experts_costs_nothing() -> None:
    target = moe("t", {f"{LAYER}mlp.experts.gate_up_proj": (2**60, 0, 4)}, "qwen3_moe")
    alignment = align(moe("v", split_names("qwen3_moe"), "qwen3_moe"), target)
    assert alignment.errors


def test_donors_in_two_storages_are_told_once() -> None:
    positive = moe("p", {**DENSE, **split_names("qwen3_moe")}, "qwen3_moe")
    negative = moe("n", {**DENSE, **packed_names("qwen3_moe")}, "qwen3_moe")
    message = only_error(donor_problems(positive, negative), "experts")
    assert "one by one" in message
    assert "p and n" in message


def test_experts_under_a_prefix() -> None:
    wrapped = {
        name.replace("model.", "model.language_model."): shape
        for name, shape in packed_names("qwen3_moe").items()
    }
    vector, target = moe("v", split_names("qwen3_moe"), "qwen3_moe"), moe("t", wrapped, "qwen3_moe")
    alignment = align(vector, target, map_prefix=[("model.language_model.", "model.")])
    assert not alignment.errors
    assert not alignment.untouched
    assert_sound(alignment, vector, target)
