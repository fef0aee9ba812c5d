"""The way back: from the digest-checked source, or from the stored residual, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from shards import Stored, contents, numbers, read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec._reasonvec import journal_name
from reasonvec.apply import ApplyOptions
from reasonvec.family import Family
from reasonvec.undo import undo
from reasonvec.verify import verify

NAME = "model.layers.0.mlp.up_proj.weight"
COUNTER = "model.counter"
CONFIG: dict[str, object] = {
    "model_type": "qwen2",
    "num_hidden_layers": 1,
    "torch_dtype": "float32",
}


def applied(family: Family, out: Path, alpha: float = 0.8, **options: object) -> Path:
    """The target of a family, copied beside the output, with the family's vector added."""
    shutil.copytree(family.instruct, out.parent / "target")
    vector = rv.open(family.rl) - rv.open(family.sft)
    settings: ApplyOptions = {"sync": False, **options}  # type: ignore[typeddict-item]
    (rv.open(out.parent / "target") + alpha * vector).save(out, **settings)
    return out


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def the_same(one: Path, other: Path) -> bool:
    return contents(one) == contents(other)


# -- from the source


@pytest.mark.parametrize("options", [{}, {"out_dtype": "float32"}, {"digest": "blake3"}])
def test_from_the_source(family: Family, tmp_path: Path, options: dict[str, object]) -> None:
    out = applied(family, tmp_path / "out", **options)
    report = undo(out, tmp_path / "back", sync=False)
    assert report.origin == "source"
    assert the_same(tmp_path / "back", family.instruct)


def test_folders_that_move_together_find_each_other(family: Family, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    applied(family, tmp_path / "one" / "out")
    (tmp_path / "one").rename(tmp_path / "two")
    report = undo(tmp_path / "two" / "out", tmp_path / "back", sync=False)
    assert report.origin == "source"
    assert the_same(tmp_path / "back", family.instruct)


def test_from_a_source_that_moved(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out")
    (tmp_path / "target").rename(tmp_path / "elsewhere")
    with pytest.raises(rv.ReasonvecError, match="--source"):
        undo(out, tmp_path / "back", sync=False)
    report = undo(out, tmp_path / "back", source=tmp_path / "elsewhere", sync=False)
    assert report.origin == "source"
    assert the_same(tmp_path / "back", family.instruct)


@pytest.mark.parametrize("other", ["sft", "base"])
def test_a_named_source_that_is_another_model(family: Family, tmp_path: Path, other: str) -> None:
    out = applied(family, tmp_path / "out", keep_undo=True)
    with pytest.raises(rv.ReasonvecError, match=r"is not the target of .* has changed since"):
        undo(out, tmp_path / "back", source=getattr(family, other), sync=False)
    assert not (tmp_path / "back").exists()


def test_a_source_of_other_tensors(family: Family, untied_family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out")
    with pytest.raises(rv.ReasonvecError, match="other tensors"):
        undo(out, tmp_path / "back", source=untied_family.instruct, sync=False)


def test_a_changed_source_is_refused(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out")
    shard = sorted((tmp_path / "target").glob("*.safetensors"))[1]
    flip(shard)
    with pytest.raises(rv.ReasonvecError) as caught:
        undo(out, tmp_path / "back", sync=False)
    message = str(caught.value)
    assert "has changed since" in message
    assert "model." in message
    assert "--keep-undo" in message
    assert "--source" in message
    assert not (tmp_path / "back").exists()


def test_a_record_without_digests_cannot_show_its_source(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out", digest="none")
    with pytest.raises(rv.ReasonvecError, match=r"no digests, because .* --digest none"):
        undo(out, tmp_path / "back", sync=False)


def test_a_changed_source_falls_back_to_the_residual(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out", keep_undo=True)
    flip(next((tmp_path / "target").glob("*.safetensors")))
    report = undo(out, tmp_path / "back", sync=False)
    assert report.origin == "residual"
    assert the_same(tmp_path / "back", family.instruct)


# -- from the residual


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"out_dtype": "float32"},
        {"out_dtype": "float16"},
        {"out_dtype": "bfloat16"},
        {"digest": "blake3"},
        {"digest": "none"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
@pytest.mark.parametrize("alpha", [0.8, -300.0])
def test_from_the_residual(
    family: Family, tmp_path: Path, options: dict[str, object], alpha: float
) -> None:
    out = applied(family, tmp_path / "out", alpha, keep_undo=True, **options)
    shutil.rmtree(tmp_path / "target")
    report = undo(out, tmp_path / "back", sync=False)
    assert report.origin == "residual"
    assert the_same(tmp_path / "back", family.instruct)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_an_untied_target_with_another_chat_template(
    untied_family: Family, tmp_path: Path, dtype: str | None
) -> None:
    family = untied_family
    options: dict[str, object] = {} if dtype is None else {"out_dtype": dtype}
    out = applied(
        family, tmp_path / "out", keep_undo=True, chat_template_from=family.sft, **options
    )
    changed = (out / "tokenizer_config.json").read_bytes()
    assert changed != (family.instruct / "tokenizer_config.json").read_bytes()
    shutil.rmtree(tmp_path / "target")
    assert undo(out, tmp_path / "back", sync=False).origin == "residual"
    assert the_same(tmp_path / "back", family.instruct)


def test_a_template_in_a_file_of_its_own(family: Family, tmp_path: Path) -> None:
    """The output then has a file that the target had not, and undo takes it away again."""
    donor = tmp_path / "template"
    donor.mkdir()
    (donor / "chat_template.jinja").write_text("{{ messages }}")
    out = applied(family, tmp_path / "out", keep_undo=True, chat_template_from=donor)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    shutil.rmtree(tmp_path / "target")
    assert undo(out, tmp_path / "back", sync=False).origin == "residual"
    assert the_same(tmp_path / "back", family.instruct)


def test_a_template_in_a_field_instead_of_a_file(family: Family, tmp_path: Path) -> None:
    """The target's own file would win over the field, so the output does without it."""
    target = shutil.copytree(family.instruct, tmp_path / "target")
    (target / "chat_template.jinja").write_text("{{ messages }}")
    before = contents(target)
    vector = rv.open(family.rl) - rv.open(family.sft)
    (rv.open(target) + vector).save(
        tmp_path / "out", chat_template_from=family.sft, keep_undo=True, sync=False
    )
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert verify(tmp_path / "out").damage == []
    shutil.rmtree(target)
    assert undo(tmp_path / "out", tmp_path / "back", sync=False).origin == "residual"
    assert contents(tmp_path / "back") == before


def test_the_index_counts_bytes(tmp_path: Path) -> None:
    """`total_size` after a change of dtype, with tensors of every width."""
    tensors = {
        NAME: numbers("BF16", 0),
        COUNTER: stored("I64", np.arange(7)),
        "flag": stored("BOOL", np.ones(5, bool)),
        "codes": stored("U8", np.arange(3, dtype=np.uint8)),
        "steps": stored("I32", np.arange(3, dtype=np.int32)),
    }
    shards = [[NAME], [name for name in tensors if name != NAME]]
    target = write_checkpoint(tmp_path / "t", tensors, config=CONFIG, shards=shards)
    path = target / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    path.write_text(json.dumps(index | {"metadata": {"total_size": 0}}))
    opened = rv.open(target)
    (opened + (opened - opened)).save(tmp_path / "out", out_dtype="float32", sync=False)
    found = json.loads((tmp_path / "out" / path.name).read_bytes())["metadata"]["total_size"]
    assert found == sum(len(t.data) for t in read_checkpoint(tmp_path / "out").values())


def points(folder: Path, dtype: str, more: Mapping[str, Stored]) -> list[Path]:
    return [
        write_checkpoint(folder / name, {NAME: numbers(dtype, seed), **more}, config=CONFIG)
        for seed, name in enumerate(("p", "n", "t"))
    ]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("out_dtype", [None, "float32", "bfloat16", "float16"])
def test_numbers_of_every_size(tmp_path: Path, dtype: str, out_dtype: str | None) -> None:
    """Tiny targets under large updates, zeros of both signs, and integers that pass through."""
    counter = stored("I64", np.arange(7))
    p, n, t = points(tmp_path, dtype, {COUNTER: counter, "flag": stored("BOOL", np.array([True]))})
    options: ApplyOptions = {"keep_undo": True, "sync": False}
    if out_dtype is not None:
        options["out_dtype"] = out_dtype  # type: ignore[typeddict-item]
    before = contents(t)
    (rv.open(t) + 0.7 * (rv.open(p) - rv.open(n))).save(tmp_path / "out", **options)
    shutil.rmtree(t)
    assert undo(tmp_path / "out", tmp_path / "back", sync=False).origin == "residual"
    assert contents(tmp_path / "back") == before


def test_a_damaged_residual_is_found(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out", keep_undo=True)
    shutil.rmtree(tmp_path / "target")
    flip(next((out / "reasonvec_undo").glob("*.safetensors")), -4096)
    with pytest.raises(rv.ReasonvecError):
        undo(out, tmp_path / "back", sync=False)


def test_a_changed_output_is_found(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out", keep_undo=True)
    shutil.rmtree(tmp_path / "target")
    flip(sorted(out.glob("*.safetensors"))[0])
    with pytest.raises(rv.DamageError, match="was changed after it was written"):
        undo(out, tmp_path / "back", sync=False)


# -- refusals


def test_neither_source_nor_residual(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out")
    shutil.rmtree(tmp_path / "target")
    with pytest.raises(rv.ReasonvecError) as caught:
        undo(out, tmp_path / "back", sync=False)
    message = str(caught.value)
    assert "not there" in message
    assert "--keep-undo" in message
    assert "--source" in message
    assert not (tmp_path / "back").exists()


def test_an_unfinished_run_is_refused(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out", keep_undo=True)
    (out / journal_name()).touch()
    with pytest.raises(rv.ReasonvecError, match="unfinished"):
        undo(out, tmp_path / "back", sync=False)


def test_what_no_apply_wrote(family: Family, tmp_path: Path) -> None:
    with pytest.raises(rv.ReasonvecError, match=r"reasonvec\.json"):
        undo(family.sft, tmp_path / "back")
    (rv.open(family.rl) - rv.open(family.sft)).save(tmp_path / "v", sync=False)
    with pytest.raises(rv.ReasonvecError, match=r"reasonvec\.json"):
        undo(tmp_path / "v", tmp_path / "back")


def test_a_destination_in_use(family: Family, tmp_path: Path) -> None:
    out = applied(family, tmp_path / "out", keep_undo=True)
    before = contents(tmp_path / "target")
    for folder in (tmp_path / "target", tmp_path / "target" / "inside"):
        with pytest.raises(rv.ReasonvecError, match="input"):
            undo(out, folder, sync=False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter.txt").write_text("dear")
    with pytest.raises(rv.ReasonvecError, match="not empty"):
        undo(out, tmp_path / "theirs", overwrite=True, sync=False)
    assert contents(tmp_path / "target") == before
    shutil.rmtree(tmp_path / "target")
    with pytest.raises(rv.ReasonvecError, match="input"):
        undo(out, out, sync=False)


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"output": None},
        {"inputs": None},
        {"inputs": []},
        {"inputs": [{"path": 7, "tensors": None}]},
        {"target": 99},
        {"digest": "md5"},
    ],
    ids=lambda damage: json.dumps(damage),
)
def test_a_damaged_record(family: Family, tmp_path: Path, damage: dict[str, object]) -> None:
    """Whatever a record says, the answer is one of reasonvec's own errors."""
    out = applied(family, tmp_path / "out")
    record = json.loads((out / "reasonvec.json").read_bytes())
    (out / "reasonvec.json").write_text(json.dumps(record | damage))
    with pytest.raises(rv.ReasonvecError):
        undo(out, tmp_path / "back", sync=False)
