"""May two folders be subtracted, and where does a vector go: ties, missing tensors, dtypes, towers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    DENSE,
    DOWN,
    EMBED,
    HEAD,
    NORM,
    POLICIES,
    QWEN,
    QWEN_5,
    UNTIED,
    UP,
    Shape,
    assert_sound,
    errors,
    layout,
    only_error,
    without_tokenizer,
)

from reasonvec.compat.alignment import align
from reasonvec.compat.donors import donor_problems
from reasonvec.compat.layout import Layout
from reasonvec.compat.placement import Placement
from reasonvec.compat.problem import Problem, demand, fold
from reasonvec.errors import FormatError, MismatchError, ReasonvecError

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
