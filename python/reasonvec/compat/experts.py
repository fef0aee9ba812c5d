"""How mixtures of experts are stored, by an explicit table.

transformers 4 stores a matrix for each expert and projection; 5 holds all experts of a layer in two
tensors (and writes the old storage unless asked not to, so that folders of both kinds are about):

    {split}.{e}.{gate}.weight (I, H)
    {split}.{e}.{up}.weight   (I, H)  <->  {packed}.gate_up_proj (E, 2I, H)
    {split}.{e}.{down}.weight (H, I)  <->  {packed}.down_proj    (E, H, I)

Each expert's gate is the first half of its 2I rows. The table says which families do it so
(`conversion_mapping.py` and the modeling files of transformers 5.23). Others store the transpose,
or gate and up interleaved, in tensors of the same names, and shapes cannot tell: they are refused.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = [
    "ADAPTABLE",
    "LAYOUTS",
    "PACKED",
    "REFUSED",
    "ExpertLayout",
    "layout_of",
    "packed_part",
    "split_part",
]

_PACKED = re.compile(r"^(?P<stem>(?:.*\.)?experts)\.(?P<part>gate_up_proj|down_proj)$")
_SPLIT = re.compile(r"^(?P<stem>(?:.*\.)?experts)\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.weight$")


class ExpertLayout(NamedTuple):
    """The two storages of some families. ``renamed``: modules beside the experts that have one name
    in the split storage and another in the packed one."""

    families: frozenset[str]
    split: str
    packed: str
    gate: str
    up: str
    down: str
    renamed: tuple[tuple[str, str], ...] = ()

    def split_stem(self, packed_stem: str) -> str | None:
        return _replaced(packed_stem, self.packed, self.split)

    def packed_stem(self, split_stem: str) -> str | None:
        return _replaced(split_stem, self.split, self.packed)

    def other_names(self, name: str) -> list[str]:
        """What a tensor beside the experts is called in the other storage."""
        found: list[str] = []
        for split, packed in self.renamed:
            for here, there in ((split, packed), (packed, split)):
                other = _replaced(name, here, there)
                if other is not None:
                    found.append(other)
        return found


LAYOUTS: tuple[ExpertLayout, ...] = (
    ExpertLayout(
        frozenset({
            "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
            "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
            "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
            "solar_open",
        }),
        split="mlp.experts",
        packed="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    ),
    ExpertLayout(
        frozenset({"ernie4_5_moe"}),
        split="mlp.experts",
        packed="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        renamed=(
            (
                "mlp.moe_statics.e_score_correction_bias",
                "mlp.gate.moe_statics.e_score_correction_bias",
            ),
        ),
    ),
    ExpertLayout(
        frozenset({"minimax", "mixtral"}),
        split="block_sparse_moe.experts",
        packed="mlp.experts",
        gate="w1",
        up="w3",
        down="w2",
        renamed=(("block_sparse_moe.gate.weight", "mlp.gate.weight"),),
    ),
    ExpertLayout(
        frozenset({"minimax_m2"}),
        split="block_sparse_moe.experts",
        packed="mlp.experts",
        gate="w1",
        up="w3",
        down="w2",
        renamed=(
            ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
            ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
        ),
    ),
    ExpertLayout(
        frozenset({"phimoe"}),
        split="block_sparse_moe.experts",
        packed="mlp.experts",
        gate="w1",
        up="w3",
        down="w2",
        renamed=(("block_sparse_moe.gate.weight", "mlp.router.weight"),),
    ),
    ExpertLayout(
        frozenset({"jamba"}),
        split="feed_forward.experts",
        packed="feed_forward.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    ),
    ExpertLayout(
        frozenset({"lfm2_moe"}),
        split="feed_forward.experts",
        packed="feed_forward.experts",
        gate="w1",
        up="w3",
        down="w2",
    ),
)  # fmt: skip

REFUSED: dict[str, str] = {
    "aria": "packs its experts transposed, (E, H, 2I) and (E, I, H)",
    "dbrx": "stores all experts of a layer as the rows of one matrix",
    "gpt_oss": "packs its experts transposed, (E, H, 2I), with gate and up interleaved",
    "granitemoe": "packs its experts under names of its own, input_linear and output_linear",
    "granitemoehybrid": "packs its experts under names of its own, input_linear and output_linear",
    "granitemoeshared": "packs its experts under names of its own, input_linear and output_linear",
    "jetmoe": "packs its experts under names of its own, input_linear and output_linear",
    "llama4": "packs its experts transposed, (E, H, 2I) and (E, I, H)",
    "openai_privacy_filter": "packs its experts transposed, (E, H, 2I)",
    "qwen3_vl_moe": "stores its packed experts transposed, (E, H, 2I) and (E, I, H)",
}


# Families of the table whose experts PEFT (0.21) packs as it loads an adapter that names each of
# them. It stacks their factors, and takes for an expert whatever has the name of one's projection.
ADAPTABLE = frozenset({
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
    "solar_open",
})  # fmt: skip


# Families whose packed tensors are the parameters of the model as it is loaded, and whether PEFT
# takes them for [experts, in, out]: by `is_transposed` of the module that has them.
PACKED: dict[str, bool] = {
    **{family: False for layout in LAYOUTS for family in layout.families},
    "gpt_oss": True,
}


def layout_of(family: str | None) -> ExpertLayout | None:
    """The table's row for a model_type; None if it has none."""
    return next((layout for layout in LAYOUTS if family in layout.families), None)


def packed_part(name: str) -> tuple[str, str] | None:
    """Stem (up to `experts`) and part (`gate_up_proj` or `down_proj`) of a packed tensor's name."""
    found = _PACKED.match(name)
    return (found["stem"], found["part"]) if found else None


def split_part(name: str) -> tuple[str, int, str] | None:
    """Stem, expert and projection of the name of one expert's matrix."""
    found = _SPLIT.match(name)
    return (found["stem"], int(found["expert"]), found["part"]) if found else None


def _replaced(name: str, old: str, new: str) -> str | None:
    if name == old or name.endswith(f".{old}"):
        return name[: len(name) - len(old)] + new
    return None
