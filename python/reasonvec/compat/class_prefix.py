"""Where a model class of transformers keeps what a file names without it.

A checkpoint that was saved from a bare model names `h.0.attn.c_attn.weight`; the class with a head,
which config.json says it is, has that module as `transformer.h.0.attn.c_attn`. transformers adds
the prefix when it loads the file. An adapter names modules, not tensors: PEFT leaves out, with no
more than a warning, what it does not find under its exact name.
"""

from __future__ import annotations

import re

from reasonvec.compat.layout import Layout

__all__ = ["class_prefix", "is_bare"]

# `base_model_prefix` of the classes with a head, by model_type.
_PREFIXES = {
    kind: prefix
    for prefix, kinds in {
        "transformer": (
            *("bloom", "codegen", "ctrl", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo"),
            *("gptj", "mpt", "openai-gpt"),
        ),
        "model": (
            *("cohere", "cohere2", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text"),
            *("glm", "glm4", "gpt_oss", "granite", "granitemoe", "llama", "ministral", "mistral"),
            *("mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi"),
            *("phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
            *("stablelm", "starcoder2"),
        ),
        "backbone": ("falcon_mamba", "mamba", "mamba2"),
        "bert": ("bert",),
        "electra": ("electra",),
        "gpt_neox": ("gpt_neox",),
        "roberta": ("camembert", "roberta", "xlm-roberta"),
    }.items()
    for kind in kinds
}
_HEADED = re.compile(r"For[A-Z]\w*$|(?:LMHead|DoubleHeads)Model$")
_BLOCK = re.compile(r"^(?:(?:encoder|decoder)\.)?(?:layers?|h|blocks?)\.\d+\.")


def is_bare(layout: Layout) -> bool:
    """Whether the file's names begin with the blocks of the model, with no class's name before
    them."""
    return any(_BLOCK.match(name) for name in layout.tensors)


def class_prefix(layout: Layout) -> str | None:
    """What stands before the file's names in the model that config.json names, with its dot; empty
    where nothing does, None where that is not known."""
    if not is_bare(layout):
        return ""
    named = layout.config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    if architecture and not _HEADED.search(architecture):
        return ""
    prefix = _PREFIXES.get(str(layout.config.get("model_type")))
    return f"{prefix}." if prefix is not None and architecture else None
