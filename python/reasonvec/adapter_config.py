"""adapter_config.json of PEFT: what in it decides over the factors, and what nobody reads here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache

from reasonvec.adapter import AdapterFolder
from reasonvec.compat.problem import Problem, Severity, shorten

__all__ = ["MERGE", "UNREADABLE", "config_problems", "scale_of"]

MERGE = (
    "merge it into its base with peft's merge_and_unload, save that as a checkpoint, and take the "
    "difference from the base"
)
_PLAIN = "write the modules' names instead"
_LONGEST_PATTERN = 500
_MOST_GROUPS = 2
_MOST_CHOICES = 20
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Keys of adapter_config.json under which the weights are no longer base + scale * B @ A.
UNREADABLE: dict[str, str] = {
    "use_dora": (
        f"DoRA rescales every row by a trained magnitude, which is no sum of factors: {MERGE}"
    ),
    "use_qalora": f"QALoRA's factors act on pooled inputs: {MERGE}",
    "use_bdlora": f"the factors are block-diagonal: {MERGE}",
    "alora_invocation_tokens": (
        "the adapter acts only after certain tokens, so no change of the weights computes the same"
    ),
    "arrow_config": "the adapter is chosen token by token: name one of the routed adapters instead",
    "kasa_config": f"KaSA truncates the base and has singular values of its own: {MERGE}",
    "monteclora_config": f"the factors are drawn anew in every pass: {MERGE}",
    "velora_config": f"the factors are compressed: {MERGE}",
    "layer_replication": f"layers of the base are repeated: {MERGE}",
    "target_parameters": (
        f"factors of parameters inside a module (packed experts) are not read: {MERGE}"
    ),
    "trainable_token_indices": f"single rows of the embeddings were trained: {MERGE}",
}
# Keys that leave the meaning of the factors alone, or that are read above.
_KNOWN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)


def config_problems(adapter: AdapterFolder) -> list[Problem]:
    """What of the config makes the factors mean something else than ``scale * B @ A``."""
    config = adapter.config
    problems = []
    kind = config.get("peft_type")
    if kind != "LORA":
        message = f"is an adapter of the kind {shorten(kind)}; only LORA is read: {MERGE}"
        problems.append(adapter.problem(message))
    for key, why in UNREADABLE.items():
        if config.get(key):
            problems.append(adapter.problem(f"has {key}: {why}"))
    for key, value in config.items():
        if key in _KNOWN or key in UNREADABLE or not value:
            continue
        message = (
            f"has {shorten(key)}: {shorten(value)}, which this version of reasonvec does not "
            f"know and which may change what the factors mean: {MERGE}"
        )
        severity: Severity = "error" if key.startswith("use_") else "warning"
        problems.append(Problem("adapter", f"{adapter.path}: {message}", None, severity))
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        message = (
            f"was initialised with {shorten(start)}, which moves the base's own weights, so it "
            "does not fit the base as it is: save it with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"
        )
        problems.append(adapter.problem(message))
    return problems


def scale_of(
    adapter: AdapterFolder, module: str, rank: int, problems: list[Problem]
) -> float | None:
    """What a module's factors of this rank are multiplied by, or None with the reason why nobody
    knows among the problems."""
    config = adapter.config
    said = _pattern(adapter, "rank_pattern", module, config.get("r"), problems)
    alpha = _pattern(adapter, "alpha_pattern", module, config.get("lora_alpha"), problems)
    if alpha is None or said is None:
        return None
    if said != rank:
        message = (
            f"adapter_config.json says rank {said:g} (r and rank_pattern), the factors have "
            f"{rank}; the file was changed after it was written: restore it"
        )
        problems.append(adapter.problem(message, module))
        return None
    root = bool(config.get("use_rslora"))
    return alpha / (math.sqrt(rank) if root else rank)


def _pattern(
    adapter: AdapterFolder, key: str, module: str, default: object, problems: list[Problem]
) -> float | None:
    """As PEFT's get_pattern_key: the first whose regular expression fits the module's end."""
    patterns = adapter.config.get(key) or {}
    value: object = default
    if not isinstance(patterns, Mapping):
        problems.append(adapter.problem(f"{key} is no object; the file is damaged"))
        return None
    for pattern, found in patterns.items():
        if _may_never_end(pattern):
            message = f"{key} has the expression {shorten(pattern)}, which may never end: {_PLAIN}"
            problems.append(adapter.problem(message))
            return None
        try:
            fits = _compiled(pattern).match(module)
        except (re.error, OverflowError) as error:
            message = f"{key} has the expression {shorten(pattern)}: {error}; {_PLAIN}"
            problems.append(adapter.problem(message))
            return None
        if fits:
            value = found
            break
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(float(str(value))):
        what = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}[key]
        message = f"expected {what} to be a number, found {shorten(value)}; the file is damaged"
        problems.append(adapter.problem(message, module))
        return None
    return float(str(value))


@lru_cache(maxsize=1 << 14)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _may_never_end(pattern: str) -> bool:
    """Whether a stranger's expression could take for ever, on names of the length that is read:
    more than one repeat, a repeated group, or choices that multiply."""
    bare = re.sub(r"\\.", "", pattern, flags=re.DOTALL).replace("(?:", "(")
    return (
        len(pattern) > _LONGEST_PATTERN
        or len(re.findall(r"[*+?{]", bare)) > 1
        or re.search(r"\)[*+{]", bare) is not None
        or bare.count("(") > _MOST_GROUPS
        or ("(" in bare and bare.count("|") > _MOST_CHOICES)
    )
