"""Digests against the record, and exact counts of what differs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from shards import Stored, read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec._reasonvec import journal_name
from reasonvec.family import Family
from reasonvec.verify import diff, verify


@pytest.fixture(scope="module")
def finished(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector and an output with a residual. Copy, never write."""
    folder = tmp_path_factory.mktemp("finished")
    vector = rv.open(family.rl) - rv.open(family.sft)
    vector.save(folder / "reason", sync=False)
    (rv.open(family.instruct) + vector).save(folder / "out", keep_undo=True, sync=False)
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


@pytest.fixture
def vector(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "reason", tmp_path / "reason"))


def spans(path: Path) -> Mapping[str, tuple[int, int]]:
    """Where in a file each tensor lies."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return {
        name: (start + row["data_offsets"][0], start + row["data_offsets"][1])
        for name, row in json.loads(content[8:start]).items()
        if name != "__metadata__" and row["data_offsets"][0] < row["data_offsets"][1]
    }


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


# -- outputs


def test_whole(out: Path, vector: Path, family: Family) -> None:
    report = verify(out)
    assert report.ok
    assert report.damage == []
    assert report.tensors == len(rv.open(family.instruct))
    assert report.files == len([p for p in out.iterdir() if p.suffix == ".json"]) - 1
    assert report.algorithm == "xxh3-128"
    assert verify(vector).ok
    assert verify(vector).tensors == len(rv.open(family.rl))


@pytest.mark.parametrize("digest", ["xxh3-128", "blake3"])
def test_algorithms(family: Family, tmp_path: Path, digest: str) -> None:
    difference = rv.open(family.rl) - rv.open(family.sft)
    difference.save(tmp_path / "v", digest=digest, sync=False)  # type: ignore[arg-type]
    (rv.open(family.instruct) + difference).save(tmp_path / "out", digest=digest, sync=False)  # type: ignore[arg-type]
    for folder in (tmp_path / "v", tmp_path / "out"):
        assert verify(folder).ok
        assert verify(folder).algorithm == digest


def test_options_change_nothing(out: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(
        out, threads=1, memory_budget=1 << 20, progress=lambda a, b: seen.append((a, b))
    )
    assert report.ok
    assert seen
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_flipped_bit_in_any_tensor(out: Path) -> None:
    """First and last byte of a tensor of every shard: the report names that tensor and no other."""
    for shard in sorted(out.glob("*.safetensors")):
        for name, (begin, end) in list(spans(shard).items())[:: max(1, len(spans(shard)) - 1)]:
            for at in (begin, end - 1):
                flip(shard, at)
                report = verify(out)
                assert not report.ok
                assert len(report.damage) == 1
                assert f": {name} has" in report.damage[0]
                assert str(shard) in report.damage[0]
                flip(shard, at)
    assert verify(out).ok


def test_every_damage_is_told(out: Path) -> None:
    touched = []
    for shard in sorted(out.glob("*.safetensors")):
        name, (begin, _) = next(iter(spans(shard).items()))
        flip(shard, begin)
        touched.append(name)
    flip(out / "tokenizer.json", 9)
    (out / "generation_config.json").unlink()
    damage = verify(out).damage
    assert len(damage) == len(touched) + 2
    for name in [*touched, "tokenizer.json", "generation_config.json"]:
        assert any(name in line for line in damage), name


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_side_file(out: Path, file: str) -> None:
    flip(out / file, 20)
    report = verify_or_refuse(out)
    assert report is None or [file in line for line in report] == [True]


def verify_or_refuse(out: Path) -> list[str] | None:
    """A damaged config.json may be no JSON any more, which is an error of its own."""
    try:
        return verify(out).damage
    except rv.FormatError:
        return None


def test_a_missing_side_file(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    assert verify(out).damage == [f"{out / 'tokenizer.json'}: is missing"]


def test_a_missing_shard(out: Path) -> None:
    next(iter(sorted(out.glob("*.safetensors")))).unlink()
    with pytest.raises((OSError, rv.FormatError)):
        verify(out)


def test_a_swap_of_shapes_is_damage(out: Path) -> None:
    """The same bytes under another header are another tensor."""
    shard = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    name = next(n for n in spans(shard) if "gate_proj" in n)
    at = content.index(b'"shape":[176,64]', content.index(name.encode()))
    content[at : at + 16] = b'"shape":[64,176]'
    shard.write_bytes(content)
    report = verify(out)
    assert not report.ok
    assert any(name in line for line in report.damage)


def test_another_dtype_is_damage(out: Path) -> None:
    shard = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    name = next(n for n in spans(shard) if "gate_proj" in n)
    at = content.index(b'"dtype":"BF16"', content.index(name.encode()))
    content[at : at + 14] = b'"dtype": "F16"'
    shard.write_bytes(content)
    report = verify(out)
    assert not report.ok
    assert any(name in line for line in report.damage)


def test_an_index_that_points_elsewhere_is_damage(out: Path) -> None:
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    files = sorted(set(index["weight_map"].values()))
    name, last = next(n for n, file in index["weight_map"].items() if file == files[0]), files[-1]
    index["weight_map"][name] = last
    path.write_text(json.dumps(index))
    with pytest.raises(rv.FormatError, match=re.escape(name)):
        verify(out)


def test_a_changed_residual(out: Path) -> None:
    part = next((out / "reasonvec_undo").glob("*.safetensors"))
    entry, (begin, end) = max(spans(part).items(), key=lambda item: item[1][1] - item[1][0])
    flip(part, (begin + end) // 2)
    report = verify(out)
    assert not report.ok
    assert any(entry.rpartition(".")[0] in line for line in report.damage), (entry, report.damage)


def test_a_missing_residual(out: Path) -> None:
    shutil.rmtree(out / "reasonvec_undo")
    report = verify(out)
    assert not report.ok
    assert "reasonvec_undo" in report.damage[0]


def test_a_vector_part(vector: Path) -> None:
    part = next(vector.glob("*.safetensors"))
    damaged = 0
    for entry, (begin, end) in list(spans(part).items())[::7]:
        if entry == "padding":
            continue
        flip(part, (begin + end) // 2)
        try:
            report = verify(vector)
        except rv.FormatError:
            damaged += 1  # a bitmap that contradicts its own counts is found before its digest
        else:
            assert not report.ok, entry
            damaged += 1
        flip(part, (begin + end) // 2)
    assert damaged > 5
    assert verify(vector).ok


def test_no_record(family: Family, out: Path, tmp_path: Path) -> None:
    with pytest.raises(rv.ReasonvecError, match=r"reasonvec\.json"):
        verify(family.sft)
    (out / journal_name()).touch()
    with pytest.raises(rv.ReasonvecError, match="unfinished"):
        verify(out)
    difference = rv.open(family.rl) - rv.open(family.sft)
    (rv.open(family.instruct) + difference).save(tmp_path / "none", digest="none", sync=False)
    with pytest.raises(rv.ReasonvecError, match="--digest none"):
        verify(tmp_path / "none")


def test_a_record_that_names_files_outside(out: Path) -> None:
    record = json.loads((out / "reasonvec.json").read_bytes())
    record["output"]["files"]["../target/config.json"] = "0" * 32
    (out / "reasonvec.json").write_text(json.dumps(record))
    assert verify(out).damage == ["'../target/config.json': is no plain file name"]


# -- diff


def test_nothing_differs(family: Family) -> None:
    report = diff(family.rl, family.rl)
    assert report.same
    assert report.differing == 0
    assert report.as_json()["tensors"] == {}
    assert report.elements == sum(t.bits.size for t in read_checkpoint(family.rl).values())


def test_a_family(family: Family) -> None:
    """Every count is that of numpy."""
    report = diff(family.rl, family.sft)
    a, b = read_checkpoint(family.rl), read_checkpoint(family.sft)
    assert [t.name for t in report.tensors] == list(rv.open(family.rl))
    for row in report.tensors:
        where = np.flatnonzero(a[row.name].bits != b[row.name].bits)
        assert row.differing == where.size
        assert row.first == (int(where[0]) if where.size else None)
        assert row.elements == a[row.name].bits.size


def test_exactly_what_was_changed(family: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family.sft, tmp_path / "changed"))
    shard = sorted(folder.glob("*.safetensors"))[0]
    name, (begin, end) = next(iter(spans(shard).items()))
    content = bytearray(shard.read_bytes())
    elements = [0, 17, (end - begin) // 2 - 1]
    for element in elements:
        content[begin + 2 * element + 1] ^= 0x80  # the sign: it counts on zeros too
    shard.write_bytes(content)
    rows = diff(family.sft, folder).as_json()["tensors"]
    assert rows == {name: {"elements": (end - begin) // 2, "differing": 3, "first": 0, "why": None}}


def tensors(**more: Stored) -> dict[str, Stored]:
    return {"weight": stored("F32", np.array([1, 2, 0], np.float32)), **more}


def test_bits_and_not_numbers(tmp_path: Path) -> None:
    """-0 is not +0, and NaN is itself."""
    one = np.array([0.0, np.nan, 1.0], np.float32)
    other = np.array([-0.0, np.nan, 1.0], np.float32)
    a = write_checkpoint(tmp_path / "a", {"weight": stored("F32", one)})
    b = write_checkpoint(tmp_path / "b", {"weight": stored("F32", other)})
    row = diff(a, b).tensors[0]
    assert (row.differing, row.first) == (1, 0)
    assert diff(a, a).same


@pytest.mark.parametrize("dtype", ["U8", "I8", "BOOL", "I32", "I64", "F64", "F8_E4M3"])
def test_every_width(tmp_path: Path, dtype: str) -> None:
    from shards import SIZE

    n = 40_000
    data = np.zeros(n * SIZE[dtype], np.uint8)
    a = write_checkpoint(tmp_path / "a", {"weight": Stored(dtype, (n,), data.tobytes())})
    data[[SIZE[dtype] * 5, SIZE[dtype] * (n - 1)]] = 1
    b = write_checkpoint(tmp_path / "b", {"weight": Stored(dtype, (n,), data.tobytes())})
    row = diff(a, b).tensors[0]
    assert (row.elements, row.differing, row.first) == (n, 2, 5)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    extra = stored("F32", np.zeros(2, np.float32))
    a = write_checkpoint(tmp_path / "a", tensors(mine=extra, shape=extra, dtype=extra))
    b = write_checkpoint(
        tmp_path / "b",
        tensors(
            theirs=extra,
            shape=stored("F32", np.zeros((2, 1), np.float32)),
            dtype=stored("I32", np.zeros(2, np.int32)),
        ),
    )
    report = diff(a, b)
    assert not report.same
    why = {t.name: t.why for t in report.tensors if t.why is not None}
    assert why == {
        "mine": f"only in {a}",
        "shape": "F32 [2] against F32 [2, 1]",
        "dtype": "F32 [2] against I32 [2]",
        "theirs": f"only in {b}",
    }
