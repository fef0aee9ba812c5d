"""Verdicts and distances of `check`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from shards import Stored, read_checkpoint, write_checkpoint

import reasonvec as rv
from reasonvec.check import check
from reasonvec.family import Family, make_family
from reasonvec.names import kind_of

Doubles = NDArray[np.float64]


def doubles(folder: Path) -> dict[str, Doubles]:
    return {
        name: np.frombuffer(t.data, ml_dtypes.bfloat16).astype(np.float64).reshape(t.shape)
        for name, t in read_checkpoint(folder).items()
    }


def rewritten(
    source: Path, folder: Path, change: Callable[[str, Doubles], Doubles]
) -> rv.Checkpoint:
    """A copy of a checkpoint with other values."""
    tensors = {
        name: Stored("BF16", x.shape, change(name, x).astype(ml_dtypes.bfloat16).tobytes())
        for name, x in doubles(source).items()
    }
    config = json.loads((source / "config.json").read_bytes())
    write_checkpoint(folder, tensors, config=config)
    shutil.copy(source / "tokenizer.json", folder)
    return rv.open(folder)


def reconfigured(source: Path, folder: Path, **more: object) -> rv.Checkpoint:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | more))
    return rv.open(folder)


def test_a_family_is_compatible(family: Family) -> None:
    report = check(rv.open(family.rl), rv.open(family.sft), rv.open(family.instruct))
    assert report.verdict == "compatible"
    assert report.ok
    assert report.reasons == []
    assert [p for p in report.problems if p.severity == "error"] == []
    assert report.same_neurons == 1.0


@pytest.mark.parametrize("which", ["family", "untied_family"])
def test_distances_are_those_of_numpy(which: str, request: pytest.FixtureRequest) -> None:
    family: Family = request.getfixturevalue(which)
    report = check(rv.open(family.rl), rv.open(family.sft), rv.open(family.instruct))
    p, n, t = doubles(family.rl), doubles(family.sft), doubles(family.instruct)
    groups: dict[str, list[str]] = {"total": list(p)}
    for name in p:
        groups.setdefault(kind_of(name), []).append(name)
    assert set(report.by_kind) == set(groups) - {"total"}
    assert report.total is not None
    for kind, found in {**report.by_kind, "total": report.total}.items():
        names = groups[kind]
        one, other, target = (np.concatenate([x[k].ravel() for k in names]) for x in (p, n, t))
        v, apart = one - other, target - other
        norm = np.linalg.norm
        assert found.vector_share == pytest.approx(norm(v) / norm(other), rel=1e-6)
        assert found.target_share == pytest.approx(norm(apart) / norm(other), rel=1e-6)
        if norm(v) and norm(apart):
            cosine = float(v @ apart / norm(v) / norm(apart))
            assert found.cosine == pytest.approx(cosine, rel=1e-5, abs=1e-7)
        else:
            assert found.cosine is None
        if norm(apart):
            share = norm(v) / norm(apart)
            assert found.vector_over_target == pytest.approx(share, rel=1e-6)
        else:
            assert found.vector_over_target is None
        assert found.moved_share == np.count_nonzero(v) / v.size


def test_donors_only(family: Family) -> None:
    report = check(rv.open(family.rl), rv.open(family.sft))
    assert report.verdict == "compatible"
    assert report.total is not None
    assert report.total.vector_share is not None
    assert report.total.vector_share > 0
    assert report.total.target_share is None
    assert report.total.cosine is None
    assert report.total.vector_over_target is None
    assert report.same_neurons == 1.0


def test_equal_donors(family: Family) -> None:
    report = check(rv.open(family.rl), rv.open(family.rl), rv.open(family.instruct))
    assert report.total is not None
    assert report.total.vector_share == 0
    assert report.total.moved_share == 0
    assert report.total.cosine is None
    json.dumps(report.as_json(), allow_nan=False)


def test_a_target_equal_to_the_negative_donor(family: Family) -> None:
    report = check(rv.open(family.rl), rv.open(family.sft), rv.open(family.sft))
    assert report.verdict == "compatible"
    assert report.total is not None
    assert report.total.target_share == 0
    assert report.total.vector_over_target is None


def test_json(family: Family) -> None:
    report = check(rv.open(family.rl), rv.open(family.sft), rv.open(family.instruct))
    value = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert set(value) == {"verdict", "reasons", "problems", "total", "by_kind", "same_neurons"}
    assert set(value["total"]) == {
        "vector_over_negative",
        "target_over_negative",
        "cosine",
        "vector_over_target",
        "moved_share",
    }


def test_options_change_no_figure(family: Family) -> None:
    points = [rv.open(path) for path in (family.rl, family.sft, family.instruct)]
    one = check(*points, threads=1, memory_budget=1 << 20).as_json()
    assert one == check(*points, threads=4).as_json()


# -- verdicts


def test_an_unrelated_target_is_incompatible(family: Family, tmp_path: Path) -> None:
    """Same shapes, same tokenizer, other weights: sqrt(2) of a norm apart."""
    other = make_family(tmp_path, seed=99, with_base=False)
    report = check(rv.open(family.rl), rv.open(family.sft), rv.open(other.instruct))
    assert report.verdict == "incompatible"
    assert not report.ok
    assert report.total is not None
    assert report.total.target_share is not None
    assert any("the target" in reason and "apart" in reason for reason in report.reasons)


def test_unrelated_donors_are_incompatible(family: Family, tmp_path: Path) -> None:
    other = make_family(tmp_path, seed=98, with_base=False)
    report = check(rv.open(other.rl), rv.open(family.sft))
    assert report.verdict == "incompatible"
    assert any("the donors" in reason and "apart" in reason for reason in report.reasons)


def test_a_distant_target_is_doubtful(family: Family, tmp_path: Path) -> None:
    dice = np.random.default_rng(0)

    def further(_: str, x: Doubles) -> Doubles:
        return x + 0.7 * np.sqrt((x**2).mean()) * dice.normal(size=x.shape)

    target = rewritten(family.instruct, tmp_path / "far", further)
    report = check(rv.open(family.rl), rv.open(family.sft), target)
    assert report.verdict == "doubtful"
    assert report.ok
    assert any("0.7" in reason and "the target" in reason for reason in report.reasons)


def test_permuted_neurons_are_doubtful(family: Family, tmp_path: Path) -> None:
    """The same function with its neurons elsewhere: a vector added there hits the wrong ones."""
    order = np.random.default_rng(0).permutation(176)

    def permuted(name: str, x: Doubles) -> Doubles:
        if "gate_proj" in name or "up_proj" in name:
            return x[order]
        return x[:, order] if "down_proj" in name else x

    target = rewritten(family.instruct, tmp_path / "permuted", permuted)
    report = check(rv.open(family.rl), rv.open(family.sft), target)
    assert report.same_neurons is not None
    assert report.same_neurons < 0.1
    assert report.verdict != "compatible"
    assert any("neurons" in reason for reason in report.reasons)


@pytest.mark.parametrize("role", [0, 1, 2])
def test_another_rope_theta_is_incompatible(family: Family, tmp_path: Path, role: int) -> None:
    paths = [family.rl, family.sft, family.instruct]
    points = [rv.open(path) for path in paths]
    points[role] = reconfigured(paths[role], tmp_path / "other", rope_theta=1e4)
    report = check(*points)
    assert report.verdict == "incompatible"
    assert any("rope_theta" in reason for reason in report.reasons)
    assert report.total is not None, "distances are told all the same"


def test_every_problem_at_once(family: Family, tmp_path: Path) -> None:
    other = reconfigured(
        family.instruct, tmp_path / "other", rope_theta=1e4, hidden_act="gelu", rms_norm_eps=1e-3
    )
    reasons = check(rv.open(family.rl), rv.open(family.sft), other).reasons
    for field in ("rope_theta", "hidden_act", "rms_norm_eps"):
        assert any(field in reason for reason in reasons), field


def test_other_shapes_are_incompatible(family: Family, untied_family: Family) -> None:
    report = check(rv.open(family.rl), rv.open(family.sft), rv.open(untied_family.instruct))
    assert report.verdict == "incompatible"
    assert report.reasons
    json.dumps(report.as_json(), allow_nan=False)


def test_nothing_in_common(family: Family, tmp_path: Path) -> None:
    zero = Stored("F32", (2,), bytes(8))
    other = rv.open(write_checkpoint(tmp_path / "other", {"weight": zero}, config={}))
    report = check(other, rv.open(family.sft), rv.open(family.instruct))
    assert report.verdict == "incompatible"
    assert report.total is None
    json.dumps(report.as_json(), allow_nan=False)


def test_nan_in_a_donor(family: Family, tmp_path: Path) -> None:
    def spoiled(name: str, x: Doubles) -> Doubles:
        x = x.copy()
        if name == "model.norm.weight":
            x[5] = np.nan
        return x

    donor = rewritten(family.rl, tmp_path / "nan", spoiled)
    with pytest.raises(rv.NonFiniteError, match=r"model\.norm\.weight"):
        check(donor, rv.open(family.sft), rv.open(family.instruct))
