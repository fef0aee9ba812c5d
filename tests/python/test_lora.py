"""LoRA in and out: adapters made of vectors, vectors made of adapters, and what PEFT computes of both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from test_adapter import Peft, adapter_folder, write

import reasonvec as rv
from reasonvec.cli.app import main
from reasonvec.errors import MismatchError
from reasonvec.family import Family
from reasonvec.lowrank import from_lora

if TYPE_CHECKING:
    import torch

Q = "model.layers.0.self_attn.q_proj.weight"


def logits(model: torch.nn.Module) -> torch.Tensor:
    from torch import Tensor, arange, no_grad

    with no_grad():
        found = model.eval()(arange(24)[None] * 7 % 96).logits
    assert isinstance(found, Tensor)
    return found


@pytest.fixture(scope="module")
def reason(family: Family) -> rv.Vector:
    return rv.open(family.rl) - rv.open(family.sft)


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


PACKED = MIXTURES | {
    "gpt_oss": (
        "GptOss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "rank", "moved"),
    [
        *((family, 0.6, ("gate_up_proj", "down_proj")) for family in PACKED),
        ("gpt_oss", 4, ("gate_up_proj", "down_proj")),
        ("qwen3_moe", 4, ("gate_up_proj",)),
        ("gpt_oss", 4, ("down_proj",)),
    ],
)
def test_peft_computes_what_experts_in_one_tensor_compute(
    tmp_path: Path, family: str, rank: float, moved: tuple[str, ...]
) -> None:
    """Experts packed in the file as in the model: PEFT computes what the dense apply of the low-rank
    vector does, but for what was left out."""
    peft = pytest.importorskip("peft")
    import torch
    import transformers
    from safetensors.torch import save_file
    from test_adapter import QWEN

    torch.manual_seed(0)
    kind, config = PACKED[family]
    settings = getattr(transformers, f"{kind}Config")(**QWEN | config)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings).float()
    draw = torch.Generator().manual_seed(1)
    n, p = tmp_path / "n", tmp_path / "p"
    for folder in (n, p):
        folder.mkdir()
        settings.architectures = [type(model).__name__]
        settings.save_pretrained(folder)
        tensors = {name: t.contiguous().clone() for name, t in model.state_dict().items()}
        if folder == p:
            for name, tensor in tensors.items():
                if name.endswith((*(f"experts.{part}" for part in moved), "o_proj.weight")):
                    step = 0.1 * torch.rand((), generator=draw)
                    tensor += step * torch.randn(tensor.shape, generator=draw)
                if tensor.ndim == 3 and name.endswith(moved[0]):
                    # One expert stays, and another moves in one direction.
                    tensor[0] = model.state_dict()[name][0]
                    tensor[1] += torch.outer(
                        *(torch.randn(k, generator=draw) for k in tensor[1].shape)
                    )
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    base = rv.open(n)
    vector = rv.open(p) - base
    plan = vector.plan_lora(rank=rank)
    report = vector.to_lora(tmp_path / "lora", rank=rank)
    assert report.left_out == []
    assert report.ranks.keys() == {
        row.name.removesuffix(".weight") for row in vector.inspect().tensors if row.norm > 0
    }
    carried = {name for name in report.ranks if ".experts." in name}
    assert {name.rpartition(".")[2] for name in carried} == set(moved)
    assert carried <= plan.memory.keys()

    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load(n, dtype=torch.float32)
    before = logits(plain)
    found = logits(peft.PeftModel.from_pretrained(plain, tmp_path / "lora"))
    vector.compress(tmp_path / "low", rank=rank)
    (base + rv.load(tmp_path / "low")).save(tmp_path / "dense", out_dtype="float32")
    expected = logits(load(tmp_path / "dense", dtype=torch.float32))
    assert (expected - found).abs().max() <= 2e-5 * expected.abs().max()
    assert (expected - before).abs().max() > 1e-3 * expected.abs().max()
