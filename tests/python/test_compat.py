"""The traps of subtracting and adding checkpoints that headers and small JSON files can tell."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonvec.compat.alignment import Alignment, align
from reasonvec.compat.configs import compare_configs
from reasonvec.compat.donors import donor_problems
from reasonvec.compat.experts import LAYOUTS, REFUSED
from reasonvec.compat.layout import Layout, TensorInfo
from reasonvec.compat.placement import Placement, Segment
from reasonvec.compat.problem import Problem, demand, fold
from reasonvec.compat.rows import VocabPolicy
from reasonvec.compat.tokenizer import compare_tokens, read_tokens, same_bytes
from reasonvec.errors import FormatError, MismatchError, ReasonvecError
from reasonvec.names import kind_of, layer_of

Shape = tuple[int, ...]

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
POLICIES: list[VocabPolicy] = ["strict", "skip", "match-tokens"]
DENSE: dict[str, Shape] = {EMBED: (16, 4), UP: (8, 4), DOWN: (4, 8), NORM: (4,)}
UNTIED: dict[str, Shape] = {**DENSE, HEAD: (16, 4)}

# Qwen2.5-1.5B as the hub has it (transformers 4) ...
QWEN: dict[str, object] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# ... and as transformers 5 saves what it loaded from that.
QWEN_5: dict[str, object] = {
    **{
        key: value
        for key, value in QWEN.items()
        if key not in {"rope_theta", "torch_dtype", "transformers_version", "sliding_window"}
    },
    "_name_or_path": "somewhere",
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 28,
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "transformers_version": "5.0.0",
}
MIXTRAL: dict[str, object] = {
    **QWEN,
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
QWEN_MOE: dict[str, object] = {
    **QWEN,
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


def layout(
    path: Path | str,
    shapes: Mapping[str, Shape],
    *,
    config: Mapping[str, object] = QWEN,
    dtype: str = "BF16",
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    tensors = {
        name: TensorInfo(name, (dtypes or {}).get(name, dtype), shape, "model.safetensors")
        for name, shape in shapes.items()
    }
    return Layout(Path(path), tensors, config, {"format": "pt"} if metadata is None else metadata)


def write_tokenizer(
    folder: Path, vocab: object, added: Sequence[tuple[str, int]] = (), **more: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token} for token, number in added],
        "normalizer": {"pattern": {"String": '"]}\\'}, "vocab": {"decoy": 7}},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "]"], ["{", '"']]},
        **more,
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def errors(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.severity == "error"]


def only_error(problems: Sequence[Problem], kind: str) -> str:
    found = errors(problems)
    assert [problem.kind for problem in found] == [kind], found
    return found[0].message


def without_tokenizer(problems: Sequence[Problem]) -> list[Problem]:
    """Without the warning that these folders have no tokenizer.json, which is most tests' case."""
    return [
        problem
        for problem in problems
        if not (problem.severity == "warning" and "no tokenizer.json" in problem.message)
    ]


def elements(placement: Placement | None, size: int) -> list[tuple[str, int] | None]:
    """For each element of a target tensor, the vector element it takes."""
    taken: list[tuple[str, int] | None] = [None] * size
    if placement is None:
        return taken
    if placement.segments is None:
        return [(placement.name, place) for place in range(size)]
    for segment in placement.segments:
        for place in range(segment.length):
            assert taken[segment.at + place] is None
            taken[segment.at + place] = (segment.name, segment.start + place)
    return taken


def assert_sound(alignment: Alignment, vector: Layout, target: Layout) -> None:
    """What holds of every alignment, whatever went wrong."""
    assert list(alignment.sources) == list(target.tensors)
    for name, placement in alignment.sources.items():
        assert (placement is None) == (name in alignment.untouched), name
        if placement is None:
            assert alignment.untouched[name]
            continue
        assert set(placement.names) <= set(vector.tensors)
        size = int(np.prod(target.tensors[name].shape))
        if placement.segments is None:
            assert target.tensors[name].shape == vector.tensors[placement.name].shape
            continue
        end = 0
        for segment in placement.segments:
            assert end <= segment.at
            assert segment.length > 0
            assert segment.start >= 0
            end = segment.at + segment.length
            source = vector.tensors[segment.name]
            assert segment.start + segment.length <= int(np.prod(source.shape))
        assert end <= size


# Donors and targets that do fit.


def test_what_fits_is_placed_whole_and_without_a_word() -> None:
    vector, target = layout("v", DENSE), layout("t", DENSE, config=QWEN_5)
    alignment = align(vector, target)
    assert alignment.sources == {name: Placement(name) for name in DENSE}
    assert not alignment.untouched
    assert not alignment.errors
    assert without_tokenizer(alignment.problems) == []
    assert without_tokenizer(donor_problems(vector, target)) == []
    assert_sound(alignment, vector, target)


def test_every_problem_is_told_at_once() -> None:
    vector = layout("v", {**DENSE, UP: (9, 4), "extra.weight": (1,)})
    target = layout(
        "t", {**DENSE, "model.more.weight": (2,)}, config={**QWEN, "rms_norm_eps": 1e-5}
    )
    alignment = align(vector, target)
    assert {problem.kind for problem in alignment.errors} == {
        "config",
        "shape",
        "missing",
        "unused",
    }
    assert_sound(alignment, vector, target)
    with pytest.raises(MismatchError) as raised:
        demand(alignment.problems)
    for words in ("rms_norm_eps", "up_proj", "extra.weight", "model.more.weight"):
        assert words in str(raised.value)


def test_demand_folds_layers_and_lets_warnings_pass() -> None:
    problems = [
        Problem("missing", f"layer {layer} lacks it", f"model.layers.{layer}.norm.weight")
        for layer in range(30)
    ]
    assert fold(problems) == [(problems[0], 30)]
    with pytest.raises(MismatchError, match=r"^layer 0 lacks it \(and 29 more like it\)$"):
        demand(problems)
    demand([Problem("dtype", "mild", severity="warning")])
    demand([])


def test_exceptions_are_what_callers_may_catch() -> None:
    assert issubclass(FormatError, ReasonvecError)
    assert issubclass(FormatError, ValueError)
    assert issubclass(MismatchError, ReasonvecError)
    assert issubclass(MismatchError, ValueError)


# Trap: padded vocabulary. Rows and tokenizer are separate questions.


def padded(tmp_path: Path, rows: int, target_rows: int) -> tuple[Layout, Layout]:
    vocab = {letter: number for number, letter in enumerate("abcdefghij")}
    write_tokenizer(tmp_path / "v", vocab)
    write_tokenizer(tmp_path / "t", vocab, version="other bytes, same tokens")
    return (
        layout(tmp_path / "v", {**UNTIED, EMBED: (rows, 4), HEAD: (rows, 4)}, config={}),
        layout(
            tmp_path / "t", {**UNTIED, EMBED: (target_rows, 4), HEAD: (target_rows, 4)}, config={}
        ),
    )


@pytest.mark.parametrize(("rows", "target_rows"), [(12, 16), (16, 12)])
def test_padded_vocabulary_is_never_resized(tmp_path: Path, rows: int, target_rows: int) -> None:
    vector, target = padded(tmp_path, rows, target_rows)
    strict = align(vector, target)
    assert [problem.tensor for problem in strict.errors] == [EMBED, HEAD]
    message = strict.errors[0].message
    for words in (
        str(tmp_path / "v"),
        str(tmp_path / "t"),
        f"{target_rows} rows",
        f"has {rows}",
        "the tokens are the same, so only the padding",
        "--vocab match-tokens",
        "--vocab skip",
    ):
        assert words in message
    assert strict.sources[EMBED] is None
    assert strict.sources[UP] == Placement(UP)

    skipped = align(vector, target, vocab="skip")
    assert not skipped.errors
    assert "--vocab skip" in skipped.untouched[EMBED]
    assert "--vocab skip" in skipped.untouched[HEAD]

    matched = align(vector, target, vocab="match-tokens")
    assert not matched.errors
    for name in (EMBED, HEAD):
        assert matched.sources[name] == Placement(name, (Segment(0, 48, name, 0),))
    assert any("updates 12 of" in problem.message for problem in matched.problems)
    for alignment in (strict, skipped, matched):
        assert_sound(alignment, vector, target)


def test_same_rows_and_tokens_match_whole(tmp_path: Path) -> None:
    vector, target = padded(tmp_path, 16, 16)
    alignment = align(vector, target, vocab="match-tokens")
    assert alignment.sources[EMBED] == Placement(EMBED)
    assert not alignment.errors


def test_donors_with_other_padding_are_an_error(tmp_path: Path) -> None:
    positive, negative = padded(tmp_path, 12, 16)
    found = errors(donor_problems(positive, negative))
    assert [(problem.kind, problem.tensor) for problem in found] == [
        ("shape", EMBED),
        ("shape", HEAD),
    ]
    assert "nothing is resized" in found[0].message
    assert "exclude embeddings" in found[0].message


# Trap: vocabularies differ.


def test_strict_refuses_tokens_with_other_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0, "b": 1, "c": 2})
    write_tokenizer(tmp_path / "t", {"a": 0, "b": 2, "c": 1})
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    alignment = align(vector, target)
    message = only_error(alignment.problems, "tokenizer")
    for words in (
        "2 tokens have another id",
        "'b' is 1 and 2",
        str(tmp_path / "v"),
        "match-tokens",
    ):
        assert words in message
    assert alignment.sources[EMBED] is None
    assert alignment.sources[UP] == Placement(UP)
    assert "difference of two tokens" in only_error(donor_problems(vector, target), "tokenizer")


def test_one_id_that_is_two_tokens_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0}, [("<think>", 1)])
    write_tokenizer(tmp_path / "t", {"a": 0}, [("<tool>", 1)])
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    message = only_error(align(vector, target).problems, "tokenizer")
    assert "1 is '<think>' and '<tool>'" in message
    assert "1 is '<think>' and '<tool>'" in only_error(donor_problems(vector, target), "tokenizer")


def test_extra_tokens_are_a_warning(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0}, [("<pad>", 1)])
    write_tokenizer(tmp_path / "t", {"a": 0})
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    for problems in (align(vector, target).problems, donor_problems(vector, target)):
        assert [(problem.kind, problem.severity) for problem in problems] == [
            ("tokenizer", "warning")
        ]
        assert f"1 tokens are only in {tmp_path / 'v'}" in problems[0].message


def test_skip_leaves_embeddings_and_head_and_nothing_else(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0, "b": 1})
    write_tokenizer(tmp_path / "t", {"b": 0, "a": 1})
    vector = layout(tmp_path / "v", {**UNTIED, EMBED: (9, 4), HEAD: (9, 4)}, config={})
    target = layout(tmp_path / "t", UNTIED, config={})
    alignment = align(vector, target, vocab="skip")
    assert not alignment.errors
    assert set(alignment.untouched) == {EMBED, HEAD}
    assert_sound(alignment, vector, target)


def test_match_tokens_by_hand(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0, "b": 1, "c": 2, "x": 3, "d": 4})
    write_tokenizer(tmp_path / "t", {"c": 0, "a": 2, "b": 3, "y": 4, "d": 5})
    vector = layout(tmp_path / "v", {EMBED: (6, 4)})
    target = layout(tmp_path / "t", {EMBED: (8, 4)})
    alignment = align(vector, target, vocab="match-tokens")
    assert not alignment.errors
    assert alignment.sources[EMBED] == Placement(
        EMBED,
        (Segment(0, 4, EMBED, 8), Segment(8, 8, EMBED, 0), Segment(20, 4, EMBED, 16)),
    )
    said = " ".join(problem.message for problem in alignment.problems)
    assert "updates 4 of 8 rows" in said
    assert "1 tokens are only in" in said


def test_match_tokens_wants_both_tokenizers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t", {"a": 0})
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    alignment = align(vector, target, vocab="match-tokens")
    message = only_error(alignment.problems, "tokenizer")
    assert str(tmp_path / "v") in message
    assert "--vocab skip" in message
    assert alignment.sources[EMBED] is None
    strict = align(vector, target)
    assert not strict.errors
    assert strict.sources[EMBED] == Placement(EMBED)
    assert any("no tokenizer.json" in problem.message for problem in strict.problems)


def test_a_token_row_shared_in_disagreement_is_left_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v", {"a": 0, "b": 1, "c": 2})
    write_tokenizer(tmp_path / "t", {"a": 0, "b": 0, "c": 1})
    vector, target = (
        layout(tmp_path / "v", {EMBED: (3, 2)}),
        layout(tmp_path / "t", {EMBED: (3, 2)}),
    )
    alignment = align(vector, target, vocab="match-tokens")
    assert alignment.sources[EMBED] == Placement(EMBED, (Segment(2, 2, EMBED, 4),))
    assert any("1 rows that several tokens share" in p.message for p in alignment.problems)


TOKENS = st.dictionaries(
    st.text(string.ascii_lowercase[:6], min_size=1, max_size=2),
    st.integers(0, 30),
    max_size=24,
)


@st.composite
def token_maps(draw: st.DrawFn) -> dict[str, int]:
    tokens = draw(st.lists(st.text("abcd", min_size=1, max_size=2), unique=True, max_size=16))
    ids = draw(st.permutations(range(len(tokens) + 4)))
    return dict(zip(tokens, draw(st.sampled_from([ids, sorted(ids)])), strict=False))


@settings(max_examples=150, deadline=None)
@given(
    ours=token_maps(),
    theirs=token_maps(),
    rows=st.integers(0, 22),
    target_rows=st.integers(0, 22),
    width=st.integers(0, 3),
)
def test_match_tokens_is_the_row_map(
    tmp_path_factory: pytest.TempPathFactory,
    ours: dict[str, int],
    theirs: dict[str, int],
    rows: int,
    target_rows: int,
    width: int,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    write_tokenizer(folder / "v", theirs)
    write_tokenizer(folder / "t", ours)
    vector = layout(folder / "v", {EMBED: (rows, width), HEAD: (rows, width)}, config={})
    target = layout(
        folder / "t", {EMBED: (target_rows, width), HEAD: (target_rows, width)}, config={}
    )
    alignment = align(vector, target, vocab="match-tokens")
    assert not alignment.errors
    assert_sound(alignment, vector, target)
    wanted: dict[int, int] = {}
    if ours == theirs:
        wanted = {row: row for row in range(min(rows, target_rows))}
    else:
        for token, row in ours.items():
            if token in theirs and row < target_rows and theirs[token] < rows:
                wanted[row] = theirs[token]
    for name in (EMBED, HEAD):
        placement = alignment.sources[name]
        assert elements(placement, target_rows * width) == [
            (name, wanted[row] * width + column) if row in wanted else None
            for row in range(target_rows)
            for column in range(width)
        ]
        segments = (placement.segments or ()) if placement else ()
        for left, right in pairwise(segments):
            touching = left.at + left.length == right.at
            assert not (touching and left.start + left.length == right.start), "not coalesced"


# Trap: tied embeddings.


def test_one_donor_lists_the_head_of_a_tied_model() -> None:
    listed, alone = layout("p", UNTIED), layout("n", DENSE)
    for positive, negative in ((listed, alone), (alone, listed)):
        assert without_tokenizer(donor_problems(positive, negative)) == []
    assert listed.names() == {name: name for name in DENSE}
    assert listed.copies() == {HEAD: EMBED}
    assert alone.copies() == {}


def test_a_tied_target_that_lists_its_head_gets_one_delta_twice() -> None:
    vector, target = layout("v", DENSE), layout("t", UNTIED)
    alignment = align(vector, target)
    assert without_tokenizer(alignment.problems) == []
    assert alignment.sources[EMBED] == alignment.sources[HEAD] == Placement(EMBED)
    assert_sound(alignment, vector, target)
    both = align(layout("v", UNTIED), target)
    assert without_tokenizer(both.problems) == []
    assert both.sources[HEAD] == Placement(EMBED)


@pytest.mark.parametrize("kept", [EMBED, HEAD])
def test_aliases_in_metadata_are_one_matrix(kept: str) -> None:
    alias = HEAD if kept == EMBED else EMBED
    shapes = {name: shape for name, shape in UNTIED.items() if name != alias}
    aliased = layout("p", shapes, metadata={"format": "pt", alias: kept})
    plain = layout("n", DENSE)
    assert without_tokenizer(donor_problems(aliased, plain)) == []
    assert without_tokenizer(donor_problems(plain, aliased)) == []
    assert aliased.names()[EMBED] == kept
    into = align(plain, aliased)
    assert without_tokenizer(into.problems) == []
    assert into.sources[kept] == Placement(EMBED)
    out = align(aliased, plain)
    assert without_tokenizer(out.problems) == []
    assert out.sources[EMBED] == Placement(kept)


def test_metadata_that_names_what_is_stored_is_no_alias() -> None:
    told = layout("p", UNTIED, config={}, metadata={HEAD: EMBED, "a": "b", "format": "pt"})
    assert told.names() == {name: name for name in UNTIED}


UNTIED_CONFIG = {**QWEN, "tie_word_embeddings": False}


def test_one_donor_tied_and_one_untied_is_refused() -> None:
    tied, untied = layout("p", DENSE), layout("n", UNTIED, config=UNTIED_CONFIG)
    for positive, negative in ((tied, untied), (untied, tied)):
        message = only_error(donor_problems(positive, negative), "tied")
        assert "tie_word_embeddings" in message
        assert "both tied or both untied" in message
    silent = {key: value for key, value in QWEN.items() if key != "tie_word_embeddings"}
    guessed = donor_problems(layout("p", DENSE, config=silent), layout("n", UNTIED, config=silent))
    message = only_error(guessed, "tied")
    assert "p ties its head" in message
    assert f"n does not and lists {HEAD}" in message


def test_ties_do_not_matter_where_embeddings_are_not_wanted() -> None:
    tied, untied = layout("p", DENSE), layout("n", UNTIED, config=UNTIED_CONFIG)
    layers = donor_problems(tied, untied, select=lambda name: ".layers." in name)
    assert layers == []
    alignment = align(untied, tied, select=lambda name: name not in {EMBED, HEAD})
    assert alignment.problems == []
    assert alignment.untouched == {EMBED: "not selected"}


def test_untied_vector_for_a_tied_target_is_refused() -> None:
    vector, target = layout("v", UNTIED, config=UNTIED_CONFIG), layout("t", DENSE)
    alignment = align(vector, target)
    message = only_error(alignment.problems, "tied")
    for words in (HEAD, EMBED, "t is tied, one matrix for both", "--vocab skip", "untied as the"):
        assert words in message
    assert alignment.sources[EMBED] is None
    lenient = align(vector, target, missing="skip")
    assert only_error(lenient.problems, "tied"), "a policy for missing tensors is none for ties"
    assert not align(vector, target, vocab="skip").errors
    for each in (alignment, lenient):
        assert_sound(each, vector, target)


def test_tied_vector_for_an_untied_target_is_refused() -> None:
    vector, target = layout("v", DENSE), layout("t", UNTIED, config=UNTIED_CONFIG)
    alignment = align(vector, target)
    message = only_error(alignment.problems, "tied")
    assert "one delta for embeddings and head" in message
    assert "is not known" in message
    assert alignment.sources[EMBED] is None
    assert alignment.sources[HEAD] is None
    assert_sound(alignment, vector, target)
    skipped = align(vector, target, vocab="skip")
    assert not skipped.errors
    assert set(skipped.untouched) == {EMBED, HEAD}


def test_a_tied_config_with_two_unlike_matrices_is_refused() -> None:
    odd = layout("p", {**UNTIED, HEAD: (20, 4)})
    assert odd.copies() == {}
    assert odd.ties is False
    for problems in (
        donor_problems(odd, odd),
        align(odd, layout("t", UNTIED, config=UNTIED_CONFIG)).problems,
    ):
        told = [problem for problem in errors(problems) if problem.kind == "tied"]
        assert "p/config.json says" in told[0].message
        assert "[20, 4]" in told[0].message


def test_a_config_that_contradicts_itself_says_nothing() -> None:
    config = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    assert layout("t", DENSE, config=config).tied is None
    assert layout("t", DENSE, config={"text_config": {"tie_word_embeddings": True}}).tied is True
    assert layout("t", DENSE, config={"tie_word_embeddings": "yes"}).tied is None


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
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


# Trap: tensors missing on one side.


def test_a_missing_tensor_is_an_error_unless_a_policy_says_otherwise() -> None:
    vector, target = (
        layout("v", {**DENSE, "a.weight": (2,)}),
        layout("t", {**DENSE, "b.weight": (2,)}),
    )
    alignment = align(vector, target)
    by_kind = {problem.kind: problem for problem in alignment.errors}
    assert set(by_kind) == {"missing", "unused"}
    for words in ("t/model.safetensors: b.weight", "expected it in v", "missing=skip"):
        assert words in by_kind["missing"].message
    for words in ("a.weight in v/model.safetensors would be dropped", "missing=skip"):
        assert words in by_kind["unused"].message
    lenient = align(vector, target, missing="skip")
    assert not lenient.errors
    assert {problem.kind for problem in lenient.problems} >= {"missing", "unused"}, "never silent"
    assert lenient.untouched == {"b.weight": "the vector has no such tensor"}
    for each in (alignment, lenient):
        assert_sound(each, vector, target)


def test_a_tensor_of_one_donor_only_is_an_error() -> None:
    positive, negative = (
        layout("p", {**DENSE, "a.weight": (2,)}),
        layout("n", {**DENSE, "b.bias": (2,)}),
    )
    found = errors(donor_problems(positive, negative))
    assert [problem.tensor for problem in found] == ["a.weight", "b.bias"]
    assert "a.weight is in p/model.safetensors, but not in n" in found[0].message
    kept = donor_problems(positive, negative, select=lambda name: name in DENSE)
    assert errors(kept) == []


def test_shapes_have_to_agree() -> None:
    vector, target = layout("v", {**DENSE, UP: (8, 5)}), layout("t", DENSE)
    message = only_error(align(vector, target).problems, "shape")
    assert "[8, 4]" in message
    assert "[8, 5]" in message
    assert "must be equal" in message
    assert "[8, 5] in v/model.safetensors" in only_error(donor_problems(vector, target), "shape")
    turned = layout("v", {**DENSE, UP: (4, 8)})
    assert "transpose" in only_error(align(turned, target).problems, "shape")


def test_unselected_tensors_stay_and_are_no_problem() -> None:
    vector = layout("v", {**DENSE, UP: (9, 9), "a.weight": (1,)})
    target = layout("t", {**DENSE, "b.weight": (1,)})
    alignment = align(vector, target, select=lambda name: name in {EMBED, DOWN, NORM})
    assert not alignment.errors
    assert alignment.untouched == {UP: "not selected", "b.weight": "not selected"}
    assert_sound(alignment, vector, target)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_tensor_is_accounted_for(data: st.DataObject) -> None:
    names = [EMBED, HEAD, UP, DOWN, NORM, "model.layers.0.mlp.gate_proj.weight"]
    shapes = st.sampled_from([(2, 3), (3, 2), (6,), (0, 3)])
    kinds = st.sampled_from(["BF16", "F32", "I64", "F8_E4M3"])
    sides: list[Layout] = []
    for path in ("v", "t"):
        drawn = data.draw(st.dictionaries(st.sampled_from(names), st.tuples(shapes, kinds)))
        config = data.draw(st.sampled_from([{}, QWEN, UNTIED_CONFIG]))
        sides.append(
            layout(
                path,
                {name: shape for name, (shape, _) in drawn.items()},
                dtypes={name: kind for name, (_, kind) in drawn.items()},
                config=config,
            )
        )
    vector, target = sides
    vocab = data.draw(st.sampled_from(POLICIES))
    alignment = align(
        vector,
        target,
        vocab=vocab,
        missing=data.draw(st.sampled_from(["error", "skip"])),
    )
    assert_sound(alignment, vector, target)
    if alignment.errors:
        return
    read = {
        name for placement in alignment.sources.values() if placement for name in placement.names
    }
    told = {problem.tensor for problem in alignment.problems}
    for name, info in vector.tensors.items():
        quiet = (
            info.dtype == "I64"
            or name in vector.copies()
            or (vocab == "skip" and name in {EMBED, HEAD})
        )
        assert name in read or name in told or quiet, name


# Trap: dtypes. f32 router biases among bf16, integers, fp8.


def test_each_tensor_keeps_its_own_dtype() -> None:
    router = "model.layers.0.mlp.gate.e_score_correction_bias"
    shapes = {**DENSE, router: (4,)}
    vector, target = layout("v", shapes, dtypes={router: "F32"}), layout("t", shapes)
    alignment = align(vector, target)
    assert without_tokenizer(alignment.problems) == []
    assert alignment.sources[router] == Placement(router)


def test_donors_of_two_float_dtypes_are_a_warning() -> None:
    positive, negative = layout("p", DENSE, dtypes={UP: "F32"}), layout("n", DENSE)
    problems = without_tokenizer(donor_problems(positive, negative))
    assert [(problem.kind, problem.severity, problem.tensor) for problem in problems] == [
        ("dtype", "warning", UP)
    ]
    assert "F32" in problems[0].message
    assert "rounding" in problems[0].message


def test_a_float_and_an_integer_are_an_error() -> None:
    shapes = {**DENSE, "model.position_ids": (4,)}
    whole = layout("p", shapes, dtypes={"model.position_ids": "I64"})
    floats = layout("n", shapes)
    assert "no difference" in only_error(donor_problems(whole, floats), "dtype")
    assert "no sum" in only_error(align(whole, floats).problems, "dtype")
    assert "equal in all inputs" in only_error(align(floats, whole).problems, "dtype")
    same = align(whole, whole)
    assert not same.errors
    assert same.untouched == {"model.position_ids": "I64 is passed through, not added to"}
    assert not align(layout("v", DENSE), whole).errors, "an integer tensor needs no delta"


@pytest.mark.parametrize(
    ("shapes", "dtypes", "config", "reason"),
    [
        (DENSE, {UP: "F8_E4M3"}, QWEN, "F8_E4M3"),
        (DENSE, {}, {**QWEN, "quantization_config": {"quant_method": "fp8"}}, "fp8"),
        (DENSE, {}, {"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({**DENSE, "a.q_proj.qweight": (2, 2)}, {"a.q_proj.qweight": "I32"}, QWEN, "qweight"),
        ({**DENSE, "a.q_proj.scales": (2, 2)}, {}, QWEN, "scales"),
        ({**DENSE, "a.q_proj.weight.absmax": (2,)}, {}, QWEN, "absmax"),
        ({**DENSE, "a.weight.quant_state.bitsandbytes__nf4": (2,)}, {}, QWEN, "bitsandbytes"),
        ({**DENSE, "a.q_proj.weight_scale_inv": (2,)}, {}, QWEN, "weight_scale_inv"),
        ({**DENSE, "a.q_proj.weight_packed": (2,)}, {}, QWEN, "weight_packed"),
        ({**DENSE, "a.experts.gate_up_proj_blocks": (2,)}, {}, QWEN, "gate_up_proj_blocks"),
        ({**DENSE, "a.q_proj.weight": (8, 1)}, {"a.q_proj.weight": "U8"}, QWEN, "codes"),
    ],
)
def test_quantised_folders_are_refused(
    shapes: dict[str, Shape], dtypes: dict[str, str], config: dict[str, object], reason: str
) -> None:
    codes = layout("q", shapes, dtypes=dtypes, config=config)
    plain = layout("n", DENSE)
    assert reason in (codes.quantised or "")
    for problems in (
        donor_problems(codes, plain),
        donor_problems(plain, codes),
        align(codes, plain).problems,
        align(plain, codes).problems,
    ):
        told = [problem.message for problem in problems if problem.kind == "quantised"]
        assert len(told) == 1
        assert "q is quantised" in told[0]
        assert reason in told[0]
        assert "dequantise" in told[0]


@pytest.mark.parametrize("said", [None, {}])
def test_an_empty_quantisation_config_is_none(said: object) -> None:
    assert layout("t", DENSE, config={**QWEN, "quantization_config": said}).quantised is None


# Trap: mixtures of experts in two storages.

EXPERTS, HIDDEN, INNER = 3, 4, 5
LAYER = "model.layers.0."


def split_names(
    family: str, experts: int = EXPERTS, inner: int = INNER, hidden: int = HIDDEN
) -> dict[str, Shape]:
    table = next(row for row in LAYOUTS if family in row.families)
    shapes: dict[str, Shape] = {}
    for expert in range(experts):
        stem = f"{LAYER}{table.split}.{expert}"
        shapes[f"{stem}.{table.gate}.weight"] = (inner, hidden)
        shapes[f"{stem}.{table.up}.weight"] = (inner, hidden)
        shapes[f"{stem}.{table.down}.weight"] = (hidden, inner)
    for split, _ in table.renamed:
        shapes[f"{LAYER}{split}"] = (experts, hidden)
    return shapes


def packed_names(
    family: str, experts: int = EXPERTS, inner: int = INNER, hidden: int = HIDDEN
) -> dict[str, Shape]:
    table = next(row for row in LAYOUTS if family in row.families)
    shapes: dict[str, Shape] = {
        f"{LAYER}{table.packed}.gate_up_proj": (experts, 2 * inner, hidden),
        f"{LAYER}{table.packed}.down_proj": (experts, hidden, inner),
    }
    for _, packed in table.renamed:
        shapes[f"{LAYER}{packed}"] = (experts, hidden)
    return shapes


def moe(path: str, shapes: Mapping[str, Shape], family: str) -> Layout:
    return layout(path, shapes, config={**QWEN_MOE, "model_type": family})


def numbered(shapes: Mapping[str, Shape]) -> dict[str, npt.NDArray[np.int64]]:
    arrays: dict[str, npt.NDArray[np.int64]] = {}
    count = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        arrays[name] = np.arange(count, count + size).reshape(shape)
        count += size
    return arrays


def gather(
    placement: Placement | None, shape: Shape, arrays: Mapping[str, npt.NDArray[np.int64]]
) -> npt.NDArray[np.int64]:
    size = int(np.prod(shape))
    taken = elements(placement, size)
    return np.array(
        [-1 if at is None else arrays[at[0]].reshape(-1)[at[1]] for at in taken]
    ).reshape(shape)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "phimoe", "jamba", "lfm2_moe"]
)
@settings(max_examples=15, deadline=None)
@given(experts=st.integers(1, 4), inner=st.integers(0, 4), hidden=st.integers(1, 4))
def test_experts_go_where_transformers_puts_them(
    family: str, experts: int, inner: int, hidden: int
) -> None:
    """Against what its conversion does: merge the experts, concatenate gate and up (dim=1)."""
    table = next(row for row in LAYOUTS if family in row.families)
    split, packed = (names(family, experts, inner, hidden) for names in (split_names, packed_names))
    one_by_one, together = moe("v", split, family), moe("t", packed, family)
    assert not errors(align(one_by_one, together).problems)

    arrays = numbered(split)
    stem = f"{LAYER}{table.split}"
    gate, up, down = (
        np.stack([arrays[f"{stem}.{e}.{part}.weight"] for e in range(experts)])
        for part in (table.gate, table.up, table.down)
    )
    converted = {
        f"{LAYER}{table.packed}.gate_up_proj": np.concatenate([gate, up], axis=1),
        f"{LAYER}{table.packed}.down_proj": down,
    }
    for old, new in table.renamed:
        converted[f"{LAYER}{new}"] = arrays[f"{LAYER}{old}"]

    pack = align(one_by_one, together, missing="skip")
    assert_sound(pack, one_by_one, together)
    for name, wanted in converted.items():
        if wanted.size:
            assert (gather(pack.sources[name], wanted.shape, arrays) == wanted).all()

    unpack = align(together, one_by_one)
    assert not unpack.errors
    assert_sound(unpack, together, one_by_one)
    for name, wanted in arrays.items():
        assert (gather(unpack.sources[name], wanted.shape, converted) == wanted).all()


def test_packed_experts_of_mixtral_by_hand() -> None:
    vector = moe("v", split_names("mixtral"), "mixtral")
    target = moe("t", packed_names("mixtral"), "mixtral")
    alignment = align(vector, target)
    assert not alignment.problems or not alignment.errors
    placement = alignment.sources[f"{LAYER}mlp.experts.gate_up_proj"]
    assert placement is not None
    assert placement.segments is not None
    stem = f"{LAYER}block_sparse_moe.experts"
    assert placement.segments[:3] == (
        Segment(0, 20, f"{stem}.0.w1.weight", 0),
        Segment(20, 20, f"{stem}.0.w3.weight", 0),
        Segment(40, 20, f"{stem}.1.w1.weight", 0),
    )
    assert alignment.sources[f"{LAYER}mlp.gate.weight"] == Placement(
        f"{LAYER}block_sparse_moe.gate.weight"
    )
    assert placement.names[:2] == (f"{stem}.0.w1.weight", f"{stem}.0.w3.weight")


@pytest.mark.parametrize("family", [*REFUSED, "a_family_of_next_year"])
def test_other_families_are_refused_by_name(family: str) -> None:
    split, packed = split_names("qwen3_moe"), packed_names("qwen3_moe")
    for vector, target in (
        (moe("v", split, family), moe("t", packed, family)),
        (moe("v", packed, family), moe("t", split, family)),
    ):
        alignment = align(vector, target)
        assert {problem.kind for problem in alignment.errors} == {"experts"}
        for words in (family, "shapes cannot tell", "v store their experts differently"):
            assert words in alignment.errors[0].message
        assert_sound(alignment, vector, target)
        assert not errors(align(vector, vector).problems), "without a conversion nothing is refused"


def test_experts_without_a_model_type_are_refused() -> None:
    vector = layout("v", split_names("qwen3_moe"), config={})
    target = layout("t", packed_names("qwen3_moe"), config={})
    alignment = align(vector, target)
    assert {problem.kind for problem in alignment.errors} == {"experts"}
    assert "model_type" in alignment.errors[0].message


def test_a_transposed_pack_is_refused() -> None:
    shapes = {
        name: (shape[0], shape[2], shape[1]) for name, shape in packed_names("qwen3_moe").items()
    }
    turned = moe("t", shapes, "qwen3_moe")
    message = align(moe("v", packed_names("qwen3_moe"), "qwen3_moe"), turned).errors[0].message
    assert "transpose" in message
    split = align(moe("v", split_names("qwen3_moe"), "qwen3_moe"), turned)
    assert split.errors
    assert split.sources == dict.fromkeys(shapes)


def test_missing_experts_are_told() -> None:
    split = split_names("qwen3_moe")
    lost = f"{LAYER}mlp.experts.1.up_proj.weight"
    del split[lost]
    vector, target = moe("v", split, "qwen3_moe"), moe("t", packed_names("qwen3_moe"), "qwen3_moe")
    alignment = align(vector, target)
    assert lost in only_error(alignment.problems, "missing")
    lenient = align(vector, target, missing="skip")
    assert not lenient.errors
    placement = lenient.sources[f"{LAYER}mlp.experts.gate_up_proj"]
    assert placement is not None
    assert placement.segments is not None
    assert len(placement.segments) == 5
    assert_sound(lenient, vector, target)


@pytest.mark.parametrize(("ours", "theirs"), [(2, 3), (3, 2)])
def test_expert_counts_have_to_agree(ours: int, theirs: int) -> None:
    for target, vector in (
        (packed_names("qwen3_moe", ours), split_names("qwen3_moe", theirs)),
        (split_names("qwen3_moe", ours), packed_names("qwen3_moe", theirs)),
    ):
        alignment = align(moe("v", vector, "qwen3_moe"), moe("t", target, "qwen3_moe"))
        assert alignment.errors


def test_a_hostile_number_of_experts_costs_nothing() -> None:
    target = moe("t", {f"{LAYER}mlp.experts.gate_up_proj": (2**60, 0, 4)}, "qwen3_moe")
    alignment = align(moe("v", split_names("qwen3_moe"), "qwen3_moe"), target)
    assert alignment.errors


def test_donors_in_two_storages_are_told_once() -> None:
    positive = moe("p", {**DENSE, **split_names("qwen3_moe")}, "qwen3_moe")
    negative = moe("n", {**DENSE, **packed_names("qwen3_moe")}, "qwen3_moe")
    message = only_error(donor_problems(positive, negative), "experts")
    assert "one by one" in message
    assert "p and n" in message


def test_experts_under_a_prefix() -> None:
    wrapped = {
        name.replace("model.", "model.language_model."): shape
        for name, shape in packed_names("qwen3_moe").items()
    }
    vector, target = moe("v", split_names("qwen3_moe"), "qwen3_moe"), moe("t", wrapped, "qwen3_moe")
    alignment = align(vector, target, map_prefix=[("model.language_model.", "model.")])
    assert not alignment.errors
    assert not alignment.untouched
    assert_sound(alignment, vector, target)


# The language tower of a vision model.

TOWER = {f"model.language_model.{name.removeprefix('model.')}": DENSE[name] for name in DENSE}
VISION = {"model.visual.blocks.0.attn.qkv.weight": (6, 2)}
TOWER_CONFIG = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True,
    "text_config": {
        **QWEN,
        "model_type": "qwen2_5_vl_text",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32},
}


def test_a_language_tower_takes_a_text_vector() -> None:
    vector, target = layout("v", DENSE), layout("t", {**TOWER, **VISION}, config=TOWER_CONFIG)
    alignment = align(
        vector, target, map_prefix=[("model.language_model.", "model.")], vocab="skip"
    )
    assert not alignment.errors
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert alignment.sources[name] == Placement(UP)
    assert "outside every --map-prefix" in alignment.untouched[next(iter(VISION))]
    told = " ".join(problem.message for problem in alignment.problems)
    assert "model_type" in told
    assert "mrope" in told
    assert "1 tensors of t are outside" in told
    assert_sound(alignment, vector, target)
    plain = align(vector, target)
    assert {problem.kind for problem in plain.errors} >= {"config", "missing", "unused"}


def test_a_prefix_that_fits_nothing_is_an_error() -> None:
    vector, target = layout("v", DENSE), layout("t", TOWER)
    alignment = align(vector, target, map_prefix=[("model.langage_model.", "model.")])
    told = [problem.message for problem in alignment.errors if problem.kind == "prefix"]
    assert len(told) == 1
    assert "'model.langage_model.'" in told[0]
    assert "'model.language_model.embed" in told[0]
    assert any(problem.kind == "unused" for problem in alignment.errors)


def test_one_delta_for_two_tensors_is_an_error() -> None:
    vector = layout("v", {UP: (8, 4)})
    target = layout("t", {UP: (8, 4), f"copy.{UP}": (8, 4)})
    alignment = align(vector, target, map_prefix=[("copy.", "")])
    assert "both get the delta" in only_error(alignment.problems, "prefix")


# tokenizer.json.


def test_tokens_come_from_the_model_and_the_added(tmp_path: Path) -> None:
    vocab = {"a": 0, 'q"\\': 1, "}{": 2, "é😀": 3}
    write_tokenizer(tmp_path, vocab, [("<eos>", 9), ("a", 12)])
    assert layout(tmp_path, DENSE).tokens() == {**vocab, "<eos>": 9}
    assert layout(tmp_path / "none", DENSE).tokens() is None


def test_unigram_vocabularies_are_lists(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path, [["<unk>", 0.0], ["a", -1.5], ["b", -2]])
    assert read_tokens(path) == {"<unk>": 0, "a": 1, "b": 2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        b"null",
        b'{"model": []}',
        b'{"model": {"vocab": 3}}',
        b'{"model": {"vocab": {"a": -1}}}',
        b'{"model": {"vocab": {"a": true}}}',
        b'{"model": {"vocab": {"a": 1.5}}}',
        b'{"model": {"vocab": {"a": "1"}}}',
        b'{"model": {"vocab": {"a": 99999999999999999999}}}',
        b'{"model": {"vocab": {"a": 0, "a": 1}}}',
        b'{"model": {"vocab": {"a": 0}, "vocab": {"a": 1}}}',
        b'{"model": {"vocab": {"a": 0}}, "model": {"vocab": {}}}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": {}}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [3]}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}',
        b'{"model": {"vocab": [["a"], [3]]}}',
        b'{"model": {"vocab": {"a": 0}, "merges": ["unclosed]}}',
        b'{"model": {"vocab": {"\xff\xfe": 0}}}',
        b'{"model": {"vocab": ' + b"[" * 100_000,
        b'{"x": ' + b'{"a":' * 100_000,
    ],
)
def test_a_broken_tokenizer_is_a_format_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="tokenizer"):
        read_tokens(path)
    write_tokenizer(tmp_path / "t", {"a": 0})
    broken, sound = layout(tmp_path, DENSE), layout(tmp_path / "t", DENSE)
    for problems in (align(broken, sound).problems, donor_problems(sound, broken)):
        assert str(path) in only_error(problems, "tokenizer")


def test_a_tokenizer_that_is_a_folder_is_a_format_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(FormatError, match="regular file"):
        layout(tmp_path, DENSE).tokens()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tokenizers_are_read_as_json_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    vocab = data.draw(st.dictionaries(st.text(max_size=6), st.integers(0, 99), max_size=8))
    more = data.draw(st.dictionaries(st.text("abc", min_size=1, max_size=3), JSON, max_size=4))
    document = {**more, "model": {**more, "vocab": vocab}, "added_tokens": []}
    text = json.dumps(
        document, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.none() | st.just(2))
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:  # a lone surrogate cannot be in a file
        return
    assert read_tokens(path) == vocab
    broken = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(broken[: data.draw(st.integers(0, len(broken)))]))
    # What the walk does not judge may be broken and pass; what it refuses has to say where.
    with suppress(FormatError):
        assert all(type(number) is int for number in read_tokens(path).values())


@settings(max_examples=100)
@given(TOKENS, TOKENS)
def test_token_maps_are_compared_by_token_and_by_id(
    first: dict[str, int], second: dict[str, int]
) -> None:
    difference = compare_tokens(first, second)
    assert difference.same == (first == second)
    assert difference.moved == sum(
        token in second and second[token] != number for token, number in first.items()
    )
    assert difference.only_first == len(first.keys() - second.keys())
    assert difference.only_second == len(second.keys() - first.keys())


def test_same_bytes_are_not_parsed(tmp_path: Path) -> None:
    for folder in ("v", "t"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_bytes(b"not JSON, and nobody looks")
    vector, target = layout(tmp_path / "v", DENSE), layout(tmp_path / "t", DENSE)
    assert align(vector, target).problems == []
    assert donor_problems(vector, target) == []
    assert same_bytes(tmp_path / "v/tokenizer.json", tmp_path / "t/tokenizer.json")


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
