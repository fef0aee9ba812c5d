"""May these two donors be subtracted? From headers and small JSON files alone, every problem at
once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from reasonvec.compat.alignment import folder_problems
from reasonvec.compat.configs import compare_configs, compare_functions
from reasonvec.compat.experts import packed_part, split_part
from reasonvec.compat.layout import FLOATS, Layout, TensorInfo
from reasonvec.compat.problem import Problem, Severity
from reasonvec.compat.rows import compare_tokenizers
from reasonvec.names import is_vocabulary

__all__ = ["donor_problems"]


def donor_problems(
    positive: Layout, negative: Layout, *, select: Callable[[str], bool] | None = None
) -> list[Problem]:
    """Everything that stands in the way of `positive - negative`, tensor by tensor and as a whole.

    Tensors are paired by their canonical names (`Layout.names`). ``select`` tells which of them are
    wanted; what is wrong with the others is no problem.
    """
    wanted = select or (lambda _: True)
    problems = [*folder_problems(positive), *folder_problems(negative)]
    names = {*positive.names(), *negative.names()}
    if any(is_vocabulary(name) and wanted(name) for name in names):
        problems += compare_configs(positive, negative)
        ties = _tie_problems(positive, negative)
        if not any(problem.kind == "tied" and problem.severity == "error" for problem in problems):
            problems += ties
        problems += _tokenizer_problems(positive, negative)
    else:
        problems += compare_functions(positive, negative)
        ties = []
    problems += _tensor_problems(positive, negative, bool(ties), wanted)
    return list(dict.fromkeys(problems))


def _tie_problems(positive: Layout, negative: Layout) -> list[Problem]:
    if positive.ties is None or negative.ties is None or positive.ties == negative.ties:
        return []
    tied, untied = (positive, negative) if positive.ties else (negative, positive)
    head = untied.vocabulary()[1]
    if head is None:
        return []  # Neither lists a head of its own, so there is one matrix on both sides.
    return [
        Problem(
            "tied",
            f"{tied.path} ties its head to its embeddings, {untied.path} does not and lists "
            f"{head}: one matrix minus two is not a delta of either; take donors that are both "
            "tied or both untied, or correct tie_word_embeddings in the config.json that is wrong",
            head,
        )
    ]


def _tensor_problems(
    positive: Layout, negative: Layout, told_of_ties: bool, select: Callable[[str], bool]
) -> Iterator[Problem]:
    ours, theirs = positive.names(), negative.names()
    storages = {_experts_packed(positive), _experts_packed(negative)}
    apart = storages == {True, False}
    if apart:
        yield Problem(
            "experts",
            f"{positive.path} and {negative.path} store the same experts differently, one by one "
            "against packed in gate_up_proj and down_proj; save both donors in one layout with "
            "transformers first",
        )
    head = next(
        (layout.vocabulary()[1] for layout in (positive, negative) if not layout.ties), None
    )
    for have, lack, names, others in (
        (positive, negative, ours, theirs),
        (negative, positive, theirs, ours),
    ):
        for name, stored in names.items():
            if name in others or not select(name) or (told_of_ties and name == head):
                continue
            if apart and (packed_part(name) or split_part(name)):
                continue
            info = have.tensors[stored]
            yield Problem(
                "missing",
                f"{stored} is in {have.path / info.file}, but not in {lack.path}: expected the "
                "same tensors in both donors; take two checkpoints of one training run, or exclude "
                "it",
                stored,
            )
    for name, stored in ours.items():
        if name in theirs and select(name):
            yield from _pair_problems(
                positive, positive.tensors[stored], negative, negative.tensors[theirs[name]]
            )


def _pair_problems(
    positive: Layout, ours: TensorInfo, negative: Layout, theirs: TensorInfo
) -> Iterator[Problem]:
    if (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype):
        return
    here, there = positive.path / ours.file, negative.path / theirs.file
    if ours.shape != theirs.shape:
        advice = (
            "donors must have the same rows, and nothing is resized: take two that were padded "
            "alike, or exclude embeddings and head"
            if is_vocabulary(ours.name) and ours.shape[1:] == theirs.shape[1:]
            else "take two checkpoints of one training run, or exclude it"
        )
        yield Problem(
            "shape",
            f"{ours.name} is {list(ours.shape)} in {here}, but {list(theirs.shape)} in {there}: "
            f"{advice}",
            ours.name,
        )
    if ours.dtype == theirs.dtype:
        return
    floats = {ours.dtype, theirs.dtype} <= FLOATS
    yield Problem(
        "dtype",
        f"{ours.name} is {ours.dtype} in {here}, but {theirs.dtype} in {there}: "
        + (
            "the coarser one has already rounded, and its rounding becomes part of the vector; "
            "take both as they were trained if you have them"
            if floats
            else "they have no difference; take two checkpoints of one format, or exclude it"
        ),
        ours.name,
        "warning" if floats else "error",
    )


def _experts_packed(layout: Layout) -> bool | None:
    """Whether the folder packs its experts; None if it has none, or has both."""
    packed = any(packed_part(name) for name in layout.tensors)
    split = any(split_part(name) for name in layout.tensors)
    return None if packed == split else packed


def _tokenizer_problems(positive: Layout, negative: Layout) -> list[Problem]:
    verdict = compare_tokenizers(positive, negative)
    if not verdict.message:
        return []
    difference = verdict.difference
    severity: Severity = "warning"
    if verdict.broken:
        severity, advice = "error", ""
    elif difference is None:
        advice = (
            ": whether a row is the same token in both donors is not known; put it there to have "
            "the ids compared"
        )
    elif difference.harmful:
        severity = "error"
        advice = (
            "; a row would be the difference of two tokens: take donors with one tokenizer, or "
            "exclude embeddings and head"
        )
    else:
        advice = "; their rows are padding in the other donor"
    return [Problem("tokenizer", verdict.message + advice, severity=severity)]
