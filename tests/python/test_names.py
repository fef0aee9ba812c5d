"""What a tensor's name says."""

from __future__ import annotations

import pytest
from layouts import EMBED, HEAD, NORM

from reasonvec.names import kind_of, layer_of

# Names.


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        (EMBED, "embed", None),
        (HEAD, "lm_head", None),
        (NORM, "norm", None),
        ("model.layers.12.self_attn.q_proj.weight", "q_proj", 12),
        ("model.layers.12.self_attn.k_proj.bias", "k_proj", 12),
        ("model.layers.3.self_attn.v_proj.weight", "v_proj", 3),
        ("model.layers.3.self_attn.o_proj.weight", "o_proj", 3),
        ("model.layers.3.self_attn.q_norm.weight", "norm", 3),
        ("model.layers.3.mlp.gate_proj.weight", "gate_proj", 3),
        ("model.layers.3.mlp.up_proj.weight", "up_proj", 3),
        ("model.layers.3.mlp.down_proj.weight", "down_proj", 3),
        ("model.layers.3.input_layernorm.weight", "norm", 3),
        ("model.layers.3.mlp.gate.weight", "router", 3),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router", 3),
        ("model.layers.3.block_sparse_moe.gate.weight", "router", 3),
        ("model.layers.3.mlp.shared_expert_gate.weight", "router", 3),
        ("model.layers.3.mlp.experts.7.gate_proj.weight", "experts.gate_proj", 3),
        ("model.layers.3.block_sparse_moe.experts.7.w2.weight", "experts.down_proj", 3),
        ("model.layers.3.mlp.experts.gate_up_proj", "experts.gate_up_proj", 3),
        ("model.layers.3.mlp.experts.down_proj", "experts.down_proj", 3),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "shared_experts.up_proj", 3),
        ("transformer.h.5.attn.c_proj.weight", "o_proj", 5),
        ("transformer.h.5.mlp.c_proj.weight", "down_proj", 5),
        ("h.0.ln_1.weight", "norm", 0),
        ("transformer.wte.weight", "embed", None),
        ("visual.blocks.31.attn.qkv.weight", "qkv_proj", 31),
        ("model.layers.99999999999999999999.x.weight", "other", None),
        ("", "other", None),
    ],
)
def test_names_tell_kind_and_layer(name: str, kind: str, layer: int | None) -> None:
    assert (kind_of(name), layer_of(name)) == (kind, layer)
