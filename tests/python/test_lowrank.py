"""Low-rank vectors: the core against the reference and the format page, compression, LoRA out."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from test_adapter import Peft, adapter_folder, bits_of, bytes_of, write

import reasonvec as rv
from reasonvec import _reasonvec as core
from reasonvec import reference as ref
from reasonvec.cli.app import main
from reasonvec.errors import FormatError, MismatchError
from reasonvec.family import Family
from reasonvec.folders import VectorFolder
from reasonvec.lowrank import from_lora
from reasonvec.names import is_vocabulary
from reasonvec.reference import BLOCK, Bits, Dtype, lowrank

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


# --------------------------------------------------------------------------------------------------
# LoRA in and out


@pytest.mark.parametrize("rslora", [False, True])
def test_a_vector_from_an_adapter_is_the_adapter(
    family: Family, tmp_path: Path, rslora: bool
) -> None:
    folder = adapter_folder(tmp_path / "a", family.sft, change={"use_rslora": rslora})
    vector = rv.adapter(folder)
    report = from_lora(vector, tmp_path / "v")
    assert [(row.rank, row.encoding) for row in report.compressed] == [(2, "lowrank")] * 2
    assert report.residual <= 1e-7 * report.norm
    if not rslora:  # a scale of two changes no bit
        assert report.residual == 0
    assert rv.load(tmp_path / "v").compare(vector).total.cosine == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(MismatchError, match="no single adapter"):
        from_lora(2.0 * vector, tmp_path / "w")


def test_factors_that_float32_does_not_hold(family: Family, tmp_path: Path) -> None:
    """What is not finite is named with its file; what only looks large or small is taken."""
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 64)), draw.normal(size=(64, 2))

    def adapter(name: str, a: NDArray[np.floating], b: NDArray[np.floating]) -> rv.Vector:
        factors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        return rv.adapter(adapter_folder(tmp_path / name, family.sft, tensors=factors))

    broken = a.astype(np.float32)
    broken[0, 5] = np.nan
    with pytest.raises(rv.NonFiniteError, match=r"(?s)adapter_model.*q_proj.*element 5 is NaN"):
        adapter("nan", broken, b.astype(np.float32)).compress(tmp_path / "v", rank=2)
    large = adapter("large", (a * 1e30).astype(np.float32), (b * 1e30).astype(np.float32))
    with pytest.raises(rv.NonFiniteError, match=r"(?s)adapter_model.*q_proj.*element 0 is -?inf"):
        large.compress(tmp_path / "v", rank=2)
    for power in (-60, 60):
        scaled = adapter(str(power), a * 10.0**power, b * 10.0**power)
        report = scaled.compress(tmp_path / f"v{power}", rank=2)
        assert [(row.rank, row.encoding) for row in report.compressed] == [(2, "lowrank")]
        assert report.residual <= 1e-6 * report.norm
        assert report.norm == pytest.approx(2 * 100.0**power * np.linalg.norm(b @ a), rel=1e-6)


def test_an_exported_adapter_is_the_low_rank_vector(
    reason: rv.Vector, family: Family, tmp_path: Path
) -> None:
    """What goes out as a LoRA comes in as the compressed vector, but for what was left out."""
    report = reason.to_lora(tmp_path / "lora", rank=3)
    reason.compress(tmp_path / "low", rank=3)
    rows = {row.name: row for row in rv.load(tmp_path / "low").inspect().tensors}
    total = sum(row.norm**2 for row in reason.inspect().tensors) ** 0.5
    assert report.norm == pytest.approx(total, rel=1e-6)
    left = {part.name: part for part in report.left_out}
    assert [part.why for part in left.values()] == ["its rows are tokens"]
    assert report.left_out_share == pytest.approx(
        rows["model.embed_tokens.weight"].norm / total, rel=1e-5
    )
    without = list(map(re.escape, left))
    kept = rv.load(tmp_path / "low").where(exclude=without)
    back = rv.adapter(tmp_path / "lora").where(exclude=without)
    compared = back.compare(kept).total
    assert compared.cosine == pytest.approx(1.0, abs=1e-9)
    assert compared.first_norm == pytest.approx(compared.second_norm, rel=1e-6)
    share = f"{100 * report.left_out_share:.3g} % of the norm"
    assert share in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "rank"), [("qwen", 3), ("qwen", 0.95), ("gpt2", 2)])
def test_peft_computes_what_the_dense_apply_computes(
    tmp_path: Path, kind: str, rank: float
) -> None:
    """An exported adapter in PEFT against the low-rank vector that we add ourselves."""
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    targets = ["q_proj", "v_proj", "down_proj"] if kind == "qwen" else ["c_attn", "c_fc"]
    patterns = {"rank_pattern": {"v_proj": 2}} if rank == 0.95 else {}
    made = Peft(tmp_path, kind, r=6, lora_alpha=9, target_modules=targets, **patterns)
    base = rv.open(made.base)
    vector = (
        rv.adapter(made.adapter, base) if kind == "gpt2" or rank != 3 else _trained(made, tmp_path)
    )
    report = vector.to_lora(tmp_path / "lora", rank=rank, base=str(made.base))
    if rank == 0.95:
        assert len(set(report.ranks.values())) > 1
    vector.compress(tmp_path / "low", rank=rank)
    (base + rv.load(tmp_path / "low")).save(tmp_path / "dense", out_dtype="float32")
    load = transformers.AutoModelForCausalLM.from_pretrained
    dense = load(tmp_path / "dense", dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(
        load(made.base, dtype=torch.float32), tmp_path / "lora"
    ).eval()
    with torch.no_grad():
        expected, found = dense(made.tokens).logits, adapted(made.tokens).logits
        plain = load(made.base, dtype=torch.float32).eval()(made.tokens).logits
    spread = expected.abs().max().item()
    assert (expected - found).abs().max().item() <= 2e-5 * spread
    assert (expected - plain).abs().max().item() > 1e-3 * spread


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bare", [False, True])
def test_an_adapter_finds_the_modules_of_a_class_with_a_head(tmp_path: Path, bare: bool) -> None:
    """Files of GPT-2 name `h.0...` what the model with a head has as `transformer.h.0...`."""
    peft = pytest.importorskip("peft")
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    made = Peft(tmp_path, "gpt2", r=4, target_modules=["c_attn", "c_fc"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    tensors = load_file(made.base / "model.safetensors")
    moved = tmp_path / "moved"
    moved.mkdir()
    draw = torch.Generator().manual_seed(1)
    for folder in (made.base, moved):
        if folder == moved:
            for name, tensor in tensors.items():
                if ".attn." in name:  # the biases too
                    tensor += 0.1 * torch.randn(tensor.shape, generator=draw)
        names = {n.removeprefix("transformer.") if bare else n: t for n, t in tensors.items()}
        save_file(names, folder / "model.safetensors", {"format": "pt"})
    (moved / "config.json").write_text((made.base / "config.json").read_text())
    base = rv.open(made.base)
    vector = rv.open(moved) - base
    report = vector.to_lora(tmp_path / "lora", rank=32)
    assert report.warnings == []
    assert report.left_out == []
    model = peft.PeftModel.from_pretrained(load(made.base, dtype=torch.float32), tmp_path / "lora")
    with torch.no_grad():
        expected = load(moved, dtype=torch.float32).eval()(made.tokens).logits
        found = model.eval()(made.tokens).logits
    assert (expected - found).abs().max() <= 2e-5 * expected.abs().max()
    assert rv.adapter(tmp_path / "lora", base).compare(vector).total.cosine == pytest.approx(1.0)


def _trained(made: Peft, tmp_path: Path) -> rv.Vector:
    """The difference of two checkpoints, with biases that moved, from an adapter's own."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and "norm" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    return rv.open(tmp_path / "trained") - rv.open(made.base)


def test_the_commands(family: Family, tmp_path: Path) -> None:
    def run(*args: str) -> dict[str, object]:
        result = CliRunner().invoke(main, [*args, "--json"])
        assert result.exit_code == 0, result.output
        return cast(dict[str, object], json.loads(result.output))

    pair = ["--from", str(family.rl), str(family.sft)]
    low, lora, back = (str(tmp_path / name) for name in ("low", "lora", "back"))
    assert run("compress", *pair, "-o", low, "--rank", "4", "--rescale")["compressed"] == 28
    shares = run("to-lora", *pair, "-o", lora, "--rank", "4", "--base-model", str(family.sft))
    assert 0 < cast(float, shares["left_out_share"]) < 1
    assert run("from-lora", lora, "-o", back)["compressed"] == 28
    assert run("inspect", back)
    out = str(tmp_path / "out")
    run("apply", low, back, "--to", str(family.instruct), "-o", out, "--alpha", "0.5")
    for command in (
        ["compress", low, back, "-o", str(tmp_path / "sum"), "--energy", "0.9"],
        ["to-lora", low, "-o", str(tmp_path / "l2")],
    ):
        assert CliRunner().invoke(main, command).exit_code == 0
    assert CliRunner().invoke(main, ["compress", low, "-o", out, "--rank", "none"]).exit_code == 2
    # An adapter of ours is replaced on request, somebody else's never.
    assert CliRunner().invoke(main, ["to-lora", low, "-o", lora]).exit_code == 2
    assert CliRunner().invoke(main, ["to-lora", low, "-o", lora, "--overwrite"]).exit_code == 0
    adapter_folder(tmp_path / "theirs", family.sft)
    command = ["to-lora", low, "-o", str(tmp_path / "theirs"), "--overwrite"]
    assert CliRunner().invoke(main, command).exit_code == 2


@pytest.mark.parametrize(
    ("number", "said"), [(np.nan, "is NaN"), (1e100, None), (np.inf, "is inf")]
)
def test_factors_that_are_no_numbers_make_no_adapter(
    family: Family, tmp_path: Path, number: float, said: str | None
) -> None:
    """Nothing is written, and what is to blame is named. What only an adapter cannot hold may be
    compressed."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": np.ones((2, 64)),
        f"{module}.lora_B.weight": np.full((64, 2), number),
    }
    folder = adapter_folder(tmp_path / "a", family.sft, tensors=tensors)
    vector = rv.adapter(folder, rv.open(family.sft))
    name = "model.layers.0.self_attn.q_proj.weight"
    if said is None:
        report = vector.compress(tmp_path / "low", rank=1)
        assert [row.residual < 1e-6 * row.norm for row in report.rows if row.name == name] == [True]
    else:
        with pytest.raises(rv.NonFiniteError, match=f"{name}.*{said}"):
            vector.compress(tmp_path / "low", rank=1)
    with pytest.raises(rv.NonFiniteError, match=name):
        vector.to_lora(tmp_path / "lora", rank=1)
    assert not list((tmp_path / "lora").glob("*"))
    if not np.isfinite(number):
        file = re.escape(str(folder / "adapter_model.safetensors"))
        with pytest.raises(rv.NonFiniteError, match=rf"^{file}: tensor {name}"):
            from_lora(vector, tmp_path / "back")


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_a_module_is_not_taken_for_another_that_ends_alike(tmp_path: Path) -> None:
    """Ranks by name, where one module's name is the end of another's."""
    peft = pytest.importorskip("peft")
    import torch

    def linear() -> torch.nn.Module:
        return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16, bias=False)})

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([linear(), linear()])
            self.vision = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([linear()])})

    generator = np.random.default_rng(0)
    ranks = {"layers.0.q_proj": 3, "layers.1.q_proj": 5, "vision.layers.0.q_proj": 5}
    zeros, moved = {}, {}
    for module, rank in ranks.items():
        product = generator.normal(size=(16, rank)) @ generator.normal(size=(rank, 16))
        bits = product.astype(np.float32).view(np.uint32)
        moved[f"{module}.weight"] = (bits, "F32", (16, 16))
        zeros[f"{module}.weight"] = (np.zeros_like(bits), "F32", (16, 16))
    for name, tensors in (("zeros", zeros), ("moved", moved)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        write(tmp_path / name / "model.safetensors", tensors)
    base = rv.open(tmp_path / "zeros")
    report = (rv.open(tmp_path / "moved") - base).to_lora(tmp_path / "lora", rank=0.999999)
    assert report.ranks == ranks
    found = rv.adapter(tmp_path / "lora", base)
    (base + found).save(tmp_path / "out")
    model = Model()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
    for module in ranks:
        name = f"{module}.weight"
        expected = moved[name][0].view(np.float32)
        ours = np.asarray(rv.open(tmp_path / "out")[name])
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        np.testing.assert_allclose(
            merged.get_submodule(module).weight.detach().numpy(), expected, atol=1e-4
        )


MIXTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [4, 0.6])
@pytest.mark.parametrize("family", MIXTURES)
def test_peft_stacks_the_factors_of_experts(tmp_path: Path, family: str, rank: float) -> None:
    """Experts by name in the file, packed in the model: PEFT computes what our own apply of the same
    adapter does, and what it has no place for is left out and said."""
    peft = pytest.importorskip("peft")
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from test_adapter import QWEN

    torch.manual_seed(0)
    kind, config = MIXTURES[family]
    sizes = QWEN | config
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**sizes)
    )
    n, p = tmp_path / "n", tmp_path / "p"
    model.save_pretrained(n)
    tensors = load_file(n / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        # Unlike steps, so that the energy rule finds unlike ranks; biases move too.
        if "experts" in name or ".self_attn." in name:
            step = 0.1 * torch.rand((), generator=draw)
            tensor += step * torch.randn(tensor.shape, generator=draw)
            if tensor.ndim == 2:
                tensor += torch.outer(*(torch.randn(k, generator=draw) for k in tensor.shape)) / 20
    p.mkdir()
    save_file(tensors, p / "model.safetensors", {"format": "pt"})
    (p / "config.json").write_text((n / "config.json").read_text())
    base = rv.open(n)
    report = (rv.open(p) - base).to_lora(tmp_path / "lora", rank=rank)
    why = {part.name: part.why for part in report.left_out}
    assert any(".experts." in name for name in why) == (family == "qwen2_moe")
    assert any("shared_experts" in name for name in why) == (family == "deepseek_v3")
    experts = {r for name, r in report.ranks.items() if ".experts." in name}
    assert len(experts) == (family != "qwen2_moe")
    if rank == 0.6:
        assert len(set(report.ranks.values())) > 1

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found = model.eval()(torch.arange(24)[None] * 7 % 96).logits
        assert isinstance(found, torch.Tensor)
        return found

    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load(n, dtype=torch.float32)
    before = logits(plain)
    found = logits(peft.PeftModel.from_pretrained(plain, tmp_path / "lora"))
    (base + rv.adapter(tmp_path / "lora", base)).save(tmp_path / "dense", out_dtype="float32")
    expected = logits(load(tmp_path / "dense", dtype=torch.float32))
    assert (expected - found).abs().max() <= 2e-5 * expected.abs().max()
    assert (expected - before).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.models
def test_the_families_are_those_that_peft_stacks() -> None:
    pytest.importorskip("peft")
    from peft.utils import transformers_weight_conversion as conversion

    from reasonvec.compat.experts import ADAPTABLE, LAYOUTS

    known = {
        kind
        for kind, pattern in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if pattern in conversion._MOE_TARGET_MODULE_MAPPING
    }
    assert set().union(*(layout.families for layout in LAYOUTS)) & known == ADAPTABLE
