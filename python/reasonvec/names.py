"""What a tensor's name says: the kind of module it belongs to, and its layer.

Only for tables, and for telling the vocabulary and other matrices from what is none. Nothing
decides by these words where a delta goes: that is by whole names, or by the table of expert
layouts.
"""

from __future__ import annotations

import re

__all__ = ["is_embedding", "is_matrix", "is_vocabulary", "kind_of", "layer_of"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")
_EXPERT = re.compile(r"(?:^|\.)experts\.")
_SHARED = re.compile(r"(?:^|\.)shared_experts?\.")

_MODULES: dict[str, str] = {
    "embed_tokens": "embed",
    "embed_tokens_per_layer": "embed",
    "wte": "embed",
    "embed_in": "embed",
    "word_embeddings": "embed",
    "tok_embeddings": "embed",
    "lm_head": "lm_head",
    "embed_out": "lm_head",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "out_proj": "o_proj",
    "qkv_proj": "qkv_proj",
    "qkv": "qkv_proj",
    "Wqkv": "qkv_proj",
    "c_attn": "qkv_proj",
    "query_key_value": "qkv_proj",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "gate_up_proj": "gate_up_proj",
    "gate_up_proj_bias": "gate_up_proj",
    "down_proj_bias": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    "fc1": "up_proj",
    "fc2": "down_proj",
    "c_fc": "up_proj",
    "dense_h_to_4h": "up_proj",
    "dense_4h_to_h": "down_proj",
    "gate": "router",
    "router": "router",
    "shared_expert_gate": "router",
    "e_score_correction_bias": "router",
}
_VOCABULARY = re.compile(
    "|".join(part for part, kind in _MODULES.items() if kind in {"embed", "lm_head"})
)
# GPT-2 and GPT-NeoX give two modules of a block one name, and the parent tells them apart.
_BY_PARENT: dict[tuple[str, str], str] = {
    ("attn", "c_proj"): "o_proj",
    ("mlp", "c_proj"): "down_proj",
    ("attention", "dense"): "o_proj",
    ("self_attention", "dense"): "o_proj",
    ("self_attn", "dense"): "o_proj",
}


def kind_of(name: str) -> str:
    """The kind of module: embed, q_proj ... o_proj, gate_proj, up_proj, down_proj, norm, lm_head,
    router, the same with `experts.` or `shared_experts.` before it inside a mixture, or other."""
    parts = name.split(".")
    for at in range(len(parts) - 1, -1, -1):
        part = parts[at]
        kind = _BY_PARENT.get((parts[at - 1], part)) if at else None
        kind = kind or _MODULES.get(part)
        if kind is None and ("norm" in part.lower() or part.startswith("ln_")):
            kind = "norm"
        if kind is None:
            continue
        if kind in {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}:
            if _SHARED.search(name):
                return f"shared_experts.{kind}"
            if _EXPERT.search(name):
                return f"experts.{kind}"
        return kind
    return "other"


def layer_of(name: str) -> int | None:
    """The index of the block that the tensor is in, the outermost if blocks are nested."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def is_embedding(name: str) -> bool:
    """Whether the tensor turns tokens into vectors."""
    return is_vocabulary(name) and kind_of(name) == "embed"


def is_vocabulary(name: str) -> bool:
    """Whether the rows of the tensor are tokens."""
    # Asked of every tensor of a mixture, tens of thousands: most names are out at a glance.
    return _VOCABULARY.search(name) is not None and kind_of(name) in {"embed", "lm_head"}


def is_matrix(name: str, dimensions: int) -> bool:
    """Whether the tensor maps vectors to vectors: a matrix, or a packed stack of them (experts);
    not the vocabulary's, whose rows are tokens, and no biases."""
    if is_vocabulary(name) or name.endswith("bias"):
        return False
    return dimensions == 2 or (dimensions == 3 and kind_of(name).startswith("experts."))
