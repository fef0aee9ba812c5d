"""Configs that make another function of the same shapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DENSE, JSON, QWEN, QWEN_5, QWEN_MOE, errors, layout, only_error

from reasonvec.compat.alignment import align
from reasonvec.compat.configs import compare_configs
from reasonvec.compat.donors import donor_problems

# Trap: same shapes, different function.

CHANGES: list[tuple[str, object, str]] = [
    ("rope_theta", 10000.0, "rope.rope_theta"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope.rope_type"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope.rope_type"),
    ("partial_rotary_factor", 0.5, "rope.partial_rotary_factor"),
    ("num_attention_heads", 24, "num_attention_heads"),
    ("num_key_value_heads", 4, "num_key_value_heads"),
    ("head_dim", 64, "head_dim"),
    ("rms_norm_eps", 1e-5, "rms_norm_eps"),
    ("hidden_act", "gelu", "hidden_act"),
    ("hidden_size", 3072, "hidden_size"),
    ("intermediate_size", 1, "intermediate_size"),
    ("num_hidden_layers", 27, "num_hidden_layers"),
    ("model_type", "qwen3", "model_type"),
]


@pytest.mark.parametrize(("field", "value", "named"), CHANGES)
def test_what_changes_the_function_is_an_error(field: str, value: object, named: str) -> None:
    for one, other in ((QWEN, {**QWEN, field: value}), ({**QWEN, field: value}, QWEN_5)):
        a, b = layout("p", DENSE, config=one), layout("n", DENSE, config=other)
        told = [problem.message for problem in errors(compare_configs(a, b))]
        found = [message for message in told if message.startswith(f"{named} is ")]
        assert len(found) == 1, told
        for words in ("p/config.json", "n/config.json", "different functions"):
            assert words in found[0]


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [
        ("num_experts_per_tok", 2, 4),
        ("norm_topk_prob", True, False),
        ("num_experts", 3, 4),
        ("moe_intermediate_size", 8, 16),
        ("routed_scaling_factor", 1.0, 2.5),
        ("attn_logit_softcapping", 50.0, 30.0),
        ("final_logit_softcapping", 30.0, 20.0),
        ("query_pre_attn_scalar", 256, 224),
        ("embedding_multiplier", None, 12.0),
        ("logits_scaling", 8.0, None),
        ("attention_bias", True, False),
        ("layer_norm_eps", 1e-5, 1e-6),
        ("clip_qkv", 8.0, 6.0),
    ],
)
def test_fields_of_other_families_count_too(field: str, one: object, other: object) -> None:
    a = layout("p", DENSE, config={**QWEN_MOE, field: one})
    b = layout("n", DENSE, config={**QWEN_MOE, field: other})
    assert only_error(compare_configs(a, b), "config").startswith(f"{field} is ")
    assert only_error(align(a, b).problems, "config").startswith(f"{field} is ")
    assert only_error(donor_problems(a, b), "config").startswith(f"{field} is ")


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "4.57.0"},
        {"_name_or_path": "/somewhere/else"},
        {"torch_dtype": None, "dtype": "float32"},
        {"use_cache": False},
        {"attention_dropout": 0.1, "initializer_range": 0.01},
        {"hidden_act": "swish"},
        {"num_key_value_heads": 2, "head_dim": 128},
        {"eos_token_id": [151645]},
        {"rope_scaling": None},
        {"rope_theta": 1000000},
        {"sliding_window": 4096},  # not in use
        {"max_window_layers": 28},
        {"pad_token_id": 151643},
        {"model_type": "qwen2_text"},
    ],
)
def test_what_is_harmless_is_not_mentioned(changes: dict[str, object]) -> None:
    a = layout("p", DENSE)
    for base in (QWEN, QWEN_5):
        b = layout("n", DENSE, config={**base, **changes})
        if base is QWEN_5 and "rope_theta" in changes:
            continue
        assert compare_configs(a, b) == []
        assert compare_configs(b, a) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", [151645, 151643]),
        ("bos_token_id", 1),
        ("max_position_embeddings", 131072),
        ("vocab_size", 152064),
        ("architectures", ["Qwen2ForSequenceClassification"]),
        ("a_field_of_next_year", 3),
    ],
)
def test_what_may_matter_is_a_warning(field: str, value: object) -> None:
    a, b = layout("p", DENSE), layout("n", DENSE, config={**QWEN, field: value})
    for problems in (compare_configs(a, b), compare_configs(b, a)):
        assert [problem.severity for problem in problems] == ["warning"]
        assert field in problems[0].message


def test_a_field_left_to_the_class_is_a_warning_that_names_it() -> None:
    silent = {key: value for key, value in QWEN.items() if key != "rms_norm_eps"}
    problems = compare_configs(layout("p", DENSE), layout("n", DENSE, config=silent))
    assert [problem.severity for problem in problems] == ["warning"]
    assert "rms_norm_eps" in problems[0].message
    assert "model class" in problems[0].message


def test_rotary_base_left_to_the_class_is_known() -> None:
    llama: dict[str, object] = {"model_type": "llama"}
    a, b = layout("p", DENSE, config=llama), layout("n", DENSE, config={**llama, "rope_theta": 1e4})
    assert compare_configs(a, b) == []
    c = layout("n", DENSE, config={**llama, "rope_theta": 1e6})
    assert only_error(compare_configs(a, c), "config").startswith("rope.rope_theta is 10000.0")
    mixtral: dict[str, object] = {"model_type": "mixtral"}
    told = layout("n", DENSE, config={**mixtral, "rope_theta": 1e6})
    assert compare_configs(layout("p", DENSE, config=mixtral), told) == []


LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_both_spellings_of_rotary_scaling_are_one() -> None:
    four = layout("p", DENSE, config={**QWEN, "rope_theta": 5e5, "rope_scaling": LLAMA_3})
    rope = {**LLAMA_3, "rope_theta": 5e5}
    five = layout("n", DENSE, config={**QWEN_5, "rope_parameters": rope})
    assert compare_configs(four, five) == []
    other = layout("n", DENSE, config={**QWEN_5, "rope_parameters": {**rope, "factor": 32.0}})
    assert only_error(compare_configs(four, other), "config").startswith("rope.factor is 8.0")


def test_rotary_tables_by_layer_type() -> None:
    base: dict[str, object] = {"model_type": "gemma3_text", "sliding_window": 512}
    scaling = {"rope_type": "linear", "factor": 8.0}
    four = {**base, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling}
    tables = {
        "full_attention": {**scaling, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    five = {**base, "rope_parameters": tables}
    a, b = layout("p", DENSE, config=four), layout("n", DENSE, config=five)
    assert compare_configs(a, b) == []
    tables["sliding_attention"] = {"rope_type": "default", "rope_theta": 2e4}
    message = only_error(compare_configs(a, b), "config")
    assert message.startswith("rope[sliding_attention].rope_theta is 10000.0")


def test_a_sliding_window_in_use_counts() -> None:
    used = {**QWEN, "use_sliding_window": True}
    a, b = layout("p", DENSE, config=used), layout("n", DENSE)
    told = [problem.message for problem in compare_configs(a, b)]
    assert any("sliding_window" in message for message in told)
    c = layout("n", DENSE, config={**used, "sliding_window": 4096})
    assert only_error(compare_configs(a, c), "config").startswith("sliding_window is 32768")
    d = layout("n", DENSE, config={**used, "max_window_layers": 14})
    assert only_error(compare_configs(a, d), "config").startswith("layer_types is ")
    kinds = ["full_attention"] * 21 + ["sliding_attention"] * 7
    e = layout("n", DENSE, config={**used, "layer_types": kinds})
    assert compare_configs(a, e) == []


def test_nested_text_configs_are_compared() -> None:
    vision = {"hidden_size": 8, "patch_size": 14}
    a = layout(
        "p", DENSE, config={"model_type": "vl", "text_config": QWEN, "vision_config": vision}
    )
    b = layout(
        "n",
        DENSE,
        config={
            "model_type": "vl",
            "text_config": {**QWEN, "rope_theta": 1e4},
            "vision_config": {**vision, "hidden_size": 16},
        },
    )
    told = sorted(problem.message.split(" is ")[0] for problem in errors(compare_configs(a, b)))
    assert told == ["rope.rope_theta", "vision_config.hidden_size"]
    assert compare_configs(a, a) == []


def test_a_folder_without_config_is_a_warning() -> None:
    problems = compare_configs(layout("p", DENSE), layout("n", DENSE, config={}))
    assert [problem.severity for problem in problems] == ["warning"]
    assert "n: no config.json" in problems[0].message


FIELDS = st.sampled_from(
    [*QWEN, "rope_scaling", "rope_parameters", "text_config", "layer_types", "head_dim", "x_config"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(FIELDS, JSON), st.dictionaries(FIELDS, JSON))
def test_any_config_can_be_compared(one: dict[str, object], other: dict[str, object]) -> None:
    """A stranger's config.json has any type in any field: that must be a report, not a crash."""
    a, b = layout("p", DENSE, config=one), layout("n", DENSE, config=other)
    kinds = {problem.kind for problem in compare_configs(a, b)}
    assert kinds <= {"config", "tied"}
    assert compare_configs(a, a) == [] or not one
    assert isinstance(a.quantised, str | None)
