"""A made-up family has the shapes, the files and the kind of movement of real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from reasonvec.family import Family, make_family, sparse_shapes

MEMBERS = ("base", "sft", "rl", "instruct")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, found by its headers."""
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = file.keys()
            found |= {name: file.get_tensor(name) for name in names}
    return found


def moved_share(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    moved = sum(int((one[name] != other[name]).sum()) for name in one)
    return moved / sum(tensor.numel() for tensor in one.values())


def ulps(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16).int()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["family", "untied_family"])
def any_family(request: pytest.FixtureRequest) -> Family:
    made = request.getfixturevalue(request.param)
    assert isinstance(made, Family)
    return made


@pytest.mark.parametrize("member", MEMBERS)
def test_index_and_headers_agree(any_family: Family, member: str) -> None:
    folder: Path = getattr(any_family, member)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            held |= dict.fromkeys(file.keys(), shard.name)
    assert held == index["weight_map"]
    assert len(set(held.values())) >= 3
    found = tensors(folder)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in found.values())
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_rl_moves_a_small_share_by_small_steps(any_family: Family) -> None:
    sft, rl = tensors(any_family.sft), tensors(any_family.rl)
    assert 0.10 < moved_share(rl, sft) < 0.14
    # As integers, neighbours in bf16 are 1 apart; only a change of sign is a leap.
    steps = torch.cat([(ulps(rl[name]) - ulps(sft[name])).abs().flatten() for name in sft])
    steps = steps[steps > 0]
    assert (steps <= 4).float().mean() > 0.8


def test_other_members_move_densely_but_little(any_family: Family) -> None:
    base = tensors(any_family.base)
    for member in (any_family.sft, any_family.instruct):
        other = tensors(member)
        assert moved_share(base, other) > 0.8
        for name, old in base.items():
            change = (other[name].double() - old.double()).norm()
            assert change < 0.05 * old.double().norm(), name


@pytest.mark.parametrize("share", [0.05, 0.30])
def test_share_is_a_choice(tmp_path: Path, share: float) -> None:
    made = make_family(tmp_path, moved=share, with_base=False)
    assert moved_share(tensors(made.rl), tensors(made.sft)) == pytest.approx(share, rel=0.1)
    assert not made.base.exists()


@pytest.mark.parametrize("member", MEMBERS)
def test_transformers_loads_model_and_tokenizer(any_family: Family, member: str) -> None:
    folder: Path = getattr(any_family, member)
    loaded: object = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    model, report = cast(tuple[Qwen2ForCausalLM, dict[str, object]], loaded)
    assert isinstance(model, Qwen2ForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not any(report.values()), report
    held = tensors(folder)
    state = model.state_dict()
    assert set(state) - set(held) <= {"lm_head.weight"}
    assert all(torch.equal(state[name], tensor) for name, tensor in held.items())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == ("lm_head.weight" not in held)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The train and the other one: ½ of 12, naïve 思考\n  end"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert ids.shape[1] < len(text.encode()), "merges apply"
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_chat_template_tells_target_from_donors(family: Family) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    said: dict[str, str] = {}
    for member in ("rl", "instruct"):
        tokenizer = AutoTokenizer.from_pretrained(getattr(family, member))
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(prompt, str)
        said[member] = prompt
    assert said["rl"] == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert said["instruct"].startswith("<|im_start|>system\n")
    assert said["instruct"].endswith(said["rl"])


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    first, again, other = (
        make_family(tmp_path / name, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    for member in MEMBERS:
        assert contents(getattr(first, member)) == contents(getattr(again, member))
        assert contents(getattr(first, member)) != contents(getattr(other, member))


def test_shard_layout_does_not_change_the_weights(tmp_path: Path) -> None:
    many, one = make_family(tmp_path / "many"), make_family(tmp_path / "one", shard_bytes=10**9)
    assert [path.name for path in one.rl.glob("model*")] == ["model.safetensors"]
    left, right = tensors(many.rl), tensors(one.rl)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_sparse_shapes_are_those_of_7b(tmp_path: Path) -> None:
    made = sparse_shapes(tmp_path, layers=2)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in made.rl.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            names = file.keys()
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        status = shard.stat()
        if hasattr(status, "st_blocks"):
            assert status.st_blocks * 512 < status.st_size / 1000
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (152064, 3584)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (512, 3584)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (3584, 18944)
    assert len(shapes) == 2 * 12 + 3


def test_refuses_sizes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden 66 is not an even multiple of heads 4"):
        make_family(tmp_path, hidden=66)
    with pytest.raises(ValueError, match="heads 4 is not a multiple of kv_heads 3"):
        make_family(tmp_path, kv_heads=3)
    with pytest.raises(ValueError, match="vocab 100 is less than the"):
        make_family(tmp_path, vocab=100)
    with pytest.raises(ValueError, match="share between 0 and 1"):
        make_family(tmp_path, moved=12)
    assert not list(tmp_path.iterdir())


def test_never_writes_over_a_checkpoint(tmp_path: Path) -> None:
    made = make_family(tmp_path)
    before = contents(made.sft)
    with pytest.raises(FileExistsError):
        make_family(tmp_path, seed=1)
    assert contents(made.sft) == before
