"""Layouts without files behind them, and what an alignment of two must always be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from reasonvec.compat.alignment import Alignment
from reasonvec.compat.layout import Layout, TensorInfo
from reasonvec.compat.placement import Placement
from reasonvec.compat.problem import Problem
from reasonvec.compat.rows import VocabPolicy

Shape = tuple[int, ...]

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
POLICIES: list[VocabPolicy] = ["strict", "skip", "match-tokens"]
DENSE: dict[str, Shape] = {EMBED: (16, 4), UP: (8, 4), DOWN: (4, 8), NORM: (4,)}
UNTIED: dict[str, Shape] = {**DENSE, HEAD: (16, 4)}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)

# Qwen2.5-1.5B as the hub has it (transformers 4) ...
QWEN: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# ... and as transformers 5 saves what it loaded from that.
QWEN_5: dict[str, object] = {
    **{
        key: value
        for key, value in QWEN.items()
        if key not in {"rope_theta", "torch_dtype", "transformers_version", "sliding_window"}
    },
    "_name_or_path": "somewhere",
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 28,
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "transformers_version": "5.0.0",
}
MIXTRAL: dict[str, object] = {
    **QWEN,
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
QWEN_MOE: dict[str, object] = {
    **QWEN,
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


def layout(
    path: Path | str,
    shapes: Mapping[str, Shape],
    *,
    config: Mapping[str, object] = QWEN,
    dtype: str = "BF16",
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    tensors = {
        name: TensorInfo(name, (dtypes or {}).get(name, dtype), shape, "model.safetensors")
        for name, shape in shapes.items()
    }
    return Layout(Path(path), tensors, config, {"format": "pt"} if metadata is None else metadata)


def write_tokenizer(
    folder: Path, vocab: object, added: Sequence[tuple[str, int]] = (), **more: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token} for token, number in added],
        "normalizer": {"pattern": {"String": '"]}\\'}, "vocab": {"decoy": 7}},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "]"], ["{", '"']]},
        **more,
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def errors(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.severity == "error"]


def only_error(problems: Sequence[Problem], kind: str) -> str:
    found = errors(problems)
    assert [problem.kind for problem in found] == [kind], found
    return found[0].message


def without_tokenizer(problems: Sequence[Problem]) -> list[Problem]:
    """Without the warning that these folders have no tokenizer.json, which is most tests' case."""
    return [
        problem
        for problem in problems
        if not (problem.severity == "warning" and "no tokenizer.json" in problem.message)
    ]


def elements(placement: Placement | None, size: int) -> list[tuple[str, int] | None]:
    """For each element of a target tensor, the vector element it takes."""
    taken: list[tuple[str, int] | None] = [None] * size
    if placement is None:
        return taken
    if placement.segments is None:
        return [(placement.name, place) for place in range(size)]
    for segment in placement.segments:
        for place in range(segment.length):
            assert taken[segment.at + place] is None
            taken[segment.at + place] = (segment.name, segment.start + place)
    return taken


def assert_sound(alignment: Alignment, vector: Layout, target: Layout) -> None:
    """What holds of every alignment, whatever went wrong."""
    assert list(alignment.sources) == list(target.tensors)
    for name, placement in alignment.sources.items():
        assert (placement is None) == (name in alignment.untouched), name
        if placement is None:
            assert alignment.untouched[name]
            continue
        assert set(placement.names) <= set(vector.tensors)
        size = int(np.prod(target.tensors[name].shape))
        if placement.segments is None:
            assert target.tensors[name].shape == vector.tensors[placement.name].shape
            continue
        end = 0
        for segment in placement.segments:
            assert end <= segment.at
            assert segment.length > 0
            assert segment.start >= 0
            end = segment.at + segment.length
            source = vector.tensors[segment.name]
            assert segment.start + segment.length <= int(np.prod(source.shape))
        assert end <= size
