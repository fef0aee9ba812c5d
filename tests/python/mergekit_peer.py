"""mergekit's own runs, and small models for it: what its outputs are, never how it makes them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from shards import Stored, read_checkpoint, stored, write_checkpoint

from reasonvec import reference as ref
from reasonvec.reference import Dtype, Work

VERSION = "0.1.5"
HOME = Path(
    os.environ.get("REASONVEC_MERGEKIT")
    or Path(__file__).parents[2] / "benches" / ".cache" / f"mergekit-{VERSION}"
)
"""The virtual environment that `make bench` makes (benches/peers.py), or another one."""
PYTHON = HOME / "bin" / "python"
TORCH: dict[Dtype, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
LAYERS = 2

Value: TypeAlias = float | bool | list[float]
Tensors: TypeAlias = dict[str, Stored]

# One process for many merges: most of a run of `mergekit-yaml` is the import of torch.
_DRIVER = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for job in json.loads(sys.stdin.read()):
    try:
        options = MergeOptions(copy_tokenizer=False, quiet=True, random_seed=job["seed"], write_model_card=False)
        run_merge(MergeConfiguration.model_validate(job["config"]), job["out"], options)
    except Exception as error:
        print(json.dumps([job["out"], f"{type(error).__name__}: {error}"]))
"""


@dataclass(frozen=True)
class Recipe:
    """A merge, as a mergekit file says it; models are places in a `Family`."""

    method: str
    models: Sequence[int]
    base: int | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    each: Sequence[Mapping[str, Value]] = ()
    """Parameters of each model."""
    dtype: Dtype = "F32"
    """The format in which mergekit computes."""
    out_dtype: Dtype | None = None
    seed: int | None = None

    @property
    def output(self) -> Dtype:
        """The format of the merged tensors."""
        return self.out_dtype or self.dtype

    def config(self, family: Family) -> dict[str, object]:
        """The recipe as a mergekit file."""
        each = self.each or [{}] * len(self.models)
        found: dict[str, object] = {
            "merge_method": self.method,
            "models": [
                {"model": str(family.folders[i]), "parameters": dict(own)}
                for i, own in zip(self.models, each, strict=True)
            ],
            "parameters": dict(self.parameters),
            "dtype": TORCH[self.dtype],
        }
        if self.base is not None:
            found["base_model"] = str(family.folders[self.base])
        if self.out_dtype is not None:
            found["out_dtype"] = TORCH[self.out_dtype]
        return found


@dataclass(frozen=True)
class Family:
    """Checkpoints of one architecture: a base and models that moved away from it."""

    folders: Sequence[Path]
    tensors: Sequence[Tensors]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.tensors[0][name].shape

    def values(self, model: int, name: str) -> Work:
        """A tensor [n] of a model, in F32."""
        tensor = self.tensors[model][name]
        return ref.widen(tensor.bits, tensor.dtype, "F32")


def _llama(hidden: int, inner: int, vocab: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def shapes_of(architecture: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small checkpoint of `llama`, `qwen2`, `mixtral` or `gemma`."""
    hidden, inner = 64, 96
    shapes = _llama(hidden, inner, 160)
    if architecture == "qwen2":
        for layer in range(LAYERS):
            for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
                shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (rows,)
    elif architecture == "mixtral":
        shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
        for layer in range(LAYERS):
            moe = f"model.layers.{layer}.block_sparse_moe"
            shapes[f"{moe}.gate.weight"] = (4, hidden)
            for expert in range(4):
                for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner))):
                    shapes[f"{moe}.experts.{expert}.{name}.weight"] = shape
                shapes[f"{moe}.experts.{expert}.w3.weight"] = (inner, hidden)
    elif architecture == "gemma":
        del shapes["lm_head.weight"]
    return shapes


def config_of(architecture: str) -> dict[str, object]:
    """The config.json that goes with `shapes_of`."""
    config: dict[str, object] = {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 160,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": architecture == "gemma",
        "torch_dtype": "bfloat16",
    }
    if architecture == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return config


def make_models(
    root: Path, architecture: str, dtypes: Sequence[Dtype], seed: int = 0, moved: float = 0.6
) -> Family:
    """A base, and a model for every further format, in which a share of the elements moved."""
    dice = np.random.default_rng(seed)
    start: dict[str, NDArray[np.float64]] = {}
    for name, shape in shapes_of(architecture).items():
        start[name] = dice.normal(float(len(shape) == 1), 0.05, shape)
    folders = []
    for place, dtype in enumerate(dtypes):
        tensors = {}
        for name, values in start.items():
            step = dice.normal(0, 0.02, values.shape) * (dice.random(values.shape) < moved)
            bits = ref.narrow((values + (step if place else 0.0)).ravel(), dtype)
            tensors[name] = stored(dtype, bits, values.shape)
        folder = root / f"{place}-{dtype}"
        folders.append(write_checkpoint(folder, tensors, config=config_of(architecture)))
    return read_family(folders)


def read_family(folders: Sequence[Path]) -> Family:
    """Checkpoints as models for recipes, the first as place 0."""
    return Family(folders, [read_checkpoint(folder) for folder in folders])


def packed(family: Family) -> Family:
    """A Mixtral as transformers 5 holds it, and as mergekit therefore merges and writes it.

    The experts of a layer are one tensor: w1 above w3 as gate_up_proj, and w2 as down_proj.
    """
    return Family(family.folders, [_packed(tensors) for tensors in family.tensors])


def _packed(tensors: Tensors) -> Tensors:
    found = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        moe = f"{at}.block_sparse_moe"
        found[f"{at}.mlp.gate.weight"] = tensors[f"{moe}.gate.weight"]
        for name, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            rows = [tensors[f"{moe}.experts.{e}.{part}.weight"] for e in range(4) for part in parts]
            height, columns = rows[0].shape
            found[f"{at}.mlp.experts.{name}"] = Stored(
                rows[0].dtype,
                (4, len(parts) * height, columns),
                b"".join(row.data for row in rows),
            )
    return found


def mergekit(recipes: Sequence[Recipe], family: Family, scratch: Path) -> list[Tensors | str]:
    """What mergekit writes for each recipe, or what it says that is wrong."""
    outs = [scratch / f"{place:04}" for place in range(len(recipes))]
    jobs = [
        {"config": recipe.config(family), "out": str(out), "seed": recipe.seed}
        for recipe, out in zip(recipes, outs, strict=True)
    ]
    finished = subprocess.run(
        [PYTHON, "-c", _DRIVER],
        input=json.dumps(jobs),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if line.startswith("[")]
    refused: dict[str, str] = dict(json.loads(line) for line in lines)
    return [refused.get(str(out)) or read_checkpoint(out) for out in outs]
