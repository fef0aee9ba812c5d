"""The factor cache: written once, kept by digest, refused for other tensors, handed to torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from test_spectral import write

import reasonvec as rv
from reasonvec.cli.app import main
from reasonvec.family import Family

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
Arrays = dict[str, tuple[str, NDArray[np.generic]]]


@pytest.fixture
def arrays() -> Arrays:
    draw = np.random.default_rng(5)
    shapes = {Q: (60, 40), UP: (50, 30), "model.norm.weight": (40,)}
    return {n: ("F32", draw.standard_normal(s).astype(np.float32)) for n, s in shapes.items()}


@pytest.fixture
def told() -> list[str]:
    return []


def parts(made: rv.Factors, name: str) -> dict[str, bytes]:
    return {part: bytes(memoryview(tensor)) for part, tensor in made[name].items()}


def test_what_is_there_is_kept(tmp_path: Path, arrays: Arrays, told: list[str]) -> None:
    file = tmp_path / "f.safetensors"
    model = write(tmp_path / "m", arrays)
    first = rv.write_factors(model, file, rank=4, which="both", tell=told.append)
    assert told == [Q, Q, UP, UP]
    was = file.read_bytes()
    told.clear()
    rv.write_factors(model, file, rank=4, which="both", tell=told.append)
    assert told == []
    assert file.read_bytes() == was
    # One tensor changes, another only its name: the first alone is factored again.
    changed = "model.layers.1.mlp.up_proj.weight"
    other = write(
        tmp_path / "other", {Q: ("F32", 2 * np.asarray(arrays[Q][1])), changed: arrays[UP]}
    )
    again = rv.write_factors(other, file, rank=4, which="both", tell=told.append)
    assert told == [Q, Q]
    assert parts(again, changed) == parts(first, UP)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ({"rank": 5}, ["top", "bottom"]),
        ({"seed": 1}, ["top"]),
    ],
)
def test_other_factors_are_not_mistaken_for_these(
    tmp_path: Path, arrays: Arrays, change: dict[str, object], made: list[str], told: list[str]
) -> None:
    model = write(tmp_path / "m", arrays)
    file, fresh = tmp_path / "f.safetensors", tmp_path / "g.safetensors"
    rv.write_factors(model, file, rank=4, which="both")
    config = {"rank": 4, "which": "both"} | change
    rv.write_factors(model, file, tell=told.append, **config)  # type: ignore[arg-type]
    rv.write_factors(model, fresh, **config)  # type: ignore[arg-type]
    assert len(told) == len(made) * 2
    assert file.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize(
    "parts_of_it",
    [
        [{"which": "top"}, {"which": "bottom"}],
        [{"which": "bottom"}, {"which": "top"}],
        [{"which": "both", "include": ["up_proj"]}, {"which": "both", "exclude": ["up_proj"]}],
        [{"which": "top"}, {"which": "bottom", "seed": 9}],
        [{"which": "both"}, {"which": "top", "include": ["up_proj"]}],
    ],
)
def test_parts_that_are_asked_for_one_by_one_come_together(
    tmp_path: Path, arrays: Arrays, parts_of_it: list[dict[str, object]], told: list[str]
) -> None:
    """One side after the other, one tensor after the other: the file is that of all at once."""
    model = write(tmp_path / "m", arrays)
    file, whole = tmp_path / "f.safetensors", tmp_path / "g.safetensors"
    for asked in parts_of_it:
        rv.write_factors(model, file, rank=4, tell=told.append, **asked)  # type: ignore[arg-type]
    rv.write_factors(model, whole, rank=4, which="both")
    assert file.read_bytes() == whole.read_bytes()
    assert len(told) == 4


def test_tensors_that_are_left_out_keep_their_rank(tmp_path: Path, arrays: Arrays) -> None:
    model = write(tmp_path / "m", arrays)
    first = rv.write_factors(model, tmp_path / "f.safetensors", rank=4, which="both")
    was = parts(first, Q)
    second = rv.write_factors(model, tmp_path / "f.safetensors", rank=2, include=["up_proj"])
    assert parts(second, Q) == was
    assert {part: list(tensor.shape) for part, tensor in second[UP].items()} == {
        "bottom.u": [50, 2],
        "bottom.s": [2],
        "bottom.vt": [2, 30],
    }


@pytest.mark.parametrize("change", ["nan", "shape", "dtype"])
def test_factors_that_somebody_changed_are_made_again(
    tmp_path: Path, arrays: Arrays, change: str, told: list[str]
) -> None:
    file = tmp_path / "f.safetensors"
    model = write(tmp_path / "m", arrays)
    rv.write_factors(model, file, rank=4)
    was = file.read_bytes()
    length = int.from_bytes(was[:8], "little")
    header = json.loads(was[8 : 8 + length])
    entry = header[f"{Q}:bottom.u"]
    content = bytearray(was)
    if change == "nan":
        at = 8 + length + entry["data_offsets"][0]
        content[at : at + 4] = np.float32("nan").tobytes()
    elif change == "shape":
        entry["shape"] = entry["shape"][::-1]
    else:
        entry["dtype"] = "I32"
    content[8 : 8 + length] = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(content)
    rv.write_factors(model, file, rank=4, tell=told.append)
    assert told == [Q]
    assert file.read_bytes() == was


def test_an_inputs_folder_is_not_written(tmp_path: Path, arrays: Arrays) -> None:
    model = write(tmp_path / "m", arrays)
    with pytest.raises(rv.MismatchError, match="lies in the folder of the input"):
        rv.write_factors(model, tmp_path / "m" / "f.safetensors", rank=4)
    assert len(rv.open(tmp_path / "m")) == len(arrays)


def test_a_zero_matrix_has_as_many_triplets_as_others(tmp_path: Path) -> None:
    """Large enough that the core finds no direction at all in it."""
    model = write(tmp_path / "m", {UP: ("F32", np.zeros((256, 200), np.float32))})
    found = rv.write_factors(model, tmp_path / "f.safetensors", rank=8, which="both")
    assert found.rows[UP]["rank"] == 8
    for side in ("top", "bottom"):
        shapes = {"u": (256, 8), "s": (8,), "vt": (8, 200)}
        for part, shape in shapes.items():
            values = np.asarray(found[UP][f"{side}.{part}"])
            assert values.shape == shape
            assert part == "vt" or not values.any()


def test_factors_of_other_tensors_are_refused(tmp_path: Path, arrays: Arrays) -> None:
    file = tmp_path / "f.safetensors"
    model = write(tmp_path / "m", arrays)
    rv.write_factors(model, file, rank=4)
    assert sorted(rv.factors(file, model)) == sorted([Q, UP])
    other = write(tmp_path / "other", arrays | {UP: ("F32", -np.asarray(arrays[UP][1]))})
    with pytest.raises(rv.DamageError, match=r"up_proj.*make them again"):
        rv.factors(file, other)
    lacks = write(tmp_path / "lacks", {Q: arrays[Q]})
    with pytest.raises(rv.DamageError, match="lacks"):
        rv.factors(file, lacks)


def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path, arrays: Arrays) -> None:
    model = write(tmp_path / "m", arrays)
    theirs = tmp_path / "m" / "model.safetensors"
    was = theirs.read_bytes()
    with pytest.raises(rv.FormatError, match="no factor file"):
        rv.write_factors(model, theirs, rank=4)
    assert theirs.read_bytes() == was


@pytest.mark.parametrize(
    "rows",
    [
        "[]",
        "{}x",
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"digest": 1, "rank": 1, "parts": [], "shape": []}}',
        '{"a": {"digest": "1", "rank": true, "parts": [], "shape": []}}',
        '{"a": {"digest": "1", "rank": 1, "parts": ["u"], "shape": []}}',
        '{"a": {"digest": "1", "rank": 1, "parts": [["top.u"]], "shape": []}}',
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, rows: str) -> None:
    header = {"__metadata__": {"format": "reasonvec-factors-1", "tensors": rows}}
    text = json.dumps(header).encode()
    file = tmp_path / "f.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(rv.FormatError, match="no factor file"):
        rv.factors(file)


def test_a_failure_leaves_the_old_file(tmp_path: Path, arrays: Arrays) -> None:
    file = tmp_path / "f.safetensors"
    rv.write_factors(write(tmp_path / "m", arrays), file, rank=4)
    was = file.read_bytes()
    broken = np.array(arrays[UP][1])
    broken[3, 3] = np.nan
    with pytest.raises(rv.NonFiniteError, match="up_proj"):
        rv.write_factors(write(tmp_path / "nan", arrays | {UP: ("F32", broken)}), file, rank=4)
    assert file.read_bytes() == was
    assert not list(tmp_path.glob("*.partial"))


def test_the_command(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    command = ["factors", str(family.sft), "-o", str(file), "--rank", "3", "--which", "top"]
    done = CliRunner().invoke(main, [*command, "--include", "q_proj", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert list(found["tensors"]) == list(rv.factors(file, rv.open(family.sft)))
    assert all("q_proj" in name for name in found["tensors"])
    assert CliRunner().invoke(main, [*command, "--include", "nothing"]).exit_code == 2


# --------------------------------------------------------------------------------------------------
# In torch


@pytest.fixture
def starts(tmp_path: Path, arrays: Arrays) -> tuple[rv.Checkpoint, rv.Factors]:
    pytest.importorskip("torch")
    model = write(tmp_path / "m", arrays)
    return model, rv.write_factors(model, tmp_path / "f.safetensors", rank=4, which="both")


@pytest.mark.models
def test_torch_gets_tensors_of_its_own(starts: tuple[rv.Checkpoint, rv.Factors]) -> None:
    import torch

    _, made = starts
    was = parts(made, Q)
    found = made.torch(Q)
    assert {part: t.shape for part, t in found.items() if part.startswith("top")} == {
        "top.u": (60, 4),
        "top.s": (4,),
        "top.vt": (4, 40),
    }
    for part, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.numpy().tobytes() == was[part]
        tensor.zero_()
    assert parts(made, Q) == was
    half = made.torch(Q, dtype=torch.bfloat16)["bottom.u"]
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, made.torch(Q)["bottom.u"].to(torch.bfloat16))
    with pytest.raises(KeyError):
        made.torch("nothing")


@pytest.mark.models
@pytest.mark.parametrize("name", [Q, UP])
def test_pissa_and_kasa_start_from_the_weight_itself(
    starts: tuple[rv.Checkpoint, rv.Factors], arrays: Arrays, name: str
) -> None:
    """PiSSA: the residual is the weight less its largest triplets, B A are those, and the sum is
    the weight. KaSA: what is frozen is the weight less its smallest."""
    import torch

    _, made = starts
    w = torch.from_numpy(np.array(arrays[name][1]))
    found = made.torch(name)
    u, s, vt = (found[f"top.{part}"] for part in ("u", "s", "vt"))
    b, a = u * s.sqrt(), s.sqrt()[:, None] * vt
    values = torch.linalg.svdvals(w.double())
    residual = w - b @ a
    assert torch.linalg.norm(residual).item() == pytest.approx(
        torch.linalg.norm(values[4:]).item(), rel=1e-3
    )
    assert torch.allclose(residual + b @ a, w, atol=1e-6)
    u, s, vt = (found[f"bottom.{part}"] for part in ("u", "s", "vt"))
    world = w - (u * s) @ vt
    kept = torch.linalg.svdvals(world.double())
    assert torch.allclose(kept[:-4], values[:-4], atol=1e-5)
    assert kept[-4:].max() < 1e-5


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_peft_starts_as_pissa_does(tmp_path: Path) -> None:
    """Factors put into PEFT's own layers, against PEFT's own initialisation, which decomposes every
    weight again: the same residual, and a model that computes what it computed before."""
    peft = pytest.importorskip("peft")
    import torch
    from test_adapter import Peft

    made = Peft(tmp_path, r=4, target_modules=["q_proj"])
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    factors = rv.write_factors(
        rv.open(made.base), tmp_path / "f.safetensors", rank=4, which="top", include=["q_proj"]
    )
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    ours = peft.get_peft_model(
        load(made.base, dtype=torch.float32), peft.LoraConfig(**config)
    ).eval()
    theirs = peft.get_peft_model(
        load(made.base, dtype=torch.float32), peft.LoraConfig(init_lora_weights="pissa", **config)
    ).eval()
    with torch.no_grad():
        for name in factors:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            mine, peer = ours.get_submodule(path), theirs.get_submodule(path)
            found = factors.torch(name)
            root = found["top.s"].sqrt()
            mine.lora_B["default"].weight.copy_(found["top.u"] * root)
            mine.lora_A["default"].weight.copy_(root[:, None] * found["top.vt"])
            mine.base_layer.weight -= mine.get_delta_weight("default")
            gap = (mine.base_layer.weight - peer.base_layer.weight).norm()
            assert gap <= 2e-2 * peer.base_layer.weight.norm()
            assert mine.base_layer.weight.norm() <= 1.001 * peer.base_layer.weight.norm()
        plain = load(made.base, dtype=torch.float32).eval()(made.tokens).logits
        assert torch.allclose(ours(made.tokens).logits, plain, atol=1e-5)
