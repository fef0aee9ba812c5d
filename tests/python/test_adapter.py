"""Adapters: the core's products against the reference, PEFT's own adapters against PEFT, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import reasonvec as rv
from reasonvec import _reasonvec as core
from reasonvec import reference as ref
from reasonvec.adapter import AdapterFolder
from reasonvec.adapter_updates import Update, copy_problems, fit
from reasonvec.cli.app import main
from reasonvec.errors import FormatError, MismatchError
from reasonvec.family import Family
from reasonvec.folders import CheckpointFolder
from reasonvec.reference import BLOCK, Bits, Dtype, lowrank

FLOATS: list[Dtype] = ["BF16", "F16", "F32", "F64"]


def write(path: Path, tensors: dict[str, tuple[Bits, Dtype, tuple[int, ...]]]) -> None:
    """A safetensors file of bit patterns."""
    header, data = {}, b""
    for name, (bits, dtype, shape) in tensors.items():
        raw = bits.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def bits_of(generator: np.random.Generator, n: int, dtype: Dtype, scale: float = 0.1) -> Bits:
    return ref.narrow(generator.normal(size=n) * scale, dtype)


def bytes_of(tensor: object, double: bool) -> np.ndarray:
    return np.frombuffer(memoryview(tensor).cast("B"), np.float64 if double else np.float32)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.sampled_from([1, 2, 3, 33, 100]),
    columns=st.sampled_from([1, 5, 31, 32, 33, 64, 100, 4097]),
    rank=st.integers(1, 9),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    transposed=st.booleans(),
    scale=st.sampled_from([1.0, 2.0, -0.3, 16 / 3, 1e-30]),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**32),
)
def test_a_product_is_the_references(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    rank: int,
    dtypes: tuple[Dtype, Dtype],
    transposed: bool,
    scale: float,
    span: tuple[float, float],
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("product") / "factors.safetensors"
    generator = np.random.default_rng(seed)
    out, into = (columns, rows) if transposed else (rows, columns)
    a = bits_of(generator, rank * into, dtypes[0]).reshape(rank, into)
    b = bits_of(generator, out * rank, dtypes[1]).reshape(out, rank)
    write(path, {"a": (a, dtypes[0], a.shape), "b": (b, dtypes[1], b.shape)})
    work = ref.work_dtype(*dtypes)
    expected = lowrank.adapter_delta(
        (a, dtypes[0]), (b, dtypes[1]), scale, transposed=transposed, work=work
    )
    adapter = {
        "a": {"operand": 0, "name": "a"},
        "b": {"operand": 0, "name": "b"},
        "scale": scale,
        "transposed": transposed,
    }
    term = {"coefficient": 1.0, "source": {"product": adapter | {"rows": rows, "columns": columns}}}
    n = rows * columns
    start, stop = sorted(round(share * n) for share in span)
    found = core.values(
        json.dumps([term]), "w", n, start, stop, [core.Checkpoint(path)], work == "F64"
    )
    assert bytes_of(found, work == "F64").tobytes() == expected.reshape(-1)[start:stop].tobytes()


@pytest.mark.parametrize("columns", [700, BLOCK + 77])
def test_products_and_adapted_tensors_over_blocks(tmp_path: Path, columns: int) -> None:
    """Rows that straddle tiles, a row longer than a block, and a tensor under two adapters."""
    generator = np.random.default_rng(3)
    rows, rank = 2 * BLOCK // columns + 3, 3
    parts: dict[str, tuple[Bits, Dtype, tuple[int, ...]]] = {}
    for i in (0, 1):
        a, b = bits_of(generator, rank * columns, "BF16"), bits_of(generator, rows * rank, "F32")
        parts |= {f"a{i}": (a, "BF16", (rank, columns)), f"b{i}": (b, "F32", (rows, rank))}
    base = bits_of(generator, rows * columns, "BF16")
    parts["w"] = base, "BF16", (rows, columns)
    write(tmp_path / "f.safetensors", parts)
    adapters = [
        {"a": {"operand": 0, "name": f"a{i}"}, "b": {"operand": 0, "name": f"b{i}"}, "scale": s}
        for i, s in ((0, 2.0), (1, -0.7))
    ]
    source = {"adapted": {"tensor": {"operand": 0, "name": "w"}, "adapters": adapters}}
    term = json.dumps([{"coefficient": 0.3, "source": source}])
    n = rows * columns
    found = core.values(term, "w", n, 5, n - 7, [core.Checkpoint(tmp_path / "f.safetensors")])
    expected = ref.widen(base, "BF16").reshape(rows, columns)
    for i, s in ((0, 2.0), (1, -0.7)):
        a, b = parts[f"a{i}"][0].reshape(rank, columns), parts[f"b{i}"][0].reshape(rows, rank)
        expected = expected + lowrank.adapter_delta((a, "BF16"), (b, "F32"), s)
    expected = np.float32(0.3) * expected
    assert bytes_of(found, False).tobytes() == expected.reshape(-1)[5 : n - 7].tobytes()


# --------------------------------------------------------------------------------------------------
# PEFT's own adapters

QWEN = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
ATTENTION = ["q_proj", "v_proj"]


class Peft:
    """A tiny model, its adapter, and what PEFT computes with the two."""

    def __init__(
        self, folder: Path, kind: str = "qwen", *, tied: bool = False, **config: object
    ) -> None:
        peft = pytest.importorskip("peft")
        import torch
        import transformers

        torch.manual_seed(0)
        self.base, self.adapter = folder / "base", folder / "adapter"
        if kind == "qwen":
            model = transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(**QWEN, tie_word_embeddings=tied)
            )
        else:
            sizes = {
                "vocab_size": 96,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 2,
                "bos_token_id": 0,
                "eos_token_id": 0,
            }
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        model.eval()
        model.save_pretrained(self.base)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if (
                    "lora_" in name
                    or "modules_to_save" in name
                    or ("bias" in name and parameter.requires_grad)
                ):
                    parameter.normal_(std=0.1)
        wrapped.eval()
        wrapped.save_pretrained(self.adapter)
        self.tokens = torch.arange(12).reshape(1, 12) * 7 % 96
        with torch.no_grad():
            self.logits = wrapped(self.tokens).logits

    def check(self, point: rv.Point, out: Path) -> None:
        """PEFT's logits against those of the checkpoint that we write."""
        import torch
        import transformers

        point.save(out)
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(self.tokens).logits
        spread = self.logits.abs().max().item()
        assert (logits - self.logits).abs().max().item() <= 2e-5 * spread
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            self.base, dtype=torch.float32
        ).eval()
        with torch.no_grad():
            assert (plain(self.tokens).logits - self.logits).abs().max().item() > 1e-3 * spread


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
        {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "down_proj"], "rank_pattern": {"v_proj": 2, r"layers\.1\..*\.down_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 24, "v_proj": 5}},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION, "alpha_pattern": {"q_proj": 3}},
        {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, "lora_bias": True},
        {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, "bias": "lora_only"},
        {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, "bias": "all", "modules_to_save": ["lm_head", "norm"]},
        {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "rslora-alpha", "lora_bias", "bias", "modules_to_save", "embeddings"],
)  # fmt: skip
def test_the_checkpoint_computes_what_peft_computes(
    tmp_path: Path, config: dict[str, object]
) -> None:
    peft = Peft(tmp_path, **config)
    base = rv.open(peft.base)
    peft.check(base + rv.adapter(peft.adapter, base), tmp_path / "out")


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "targets", [["c_attn"], ["c_attn", "c_proj"], ["c_proj", "c_fc", "lm_head"]]
)
def test_matrices_that_are_stored_as_in_by_out(tmp_path: Path, targets: list[str]) -> None:
    peft = Peft(tmp_path, "gpt2", r=4, lora_alpha=8, target_modules=targets)
    base = rv.open(peft.base)
    vector = rv.adapter(peft.adapter, base)
    if "lm_head" in targets:  # GPT-2 ties it
        with pytest.raises(MismatchError, match=r"ties embeddings and head|ties to its embeddings"):
            (base + vector).save(tmp_path / "out")
        return
    peft.check(base + vector, tmp_path / "out")


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_adapters_have_no_cross_terms(tmp_path: Path) -> None:
    """Twice an adapter less the same is the adapter; the sum of two is the sum of their products."""
    first = Peft(tmp_path / "a", r=4, lora_alpha=8, target_modules=ATTENTION)
    base = rv.open(first.base)
    vector = rv.adapter(first.adapter, base)
    (2.0 * vector - vector).save(tmp_path / "v")
    vector.save(tmp_path / "w")
    one, other = rv.load(tmp_path / "v"), rv.load(tmp_path / "w")
    compared = one.compare(other)
    assert compared.total.cosine == pytest.approx(1.0, abs=1e-12)
    assert vector.inspect().totals().moved == sum(
        row.elements
        for row in other.inspect().tensors
        if "q_proj.weight" in row.name or "v_proj.weight" in row.name
    )
    first.check(base + 0.5 * vector + 0.5 * other, tmp_path / "out")


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA rescales every row"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"target_parameters": ["self_attn.q_proj.weight"], "target_modules": []}, "target_parameters"),
        ({"trainable_token_indices": [1, 2]}, "rows of the embeddings"),
    ],
)  # fmt: skip
def test_what_is_no_sum_of_factors_is_refused(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    peft = Peft(tmp_path, **({"r": 4, "target_modules": ATTENTION} | config))
    base = rv.open(peft.base)
    with pytest.raises(MismatchError, match=message):
        (base + rv.adapter(peft.adapter, base)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_a_tied_matrix_is_not_adapted_on_one_side(
    tmp_path: Path, config: dict[str, object]
) -> None:
    peft = Peft(tmp_path, tied=True, r=2, **config)
    base = rv.open(peft.base)
    with pytest.raises(MismatchError, match="tie_word_embeddings false"):
        (base + rv.adapter(peft.adapter, base)).save(tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# Folders made by hand


def adapter_folder(
    folder: Path,
    family_path: Path,
    *,
    change: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """An adapter of rank 2 on two matrices of the tiny family, by default."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    if tensors is None:
        tensors = {}
        for layer in (0, 1):
            stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{stem}.lora_A.weight"] = generator.normal(size=(2, 64)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = generator.normal(size=(64, 2)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": str(family_path),
    } | (change or {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def fitted(folder: Path, base: Path) -> dict[str, Update]:
    updates = fit(AdapterFolder(folder), CheckpointFolder(base).layout)
    assert updates.problems == []
    return updates.of


def told(folder: Path, base: Path) -> str:
    adapter, point = AdapterFolder(folder), CheckpointFolder(base)
    updates = fit(adapter, point.layout)
    problems = updates.problems or copy_problems(adapter, point.layout, point.handle, updates)
    return "\n".join(problem.message for problem in problems)


def test_the_base_is_the_one_that_the_config_names(family: Family, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", family.sft)
    assert str(rv.open(family.instruct) + 0.5 * rv.adapter(folder)) == "instruct + 0.5 * a"
    folder = adapter_folder(tmp_path / "a", Path("someone/model"))
    with pytest.raises(MismatchError, match="someone/model, which is no folder here"):
        rv.adapter(folder)
    assert len(fitted(folder, family.sft)) == 2


def test_pickles_are_refused(family: Family, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", family.sft)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FormatError, match="safe_serialization=True"):
        rv.adapter(folder)


def test_opening_an_adapter_as_something_else_says_how(family: Family, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", family.sft)
    with pytest.raises(FormatError, match=r"rv\.adapter"):
        rv.open(folder)
    with pytest.raises(FormatError, match=r"rv\.adapter"):
        rv.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "of the kind 'LOHA'"),
        ({"r": 3}, "says rank 3"),
        ({"r": None}, "expected r to be a number"),
        ({"lora_alpha": True}, "expected lora_alpha to be a number"),
        ({"alpha_pattern": {"(q+)+_proj": 3}}, "may never end"),
        ({"alpha_pattern": {"(q|q)*_proj": 3}}, "may never end"),
        ({"rank_pattern": {".*.*x": 3}}, "may never end"),
        ({"rank_pattern": {"a?a?aa": 3}}, "may never end"),
        ({"rank_pattern": {r"\\.+\.+x": 3}}, "may never end"),
        ({"rank_pattern": {"(a|a)(a|a)(a|a)": 3}}, "may never end"),
        ({"rank_pattern": {"q" * 501: 3}}, "may never end"),
        ({"rank_pattern": {"x{99999999999}": 3}}, "write the modules' names"),
        ({"alpha_pattern": {"(q": 3}}, "write the modules' names"),
        ({"alpha_pattern": [1]}, "is no object"),
        ({"use_frobnication": True}, "use_frobnication"),
        ({"alora_invocation_tokens": [5]}, "only after certain tokens"),
        ({"layer_replication": [[0, 1]]}, "repeated"),
        ({"frobnication": 7}, "does not know"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(
    family: Family, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    assert message in told(adapter_folder(tmp_path / "a", family.sft, change=change), family.sft)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({f"{Q}.lora_A.weight": (2, 64)}, "has the factor A and no B"),
        ({f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_B.weight": (64, 3)}, "expected factors"),
        ({f"{Q}.lora_A.weight": (0, 64), f"{Q}.lora_B.weight": (64, 0)}, "expected factors"),
        ({f"{Q}.lora_A.weight": (2, 60), f"{Q}.lora_B.weight": (64, 2)}, "brings [64, 60]"),
        ({f"{Q}.lora_A.weight": (2, 64, 1), f"{Q}.lora_B.weight": (64, 2, 1)}, "no convolutions"),
        ({f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_B.weight": (64, 2), f"{Q}.lora_magnitude_vector": (64,)}, "DoRA"),
        ({f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_B.weight": (64, 2), f"{Q}.lora_C.weight": (2, 2)}, "no part of a LoRA"),
        ({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": (2, 64), "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": (64, 2)}, "does not have"),
        ({"base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": (2, 64), "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight": (64, 2), "base_model.model.model.layers.0.self_attn.o_proj.lora_B.bias": (64,)}, "has none for"),
        ({"base_model.model.model.embed_tokens.weight": (5000, 64)}, "resized the vocabulary"),
        ({f"{Q}.lora_A.weight": (2, 64), f"{Q}.lora_A.default.weight": (2, 64), f"{Q}.lora_B.weight": (64, 2)}, "is the same part as"),
        ({f"{Q}.weight": (64, 64), f"{Q}.base_layer.weight": (64, 64)}, "is the same part as"),
        ({f"{Q}.base_layer.weight": (64, 64), f"{Q}.modules_to_save.weight": (64, 64)}, "is the same part as"),
        ({"a." * 65 + "weight": (64, 64)}, "no model has such a module"),
        ({"a" * 501: (64, 64)}, "no model has such a module"),
        ({}, "changes nothing"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(
    family: Family, tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    assert message in told(adapter_folder(tmp_path / "a", family.sft, tensors=tensors), family.sft)


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        (r"layers\.\d+\.self_attn\.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        (r"^model\.layers\.0\.self_attn\.q_proj", True),
        ("(q|k)_proj", True),
        ("k_proj|v_proj|q_proj", True),
        (r".*\*.*", None),
        ("^layers.0.self_attn.q_proj", False),
        ("self_attn", False),
    ],
)
def test_patterns_are_read_as_peft_reads_them(
    family: Family, tmp_path: Path, pattern: str, fits: bool | None
) -> None:
    """The expressions that people write; PEFT's own function says which of them fit."""
    module = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{Q}.lora_A.weight": np.ones((2, 64), np.float32),
        f"{Q}.lora_B.weight": np.ones((64, 2), np.float32),
    }
    change: dict[str, object] = {"alpha_pattern": {pattern: 6}}
    folder = adapter_folder(tmp_path / "a", family.sft, change=change, tensors=tensors)
    if fits is None:
        assert "may never end" in told(folder, family.sft)
        return
    factors = fitted(folder, family.sft)[f"{module}.weight"].factors
    assert factors is not None
    assert factors.scale == (3.0 if fits else 2.0)
    other = pytest.importorskip("peft.utils.other")
    assert (other.get_pattern_key([pattern], module) == pattern) is fits


def test_a_prefix_that_the_checkpoint_lacks(family: Family, tmp_path: Path) -> None:
    """GPT-2's checkpoints have no "transformer." before their names, its adapters do."""
    tensors = {}
    for part, shape in (("A", (2, 64)), ("B", (64, 2))):
        tensors[f"base_model.model.outer.model.layers.1.self_attn.o_proj.lora_{part}.weight"] = (
            np.ones(shape, np.float32)
        )
    assert list(
        fitted(adapter_folder(tmp_path / "a", family.sft, tensors=tensors), family.sft)
    ) == ["model.layers.1.self_attn.o_proj.weight"]


def test_exclude_leaves_a_refused_tensor_out(family: Family, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": np.ones((2, 64), np.float32), f"{Q}.lora_B.weight": np.ones((64, 2), np.float32), "base_model.model.lm_head.weight": np.ones((5120, 64), np.float32)}  # fmt: skip
    vector = rv.adapter(adapter_folder(tmp_path / "a", family.sft, tensors=tensors))
    with pytest.raises(MismatchError, match="--exclude"):
        (rv.open(family.sft) + vector).save(tmp_path / "out")
    report = (rv.open(family.sft) + vector.where(exclude=["lm_head"])).save(tmp_path / "out")
    changed = [t.name for t in report.tensors if t.action == "update"]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_the_output_is_the_references(family: Family, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", family.sft)
    (rv.open(family.sft) + 0.7 * rv.adapter(folder)).save(tmp_path / "out")
    base, out = rv.open(family.sft), rv.open(tmp_path / "out")
    factors = AdapterFolder(folder)
    for name, update in fitted(folder, family.sft).items():
        assert update.factors is not None
        a, b = (
            np.frombuffer(memoryview(factors.handle.tensor(str(f))).cast("B"), np.uint32)
            for f in (update.factors.a, update.factors.b)
        )
        delta = lowrank.adapter_delta((a.reshape(2, 64), "F32"), (b.reshape(64, 2), "F32"), 2.0)
        t = np.frombuffer(memoryview(base[name]).cast("B"), np.uint16)
        u = ref.combine([delta.reshape(-1)], [0.7], "F32")
        assert (
            memoryview(out[name]).cast("B").tobytes() == ref.finish(t, "BF16", u, "BF16").tobytes()
        )
    record = json.loads((tmp_path / "out" / "reasonvec.json").read_text())
    kinds = {entry["kind"]: entry for entry in record["inputs"]}
    assert len(kinds["adapter"]["tensors"]) == 4
    assert record["terms"][0]["text"] == "0.7 * a"


def test_digests_do_not_depend_on_threads_budgets_or_levels(family: Family, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", family.sft)
    code = "import sys, reasonvec as rv; b, a, o, t, m = sys.argv[1:]; (rv.open(b) + 0.7 * rv.adapter(a)).save(o, threads=int(t), memory_budget=int(m))"
    seen = set()
    for i, (threads, budget, level) in enumerate(
        [
            (1, 1 << 20, core.simd_levels()[0]),
            (3, 64 << 20, core.simd_levels()[-1]),
            (2, 8 << 20, core.simd_levels()[0]),
        ]
    ):
        out = tmp_path / f"out{i}"
        command = [
            sys.executable,
            "-c",
            code,
            str(family.sft),
            str(folder),
            str(out),
            str(threads),
            str(budget),
        ]
        subprocess.run(command, check=True, env=os.environ | {"REASONVEC_SIMD": level})
        record = json.loads((out / "reasonvec.json").read_text())
        seen.add(json.dumps(record["output"]["tensors"], sort_keys=True))
    assert len(seen) == 1


@pytest.mark.parametrize("command", ["apply", "inspect", "compare"])
def test_an_adapter_stands_where_a_vector_may(family: Family, tmp_path: Path, command: str) -> None:
    folder = adapter_folder(tmp_path / "a", Path("someone/model"))
    args = {
        "apply": [
            str(folder),
            "--to",
            str(family.instruct),
            "-o",
            str(tmp_path / "out"),
            "--alpha",
            "0.5",
        ],
        "inspect": [str(folder)],
        "compare": [str(folder), "--from", str(family.rl), str(family.sft)],
    }[command]
    result = CliRunner().invoke(main, [command, *args, "--json"])
    assert result.exit_code == 2
    assert "--base" in result.output
    result = CliRunner().invoke(main, [command, *args, "--base", str(family.sft), "--json"])
    assert result.exit_code == 0, result.output
