"""Whatever goes wrong: one clear error, inputs untouched, nothing half-made under a final name, and a
way to go on that ends in the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import xxhash
from shards import Stored, contents, read_shard, write_shard

import reasonvec as rv
from reasonvec import reference
from reasonvec.algebra import Point, Vector
from reasonvec.family import Family, make_family

WINDOWS = sys.platform == "win32"
JOURNAL = ".reasonvec-journal"
EMBED = "model.embed_tokens.weight"
# Whether threads begin with the floating-point mode of the thread that makes them.
INHERITED = sys.platform == "linux"
# What a child does. Noise takes long to draw: the run is slow enough to be hurt at any stage of it.
CHILD = """
import signal
import sys
import reasonvec as rv

# Whoever runs the tests in the background leaves Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

target, rl, sft, out, kind = sys.argv[1:]
noise = (rv.open(rl) - rv.open(sft)).control("random", seed=3)
if kind == "vector":
    noise.save(out, overwrite=True)
else:
    (rv.open(target) + noise).save(out, resume=True)
print("end", flush=True)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Fourteen shards, 16 MB a checkpoint."""
    return make_family(
        tmp_path_factory.mktemp("many"),
        hidden=256,
        intermediate=1100,
        layers=6,
        vocab=4100,
        shard_bytes=1_200_000,
        with_base=False,
    )


@pytest.fixture
def own(family: Family, tmp_path: Path) -> Family:
    """A family of a test's own, to be damaged."""
    for name in ("base", "sft", "rl", "instruct"):
        shutil.copytree(getattr(family, name), tmp_path / name)
    return Family(*(tmp_path / name for name in ("base", "sft", "rl", "instruct")))


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Asserts that no byte of an input changes, whatever happens inside."""
    before = [contents(folder) for folder in folders]
    try:
        yield
    finally:
        assert [contents(folder) for folder in folders] == before


def donors(family: Family) -> Vector:
    return rv.open(family.rl) - rv.open(family.sft)


def point(family: Family) -> Point:
    return rv.open(family.instruct) + 0.8 * donors(family)


def final_names(folder: Path) -> dict[str, bytes]:
    """What stands in a folder under a final name."""
    if not folder.exists():
        return {}
    return {
        name: content
        for name, content in contents(folder).items()
        if not name.endswith(".partial") and name != JOURNAL
    }


def assert_whole(folder: Path, wanted: dict[str, bytes]) -> None:
    """Nothing under a final name but what an undisturbed run has there, to the last byte."""
    for name, content in final_names(folder).items():
        assert content == wanted[name], name
        if name.endswith(".safetensors"):
            read_shard(folder / name)


# Killed runs


def begin(family: Family, out: Path, kind: str) -> subprocess.Popen[str]:
    """A child that saves a point or a vector; it resumes or overwrites what it finds."""
    folders = [str(folder) for folder in (family.instruct, family.rl, family.sft, out)]
    command = [sys.executable, "-c", CHILD, *folders, kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def undisturbed(family: Family, out: Path, kind: str) -> dict[str, bytes]:
    """What a child writes that nobody hurts."""
    child = begin(family, out, kind)
    assert child.communicate() == ("end\n", "")
    return contents(out)


def wait(child: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    """Waits for a child to come as far as `until` says, or to an end."""
    while child.poll() is None and not until():
        time.sleep(0.0005)


def size_of(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return -1


def lines_of(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.read_bytes().count(b"\n")
    return 0


def test_killed_runs_resume_to_the_same_bytes(many: Family, tmp_path: Path) -> None:
    """At 20 random moments: nothing incomplete has a final name, and resuming ends as undisturbed."""
    dice = random.Random(20)
    wanted = undisturbed(many, tmp_path / "undisturbed", "point")
    digests = {
        name: row["digest"]
        for name, row in json.loads(wanted["reasonvec.json"])["output"]["tensors"].items()
    }
    unfinished = 0
    with untouched(many.instruct, many.rl, many.sft):
        for run in range(10):
            out = tmp_path / f"killed{run}"
            # What is resumed is killed again, further on; beyond the last line, among the small files.
            for lines in sorted(dice.randrange(len(digests) + 20) for _ in range(2)):
                child = begin(many, out, "point")
                wait(child, lambda n=lines, out=out: lines_of(out / JOURNAL) >= n)
                child.kill()
                child.communicate()
                assert_whole(out, wanted)
                unfinished += (out / JOURNAL).exists()
            if (out / JOURNAL).exists() or not (out / "reasonvec.json").exists():
                undisturbed(many, out, "point")
            for name, content in contents(out).items():
                assert content == wanted[name], name
            if (out / "reasonvec.json").exists():
                assert contents(out) == wanted
            found = {
                name: t for f in out.glob("*.safetensors") for name, t in read_shard(f).items()
            }
            assert {name: digest_of(tensor) for name, tensor in found.items()} == digests
            shutil.rmtree(out)
    assert unfinished >= 6


def digest_of(tensor: Stored) -> str:
    return reference.tensor_digest(tensor.data, 2, xxhash.xxh3_128_digest)


def test_killed_extractions_are_done_again(many: Family, tmp_path: Path) -> None:
    """A vector has its manifest when it is whole; a folder without one may be overwritten."""
    dice = random.Random(6)
    wanted = undisturbed(many, tmp_path / "undisturbed", "vector")
    size = len(wanted["vector_model.safetensors"])
    unfinished = 0
    with untouched(many.rl, many.sft):
        for run, share in enumerate([0.0, *(dice.random() for _ in range(4)), 1.0]):
            out = tmp_path / f"killed{run}"
            child = begin(many, out, "vector")
            begun, whole = (
                out / "vector_model-00001.safetensors.partial",
                out / "vector_model.safetensors",
            )
            wait(child, lambda n=share * size, b=begun, w=whole: size_of(b) >= n or w.exists())
            child.kill()
            child.communicate()
            assert_whole(out, wanted)
            if (out / "vector_config.json").exists():
                assert {"vector_model.safetensors", "tokenizer.json"} <= set(contents(out))
            else:
                unfinished += 1
            assert undisturbed(many, out, "vector") == wanted
    assert unfinished >= 3


@pytest.mark.skipif(WINDOWS, reason="Windows cannot send Ctrl-C to one process alone")
@pytest.mark.parametrize("kind", ["point", "vector"])
def test_ctrl_c_stops_at_once_and_cleanly(kind: str, many: Family, tmp_path: Path) -> None:
    """One KeyboardInterrupt, within a moment; the next run ends as if nothing had been."""
    wanted = undisturbed(many, tmp_path / "undisturbed", kind)
    out = tmp_path / "out"
    with untouched(many.instruct, many.rl, many.sft):
        child = begin(many, out, kind)
        wait(child, lambda: out.exists() and len(list(out.iterdir())) > 1)
        child.send_signal(signal.SIGINT)
        start = time.perf_counter()
        said, complained = child.communicate()
        assert time.perf_counter() - start < 5
    assert said == ""
    assert complained.splitlines()[-1].startswith("KeyboardInterrupt")
    assert complained.count("Traceback") == 1
    assert child.returncode in (-signal.SIGINT, 130)
    assert_whole(out, wanted)
    assert not {"reasonvec.json", "vector_config.json"} & set(contents(out))
    assert undisturbed(many, out, kind) == wanted


def test_an_error_in_progress_stops_the_run(many: Family, tmp_path: Path) -> None:
    """What a progress callback raises comes out of the run, which can be continued."""

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("enough")

    noise = rv.open(many.instruct) + donors(many).control("random")
    with untouched(many.instruct), pytest.raises(RuntimeError, match="enough"):
        noise.save(tmp_path / "out", progress=refuse)
    assert not (tmp_path / "out" / "reasonvec.json").exists()


HalfDone: TypeAlias = tuple[Family, Path, dict[str, bytes]]


@pytest.fixture
def half_done(own: Family, tmp_path: Path) -> HalfDone:
    """A run that could not give its last shard its name: all others have theirs."""
    point(own).save(tmp_path / "whole")
    out = tmp_path / "out"
    plan = point(own).plan(out, threads=1)
    shards = sorted(path.name for path in own.instruct.glob("*.safetensors"))
    in_the_way = out / shards[-1]
    in_the_way.mkdir(parents=True)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - another class on Windows
        plan.run()
    assert caught.value.filename == str(in_the_way)
    in_the_way.rmdir()
    assert set(final_names(out)) == set(shards[:-1])
    return own, out, contents(tmp_path / "whole")


def test_resume_finishes_what_is_left(half_done: HalfDone) -> None:
    """The bytes of a run that nothing stopped; finished shards are not written again."""
    family, out, wanted = half_done
    before = {name: (out / name).stat().st_mtime_ns for name in final_names(out)}
    assert len(before) > 1
    point(family).save(out, resume=True)
    assert contents(out) == wanted
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("loss", ["journal", "all of the journal", "byte", "partial"])
def test_resume_survives_what_a_crash_of_the_machine_loses(half_done: HalfDone, loss: str) -> None:
    """Lines of the journal, bytes of a finished shard, bytes of an unfinished one: written again."""
    family, out, wanted = half_done
    journal = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    first, last = min(final_names(out)), max(out.glob("*.partial"))
    if loss == "journal":
        (out / JOURNAL).write_bytes(b"".join(journal[:2]) + journal[2][:20])
    elif loss == "all of the journal":
        (out / JOURNAL).write_bytes(journal[0])
    else:
        path = out / first if loss == "byte" else last
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content if loss == "byte" else content[:100])
    point(family).save(out, resume=True)
    assert contents(out) == wanted


def test_an_unfinished_run_is_not_written_over_by_chance(half_done: HalfDone) -> None:
    """Without --resume or --overwrite it is refused, and both are named; no byte of it changes."""
    family, out, _ = half_done
    with (
        untouched(out, family.instruct),
        pytest.raises(rv.ReasonvecError, match=r"unfinished run.*--resume.*--overwrite"),
    ):
        point(family).save(out)


@pytest.mark.parametrize("change", ["recipe", "input"])
def test_resume_refuses_another_run(half_done: HalfDone, change: str) -> None:
    """Another alpha, or a donor that was written since: neither may be mixed with what is there."""
    family, out, _ = half_done
    other = point(family) if change == "input" else rv.open(family.instruct) + 0.7 * donors(family)
    if change == "input":
        os.utime(next(family.rl.glob("*.safetensors")))
    with untouched(out), pytest.raises(rv.ReasonvecError, match=r"another recipe.*--overwrite"):
        other.save(out, resume=True)


def test_resume_refuses_a_vector_with_another_manifest(own: Family, tmp_path: Path) -> None:
    """What a vector's data mean stands in its manifest, so another one is another input."""
    donors(own).save(tmp_path / "vector")
    out = tmp_path / "out"
    shard = max(path.name for path in own.instruct.glob("*.safetensors"))
    plan = (rv.open(own.instruct) + rv.load(tmp_path / "vector")).plan(out, threads=1)
    (out / shard).mkdir(parents=True)
    with pytest.raises(OSError):  # noqa: PT011 - another class on Windows
        plan.run()
    (out / shard).rmdir()
    manifest = tmp_path / "vector" / "vector_config.json"
    config = json.loads(manifest.read_text())
    moved = next(row for row in config["tensors"] if row["encoding"] != "zero")
    moved.update(encoding="zero", moved=0, wide=0, bytes=0, parts={})
    manifest.write_text(json.dumps(config))
    other = rv.open(own.instruct) + rv.load(tmp_path / "vector")
    with untouched(out), pytest.raises(rv.ReasonvecError, match=r"another recipe.*--overwrite"):
        other.save(out, resume=True)


def test_overwrite_starts_an_unfinished_run_over(half_done: HalfDone, tmp_path: Path) -> None:
    """Nothing of the old run stays, even where the new one has other shards."""
    family, out, _ = half_done
    other = make_family(tmp_path / "other", shard_bytes=1 << 30)
    (rv.open(other.instruct) + donors(family)).save(out, overwrite=True)
    assert {name for name in contents(out) if "safetensors" in name} == {"model.safetensors"}
    assert len(rv.open(out)) == len(rv.open(family.instruct))


def test_resume_in_an_empty_folder_begins(family: Family, tmp_path: Path) -> None:
    """One command line serves the first try and the next."""
    point(family).save(tmp_path / "a", resume=True)
    point(family).save(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# A disk without room


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], Path]]:
    """Makes file systems of some bytes of their own."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = Path(tempfile.mkdtemp())
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            place.rmdir()
            pytest.skip("only who may mount a tmpfs can have a disk that is full")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def bytes_of(family: Family) -> int:
    return sum(path.stat().st_size for path in family.instruct.glob("*.safetensors"))


def test_a_disk_without_room_is_seen_before_anything_is_written(
    family: Family, small_disk: Callable[[int], Path]
) -> None:
    """ENOSPC with the folder, what it needs and what is free, from plan() as a problem too."""
    out = small_disk(bytes_of(family) // 2) / "out"
    with untouched(family.instruct, family.rl, family.sft):
        problems = point(family).plan(out).errors
        assert [problem.kind for problem in problems] == ["disk"]
        with pytest.raises(OSError, match="free") as caught:
            point(family).save(out)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(out))
    assert not out.exists()


def test_a_disk_that_fills_up_meanwhile(family: Family, small_disk: Callable[[int], Path]) -> None:
    """ENOSPC that names the file, no final names, and resume when there is room again."""
    size = bytes_of(family)
    disk = small_disk(size * 3)
    plan = point(family).plan(disk / "out")
    (disk / "filler").write_bytes(bytes(size * 5 // 2))
    with untouched(family.instruct, family.rl, family.sft), pytest.raises(OSError) as caught:  # noqa: PT011
        plan.run()
    assert caught.value.errno == errno.ENOSPC
    assert Path(caught.value.filename).parent == disk / "out"
    assert not final_names(disk / "out")
    (disk / "filler").unlink()
    point(family).save(disk / "out", resume=True)
    point(family).save(disk / "again")
    assert contents(disk / "out") == contents(disk / "again")


def test_a_disk_with_room_for_the_shards_and_no_more(
    family: Family, small_disk: Callable[[int], Path]
) -> None:
    """ENOSPC at a small file: the shards stay, no manifest says that the folder is whole, resume."""
    disk = small_disk(bytes_of(family) + (256 << 10))
    plan = point(family).plan(disk / "out")
    free = shutil.disk_usage(disk).free - plan.written_bytes
    (disk / "filler").write_bytes(bytes(free - (20 << 10)))
    with pytest.raises(OSError) as caught:  # noqa: PT011
        plan.run()
    assert caught.value.errno == errno.ENOSPC
    assert Path(caught.value.filename).parent == disk / "out"
    assert "reasonvec.json" not in contents(disk / "out")
    (disk / "filler").unlink()
    point(family).save(disk / "out", resume=True)
    for shard in (disk / "out").glob("*.safetensors"):
        read_shard(shard)
    assert not (disk / "out" / JOURNAL).exists()


def test_a_vector_without_room_leaves_nothing(
    family: Family, small_disk: Callable[[int], Path]
) -> None:
    """ENOSPC names the folder or a file in it, and what was begun is taken away."""
    out = small_disk(100 << 10) / "reason"
    with untouched(family.rl, family.sft), pytest.raises(OSError) as caught:  # noqa: PT011
        donors(family).save(out, encoding="dense")
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).startswith(str(out))
    assert not contents(out)


# Inputs that cannot be read


def shard_of(folder: Path, name: str = EMBED) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][name])


@pytest.mark.parametrize("role", ["instruct", "rl", "sft"])
@pytest.mark.parametrize("io", ["map", "read"])
def test_a_shard_that_becomes_shorter_is_an_error_and_no_signal(
    own: Family, tmp_path: Path, role: str, io: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OSError with the path, and both sizes; nothing under a final name that is not whole."""
    monkeypatch.setenv("REASONVEC_IO", io)
    path = shard_of(getattr(own, role))
    sum_, vector = point(own), donors(own)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    said = f"was {size} bytes when it was opened and is {size // 2} now"
    with untouched(own.instruct, own.rl, own.sft), pytest.raises(OSError, match=said) as caught:
        sum_.save(tmp_path / "out")
    assert (caught.value.filename, caught.value.errno) == (str(path), errno.EIO)
    assert path.name not in final_names(tmp_path / "out")
    if role != "instruct":
        with pytest.raises(OSError, match=said):
            vector.save(tmp_path / "reason")
        assert not contents(tmp_path / "reason")
        with pytest.raises(OSError, match=said):
            vector.inspect()


@pytest.mark.parametrize("what", ["missing", "short", "header", "folder", "empty", "pickle"])
def test_a_broken_checkpoint_is_refused_when_it_is_opened(own: Family, what: str) -> None:
    """A missing, truncated or empty shard, a folder in its place, a pickle: the path and the reason."""
    path = shard_of(own.rl)
    content = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pickle":
        path.with_suffix(".bin").write_bytes(b"\x80\x04.")
        for file in own.rl.glob("*.safetensors*"):
            file.unlink()
    elif what != "missing":
        path.write_bytes(content[: {"short": len(content) - 2, "header": 40, "empty": 0}[what]])
    error, said = {
        "missing": (FileNotFoundError, "a shard of this checkpoint is missing; download it again"),
        "short": (rv.FormatError, "truncated or damaged: download it again"),
        "header": (rv.FormatError, "truncated one: download it again"),
        "folder": (PermissionError, "") if WINDOWS else (rv.FormatError, "expected a regular file"),
        "empty": (rv.FormatError, "at least 8 bytes, found 0"),
        "pickle": (rv.FormatError, "pickled weights .* never loaded"),
    }[what]
    with pytest.raises(error, match=said) as caught:
        rv.open(own.rl)
    assert str(own.rl if what == "pickle" else path) in str(caught.value)


@contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights over other people's files, where this one is root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public(family: Family) -> Iterator[Path]:
    """A folder that everybody can enter, with a copy of the family."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        for name in ("sft", "rl", "instruct"):
            shutil.copytree(getattr(family, name), Path(place, name))
        yield Path(place)


@pytest.mark.skipif(
    WINDOWS, reason="chmod takes no right to read or write a folder away on Windows"
)
def test_a_shard_that_may_not_be_read(public: Path) -> None:
    """PermissionError with the path."""
    path = shard_of(public / "rl")
    path.chmod(0)
    with nobody(), pytest.raises(PermissionError) as caught:
        rv.open(public / "rl")
    assert caught.value.filename == str(path)


@pytest.mark.skipif(
    WINDOWS, reason="chmod takes no right to read or write a folder away on Windows"
)
@pytest.mark.parametrize("exists", [False, True])
def test_an_output_that_may_not_be_written(public: Path, exists: bool) -> None:
    """PermissionError with the path, for a folder that cannot be made and one that cannot be filled."""
    out = public / "shut" / "out"
    (out if exists else out.parent).mkdir(parents=True)
    (out if exists else out.parent).chmod(0o555)
    family = Family(public, public / "sft", public / "rl", public / "instruct")
    with nobody():
        for save in (point(family).save, donors(family).save):
            with pytest.raises(PermissionError) as caught:
                save(out)
            assert str(caught.value.filename).startswith(str(out))
    assert not contents(out.parent)


def test_a_nan_in_a_donor_is_named(own: Family, tmp_path: Path) -> None:
    """File, tensor and first index, from every command that reads it; allowed only on request."""
    path = shard_of(own.sft)
    tensors = read_shard(path)
    bits = tensors[EMBED].bits.copy()
    bits[[300_001, 300_007]] = 0x7FC1
    tensors[EMBED] = Stored("BF16", tensors[EMBED].shape, bits.tobytes())
    write_shard(path, tensors, {"format": "pt"})
    said = f"{re.escape(str(path))}: tensor {EMBED}: element 300001 is NaN; .*allow-nonfinite"
    runs: list[Callable[[], object]] = [
        lambda: point(own).save(tmp_path / "out"),
        lambda: donors(own).save(tmp_path / "reason"),
        lambda: donors(own).inspect(),
        lambda: donors(own).compare(donors(own)),
    ]
    with untouched(own.instruct, own.rl, own.sft):
        for run in runs:
            with pytest.raises(rv.NonFiniteError, match=said):
                run()
        assert path.name not in final_names(tmp_path / "out")
        assert not contents(tmp_path / "reason")
        point(own).save(tmp_path / "allowed", allow_nonfinite=True)
        donors(own).save(tmp_path / "allowed vector", allow_nonfinite=True)
    out = read_shard(shard_of(tmp_path / "allowed"))[EMBED].bits
    assert np.flatnonzero(out & 0x7FFF > 0x7F80).tolist() == [300_001, 300_007]
    for folder in ("allowed", "allowed vector"):
        for file in (tmp_path / folder).glob("*.json"):
            json.loads(file.read_text(), parse_constant=pytest.fail)


# Folders that may not be written


@pytest.mark.parametrize("save", ["point", "vector"])
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("rl", "is an input of this run"),
        ("link", "is an input of this run"),
        ("rl/inside", "lies inside the input"),
        ("link/inside", "lies inside the input"),
        ("", "lies inside of it"),
        ("file", "is a file; name a folder"),
        ("foreign", "reasonvec did not write what is in it"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_written(
    own: Family, tmp_path: Path, save: str, where: str, said: str, overwrite: bool
) -> None:
    """Inputs, whatever is in or around them, by any path, files and strangers' folders."""
    (tmp_path / "link").symlink_to(own.rl, target_is_directory=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_text("mine")
    run = point(own).save if save == "point" else donors(own).save
    with untouched(tmp_path), pytest.raises(rv.ReasonvecError, match=said) as caught:
        run(tmp_path / where, overwrite=overwrite)
    assert str(tmp_path / where) in str(caught.value)


def test_the_way_back_in_an_output_is_an_input_too(own: Family, tmp_path: Path) -> None:
    """A vector inside the output folder is not removed by the run that reads it."""
    point(own).save(tmp_path / "out", keep_undo=True)
    back = rv.load(tmp_path / "out" / "reasonvec_undo")
    with untouched(tmp_path), pytest.raises(rv.ReasonvecError, match="lies inside of it"):
        (rv.open(own.instruct) + back).save(tmp_path / "out", overwrite=True)


def test_overwrite_removes_only_what_it_wrote(own: Family, tmp_path: Path) -> None:
    """Somebody's notes in an output folder survive; an old shard and an old undo do not."""
    out = tmp_path / "out"
    other = make_family(tmp_path / "other", shard_bytes=1 << 30)
    (rv.open(other.instruct) + donors(own)).save(out, keep_undo=True)
    with pytest.raises(rv.ReasonvecError, match=r"is not empty; .*--overwrite"):
        point(own).save(out)
    (out / "notes.txt").write_text("mine")
    (out / "runs").mkdir()
    (out / "runs" / "vector_config.json").write_text("mine")
    point(own).save(out, overwrite=True)
    point(own).save(tmp_path / "fresh")
    notes = {"notes.txt": b"mine", "runs/vector_config.json": b"mine"}
    assert contents(out) == contents(tmp_path / "fresh") | notes
    donors(own).save(tmp_path / "reason")
    (tmp_path / "reason" / "notes.txt").write_text("mine")
    donors(own).save(tmp_path / "reason", overwrite=True, encoding="dense")
    assert contents(tmp_path / "reason")["notes.txt"] == b"mine"


def test_what_is_overwritten_stands_until_the_new_one_is_whole(own: Family, tmp_path: Path) -> None:
    """Vectors and adapters survive a run that fails; one that ends leaves what it would have made in
    an empty folder."""
    saves: dict[str, Callable[[Vector, Path, bool], object]] = {
        "exact": lambda v, out, over: v.save(out, overwrite=over),
        "low": lambda v, out, over: v.compress(out, rank=2, overwrite=over),
        "lora": lambda v, out, over: v.to_lora(out, rank=2, overwrite=over),
    }
    whole = donors(own)
    for name, save in saves.items():
        save(2 * whole, tmp_path / name, False)
        # What a killed run left in the way.
        half = tmp_path / name / ".reasonvec-renewed"
        half.mkdir()
        (half / "vector_model-00007.safetensors").write_text("half")
        save(whole, tmp_path / name, True)
        save(whole, tmp_path / f"new-{name}", False)
        assert contents(tmp_path / name) == contents(tmp_path / f"new-{name}")
        assert not half.exists()
    nothing = rv.open(own.sft) - rv.open(shutil.copytree(own.sft, tmp_path / "same"))
    with untouched(tmp_path / "lora"), pytest.raises(rv.MismatchError, match="nothing to export"):
        nothing.to_lora(tmp_path / "lora", overwrite=True)
    for file in own.rl.glob("*.safetensors"):
        nan = {
            name: stored._replace(data=b"\xff\x7f" + stored.data[2:])
            for name, stored in read_shard(file).items()
        }
        write_shard(file, nan, {"format": "pt"})
    for name, save in saves.items():
        with untouched(tmp_path / name), pytest.raises(rv.NonFiniteError):
            save(donors(own), tmp_path / name, True)


def test_a_manifest_cannot_have_other_files_removed(own: Family, tmp_path: Path) -> None:
    """Overwriting believes a manifest only about its own folder."""
    point(own).save(tmp_path / "out")
    (tmp_path / "precious").write_text("mine")
    manifest = json.loads((tmp_path / "out" / "reasonvec.json").read_text())
    manifest["output"]["files"] = {"../precious": None, str(tmp_path / "precious"): None}
    manifest["output"]["tensors"] = {"a": {"file": "../precious"}}
    (tmp_path / "out" / "reasonvec.json").write_text(json.dumps(manifest))
    with untouched(own.instruct, own.rl, own.sft):
        point(own).save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_strangers_manifest_removes_nothing_that_no_run_writes(
    own: Family, tmp_path: Path
) -> None:
    """Files that only the record names stay, unless they are the bytes that the record says."""
    (own.instruct / "LICENSE").write_text("a target's own")
    (own.instruct / "NOTICE").write_text("a target's own")
    out = tmp_path / "out"
    point(own).save(out)
    (out / "NOTICE").write_text("changed since")
    (out / "thesis.txt").write_text("mine")
    manifest = json.loads((out / "reasonvec.json").read_text())
    manifest["output"]["files"]["thesis.txt"] = "00"
    manifest["output"]["tensors"]["a"] = {"file": "thesis.txt"}
    (out / "reasonvec.json").write_text(json.dumps(manifest))
    (own.instruct / "LICENSE").unlink()
    (own.instruct / "NOTICE").unlink()
    point(own).save(out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    assert (out / "NOTICE").read_text() == "changed since"
    assert not (out / "LICENSE").exists()


@pytest.mark.parametrize(
    "output",
    [None, 3, {"tensors": [1], "files": 2}, {"tensors": {"a": {}, "b": 1, "c": {"file": [1]}}}],
)
def test_an_odd_manifest_is_overwritten(own: Family, tmp_path: Path, output: object) -> None:
    point(own).save(tmp_path / "out")
    record = tmp_path / "out" / "reasonvec.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"output": output}))
    point(own).save(tmp_path / "out", overwrite=True)
    point(own).save(tmp_path / "new")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("key", ["norm", "max", "max_at"])
def test_a_manifest_without_a_figure_is_damaged(own: Family, tmp_path: Path, key: str) -> None:
    donors(own).save(tmp_path / "reason")
    path = tmp_path / "reason" / "vector_config.json"
    config = json.loads(path.read_text())
    del config["tensors"][1][key]
    path.write_text(json.dumps(config))
    with pytest.raises(rv.FormatError, match=f"{config['tensors'][1]['name']}.*{key}"):
        rv.load(tmp_path / "reason").inspect()


# Damage


@pytest.mark.parametrize("digest", ["xxh3-128", "blake3"])
def test_a_damaged_vector_is_refused_before_it_is_used(
    family: Family, tmp_path: Path, digest: str
) -> None:
    """One flipped bit in any part: DamageError with file, entry and both digests, nothing written."""
    stored = tmp_path / "reason"
    donors(family).save(stored, digest=digest)
    path = stored / "vector_model.safetensors"
    whole = path.read_bytes()
    dice = random.Random(1)
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    for name in dice.sample(sorted(set(header) - {"__metadata__"}), 6):
        begin, end = header[name]["data_offsets"]
        content = bytearray(whole)
        content[start + dice.randrange(begin, end)] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        # Counts are checked when the folder is opened, all else when it is read.
        with pytest.raises((rv.DamageError, rv.FormatError)) as caught:
            (rv.open(family.instruct) + rv.load(stored)).save(tmp_path / "out")
        assert str(stored) in str(caught.value)
        if isinstance(caught.value, rv.DamageError):
            assert name in str(caught.value)
            assert json.loads((stored / "vector_config.json").read_text())["digest"] == digest
        else:
            assert name.endswith((":starts", ":wide_starts"))
        with pytest.raises((rv.DamageError, rv.FormatError)):
            (2 * rv.load(stored)).save(tmp_path / "twice")
        assert not final_names(tmp_path / "out")
        assert not final_names(tmp_path / "twice")


# A process that is not as others


@pytest.mark.models
def test_a_process_that_flushes_subnormals_is_refused(family: Family, tmp_path: Path) -> None:
    """torch.set_flush_denormal(True) would change results: a clear error, and nothing written."""
    torch = pytest.importorskip("torch")
    point(family).save(tmp_path / "wanted")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals to zero")
    said = "flushes subnormal .*set_flush_denormal"
    try:
        for run in (
            lambda: point(family).save(tmp_path / "out"),
            lambda: donors(family).save(tmp_path / "reason"),
            lambda: donors(family).inspect(),
        ):
            # Where threads do not inherit the mode, nothing is wrong.
            with pytest.raises(rv.ReasonvecError, match=said) if INHERITED else nullcontext():
                run()
    finally:
        torch.set_flush_denormal(False)
    if INHERITED:
        assert not final_names(tmp_path / "out")
        assert not contents(tmp_path / "reason")
        point(family).save(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
