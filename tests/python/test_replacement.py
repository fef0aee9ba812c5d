"""An output that takes the place of another: the old one stands until the new one is whole, and
whoever kills the run in between finds one of the two, and can go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from shards import contents, read_shard, write_shard

import reasonvec as rv
from reasonvec.family import Family, make_family
from reasonvec.undo import undo
from reasonvec.verify import verify

RENEWED = ".reasonvec-renewed"
JOURNAL = ".reasonvec-journal"
Save: TypeAlias = Callable[[Path, bool], object]


class Killed(BaseException):
    """The process is gone."""


def little(place: Path, shard_bytes: int, seed: int) -> Family:
    return make_family(
        place,
        hidden=16,
        intermediate=24,
        layers=1,
        heads=2,
        kv_heads=1,
        vocab=300,
        seed=seed,
        shard_bytes=shard_bytes,
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return little(tmp_path_factory.mktemp("family"), 8_000, 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The same shapes in one shard."""
    return little(tmp_path_factory.mktemp("other"), 1 << 30, 3)


def saves(family: Family, other: Family, place: Path) -> dict[str, tuple[Save, Save]]:
    """By kind of output: what writes the old one, and what writes another in its place."""
    vector = rv.open(family.rl) - rv.open(family.sft)
    theirs = rv.open(other.rl) - rv.open(other.sft)
    target, its = rv.open(family.instruct), rv.open(other.instruct)
    old: Save = lambda out, over: (its + theirs).save(  # noqa: E731
        out, overwrite=over, keep_undo=True, sync=False
    )
    new: Save = lambda out, over: (target + vector).save(out, overwrite=over, sync=False)  # noqa: E731
    undone = place / "undone"
    (target + vector).save(undone, sync=False)
    return {
        "point": (old, new),
        "point with its way back": (
            new,
            lambda out, over: (its + theirs).save(
                out, overwrite=over, keep_undo=True, out_dtype="float32", sync=False
            ),
        ),
        "merge": (
            old,
            lambda out, over: rv.linear([target, rv.open(family.rl)]).save(
                out, overwrite=over, shard_size=8_000, sync=False
            ),
        ),
        "undo": (old, lambda out, over: undo(undone, out, overwrite=over, sync=False)),
        "vector": (
            lambda out, over: vector.save(out, overwrite=over, sync=False, shard_bytes=8_000),
            lambda out, over: theirs.save(out, overwrite=over, sync=False),
        ),
        "adapter": (
            lambda out, over: vector.to_lora(out, rank=2, overwrite=over, sync=False),
            lambda out, over: theirs.to_lora(out, rank=3, overwrite=over, sync=False),
        ),
    }


KINDS = ["point", "point with its way back", "merge", "undo", "vector", "adapter"]


def killed_at(step: int, run: Callable[[], object]) -> bool:
    """Runs, and ends it before one of the changes to the disk with which the new output comes to
    its place. Whether it came as far."""
    counted = 0

    def counting(change: Callable[..., object]) -> Callable[..., object]:
        def counted_change(*arguments: object, **options: object) -> object:
            nonlocal counted
            if any(frame == "_replace" for frame in callers()):
                counted += 1
                if counted > step:
                    raise Killed
            return change(*arguments, **options)

        return counted_change

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Path, "unlink"), (Path, "rmdir"), (Path, "touch"), (os, "link")):
            patch.setattr(owner, name, counting(getattr(owner, name)))
        try:
            run()
        except Killed:
            return True
    return False


def callers() -> list[str]:
    names = []
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        names.append(frame.f_code.co_name)
    return names


def stands(found: dict[str, bytes], wanted: dict[str, bytes]) -> bool:
    """Whether a whole output is there, whatever else is."""
    return wanted.items() <= found.items()


def renewed(found: dict[str, bytes]) -> dict[str, bytes]:
    start = f"{RENEWED}/"
    return {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_step_of_the_swap(
    kind: str, family: Family, other: Family, tmp_path: Path
) -> None:
    """The old output or the new one is whole, and the next run leaves what a fresh one would."""
    old, new = saves(family, other, tmp_path)[kind]
    old(tmp_path / "old", False)
    # An adapter has no list of its files: with others among them it is nobody's to replace.
    notes = {} if kind == "adapter" else {"notes.txt": b"mine"}
    for name, text in notes.items():
        (tmp_path / "old" / name).write_bytes(text)
    step, out = 0, tmp_path / "out"
    new(out, False)
    before, wanted = contents(tmp_path / "old"), contents(out)
    shutil.rmtree(out)
    while True:
        shutil.copytree(tmp_path / "old", out)
        if not killed_at(step, lambda: new(out, True)):
            break
        found = contents(out)
        assert stands(found, before) or stands(renewed(found), wanted) or stands(found, wanted)
        assert stands(found, notes)
        if step % 2 and kind in ("point", "merge") and (out / RENEWED / JOURNAL).exists():
            resumed(kind, family, out)
        elif found.keys() - notes.keys() != wanted.keys() or kind != "undo":
            # A checkpoint that was given back is nobody's to replace.
            new(out, True)
        assert contents(out) == wanted | notes
        shutil.rmtree(out)
        step += 1
    assert contents(out) == wanted | notes
    assert step > len(wanted)


def resumed(kind: str, family: Family, out: Path) -> None:
    target, rl = rv.open(family.instruct), rv.open(family.rl)
    if kind == "merge":
        rv.linear([target, rl]).save(out, resume=True, shard_size=8_000, sync=False)
    else:
        (target + (rl - rv.open(family.sft))).save(out, resume=True, sync=False)
    assert not (out / RENEWED).exists()


CHILD = """
import os, sys
from pathlib import Path
import reasonvec as rv

target, rl, sft, out, step = sys.argv[1:]
links, link = 0, os.link

def count(*paths):
    global links
    links += 1
    if links > int(step):
        os._exit(9)
    link(*paths)

os.link = count
(rv.open(target) + (rv.open(rl) - rv.open(sft))).save(out, overwrite=True, sync=False)
"""


@pytest.mark.parametrize("step", [0, 2])
def test_a_process_that_ends_in_the_swap(
    step: int, family: Family, other: Family, tmp_path: Path
) -> None:
    """The same of a real process: the journal is there, a run without a word is refused, resuming
    ends in the bytes of an undisturbed one."""
    old, new = saves(family, other, tmp_path)["point"]
    out = tmp_path / "out"
    old(out, False)
    new(tmp_path / "new", False)
    folders = [str(folder) for folder in (family.instruct, family.rl, family.sft, out)]
    child = subprocess.run([sys.executable, "-c", CHILD, *folders, str(step)], check=False)
    assert child.returncode == 9
    assert stands(renewed(contents(out)), contents(tmp_path / "new"))
    with pytest.raises(rv.ReasonvecError, match=r"unfinished run.*--resume.*--overwrite"):
        new(out, False)
    resumed("point", family, out)
    assert contents(out) == contents(tmp_path / "new")


@pytest.mark.parametrize("kind", ["point", "merge"])
def test_a_run_that_fails_leaves_the_old_output(
    kind: str, family: Family, other: Family, tmp_path: Path
) -> None:
    """A NaN that only the bytes tell: the old one stands to the byte; mended, the run resumes or
    starts over."""
    rl = shutil.copytree(family.rl, tmp_path / "rl")
    own = Family(family.base, family.sft, rl, family.instruct)
    out = tmp_path / "out"
    old, new = saves(own, other, tmp_path)[kind]
    old(out, False)
    before = contents(out)
    file = sorted(rl.glob("*.safetensors"))[-1]
    good = file.read_bytes()
    nan = {n: t._replace(data=b"\xff\x7f" + t.data[2:]) for n, t in read_shard(file).items()}
    write_shard(file, nan, {"format": "pt"})
    vector = rv.open(rl) - rv.open(family.sft)
    bad = (
        rv.open(family.instruct) + vector
        if kind == "point"
        else rv.linear([rv.open(family.instruct), rv.open(rl)])
    )
    with pytest.raises(rv.NonFiniteError):
        bad.save(out, overwrite=True, sync=False)
    found = contents(out)
    assert {k: v for k, v in found.items() if not k.startswith(RENEWED)} == before
    assert verify(out).ok
    file.write_bytes(good)
    new(out, True)
    new(tmp_path / "fresh", False)
    assert contents(out) == contents(tmp_path / "fresh")


def test_both_must_fit_on_the_disk(
    family: Family, other: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands is no room for what is to come, and the plan says so before anything happens."""
    old, new = saves(family, other, tmp_path)["point"]
    out = tmp_path / "out"
    old(out, False)
    before = contents(out)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="1000 free; remove the output that is there"):
        new(out, True)
    assert contents(out) == before
