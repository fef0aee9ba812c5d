"""Writing a merge: the shards laid out, and everything that stands beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reasonvec.apply import (
    Accompaniment,
    Action,
    ApplyOptions,
    ApplyPlan,
    SaveOptions,
    TensorChange,
    settle,
)
from reasonvec.compat.layout import text_config
from reasonvec.compat.problem import Problem
from reasonvec.json_values import Json, json_bytes, read_json
from reasonvec.merging.chat import chat_template
from reasonvec.merging.method import Numerics
from reasonvec.merging.planning import Plan, plan_merge
from reasonvec.merging.stages import Stages
from reasonvec.merging.tensors import MergedTensor
from reasonvec.merging.tokenizer_files import TOKENIZER_FILES, tokenizer_files
from reasonvec.terms import Operands, elements

if TYPE_CHECKING:
    from reasonvec.merging.merge import Merge

__all__ = ["DEFAULT_SHARD", "MergeOptions", "plan"]

DEFAULT_SHARD = 5_000_000_000
_BYTES = {"F64": 8, "F32": 4, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
          "I16": 2, "U16": 2}  # fmt: skip
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class MergeOptions(SaveOptions, total=False):
    """Keywords of `Merge.save` and `Merge.plan`."""

    shard_size: int
    """Bytes of a shard at most, 5 GB by default; a tensor is never split."""
    numerics: Numerics
    """``"default"``: every weight as it is, dropped elements made up for by 1 / density;
    ``"mergekit"``: L1 norms restored, tiny updates taken for none, and where the working dtype has
    16 bits every step of task arithmetic and the methods that trim rounded to it, as mergekit
    does."""
    seed: int
    """For the methods that drop elements at random (0 by default)."""
    card: bool
    """Whether a README.md is written (default True)."""
    copy_tokenizer: bool
    """Whether tokenizer files are written (default True)."""


def plan(merge: Merge, out: Path, options: MergeOptions) -> ApplyPlan:
    """Decide what writing a merge into a folder will do, from headers alone.

    Raises:
        FormatError, OSError: a config or tokenizer cannot be read.
    """
    operands = Operands()
    stages = Stages(out, operands)
    asked = options.get("out_dtype") or merge.out_dtype
    found = plan_merge(
        merge,
        operands,
        stages,
        out_dtype=asked,
        missing=options.get("missing", "error"),
        numerics=options.get("numerics", "default"),
        seed=options.get("seed", 0),
    )
    problems = list(found.problems)
    template, problem = chat_template(merge.chat_template, found)
    if problem is not None:
        problems.append(problem)
    if stages.staged:
        names = ", ".join(dict.fromkeys(staged.label for staged in stages.staged))
        message = (
            f"{names}: {stages.written} bytes are written beside the output while the run lasts, "
            f"because {found.method} reads what is no tensor of any file"
        )
        problems.append(Problem("stage", message, severity="warning"))
    shards = _shards(found.tensors, options.get("shard_size", DEFAULT_SHARD))
    changes: list[TensorChange] = []
    layout: list[Json] = []
    for file, tensors in shards.items():
        changes += [_change(tensor, file) for tensor in tensors]
        layout.append(
            {"file": file, "metadata": [["format", "pt"]], "tensors": [t.plan for t in tensors]}
        )
    settled = cast(
        "ApplyOptions",
        {key: value for key, value in options.items() if key not in _OWN} | {"out_dtype": asked},
    )
    beside = _Beside(merge, found, options, template, len(shards) > 1)
    settled_stages = stages if stages.staged else None
    return settle(merge, out, settled, operands, problems, changes, layout, beside, settled_stages)


_OWN = frozenset({"shard_size", "numerics", "seed", "card", "copy_tokenizer"})


def _shards(tensors: Sequence[MergedTensor], limit: int) -> dict[str, list[MergedTensor]]:
    parts: list[list[MergedTensor]] = [[]]
    room = limit
    for tensor in tensors:
        size = _size(tensor)
        if size > room and parts[-1]:
            parts.append([])
            room = limit
        parts[-1].append(tensor)
        room -= size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{k:05}-of-{len(parts):05}.safetensors": part for k, part in enumerate(parts, 1)}


def _size(tensor: MergedTensor | TensorChange) -> int:
    return elements(tensor.shape) * _BYTES.get(tensor.dtype, 1)


def _change(tensor: MergedTensor, file: str) -> TensorChange:
    method = tensor.plan.get("method")
    target, terms = tensor.plan["target"], tensor.plan["terms"]
    action: Action
    if terms or target is None:
        action = "update" if target is not None else "merge"
    else:
        changed = tensor.dtype != tensor.stored
        action = "convert" if changed else "check" if tensor.plan["equal"] else "copy"
    return TensorChange(
        tensor.name,
        file,
        tensor.dtype,
        tensor.shape,
        action,
        tensor.coefficients,
        tensor.why,
        method=method if isinstance(method, dict) else None,
        inputs=tensor.inputs,
    )


@dataclass(frozen=True)
class _Beside(Accompaniment):
    merge: Merge
    found: Plan
    options: MergeOptions
    template: str | None
    several: bool

    def files(self, plan: ApplyPlan) -> dict[str, Path | bytes]:
        donor, vocabulary = self.found.donor, self.found.vocabulary
        names = {path.name: path for path in donor.files()}
        for name in ("README.md", "config.json", "mergekit_config.yml"):
            names.pop(name, None)
        written: dict[str, Path | bytes] = {
            name: path for name, path in names.items() if name not in TOKENIZER_FILES
        }
        config = self._config(plan)
        if config is not None:
            written["config.json"] = json_bytes(config)
        if self.options.get("copy_tokenizer", True):
            owner = donor if vocabulary is None else vocabulary.tokenizer.folder
            written |= tokenizer_files(owner, vocabulary)
        if self.template is not None:
            written |= _templated(written, self.template)
        if self.merge.config is not None:
            written["mergekit_config.yml"] = self.merge.config
        return written

    def _config(self, plan: ApplyPlan) -> Json | None:
        if not self.found.donor.layout.config:
            return None
        config = json.loads(json.dumps(self.found.config))
        vocabulary = self.found.vocabulary
        parts = [config] + ([inner] if (inner := text_config(config)) is not config else [])
        sizes: Counter[str] = Counter()
        for tensor in plan.tensors:
            sizes[tensor.dtype] += _size(tensor)
        main = next((_NAMES[d] for d, _ in sizes.most_common() if d in _NAMES), None)
        for part in parts:
            for key in ("torch_dtype", "dtype"):
                if key in part and plan.options.get("out_dtype") is not None and main is not None:
                    part[key] = main
            if vocabulary is None or not vocabulary.moves:
                continue
            if "vocab_size" in part:
                part["vocab_size"] = vocabulary.rows
            theirs = vocabulary.tokenizer.layout.config
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if key in part and key in theirs:
                    part[key] = theirs[key]
        return cast("Json", config)

    def index(self, plan: ApplyPlan) -> tuple[str, bytes] | None:
        if not self.several:
            return None
        index = {
            "metadata": {"total_size": sum(_size(t) for t in plan.tensors)},
            "weight_map": {t.name: t.file for t in sorted(plan.tensors, key=lambda t: t.name)},
        }
        return "model.safetensors.index.json", json_bytes(index)

    def said(self, plan: ApplyPlan) -> Json:
        return {
            "merge": {
                "method": self.merge.called or self.merge.method.name,
                "numerics": self.options.get("numerics", "default"),
                "seed": self.options.get("seed", 0),
                "donor": plan.operands.number(self.found.donor)
                if self.found.donor in plan.operands.folders
                else None,
                "tensors": {t.name: t.method for t in plan.tensors if t.method is not None},
            }
        }

    def card(self, plan: ApplyPlan, tensors: list[TensorChange]) -> str | None:
        if not self.options.get("card", True):
            return None
        from reasonvec.merging.card import merge_card

        return merge_card(self.merge, [source.label for source in self.found.inputs])


def _templated(files: dict[str, Path | bytes], template: str) -> dict[str, Path | bytes]:
    """The tokenizer's config with another chat template, and no second one beside it."""
    files.pop("chat_template.jinja", None)
    said = files.get("tokenizer_config.json")
    if isinstance(said, Path):
        config = read_json(said)
    else:
        config = json.loads(said) if said is not None else {}
    return {"tokenizer_config.json": json_bytes(config | {"chat_template": template})}
