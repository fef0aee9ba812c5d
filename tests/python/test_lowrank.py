"""Low-rank vectors: the core against the reference and the format page, and compression."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from test_adapter import bits_of, bytes_of, write

import reasonvec as rv
from reasonvec import _reasonvec as core
from reasonvec import reference as ref
from reasonvec.errors import FormatError, MismatchError
from reasonvec.family import Family
from reasonvec.folders import VectorFolder
from reasonvec.lowrank import summed
from reasonvec.names import is_vocabulary
from reasonvec.reference import BLOCK, Bits, Dtype, lowrank
from reasonvec.triplets import leading

FLOATS: list[Dtype] = ["BF16", "F16", "F32", "F64"]
Q = "model.layers.0.self_attn.q_proj.weight"
Reader = Callable[
    [Path], dict[str, tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]]
]


def page_reader() -> Reader:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text("utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    scope: dict[str, object] = {}
    exec(block[1], scope)  # running the page is the point
    return cast(Reader, scope["read_vector"])


def folder_of(
    path: Path, shape: tuple[int, ...], rank: int, dtypes: tuple[Dtype, Dtype]
) -> tuple[Bits, NDArray[np.float64], Bits]:
    """A vector folder of one low-rank tensor, by the words of docs/format.md."""
    generator = np.random.default_rng(rank)
    *stack, rows, columns = shape
    matrices = math.prod(stack)
    u, v = (
        bits_of(generator, matrices * rows * rank, dtypes[0]),
        bits_of(generator, matrices * rank * columns, dtypes[1]),
    )
    s = generator.normal(size=(*stack, rank)) ** 2
    parts = {
        "w:s": (s.view(np.uint64), "F64", (*stack, rank)),
        "w:u": (u, dtypes[0], (*stack, rows, rank)),
        "w:v": (v, dtypes[1], (*stack, rank, columns)),
    }
    parts = dict(sorted(parts.items(), key=lambda part: -part[1][0].itemsize))
    path.mkdir()
    write(path / "vector_model.safetensors", parts)
    row = {
        "name": "w",
        "shape": shape,
        "dtype": "F64" if "F64" in dtypes else "BF16",
        "encoding": "lowrank",
        "elements": math.prod(shape),
    }
    row |= {
        "moved": 0,
        "norm": 1.0,
        "max": 1.0,
        "max_at": 0,
        "inexact": 0,
        "wide": 0,
        "rank": rank,
        "residual": 0.0,
    }
    row |= {
        "bytes": u.nbytes + s.nbytes + v.nbytes,
        "parts": {r: {"entry": f"w:{r}", "digest": None} for r in "usv"},
    }
    (path / "vector_config.json").write_text(
        json.dumps({"format": 1, "digest": "none", "tensors": [row]})
    )
    return u.reshape(*stack, rows, rank), s, v.reshape(*stack, rank, columns)


@pytest.mark.parametrize(
    "dtypes", [("F32", "F32"), ("BF16", "F16"), ("BF16", "F32"), ("F32", "F64")]
)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((3, 5), 1),
        ((100, 33), 7),
        ((2, BLOCK + 9), 2),
        ((900, 700), 5),
        ((1, 4, 6), 2),
        ((5, 7, 9), 3),
        ((40, 130, 99), 4),
        ((3, 700, 500), 5),
        ((3, 2, BLOCK + 9), 2),
    ],
)
def test_core_reference_and_page_read_the_same(
    tmp_path: Path, shape: tuple[int, ...], rank: int, dtypes: tuple[Dtype, Dtype]
) -> None:
    u, s, v = folder_of(tmp_path / "v", shape, rank, dtypes)
    work = ref.work_dtype(*dtypes)
    expected = lowrank.lowrank_values((u, dtypes[0]), s, (v, dtypes[1]), work=work)
    n = math.prod(shape)
    term = json.dumps([{"coefficient": 1.0, "source": {"stored": {"operand": 0, "name": "w"}}}])
    found = core.values(term, "w", n, 0, n, [core.VectorFolder(tmp_path / "v")], work == "F64")
    assert bytes_of(found, work == "F64").tobytes() == expected.tobytes()
    # From the middle of a row, and of a matrix of a stack, to the middle of another.
    for start, stop in ((n // 3 + 1, n - 2), (n // 2, n // 2 + 1)):
        found = core.values(
            term, "w", n, start, stop, [core.VectorFolder(tmp_path / "v")], work == "F64"
        )
        part = expected.reshape(-1)[start:stop]
        assert bytes_of(found, work == "F64").tobytes() == part.tobytes()
    hi, at, _ = page_reader()(tmp_path / "v")["w"]
    assert hi.tobytes() == expected.tobytes()
    assert hi.shape == shape
    assert at.size == 0


@pytest.fixture(scope="module")
def reason(family: Family) -> rv.Vector:
    return rv.open(family.rl) - rv.open(family.sft)


def exact(vector: rv.Vector, tmp_path: Path) -> dict[str, NDArray[np.float32]]:
    vector.save(tmp_path / "exact")
    return {name: hi for name, (hi, _, _) in page_reader()(tmp_path / "exact").items()}


def test_matrices_become_their_leading_triplets(reason: rv.Vector, tmp_path: Path) -> None:
    before = exact(reason, tmp_path)
    report = reason.compress(tmp_path / "low", rank=6)
    after = {name: hi for name, (hi, _, _) in page_reader()(tmp_path / "low").items()}
    assert list(after) == list(before)
    for row in report.rows:
        was, now = before[row.name].astype(float), after[row.name].astype(float)
        if was.ndim < 2 or is_vocabulary(row.name):
            assert row.encoding in ("zero", "sparse", "dense")
            assert row.residual is None
            assert was.tobytes() == now.tobytes()
            continue
        assert (row.encoding, row.rank) == ("lowrank", 6)
        best = np.linalg.svd(was, compute_uv=False)[6:]
        assert np.linalg.norm(was - now) == pytest.approx(row.residual, rel=1e-6)
        assert row.residual <= 1.01 * np.linalg.norm(best)
        assert np.linalg.norm(now) == pytest.approx(row.norm, rel=1e-6)
        assert row.max == np.abs(now).max()
        assert row.moved == np.count_nonzero(now)
    assert not list((tmp_path / "low").glob("*.partial"))
    core.verify_vector(core.VectorFolder(tmp_path / "low"), json.dumps({"memory_budget": 1 << 22}))
    card = (tmp_path / "low" / "README.md").read_text()
    assert "Not exact, on request" in card
    assert "of rank 6." in card


def test_rescaled_matrices_have_their_norms(reason: rv.Vector, tmp_path: Path) -> None:
    before = exact(reason, tmp_path)
    report = reason.compress(tmp_path / "low", rank=1, rescale=True)
    for row in report.compressed:
        assert row.norm == pytest.approx(np.linalg.norm(before[row.name]), rel=1e-6)
    plain = reason.compress(tmp_path / "plain", rank=1)
    assert report.residual > plain.residual


def test_energy_decides_the_rank(reason: rv.Vector, tmp_path: Path) -> None:
    before = exact(reason, tmp_path)
    report = reason.compress(tmp_path / "low", rank=0.6)
    for row in report.compressed:
        total = np.linalg.norm(before[row.name].astype(float)) ** 2
        values = np.linalg.svd(before[row.name].astype(float), compute_uv=False) ** 2
        assert values[: row.rank].sum() >= 0.6 * total * (1 - 1e-5)
        assert values[: (row.rank or 0) - 1].sum() < 0.6 * total


@pytest.mark.parametrize("rank", [0, -3, 0.0, 1.5, -0.1])
def test_what_is_no_rank_is_refused(reason: rv.Vector, tmp_path: Path, rank: float) -> None:
    with pytest.raises(MismatchError, match="rank: expected"):
        reason.compress(tmp_path / "low", rank=rank)
    assert not (tmp_path / "low").exists()


def test_a_rank_that_saves_nothing_leaves_the_matrix_exact(
    reason: rv.Vector, tmp_path: Path
) -> None:
    report = reason.compress(tmp_path / "low", rank=60)
    assert {row.encoding for row in report.rows} <= {"zero", "sparse", "dense"}
    assert report.residual == 0


@pytest.mark.parametrize("shape", [(1, 64), (64, 1)])
def test_a_single_row_is_not_taken_for_noise(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Random signs leave its norm alone: compressing keeps it exactly, an adapter with rank 1."""
    generator = np.random.default_rng(7)
    names = [f"model.layers.{i}.mlp.gate.weight" for i in range(12)]
    names += [f"model.layers.{i}.mlp.down_proj.weight" for i in range(12)]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        tensors = {n: (bits_of(generator, 64, "BF16"), cast(Dtype, "BF16"), shape) for n in names}
        write(tmp_path / folder / "model.safetensors", tensors)
    vector = rv.open(tmp_path / "b") - rv.open(tmp_path / "a")
    low = vector.compress(tmp_path / "low")
    assert {row.encoding for row in low.rows} <= {"dense", "sparse"}
    kept = {name: hi for name, (hi, _, _) in page_reader()(tmp_path / "low").items()}
    assert kept.keys() == set(names)
    np.testing.assert_equal(kept, exact(vector, tmp_path))
    ranks = vector.to_lora(tmp_path / "lora").ranks
    assert set(ranks.values()) == {1}
    assert len(ranks) >= 12


def test_sums_of_low_rank_vectors_keep_the_sum_of_their_ranks(
    reason: rv.Vector, family: Family, tmp_path: Path
) -> None:
    other = rv.open(family.instruct) - rv.open(family.base)
    reason.compress(tmp_path / "a", rank=3)
    other.compress(tmp_path / "b", rank=2)
    a, b = rv.load(tmp_path / "a"), rv.load(tmp_path / "b")
    total = 2.0 * a - 0.5 * b
    report = total.compress(tmp_path / "sum")
    assert {row.rank for row in report.compressed} == {5}
    assert report.residual <= 2e-6 * report.norm
    compared = rv.load(tmp_path / "sum").compare(total)
    assert compared.total.cosine == pytest.approx(1.0, abs=1e-10)
    again = (a - 0.25 * a).compress(tmp_path / "again")
    assert {row.rank for row in again.compressed} == {3}
    assert total.compress(tmp_path / "less", rank=4).residual > 0


def test_low_rank_and_exact_vectors_share_one_algebra(
    reason: rv.Vector, family: Family, tmp_path: Path
) -> None:
    reason.compress(tmp_path / "low", rank=4)
    low = rv.load(tmp_path / "low")
    (rv.open(family.instruct) + 0.7 * low + 0.1 * reason).save(tmp_path / "out")
    values = page_reader()(tmp_path / "low")
    exactly = exact(reason, tmp_path)
    base, out = rv.open(family.instruct), rv.open(tmp_path / "out")
    for name, (hi, _, _) in values.items():
        t = np.frombuffer(memoryview(base[name]).cast("B"), np.uint16)
        u = ref.combine([hi.reshape(-1), exactly[name].reshape(-1)], [0.7, 0.1], "F32")
        assert (
            memoryview(out[name]).cast("B").tobytes() == ref.finish(t, "BF16", u, "BF16").tobytes()
        )


def test_digests_do_not_depend_on_threads_budgets_or_levels(family: Family, tmp_path: Path) -> None:
    code = "import sys, reasonvec as rv; p, n, o, t, m = sys.argv[1:]; (rv.open(p) - rv.open(n)).compress(o, rank=5, threads=int(t), memory_budget=int(m))"
    seen = set()
    for i, (threads, budget, level) in enumerate(
        [(1, 1 << 20, core.simd_levels()[0]), (3, 64 << 20, core.simd_levels()[-1])]
    ):
        out = tmp_path / f"out{i}"
        command = [
            sys.executable,
            "-c",
            code,
            str(family.rl),
            str(family.sft),
            str(out),
            str(threads),
            str(budget),
        ]
        subprocess.run(command, check=True, env=os.environ | {"REASONVEC_SIMD": level})
        seen.add(json.dumps(json.loads((out / "vector_config.json").read_text())["tensors"]))
    assert len(seen) == 1


def test_a_damaged_factor_is_found(reason: rv.Vector, family: Family, tmp_path: Path) -> None:
    reason.compress(tmp_path / "low", rank=2)
    path = tmp_path / "low" / "vector_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(rv.DamageError):
        (rv.open(family.instruct) + rv.load(tmp_path / "low")).save(tmp_path / "out")
    config = tmp_path / "low" / "vector_config.json"
    config.write_text(config.read_text().replace('"rank": 2', '"rank": 3'))
    with pytest.raises(FormatError, match="rank"):
        rv.load(tmp_path / "low")


# --------------------------------------------------------------------------------------------------
# Stacks: the experts of a layer in one tensor

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def stacks(path: Path, ranks: tuple[int, ...], shape: tuple[int, int] = (48, 40)) -> rv.Vector:
    """A difference of two checkpoints whose experts differ by updates of these ranks."""
    draw = np.random.default_rng(9)
    low = [draw.normal(size=(shape[0], r)) @ draw.normal(size=(r, shape[1])) for r in ranks]
    n = draw.normal(size=(len(ranks), *shape)).astype(np.float32)
    folders = {}
    for name, values in (("n", n), ("p", n + np.array(low, np.float32))):
        (path / name).mkdir(parents=True)
        parts: dict[str, tuple[Bits, Dtype, tuple[int, ...]]] = {
            EXPERTS: (values.view(np.uint32), "F32", values.shape)
        }
        write(path / name / "model.safetensors", parts)
        (path / name / "config.json").write_text("{}")
        folders[name] = rv.open(path / name)
    return folders["p"] - folders["n"]


def test_every_expert_of_a_stack_is_a_matrix(tmp_path: Path) -> None:
    vector = stacks(tmp_path, (2, 5, 3))
    vector.save(tmp_path / "exact")
    was = page_reader()(tmp_path / "exact")[EXPERTS][0].astype(float)
    report = vector.compress(tmp_path / "low", rank=4)
    (row,) = report.rows
    assert (row.encoding, row.rank) == ("lowrank", 4)
    now = page_reader()(tmp_path / "low")[EXPERTS][0].astype(float)
    assert now.shape == (3, 48, 40)
    left = np.linalg.norm(was - now, axis=(1, 2))
    best = [np.linalg.svd(one, compute_uv=False)[4:] for one in was]
    assert left == pytest.approx([np.linalg.norm(b) for b in best], rel=1e-2, abs=1e-4)
    assert row.residual == pytest.approx(np.linalg.norm(left), rel=1e-4)
    core.verify_vector(core.VectorFolder(tmp_path / "low"), json.dumps({"memory_budget": 1 << 22}))
    low = rv.load(tmp_path / "low")
    assert low.compare(vector).total.cosine == pytest.approx(
        float((was * now).sum() / np.linalg.norm(was) / np.linalg.norm(now)), rel=1e-6
    )
    assert np.asarray(low.svd(EXPERTS, rank=4, number=1).s) == pytest.approx(
        np.linalg.svd(now[1], compute_uv=False)[:4], rel=1e-4
    )


def test_of_a_stack_of_factors_the_matrix_in_question_is_read(tmp_path: Path) -> None:
    """What an expert takes does not grow with the number of experts beside it."""
    vector = stacks(tmp_path, (4,) * 64)
    vector.compress(tmp_path / "low", rank=4)
    tensors, operands = summed(rv.load(tmp_path / "low"))
    (tensor,) = tensors.values()
    one = 8 * 4 * (48 + 40)
    tracemalloc.start()
    found = leading(tensor.name, tensor.shape, tensor.terms, operands, 4, {}, 63)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    was = page_reader()(tmp_path / "low")[EXPERTS][0][63]
    np.testing.assert_allclose((found.u * found.s) @ found.v, was, atol=1e-4)
    assert most < 16 * one < 64 * one


def test_experts_of_unlike_ranks_are_filled_up_with_zeros(tmp_path: Path) -> None:
    vector = stacks(tmp_path, (2, 0, 5))
    report = vector.compress(tmp_path / "low", rank=0.9999999)
    (row,) = report.rows
    folder = VectorFolder(tmp_path / "low")
    s = np.asarray(memoryview(folder.part(f"{EXPERTS}:s")))
    assert row.rank == s.shape[1] == 5
    assert (s != 0).sum(axis=1).tolist() == [2, 0, 5]
    # Sums of such vectors are made of their factors, and lose nothing but rounding.
    low = rv.load(tmp_path / "low")
    again = (2.0 * low - 0.5 * low).compress(tmp_path / "again")
    assert again.rows[0].rank == 5
    assert again.residual <= 2e-6 * again.norm
    low.compress(tmp_path / "scaled", rank=1, rescale=True)
    before, after = (page_reader()(tmp_path / f)[EXPERTS][0] for f in ("low", "scaled"))
    assert np.linalg.norm(after, axis=(1, 2)) == pytest.approx(
        np.linalg.norm(before, axis=(1, 2)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shape": [3, 40, 48]}, "stack|shape"),
        ({"shape": [120, 48]}, "matrix|F64|product"),
        ({"shape": [2, 72, 40]}, "F64"),
        ({"shape": [3, 48, 40, 1]}, "matri"),
        ({"rank": 12}, "rank"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    stacks(tmp_path, (2, 2, 2)).compress(tmp_path / "low", rank=4)
    config = tmp_path / "low" / "vector_config.json"
    said = json.loads(config.read_text())
    said["tensors"][0] |= change
    config.write_text(json.dumps(said))
    with pytest.raises(FormatError, match=says):
        rv.load(tmp_path / "low").save(tmp_path / "out")
