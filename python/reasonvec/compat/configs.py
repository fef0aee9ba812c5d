"""Whether two config.json files describe the same function of the weights.

Two models of equal shapes are different functions when their rotary base, head counts or norm
epsilon differ, and then the difference of their weights means nothing. So a field counts unless it
is known to be harmless: one that nobody has judged yet is at least a warning.

Spellings and defaults are those of transformers 4 and 5: 5 moved every rotary field into
`rope_parameters`, and writes fields that 4 left to the model class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from reasonvec.compat.layout import Layout, text_config
from reasonvec.compat.problem import Problem, Severity, shorten

__all__ = ["compare_configs", "compare_functions", "family_of"]

_Config = Mapping[str, object]

# Training, bookkeeping, generation and storage: none of it is part of the function.
_HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_commit_hash", "_name_or_path", "attention_dropout", "attn_implementation", "attn_pdrop",
    "aux_loss_alpha", "begin_suppress_tokens", "chunk_size_feed_forward", "classifier_dropout",
    "dtype", "embd_pdrop", "ep_size", "finetuning_task", "generation_config",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_factor",
    "initializer_range", "input_jitter_noise", "keys_to_ignore_at_inference", "label2id",
    "max_length", "max_new_tokens", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef",
    "seq_aux", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "temperature",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "use_return_dict",
})  # fmt: skip

# They concern the tokenizer, the length of a prompt or the class that loads the weights.
_NOTABLE: dict[str, str] = {
    "architectures": "the classes that load them differ",
    "bos_token_id": "a generation may start differently",
    "eos_token_id": "a generation may stop differently; the output keeps the target's",
    "max_position_embeddings": "they were made for different lengths",
    "vocab_size": "rows are compared tensor by tensor, tokens by tokenizer.json",
}

_FUNCTION = frozenset({
    "activation_function", "alibi", "attention_bias", "attention_chunk_size",
    "attention_in_multiplier", "attention_multiplier", "attention_out_bias",
    "attention_out_multiplier", "attn_logit_softcapping", "attn_scale",
    "attn_temperature_tuning", "bias", "clip_qkv", "conv_L_cache", "conv_bias",
    "decoder_sparse_step", "dim_model_base", "embedding_multiplier", "final_logit_softcapping",
    "first_k_dense_replace", "floor_scale", "full_attention_interval", "head_dim", "hidden_act",
    "hidden_size", "hidden_size_per_layer_input", "interleave_moe_layer_step",
    "intermediate_size", "intermediate_size_mlp", "is_causal", "is_decoder",
    "is_encoder_decoder", "key_multiplier", "kv_lora_rank", "layer_norm_eps",
    "layer_norm_epsilon", "layer_norm_type", "layer_types", "linear_conv_kernel_dim",
    "linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads",
    "linear_value_head_dim", "lm_head_multiplier", "logit_scale", "logit_softcap",
    "logits_scaling", "max_window_layers", "mlp_bias", "mlp_multipliers", "mlp_only_layers",
    "model_type", "moe_intermediate_size", "moe_layer_freq", "moe_layers", "multi_query",
    "n_group", "n_shared_experts", "new_decoder_architecture", "no_rope_layer_interval",
    "no_rope_layers", "norm_eps", "norm_epsilon", "norm_topk_prob", "num_attention_heads",
    "num_experts", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads",
    "num_kv_shared_layers", "parallel_attn", "q_lora_rank", "qk_layernorm", "qk_nope_head_dim",
    "qk_norm", "qk_rope_head_dim", "qkv_bias", "query_pre_attn_scalar", "residual_multiplier",
    "rms_norm_eps", "rope_interleave", "routed_scaling_factor", "router_bias",
    "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "scale_depth", "scale_emb",
    "scoring_func", "shared_expert_intermediate_size", "sliding_window",
    "sliding_window_pattern", "ssm_multipliers", "swiglu_alpha", "swiglu_limit", "topk_group",
    "topk_method", "use_bias", "use_bidirectional_attention", "use_parallel_residual",
    "use_qk_norm", "v_head_dim",
})  # fmt: skip

# What every family that has the field takes where the config leaves it out.
_DEFAULTS: dict[str, object] = {
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "is_causal": True,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "scale_attn_weights": True,
}

# False, and left out, are not the same here: some families take True.
_TRUE_OF_CLASS = frozenset({"norm_topk_prob", "qkv_bias", "rope_interleave", "use_qk_norm"})

# One field under the names that families and versions give it; the first that is there counts.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_act": ("hidden_activation", "hidden_act", "activation_function"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
}
_ACTIVATIONS = {"swish": "silu"}

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "rotary_emb_base",
         "partial_rotary_factor", "rotary_pct", "original_max_position_embeddings")  # fmt: skip
_ROPE_TYPES = {"su": "longrope", "mrope": "default", "axial": "default"}
_STRETCHED = frozenset({"llama3", "yarn", "longrope", "dynamic"})
# The classes' own rotary base where it is not 10,000 (transformers 5.23, `default_theta`).
_THETA: dict[str, float] = {
    "apertus": 12e6, "bitnet": 5e5, "cohere": 5e5, "ernie4_5": 5e5, "ernie4_5_moe": 5e5,
    "flex_olmo": 5e5, "gemma3": 1e6, "gemma3n": 1e6, "gpt_oss": 15e4, "helium": 1e5, "lfm2": 1e6,
    "lfm2_moe": 1e6, "llama4": 5e5, "longcat_flash": 1e7, "minimax": 1e6, "minimax_m2": 5e6,
    "mixtral": 1e6, "mllama": 5e5, "olmo3": 5e5, "phimoe": 1e6, "qwen2_5_vl": 1e6, "qwen2_vl": 1e6,
    "qwen3_vl": 5e5, "qwen3_vl_moe": 5e5, "smollm3": 2e6, "solar_open": 1e6,
}  # fmt: skip
_LAYERS = 4096  # a config may claim any number of them

_ADVICE = (
    "the two compute different functions, so a difference of their weights means nothing: take "
    "checkpoints of one family, or correct the config.json that is wrong"
)


def family_of(config: _Config) -> str | None:
    """The model_type of the language tower, without the `_text` that towers add to it."""
    said = text_config(config).get("model_type")
    return said.removesuffix("_text") if isinstance(said, str) else None


def compare_configs(a: Layout, b: Layout, *, tower: bool = False) -> list[Problem]:
    """Every difference of the two folders' configs: errors change the function, warnings may.

    Whether embeddings are tied counts where either folder has a head to tie. With `tower`, one is a
    part of the other (the language tower of a vision model), and what only the whole has (its
    model_type, multimodal rotary sections) is a warning.
    """
    problems = compare_functions(a, b, tower=tower)
    if a.tied is not None and b.tied is not None and a.tied != b.tied:
        heads = any(layout.vocabulary()[1] or layout.copies() for layout in (a, b))
        says = f"tie_word_embeddings is {a.tied} in {_file(a)}, but {b.tied} in {_file(b)}"
        if heads:
            says += (
                ": a delta of one shared matrix is no delta of two, nor the other way round; take "
                "checkpoints that are both tied or both untied"
            )
        problems.append(Problem("tied", says, severity="error" if heads else "warning"))
    return problems


def compare_functions(a: Layout, b: Layout, *, tower: bool = False) -> list[Problem]:
    """As `compare_configs`, but for ties, where what is to be done depends on a policy."""
    unknown = [layout for layout in (a, b) if not layout.config]
    if unknown:
        return [
            Problem(
                "config",
                f"{layout.path}: no config.json, so nothing says that it is the same function as "
                f"{(b if layout is a else a).path}; put the model's config.json beside its weights",
                severity="warning",
            )
            for layout in unknown
        ]
    return list(_compare(_flat(a.config), _flat(b.config), _file(a), _file(b), "", tower))


def _file(layout: Layout) -> Path:
    return layout.path / "config.json"


def _flat(config: _Config) -> dict[str, object]:
    inner = text_config(config)
    return dict(config) if inner is config else {**config, **inner}


def _compare(
    a: _Config, b: _Config, file_a: Path, file_b: Path, under: str, tower: bool
) -> Iterator[Problem]:
    function_a, rest_a = _split(a)
    function_b, rest_b = _split(b)
    yield from _compare_rope(a, b, file_a, file_b, under, tower)
    one_sided: list[str] = []
    for field in sorted({*function_a, *function_b, *rest_a, *rest_b}):
        counts = field in function_a or field in function_b
        left, right = (function_a, function_b) if counts else (rest_a, rest_b)
        one, other = (
            _DEFAULTS.get(field) if (value := side.get(field)) is None else value
            for side in (left, right)
        )
        if _equal(one, other):
            continue
        if _empty(one) and _empty(other) and field not in _TRUE_OF_CLASS:
            continue
        name = f"{under}{field}"
        if field.endswith("_config"):
            if isinstance(one, Mapping) and isinstance(other, Mapping):
                yield from _compare(one, other, file_a, file_b, f"{name}.", tower)
            else:
                one_sided.append(name)
        elif one is None or other is None:
            if field not in _NOTABLE:
                one_sided.append(name)
        elif counts:
            mild = tower and field == "model_type"
            yield _differs(name, one, other, file_a, file_b, "warning" if mild else "error")
        else:
            why = _NOTABLE.get(
                field, "reasonvec does not know this field: make sure it is harmless"
            )
            yield Problem(
                "config",
                f"{name} is {shorten(one)} in {file_a}, but {shorten(other)} in {file_b}: {why}",
                severity="warning",
            )
    if one_sided:
        yield Problem(
            "config",
            f"only one of {file_a} and {file_b} sets {shorten(', '.join(one_sided), 400)}: the "
            "other leaves it to its model class; make sure that they mean the same",
            severity="warning",
        )


def _differs(
    field: str, one: object, other: object, file_a: Path, file_b: Path, severity: Severity
) -> Problem:
    return Problem(
        "config",
        f"{field} is {shorten(one)} in {file_a}, but {shorten(other)} in {file_b}: {_ADVICE}",
        severity=severity,
    )


def _split(config: _Config) -> tuple[dict[str, object], dict[str, object]]:
    """The fields that are part of the function, normalised, and all others but the harmless."""
    function: dict[str, object] = {}
    rest: dict[str, object] = {}
    spelt = {spelling for names in _SPELLINGS.values() for spelling in names}
    for field, value in config.items():
        if field in spelt or field in _HARMLESS or field in _ROPE or field == "tie_word_embeddings":
            continue
        if field in {"quantization_config", "compression_config", "use_sliding_window"}:
            continue
        if isinstance(value, Mapping) and value is text_config(config):
            continue
        (function if field in _FUNCTION else rest)[field] = value
    for field, names in _SPELLINGS.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        (rest if field in _NOTABLE else function)[field] = value
    for field in ("eos_token_id", "bos_token_id"):
        value = rest.get(field)
        if isinstance(value, list) and len(value) == 1:
            rest[field] = value[0]
    activation = function["hidden_act"]
    if isinstance(activation, str):
        function["hidden_act"] = _ACTIVATIONS.get(activation, activation)
    model_type = function.get("model_type")
    if isinstance(model_type, str):
        function["model_type"] = model_type.removesuffix("_text")
    heads = function["num_attention_heads"]
    if function.get("num_key_value_heads") is None:
        function["num_key_value_heads"] = heads
    width = function["hidden_size"]
    if function.get("head_dim") is None and type(width) is int and type(heads) is int and heads > 0:
        function["head_dim"] = width // heads
    _windows(config, function)
    return function, rest


def _windows(config: _Config, function: dict[str, object]) -> None:
    """Leave of the sliding window only what is in use: Qwen lists one and switches it off."""
    window = function.get("sliding_window")
    qwen = str(function.get("model_type", "")).startswith("qwen")
    if window == 0 or config.get("use_sliding_window", None if not qwen else False) is False:
        window = function["sliding_window"] = None
    first = function.get("max_window_layers")
    layers = function["num_hidden_layers"]
    kinds = function.get("layer_types")
    if window is None:
        function["max_window_layers"] = None
    elif (
        function.get("model_type") in ("qwen2", "qwen3")
        and type(layers) is int
        and layers <= _LAYERS
    ):
        # Which of their layers slide is a rule of the class for 4, and a list in the file for 5.
        if kinds is None and type(first) is int:
            kinds = [
                "full_attention" if at < first else "sliding_attention" for at in range(layers)
            ]
        function["max_window_layers"] = None
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        kinds = None
    function["layer_types"] = kinds


def _compare_rope(
    a: _Config, b: _Config, file_a: Path, file_b: Path, under: str, tower: bool
) -> Iterator[Problem]:
    one, other = _rope(a), _rope(b)
    if one is None and other is None:
        return
    one, other = one or _tables(a), other or _tables(b)
    if set(one) != set(other):
        # One rotary table for all layers against one for each type of layer.
        one = {kind: one.get(kind, one.get("", {})) for kind in set(one) | set(other) if kind}
        other = {kind: other.get(kind, other.get("", {})) for kind in one}
    for kind in sorted(one):
        left, right = one[kind], other[kind]
        for field in sorted({*left, *right}):
            if _equal(left.get(field), right.get(field)):
                continue
            name = f"{under}rope{f'[{kind}]' if kind else ''}.{field}"
            mild = tower and field.startswith("mrope")
            yield _differs(
                name,
                left.get(field),
                right.get(field),
                file_a,
                file_b,
                "warning" if mild else "error",
            )


def _rope(config: _Config) -> dict[str, dict[str, object]] | None:
    """The rotary embedding of each type of layer ("" for all), in one spelling; None if untold."""
    if not any(config.get(field) is not None for field in _ROPE):
        return None
    return _tables(config)


def _tables(config: _Config) -> dict[str, dict[str, object]]:
    said: _Config = {}
    for field in ("rope_scaling", "rope_parameters"):
        value = config.get(field)
        if isinstance(value, Mapping) and value:
            said = value
            break
    nested = {kind: value for kind, value in said.items() if isinstance(value, Mapping)}
    if nested:
        return {kind: _one_rope(value, config) for kind, value in nested.items()}
    tables = {"": _one_rope(said, config)}
    local = config.get("rope_local_base_freq")
    if local is None and family_of(config) in {"gemma3", "gemma3n"}:
        local = 10_000.0
    if local is not None:
        # Gemma 3 as transformers 4 writes it: the scaling is that of the full-attention layers.
        tables = {
            "full_attention": tables[""],
            "sliding_attention": _one_rope({"rope_theta": local}, {}),
        }
    return tables


def _one_rope(said: _Config, config: _Config) -> dict[str, object]:
    table = {field: value for field, value in said.items() if value is not None}
    kind = table.pop("rope_type", table.pop("type", "default"))
    table.pop("type", None)
    kind = _ROPE_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    theta = _first(table.pop("rope_theta", None), config, ("rope_theta", "rotary_emb_base"))
    if theta is None:
        theta = _THETA.get(family_of(config) or "", 10_000.0)
    partial = _first(
        table.pop("partial_rotary_factor", None), config, ("partial_rotary_factor", "rotary_pct")
    )
    length = table.pop("original_max_position_embeddings", None)
    if kind == "default" or (kind == "linear" and table.get("factor") == 1):
        kind = "default"
        table = {field: value for field, value in table.items() if field.startswith("mrope")}
    elif kind in _STRETCHED:
        lengths = ("original_max_position_embeddings", "max_position_embeddings")
        table["original_max_position_embeddings"] = _first(length, config, lengths)
    if kind == "yarn":
        table = {"beta_fast": 32, "beta_slow": 1, "truncate": True, **table}
    return {
        **table,
        "rope_type": kind,
        "rope_theta": theta,
        "partial_rotary_factor": 1.0 if partial is None else partial,
    }


def _first(said: object, config: _Config, fields: Iterable[str]) -> object:
    if said is not None:
        return said
    return next((config[field] for field in fields if config.get(field) is not None), None)


def _empty(value: object) -> bool:
    return value is None or value is False or value in (0, "", [], {})


def _equal(one: object, other: object) -> bool:
    return one == other or (one != one and other != other)
