"""A vector as a LoRA adapter of PEFT, and an account of what an adapter cannot carry.

Each matrix of the vector becomes ``B @ A`` of its leading triplets, ``B = u sqrt(s)`` and
``A = sqrt(s) v``, so that both factors have one size; alpha is the rank everywhere, so the scale
is 1. The experts of a layer that are one tensor have a pair of factors each, which PEFT takes one
below the other (`target_parameters`). Norm weights, embeddings and the head, and biases of modules
without factors have no place in a LoRA: the report says what was left out and how much of the norm
that was. ``modules_to_save`` would carry them, but it overwrites a model's values where a vector
adds to them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reasonvec import _reasonvec as core
from reasonvec.adapter import ADAPTER_CONFIG, ADAPTER_MODEL
from reasonvec.algebra import Adapter, Difference, Vector
from reasonvec.compat.class_prefix import class_prefix
from reasonvec.compat.experts import ADAPTABLE, PACKED, layout_of, packed_part
from reasonvec.compat.layout import FLOATS, Layout
from reasonvec.destination import Destination, write_json
from reasonvec.errors import MismatchError, NonFiniteError
from reasonvec.factor_file import FactorFile, single
from reasonvec.json_values import Json
from reasonvec.lowrank import FactorsPlan, has_factors, is_stack, plan_factors, summed
from reasonvec.measure import Quantities, measure
from reasonvec.names import is_vocabulary, kind_of
from reasonvec.run import RunOptions, steps
from reasonvec.terms import Operands, Summed, elements, leaf_layout
from reasonvec.triplets import Rank, Triplets, check_rank, leading

__all__ = ["LeftOut", "LoraOptions", "LoraReport", "plan_lora", "to_lora"]

_PREFIX = "base_model.model."
# Their linear layers keep matrices as [in, out].
_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_TABLE = re.compile(r"(?:embed\w*|wpe|wte|relative_attention_bias)\.weight$")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class LoraOptions(RunOptions, total=False):
    """Keywords of `Vector.to_lora`."""

    rank: Rank
    """How many triplets of each matrix: a number, "auto" (default) for those above the noise floor,
    or a share between 0 and 1 of the sum of squares."""
    base: str | None
    """What the adapter says its base is (base_model_name_or_path): a folder or a hub repository; by
    default the negative donor."""
    sync: bool
    """Whether files are flushed to the disk before they get their final names (default True)."""
    overwrite: bool
    """Replace an earlier output of reasonvec in the folder. It stands until the new one is whole:
    there must be room for both."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that moved and that the adapter does not have."""

    name: str
    why: str
    norm: float


@dataclass(frozen=True)
class LoraReport:
    """A finished adapter: the rank of every module, and what it does not carry. ``norm`` is the
    vector's, ``truncated`` the norm of what the ranks cut off, ``left_out`` the tensors that have
    no place in it."""

    path: Path
    recipe: str
    ranks: dict[str, int]
    biases: list[str]
    norm: float
    truncated: float
    left_out: list[LeftOut]
    bytes: int
    warnings: list[str]

    @property
    def left_out_norm(self) -> float:
        """The norm of the tensors that are not there."""
        return math.sqrt(sum(part.norm**2 for part in self.left_out))

    @property
    def left_out_share(self) -> float:
        """That norm as a share of the vector's."""
        return self.left_out_norm / self.norm if self.norm else 0.0

    @property
    def truncated_share(self) -> float:
        """The truncated norm as a share of the vector's."""
        return self.truncated / self.norm if self.norm else 0.0

    def by_kind(self) -> dict[tuple[str, str], list[LeftOut]]:
        """What was left out by kind of module and reason."""
        kinds: dict[tuple[str, str], list[LeftOut]] = {}
        for part in self.left_out:
            kinds.setdefault((kind_of(part.name), part.why), []).append(part)
        return kinds

    def as_json(self) -> Json:
        return {
            "path": str(self.path),
            "recipe": self.recipe,
            "norm": self.norm,
            "truncated": self.truncated,
            "truncated_share": self.truncated_share,
            "left_out_norm": self.left_out_norm,
            "left_out_share": self.left_out_share,
            "left_out": [{"name": p.name, "why": p.why, "norm": p.norm} for p in self.left_out],
            "ranks": self.ranks,
            "biases": self.biases,
            "bytes": self.bytes,
            "warnings": self.warnings,
        }


def to_lora(vector: Vector, out: Path, options: LoraOptions) -> LoraReport:
    """Write a vector as an adapter; see `Vector.to_lora`."""
    rank = options.get("rank", "auto")
    check_rank(rank)
    tensors, operands = summed(vector)
    destination = Destination(out, operands.folders, overwrite=options.get("overwrite", False))
    with destination.renewed(ADAPTER_CONFIG) as folder:
        return _write(vector, tensors, operands, folder, out, options)


def _write(
    vector: Vector,
    tensors: Mapping[str, Summed],
    operands: Operands,
    folder: Path,
    out: Path,
    options: LoraOptions,
) -> LoraReport:
    """Write it into a folder that will be ``out`` in the end."""
    rank = options.get("rank", "auto")
    layout = leaf_layout(vector.terms[0].leaf)
    flipped = layout.config.get("model_type") in _CONV1D
    modules = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if _why_not(tensor) is None
    }
    stacks = {name: tensor for name, tensor in tensors.items() if _is_packed(tensor, layout)}
    # Norms are one reading, triplets are several.
    sizes = [elements(tensor.shape) for tensor in tensors.values()]
    taken = [*modules.values(), *stacks.values()]
    parts = steps(options, [sum(sizes), *(4 * elements(tensor.shape) for tensor in taken)])
    norms = _norms(tensors, operands, next(parts))
    experts, lost = _experts(modules, layout, norms)
    stacks_moved = {name for name in stacks if norms.get(name, 0.0) > 0}
    if experts or stacks_moved:
        biases_of = (name for name in tensors if name.endswith(".bias"))
        lost |= dict.fromkeys(biases_of, "PEFT has no biases beside experts")
    ranks: dict[str, int] = {}
    truncated = 0.0
    bare = class_prefix(layout)
    place = _PREFIX + (bare or "")
    names = [f"{place}{module}.lora_{part}" for module in modules for part in _PARTS]
    names += [f"{place}{_wrapper(n, stacks)}.lora_{part}" for n in stacks for part in _PARTS]
    spool = folder / _EXPERTS
    try:
        with (
            FactorFile(folder / ADAPTER_MODEL, names, _METADATA) as file,
            FactorFile(spool, names) as stacked,
        ):
            for (module, tensor), part in zip(modules.items(), parts, strict=False):
                if module in lost or norms.get(tensor.name, 0.0) == 0.0:
                    continue
                found = leading(tensor.name, tensor.shape, tensor.terms, operands, rank, part)
                truncated += max(found.squares - float(np.sum(found.s * found.s)), 0.0)
                if found.rank == 0:
                    continue
                ranks[module] = found.rank
                b, a = _balanced(tensor.name, found)
                if flipped:
                    b, a = a.T, b.T
                into = stacked if module in experts else file
                into.add(f"{place}{module}.lora_A.weight", a, "F32")
                into.add(f"{place}{module}.lora_B.weight", b, "F32")
            stacked_ranks: dict[str, int] = {}
            for (name, tensor), part in zip(stacks.items(), parts, strict=True):
                if name not in stacks_moved:
                    continue
                runs = steps(part, [1] * tensor.shape[0])
                each = [
                    leading(name, tensor.shape, tensor.terms, operands, rank, run, number)
                    for number, run in enumerate(runs)
                ]
                for one in each:
                    truncated += max(one.squares - float(np.sum(one.s * one.s)), 0.0)
                a, b = _stacked(name, each, transposed=PACKED[_family(layout)])
                wrapper = _wrapper(name, stacks_moved)
                file.add(f"{place}{wrapper}.lora_A.weight", a, "F32")
                file.add(f"{place}{wrapper}.lora_B.weight", b, "F32")
                stacked_ranks[name] = a.shape[0] // len(each)
                if any(one.rank for one in each):
                    ranks[name] = stacked_ranks[name]
            if not ranks:
                raise MismatchError(_nothing(vector, tensors, norms, lost))
            stacked.finish(sync=False)
            shapes = {module: modules[module].shape for module in modules if module in experts}
            common = _write_experts(file, spool, place, shapes, ranks)
            ranks |= dict.fromkeys(shapes, common) if common else {}
            # PEFT has no biases in an adapter that has experts.
            ranks |= stacked_ranks
            alone = common == 0 and not stacked_ranks
            biases = _write_biases(file, place, ranks, tensors, norms, operands) if alone else []
            file.finish(sync=options.get("sync", True))
    finally:
        spool.unlink(missing_ok=True)
    carried = {f"{module}.weight" for module in modules if module not in lost} | set(biases)
    carried |= stacks_moved
    left_out = [
        LeftOut(
            name,
            lost.get(name.removesuffix(".weight")) or _why_not(tensors[name]) or "",
            norm,
        )
        for name, norm in norms.items()
        if norm > 0 and name not in carried
    ]
    report = LoraReport(
        out,
        str(vector),
        ranks,
        biases,
        math.sqrt(sum(norm**2 for norm in norms.values())),
        math.sqrt(truncated),
        left_out,
        (folder / ADAPTER_MODEL).stat().st_size,
        [_unplaced(layout)] if bare is None else [],
    )
    sync = options.get("sync", True)
    base = options.get("base") or _base_of(vector)
    config = _config(
        report, bare or "", modules, experts, stacks_moved, layout.config, base, flipped=flipped
    )
    core.write_whole(folder / "README.md", _card(report, base).encode(), sync)
    # The config last: a folder without it is no adapter.
    write_json(folder / ADAPTER_CONFIG, config, sync=sync)
    return report


_EXPERTS = "experts.safetensors"
_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
_METADATA = {"format": "pt", "reasonvec": core.version()}
_PARTS = ("A.weight", "B.weight", "B.bias")


def _family(layout: Layout) -> str:
    return str(layout.config.get("model_type"))


def _is_packed(tensor: Summed, layout: Layout) -> bool:
    """Whether a tensor is all experts of a layer, in a way that PEFT can put factors on."""
    known = packed_part(tensor.name) is not None and _family(layout) in PACKED
    return known and is_stack(tensor.name, tensor.shape, tensor.dtype)


def _wrapper(name: str, stacks: Collection[str]) -> str:
    """What PEFT names the factors of a packed tensor by. Every parameter of a module that has some
    is wrapped, the later around the earlier, and all classes name ``gate_up_proj`` before
    ``down_proj``."""
    stem, _, part = name.rpartition(".")
    return f"{stem}.base_layer" if part != "down_proj" and f"{stem}.down_proj" in stacks else stem


def _balanced(name: str, found: Triplets) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """B and A of one size.

    Raises:
        NonFiniteError: float32 does not hold them.
    """
    root = np.sqrt(found.s)
    with np.errstate(over="ignore"):
        b = (found.u * root).astype(np.float32)
        a = (root[:, None] * found.v).astype(np.float32)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        message = f"{name}: its factors are beyond float32, which adapters have"
        raise NonFiniteError(message)
    return b, a


def _stacked(
    name: str, each: list[Triplets], *, transposed: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A [experts * rank, in] and B [out, rank * experts] of a stack, at the highest rank of its
    experts (1, if they have none), with zeros after the factors of those of a lower one: in A rank
    after rank within an expert, in B expert after expert within a rank."""
    rank = max(1, *(one.rank for one in each))
    pairs = [_balanced(name, one) for one in each]
    if transposed:
        pairs = [(a.T, b.T) for b, a in pairs]
    stacked_a = np.zeros((len(each), rank, pairs[0][1].shape[1]), np.float32)
    stacked_b = np.zeros((pairs[0][0].shape[0], rank, len(each)), np.float32)
    for number, (b, a) in enumerate(pairs):
        stacked_a[number, : a.shape[0]] = a
        stacked_b[:, : b.shape[1], number] = b
    return stacked_a.reshape(-1, stacked_a.shape[2]), stacked_b.reshape(stacked_b.shape[0], -1)


def _experts(
    modules: Mapping[str, Summed], layout: Layout, norms: Mapping[str, float]
) -> tuple[set[str], dict[str, str]]:
    """The experts whose factors PEFT stacks, and the modules that it then has no place for, with
    the reason.

    A class that packs its experts has no modules for them. PEFT knows what to make of an adapter
    that names them for some families, and only if none is missing and all have one rank.
    """
    family = _family(layout)
    known = layout_of(family)
    if known is None:
        return set(), {}
    experts = {module for module in modules if _EXPERT.search(module)}
    if family not in ADAPTABLE:
        return set(), dict.fromkeys(experts, "an expert, packed where PEFT does not see it")
    taken = {known.gate, known.up, known.down}
    others = {m for m in modules if m not in experts and m.rpartition(".")[2] in taken}
    lost = dict.fromkeys(others, "PEFT takes its name for an expert's")
    if not any(norms.get(f"{module}.weight", 0.0) > 0 for module in experts):
        return set(), lost
    return experts, lost


def _write_experts(
    file: FactorFile,
    spool: Path,
    place: str,
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
) -> int:
    """The factors of all experts at the highest of their ranks, with zeros after those of a lower
    one; that rank."""
    rank = max((ranks[module] for module in shapes if module in ranks), default=0)
    if rank == 0:
        return 0
    found = core.Checkpoint(spool)
    for module, (rows, columns) in shapes.items():
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            name = f"{place}{module}.lora_{part}.weight"
            values = np.zeros(shape, np.float32)
            if module in ranks:
                kept = single(found.tensor(name))
                values[: kept.shape[0], : kept.shape[1]] = kept
            file.add(name, values, "F32")
    return rank


def _nothing(
    vector: Vector,
    tensors: Mapping[str, Summed],
    norms: Mapping[str, float],
    lost: Mapping[str, str],
) -> str:
    moved = [name for name, norm in norms.items() if norm > 0]
    why = Counter(lost.get(n.removesuffix(".weight")) or _why_not(tensors[n]) for n in moved)
    reasons = ", ".join(f"{n} times {reason}" for reason, n in why.items() if reason is not None)
    return f"{vector}: no matrix of it has a rank above zero; there is nothing to export" + (
        f" (what moved and has no place in a LoRA: {reasons})" if reasons else ""
    )


def plan_lora(vector: Vector, options: LoraOptions) -> FactorsPlan:
    """What `to_lora` will do, from headers alone; see `Vector.plan_lora`."""
    rank = options.get("rank", "auto")
    layout = leaf_layout(vector.terms[0].leaf) if vector.terms else None

    def taken(tensor: Summed) -> bool:
        packed = layout is not None and _is_packed(tensor, layout)
        return packed or _why_not(tensor) is None

    return plan_factors(vector, options, taken, rank)


def _norms(
    tensors: Mapping[str, Summed], operands: Operands, options: RunOptions
) -> dict[str, float]:
    floats = [t for t in tensors.values() if t.dtype in FLOATS and t.terms]
    rows = measure(
        [Quantities(t.name, elements(t.shape), [t.terms]) for t in floats], operands, options
    )
    return {row.name: row.norm(0) for row in rows}


def _write_biases(
    file: FactorFile,
    place: str,
    ranks: Mapping[str, int],
    tensors: Mapping[str, Summed],
    norms: Mapping[str, float],
    operands: Operands,
) -> list[str]:
    """The biases of modules with factors, where any of them moved: PEFT then wants one for every
    such module, zero where the model has none."""
    moved = [f"{m}.bias" for m in ranks if norms.get(f"{m}.bias", 0.0) > 0]
    if not moved:
        return []
    for module in ranks:
        tensor = tensors.get(f"{module}.bias")
        if tensor is None or not tensor.terms:
            shape = tensors[f"{module}.weight"].shape
            values = np.zeros(shape[0], np.float32)
        else:
            found = core.values(
                json.dumps(tensor.terms), tensor.name, n := elements(tensor.shape), 0, n,
                operands.handles,
            )  # fmt: skip
            values = np.frombuffer(memoryview(found).cast("B"), np.float32)
        file.add(f"{place}{module}.lora_B.bias", values, "F32")
    return moved


def _why_not(tensor: Summed) -> str | None:
    """Why a tensor is no matrix of a linear layer, as far as its name and shape tell."""
    name = tensor.name
    if is_vocabulary(name):
        return "its rows are tokens"
    if name.endswith(".bias"):
        return "the bias of a module without factors"
    if not has_factors(name, tensor.shape, tensor.dtype):
        return (
            "one dimension"
            if len(tensor.shape) < 2
            else "experts in one tensor, of a layout that is not known"
        )
    if not name.endswith(".weight"):
        return "not the weight of a module"
    if _TABLE.search(name):
        return "an embedding"
    # transformers has made modules of their own of them, which PEFT cannot put factors on.
    return "a router" if kind_of(name) == "router" else None


def _unplaced(layout: Layout) -> str:
    kind = layout.config.get("model_type")
    return (
        f"{layout.path}: names its blocks without the name of a model class, and where the class "
        f"of model_type {kind!r} keeps them is not known here; PEFT finds the adapter's modules "
        "only in a model whose own names begin in the same way (look at model.named_modules())"
    )


def _base_of(vector: Vector) -> str | None:
    """The checkpoint that the vector is measured from, if it is one."""
    leaf = vector.terms[0].leaf
    if isinstance(leaf, Difference):
        return str(leaf.negative.path)
    if isinstance(leaf, Adapter):
        return str(leaf.base.path)
    donors = leaf.config.get("donors")
    donor = donors.get("negative") if isinstance(donors, dict) else None
    path = donor.get("path") if isinstance(donor, dict) else None
    return str((leaf.path / path).resolve()) if isinstance(path, str) else None


def _config(
    report: LoraReport,
    prefix: str,
    modules: Iterable[str],
    experts: Collection[str],
    stacks: Collection[str],
    model: Mapping[str, object],
    base: str | None,
    *,
    flipped: bool,
) -> Json:
    # The rank of experts cannot be said by name: PEFT's own names for them are others.
    stacked = [report.ranks[module] for module in experts if module in report.ranks]
    common = Counter(stacked or report.ranks.values()).most_common(1)[0][0]
    others = _patterns(report.ranks, common, prefix)
    ranks = {module: rank for module, rank in report.ranks.items() if module not in stacks}
    parameters = {"target_parameters": sorted(prefix + name for name in stacks)} if stacks else {}
    return parameters | {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "lora_bias": bool(report.biases),
        "fan_in_fan_out": flipped,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _targets(ranks, prefix, modules, experts),
        "rank_pattern": others,
        "alpha_pattern": others,
    }


def _patterns(ranks: Mapping[str, int], common: int, prefix: str) -> dict[str, int]:
    """The ranks of modules that have another than most, by name. PEFT takes a key for a regular
    expression of how a name ends, so where the end of another module's name is the same, the key is
    tied to the beginning."""
    unlike = {
        end
        for module, rank in ranks.items()
        for end in _ends(prefix + module)
        if ranks.get(end.removeprefix(prefix), rank) != rank
    }
    return {
        f"^{re.escape(name)}" if (name := prefix + module) in unlike else name: rank
        for module, rank in ranks.items()
        if rank != common
    }


def _ends(name: str) -> Iterator[str]:
    """What is left of a module's name without the first parts of it."""
    while name := name.partition(".")[2]:
        yield name


def _targets(
    ranks: Mapping[str, int], prefix: str, modules: Iterable[str], experts: Collection[str]
) -> list[str]:
    """The last parts of the modules' names where those name them all and no others; of experts
    always."""
    stacked = {module.rpartition(".")[2] for module in experts if module in ranks}
    rest = {module for module in ranks if module not in experts}
    last = {module.rpartition(".")[2] for module in rest}
    named = {module for module in modules if module.rpartition(".")[2] in last}
    return sorted(stacked | (last if named == rest else {prefix + module for module in rest}))


def _task(model: Mapping[str, object]) -> str | None:
    named = model.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if model.get("is_encoder_decoder") is True:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _card(report: LoraReport, base: str | None) -> str:
    ranks = sorted(report.ranks.values())
    span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    warnings = [line for warning in report.warnings for line in ("", f"**Note:** {warning}.")]
    lines = [
        "---",
        "library_name: peft",
        "tags:",
        "- lora",
        "- reasonvec",
        "---",
        "",
        f"# LoRA of `{report.recipe.replace('`', '')}`",
        "",
        f"Factors of rank {span} for {len(report.ranks)} matrices, made from a vector in weight "
        "space by reasonvec. The scale is 1 (lora_alpha is r).",
        *warnings,
        "",
        "## What it does not carry",
        "",
        f"The ranks cut off {100 * report.truncated_share:.3g} % of the vector's norm. Storage in "
        "bf16 adds noise in all directions to an update, so much of that is noise.",
        "",
    ]
    if report.left_out:
        lines += [
            f"A LoRA has no place for {len(report.left_out)} tensors that moved, "
            f"{100 * report.left_out_share:.3g} % of the norm:",
            "",
            "| module | why | tensors | share of the norm |",
            "| --- | --- | ---: | ---: |",
        ]
        for (kind, why), parts in report.by_kind().items():
            norm = math.sqrt(sum(part.norm**2 for part in parts))
            share = 100 * norm / report.norm
            lines.append(f"| {kind} | {why} | {len(parts)} | {share:.3g} % |")
        lines += ["", "(Shares of a norm add up as squares do.)", ""]
    else:
        lines += ["Every other tensor is equal in both donors: nothing else was left out.", ""]
    return "\n".join(lines)
