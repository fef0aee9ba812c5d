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
from shards import Stored, stored, write_checkpoint

from reasonvec import reference as ref
from reasonvec.reference import Dtype, Work

VERSION = "0.1.5"
HOME = Path(
    os.environ.get("REASONVEC_MERGEKIT")
    or Path(__file__).parents[2] / "benches" / ".cache" / f"mergekit-{VERSION}"
)
"""The virtual environment that `make agreement` makes (benches/peers.py), or another one."""
PYTHON = HOME / "bin" / "python"
TORCH: dict[Dtype, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
LAYERS, HIDDEN, INNER, VOCABULARY = 2, 32, 48, 80

Value: TypeAlias = float | bool | list[float]
Tensors: TypeAlias = dict[str, Stored]

# Merges one after another: most of a run of `mergekit-yaml` is the import of torch. Whatever its
# libraries print goes to stderr.
_DRIVER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for line in sys.stdin:
    config, out, options = json.loads(line)
    problem = None
    try:
        asked = MergeOptions(quiet=True, write_model_card=False, **options)
        run_merge(MergeConfiguration.model_validate(config), out, asked)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    print(json.dumps(problem), file=answers, flush=True)
"""


class Mergekit:
    """A mergekit that waits for recipes."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [PYTHON, "-c", _DRIVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
                text=True,
            )
        self.log = log

    def merge(self, config: object, out: Path, **options: Value) -> str | None:
        """Run a recipe; what mergekit says that is wrong, or None."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        options.setdefault("copy_tokenizer", False)
        self.process.stdin.write(json.dumps([config, str(out), options]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-4000:]
        said = json.loads(line)
        return None if said is None else str(said)

    def close(self) -> None:
        """End it."""
        self.process.communicate(timeout=60)


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
    hidden, inner = HIDDEN, INNER
    shapes = _llama(hidden, inner, VOCABULARY)
    if architecture == "qwen2":
        for layer in range(LAYERS):
            for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
                shapes[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (rows,)
    elif architecture == "mixtral":
        # As transformers 5 packs experts: mergekit, which builds on it, merges and writes no others.
        shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
        for layer in range(LAYERS):
            moe = f"model.layers.{layer}.mlp"
            shapes[f"{moe}.gate.weight"] = (4, hidden)
            shapes[f"{moe}.experts.gate_up_proj"] = (4, 2 * inner, hidden)
            shapes[f"{moe}.experts.down_proj"] = (4, hidden, inner)
    elif architecture == "gemma":
        del shapes["lm_head.weight"]
    return shapes


def config_of(architecture: str) -> dict[str, object]:
    """The config.json that goes with `shapes_of`."""
    config: dict[str, object] = {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN // 4,
        "vocab_size": VOCABULARY,
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
    root: Path,
    architecture: str,
    dtypes: Sequence[Dtype],
    seed: int = 0,
    moved: float = 0.6,
    steps: Sequence[float] = (0.02, 0.03, 0.01),
) -> Family:
    """A base, and a model for every further format, in which a share of the elements moved.

    A third of every step, of one of these sizes each, is common to all models.
    """
    dice = np.random.default_rng(seed)
    shapes = shapes_of(architecture)
    start: dict[str, NDArray[np.float64]] = {}
    for name, shape in shapes.items():
        start[name] = dice.normal(float(len(shape) == 1), 0.05, shape)
    common = {name: dice.normal(0, 1, shape) for name, shape in shapes.items()}
    folders, found = [], []
    for place, dtype in enumerate(dtypes):
        tensors = {}
        for name, values in start.items():
            if place:
                step = (2 * dice.normal(0, 1, values.shape) + common[name]) / 3
                step *= steps[(place - 1) % len(steps)]
                values = values + step * (dice.random(values.shape) < moved)
            bits = ref.narrow(values.ravel(), dtype)
            tensors[name] = stored(dtype, bits, values.shape)
        folder = root / f"{place}-{dtype}"
        folders.append(write_checkpoint(folder, tensors, config=config_of(architecture)))
        found.append(tensors)
    return Family(folders, found)
