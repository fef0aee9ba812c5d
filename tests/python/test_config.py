"""The YAML of mergekit: every recipe, what it says, and what comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from config_files import planned, write
from models import NEW_TOKENS, make_models, tensors_of
from safetensors.numpy import save_file

import reasonvec as rv
from reasonvec.apply import ApplyPlan
from reasonvec.cli.app import main

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def coefficients(plan: ApplyPlan) -> dict[str, tuple[float, ...]]:
    return {t.name: t.coefficients for t in plan.tensors}


def f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


# ---- every recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_unchanged(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(
        main, ["merge", str(recipe), str(out), "--json", "--strict", "--no-sync"]
    )
    assert result.exit_code == 0, result.output
    assert (out / "mergekit_config.yml").read_bytes() == recipe.read_bytes()
    assert json.loads((out / "reasonvec.json").read_text())["merge"]["method"] in recipe.read_text()
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    checked = CliRunner().invoke(main, ["verify", str(out)])
    assert checked.exit_code == 0, checked.output
    config = json.loads((out / "config.json").read_text())
    tensors = tensors_of(out)
    assert tensors["model.embed_tokens.weight"].shape[0] == config["vocab_size"]
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    assert layers == set(range(config["num_hidden_layers"]))


@pytest.mark.models
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_in_transformers(recipe: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["merge", str(recipe), str(out), "-q", "--no-sync"])
    assert result.exit_code == 0, result.output
    model, said = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the end of the<|im_end|>", return_tensors="pt").input_ids
    assert int(ids.max()) < model.config.vocab_size
    with torch.no_grad():
        logits = model(ids).logits
    assert bool(torch.isfinite(logits).all())
    if "chat_template" in recipe.read_text():
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_recipes_cover_every_method_and_key() -> None:
    from reasonvec import config
    from reasonvec.config_values import CONDITION
    from reasonvec.merging.methods import METHODS

    text = "\n".join(path.read_text() for path in RECIPES)
    assert len(RECIPES) >= 25
    for method in METHODS:
        assert f"merge_method: {method}\n" in text
    for key in {
        *config._TOP,
        *config._SOURCE,
        *config._SLICE,
        *config._MODULE,
        *config._TOKENIZER,
        *config._TOKEN,
        *CONDITION,
    }:
        assert f"{key}:" in text, key


# ---- parameters


def test_precedence_is_source_slice_module_global(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        """
merge_method: task_arithmetic
base_model: models/base
modules:
  default:
    slices:
      - sources:
          - {model: models/base, layer_range: [0, 1]}
          - {model: models/rl, layer_range: [0, 1], parameters: {weight: 1}}
        parameters: {weight: 2}
      - sources:
          - {model: models/base, layer_range: [1, 2]}
          - {model: models/rl, layer_range: [1, 2]}
        parameters: {weight: 2}
      - sources:
          - {model: models/base, layer_range: [2, 3]}
          - {model: models/rl, layer_range: [2, 3]}
    parameters: {weight: 3}
parameters: {weight: 4, lambda: 0.5}
""",
    )
    found = coefficients(plan)
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [
        (0.5,),
        (1.0,),
        (1.5,),
    ]
    # Embeddings go with the first slice, norm and head with the last.
    assert found["model.embed_tokens.weight"] == (0.5,)
    assert found["model.norm.weight"] == found["lm_head.weight"] == (1.5,)


def test_a_filter_that_fits_nowhere_leaves_it_to_the_next_level(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        """
merge_method: task_arithmetic
base_model: models/base
models:
  - model: models/rl
    parameters:
      weight:
        - {filter: mlp.up, value: 7}
        - {filter: mlp, value: 8}
        - {filter: mlp.down, value: 9}
parameters:
  weight: 1
""",
    )
    found = coefficients(plan)
    assert found["model.layers.0.mlp.up_proj.weight"] == (7.0,)
    assert found["model.layers.0.mlp.down_proj.weight"] == (8.0,)  # the first that fits
    assert found["model.layers.0.self_attn.q_proj.weight"] == (1.0,)


def test_gradients_are_straight_lines_over_the_layers(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        """
merge_method: task_arithmetic
base_model: models/base
models:
  - model: models/rl
    parameters: {weight: [0.5, 1, 3]}
""",
    )
    found = coefficients(plan)
    values = [found[f"model.layers.{i}.input_layernorm.weight"][0] for i in range(4)]
    assert values == pytest.approx([0.5, 0.5 + 1 / 3, 1 + 2 / 3, 3])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert found[name] == (0.5,)


def test_numbers_that_yaml_reads_as_words(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        "merge_method: ram\nbase_model: models/base\nmodels: [{model: models/rl}]\nparameters: {epsilon: 1e-4}\n",
    )
    assert {t.method["epsilon"] for t in plan.tensors if t.method} == {1e-4}


def test_linear_values(tmp_path: Path, place: Path) -> None:
    out = tmp_path / "out"
    rv.read_config(RECIPES[[p.stem for p in RECIPES].index("linear")]).save(out)
    a, b, made = (tensors_of(p) for p in (place / "models/sft", place / "models/instruct", out))
    assert made.keys() == a.keys()
    for name, value in made.items():
        expected = np.float32(0.75) * f32(a[name]) + np.float32(0.25) * f32(b[name])
        assert (value == expected.astype(value.dtype)).all(), name


def test_several_documents_are_one_expression(tmp_path: Path, place: Path) -> None:
    out = tmp_path / "out"
    recipe = next(p for p in RECIPES if p.stem == "several_merges")
    report = rv.read_config(recipe).save(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    base, sft, rl, instruct, made = (
        tensors_of(p)
        for p in (*(place / "models" / n for n in ("base", "sft", "rl", "instruct")), out)
    )
    for name, value in made.items():
        b = base[name].astype(np.float64)
        average = (sft[name].astype(np.float64) + rl[name]) / 2
        expected = b + 0.6 * (average - b) + 0.4 * (instruct[name].astype(np.float64) - b)
        assert np.allclose(value.astype(np.float64), expected, rtol=2**-8, atol=1e-6), name
    assert "average" in report.recipe


# ---- slices


def test_stacked_layers_and_config(tmp_path: Path, place: Path) -> None:
    config = place / "models/sft/config.json"
    said = json.loads(config.read_text())
    listed = said | {"layer_types": ["a", "b", "c", "d"], "max_window_layers": 4}
    shutil.copytree(place / "models", tmp_path / "models")
    for name in ("sft", "instruct"):
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(listed))
    text = """
merge_method: passthrough
slices:
  - sources: [{model: models/sft, layer_range: [0, 3]}]
  - sources: [{model: models/instruct, layer_range: [1, 4]}]
"""
    path = write(tmp_path, text.replace("models/", f"{tmp_path.as_posix()}/models/"))
    rv.read_config(path).save(tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    sft, instruct = tensors_of(place / "models/sft"), tensors_of(place / "models/instruct")
    for layer, (source, number) in enumerate(
        [(sft, 0), (sft, 1), (sft, 2), (instruct, 1), (instruct, 2), (instruct, 3)]
    ):
        for part in ("mlp.up_proj.weight", "self_attn.q_proj.bias"):
            assert (
                made[f"model.layers.{layer}.{part}"] == source[f"model.layers.{number}.{part}"]
            ).all()
    assert (made["model.embed_tokens.weight"] == sft["model.embed_tokens.weight"]).all()
    assert (made["model.norm.weight"] == instruct["model.norm.weight"]).all()
    assert (made["lm_head.weight"] == instruct["lm_head.weight"]).all()
    patched = json.loads((tmp_path / "out/config.json").read_text())
    assert patched["num_hidden_layers"] == patched["max_window_layers"] == 6
    assert patched["layer_types"] == ["a", "b", "c", "b", "c", "d"]


def sliced(*ranges: str) -> str:
    """A module of slices of rl."""
    parts = (f"{{sources: [{{model: models/rl, layer_range: {part}}}]}}" for part in ranges)
    return f"{{slices: [{', '.join(parts)}]}}"


def test_a_sliced_module_makes_its_own_share(tmp_path: Path, place: Path) -> None:
    path = write(
        tmp_path,
        "merge_method: passthrough\nmodules:\n  mlp: {models: [{model: models/sft}]}\n"
        f"  self_attn: {sliced('[2, 4]', '[0, 2]')}\n  default: {sliced('[0, 4]')}\n",
    )
    out = tmp_path / "out"
    rv.read_config(path).save(out, sync=False)
    found, sft, rl = (tensors_of(p) for p in (out, place / "models/sft", place / "models/rl"))
    assert found.keys() == rl.keys()
    for name, tensor in found.items():
        source = name
        if ".self_attn." in name:
            layer = int(name.split(".")[2])
            source = name.replace(f".{layer}.", f".{(layer + 2) % 4}.", 1)
        expected = sft[name] if ".mlp." in name else rl[source]
        assert tensor.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        (f"mlp: {{models: [models/sft]}}, default: {sliced('[0, 4]', '[0, 1]')}",
         "mlp makes 4, default makes 5"),
        (f"self_attn: {sliced('[0, 2]')}",
         "self_attn makes 2, what no module takes has 4"),
        (f"lm_head: {sliced('[0, 4]')}, default: {{models: [models/rl]}}",
         "lm_head: has slices, and none of the layers model.layers.*"),
    ],
)  # fmt: skip
def test_modules_that_make_no_whole_layers(tmp_path: Path, modules: str, found: str) -> None:
    plan = planned(tmp_path, f"merge_method: passthrough\nmodules: {{{modules}}}\n")
    assert [p.kind for p in plan.errors] == ["module"]
    assert found in plan.errors[0].message


def test_a_tensor_that_two_slices_make_is_refused(tmp_path: Path, place: Path) -> None:
    # Prediction layers lie behind the last one: a longer stack would run into them.
    extra = shutil.copytree(place / "models/rl", tmp_path / "extra")
    name = "model.layers.4.mlp.up_proj.weight"
    save_file({name: np.ones((48, 32), np.float32)}, extra / "model-extra.safetensors")
    index = extra / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"][name] = "model-extra.safetensors"
    index.write_text(json.dumps(said))
    part = f"{{sources: [{{model: {extra}, layer_range: [0, 4]}}]}}"
    again = f"{{sources: [{{model: {place / 'models/rl'}, layer_range: [0, 1]}}]}}"
    plan = planned(tmp_path, f"merge_method: passthrough\nslices: [{part}, {again}]\n")
    assert [p.message for p in plan.errors] == [
        f"{name} would be written 2 times: two modules or slices make it"
    ]


@pytest.mark.parametrize(
    ("ranges", "found"),
    [
        ("[[0, 2], [0, 3]]", "one length"),
        ("[[2, 9], [2, 9]]", "it has 4 layers"),
        ("[[2, 2], [2, 2]]", "is empty or turned round"),
        ("[[2], [2, 3]]", "expected [first layer, one past the last]"),
    ],
)
def test_layer_ranges_that_do_not_fit(tmp_path: Path, ranges: str, found: str) -> None:
    import yaml

    first, second = yaml.safe_load(ranges)
    text = f"""
merge_method: linear
parameters: {{weight: 1}}
slices:
  - sources:
      - {{model: models/sft, layer_range: {first}}}
      - {{model: models/rl, layer_range: {second}}}
"""
    with pytest.raises(rv.ReasonvecError, match=found.replace("[", r"\[")):
        rv.read_config(write(tmp_path, text)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- tokenizers


def rows_of(folder: Path) -> dict[str, int]:
    found = rv.open(folder).base.layout.tokens()
    assert found is not None
    return dict(found)


def test_union_lays_rows_by_token(tmp_path: Path, place: Path) -> None:
    out = tmp_path / "out"
    rv.read_config(next(p for p in RECIPES if p.stem == "tokenizer_union")).save(out)
    ours, theirs, both = (rows_of(p) for p in (place / "models/sft", place / "models/chatty", out))
    assert set(both) == {*ours, *NEW_TOKENS}
    assert {t: i for t, i in both.items() if t in ours} == ours
    sft, chatty, made = (
        tensors_of(p) for p in (place / "models/sft", place / "models/chatty", out)
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for token, row in both.items():
            a = f32(sft[name][ours[token]]) if token in ours else f32(chatty[name][theirs[token]])
            expected = np.float32(0.5) * a + np.float32(0.5) * f32(chatty[name][theirs[token]])
            assert (made[name][row] == expected.astype(made[name].dtype)).all(), token
    assert made["model.embed_tokens.weight"].shape[0] == 320  # the padding of the first stays


def test_union_with_a_method_that_is_not_linear(tmp_path: Path, place: Path) -> None:
    out = tmp_path / "out"
    text = "merge_method: ties\nbase_model: models/sft\nparameters: {weight: 0.5, density: 0.5}\nmodels: [{model: models/instruct}, {model: models/chatty}]\ntokenizer_source: union\n"
    rv.read_config(write(tmp_path, text)).save(out)
    chatty, sft, instruct, made = (
        tensors_of(p) for p in (*(place / "models" / n for n in ("chatty", "sft", "instruct")), out)
    )
    theirs, both = rows_of(place / "models/chatty"), rows_of(out)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == []
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for token in NEW_TOKENS:  # one model has them, so all have that row, and no delta
            assert (made[name][both[token]] == chatty[name][theirs[token]]).all()
        ours, moved, now = (f32(t[name])[both["A"]] for t in (sft, instruct, made))
        # "A" is in another row of chatty, and is instruct's "A" there: each element is kept or not.
        assert (np.isclose(now, ours, rtol=2**-8) | np.isclose(now, moved, rtol=2**-7)).all()


def test_rules_for_tokens_and_padding(tmp_path: Path, place: Path) -> None:
    out = tmp_path / "out"
    rv.read_config(next(p for p in RECIPES if p.stem == "tokenizer_section")).save(out)
    instruct, made = tensors_of(place / "models/instruct"), tensors_of(out)
    both, ours = rows_of(out), rows_of(place / "models/sft")
    table, source = made["lm_head.weight"], instruct["lm_head.weight"]
    assert table.shape[0] == 384
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 384
    # Forced: all models have instruct's row, and 1 + 0.5 (x - x) twice is x.
    assert np.allclose(
        f32(table[both["<|im_start|>"]]), f32(source[ours["<|im_start|>"]]), rtol=2**-8
    )
    assert np.allclose(
        f32(table[both["<|spare|>"]]), f32(source[ours["<|endoftext|>"]]), rtol=2**-8
    )
    assert not f32(table[both["<|blank|>"]]).any()
    assert not f32(table[384 - 64 :]).any()
    assert (
        "<|im_start|>" in json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    )


@pytest.mark.parametrize("multiple", [30_000_000, 10**12])
def test_padding_has_a_bound(tmp_path: Path, multiple: int) -> None:
    text = "merge_method: passthrough\nmodels: [models/sft]\n"
    plan = planned(tmp_path, f"{text}tokenizer: {{pad_to_multiple_of: {multiple}}}\n")
    assert [p.kind for p in plan.errors] == ["tokenizer"]
    assert f"makes {multiple} rows of 320" in plan.errors[0].message
    plan = planned(tmp_path, f"{text}tokenizer: {{pad_to_multiple_of: 512}}\n")
    assert not plan.errors
    assert {t.shape[0] for t in plan.tensors if "embed" in t.name} == {512}


def test_ids_of_tokens_have_a_bound(tmp_path: Path, place: Path) -> None:
    model = shutil.copytree(place / "models/sft", tmp_path / "model")
    path = model / "tokenizer.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["model"]["vocab"]["far"] = 10**9
    path.write_text(json.dumps(said), encoding="utf-8")
    text = f"merge_method: passthrough\nmodels: [{model}]\ntokenizer_source: base\n"
    plan = planned(tmp_path, text)
    assert [p.kind for p in plan.errors] == ["tokenizer"]
    assert f"{path}: 'far' has the id 1000000000" in plan.errors[0].message
    said["model"]["vocab"]["far"] = 400  # a few rows more than there are: no harm
    path.write_text(json.dumps(said), encoding="utf-8")
    assert not planned(tmp_path, text).errors


def test_a_row_by_its_number(tmp_path: Path, place: Path) -> None:
    path = write(
        tmp_path,
        "merge_method: passthrough\nmodels: [models/sft]\ntokenizer:\n  tokens:\n"
        "    <|new|>: {source: {model: models/rl, token_id: 5}}\n",
    )
    out = tmp_path / "out"
    rv.read_config(path).save(out, sync=False)
    made = tensors_of(out)["model.embed_tokens.weight"]
    rl = tensors_of(place / "models/rl")["model.embed_tokens.weight"]
    assert made[rows_of(out)["<|new|>"]].tobytes() == rl[5].tobytes()


def test_a_chat_template_that_is_no_text(tmp_path: Path, place: Path) -> None:
    model = shutil.copytree(place / "models/sft", tmp_path / "model")
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe{{x}}")
    text = f"merge_method: passthrough\nmodels: [{model}]\nchat_template: auto\n"
    with pytest.raises(rv.FormatError, match=r"chat_template\.jinja: expected .* in UTF-8"):
        planned(tmp_path, text)


def test_a_token_of_several_takes_their_mean(tmp_path: Path, place: Path) -> None:
    shutil.copytree(place / "models", tmp_path / "models")
    shutil.copytree(tmp_path / "models/chatty", tmp_path / "models/second")
    second = tensors_of(tmp_path / "models/second")
    from safetensors.numpy import save_file

    second = {k: (f32(v) * 2).astype(v.dtype) for k, v in second.items()}
    save_file(second, tmp_path / "models/second/model.safetensors", {"format": "pt"})
    text = "merge_method: linear\nbase_model: m/sft\nparameters: {weight: 1}\nmodels: [{model: m/sft}, {model: m/chatty}, {model: m/second}]\ntokenizer_source: union\n"
    path = write(tmp_path, text.replace("m/", f"{tmp_path.as_posix()}/models/"))
    rv.read_config(path).save(tmp_path / "out")
    made, chatty = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "models/chatty")
    row = f32(chatty["lm_head.weight"][rows_of(tmp_path / "models/chatty")[NEW_TOKENS[0]]])
    got = f32(made["lm_head.weight"][rows_of(tmp_path / "out")[NEW_TOKENS[0]]])
    assert np.allclose(got, 1.5 * row, rtol=2**-7)  # (1.5 + 1 + 2) / 3


# ---- the command


def test_dry_run_shows_every_tensor_and_reads_nothing(tmp_path: Path) -> None:
    recipe = next(p for p in RECIPES if p.stem == "ties")
    result = CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0, result.output
    lines = [
        line
        for line in result.output.splitlines()
        if line.startswith("model.layers.2.mlp.up_proj.weight:")
    ]
    assert len(lines) == 1
    assert "ties(density=" in lines[0]
    assert "of base, rl, instruct, sft" in lines[0]
    assert not (tmp_path / "out").exists()
    said = CliRunner().invoke(
        main, ["merge", str(recipe), str(tmp_path / "out"), "--dry-run", "--json"]
    )
    row = next(
        t
        for t in json.loads(said.output)["tensors"]
        if t["name"] == "model.layers.3.mlp.up_proj.weight"
    )
    assert row["method"] == {
        "kind": "ties",
        "density": [0.1, 0.5, 0.33],
        "normalize": True,
        "lambda": 1.0,
    }
    assert row["coefficients"] == [1.0, 1.0, 0.5]


def test_flags_of_mergekit_are_accepted(tmp_path: Path) -> None:
    recipe = next(p for p in RECIPES if p.stem == "linear")
    flags = ["--cuda", "--low-cpu-memory", "--lazy-unpickle", "--no-copy-tokenizer", "--allow-crimes", "--trust-remote-code",
             "--no-write-model-card", "--safe-serialization", "--clone-tensors", "--random-seed", "3", "-v", "--num-threads", "1",
             "--out-shard-size", "100K", "--transformers-cache", "x", "--lora-merge-cache", "y", "--device", "cuda"]  # fmt: skip
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["merge", str(recipe), str(out), *flags])
    assert result.exit_code == 0, result.output
    assert "note: --cuda changes nothing" in result.stderr
    assert "--trust-remote-code changes nothing: code of a model is never run" in result.stderr
    assert not list(out.glob("tokenizer*"))
    assert not (out / "README.md").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert {p.name for p in out.glob("*.safetensors")} == set(files)
    result = CliRunner().invoke(main, ["merge", str(recipe), str(out), "-q", "--cuda"])
    assert result.exit_code == 2  # not empty
    assert "--overwrite" in result.stderr
    assert "note:" not in result.stderr
    again = CliRunner().invoke(main, ["merge", str(recipe), str(out), "-q", "--overwrite"])
    assert again.exit_code == 0, again.output
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]


def test_undo_of_a_merge_says_that_there_is_no_target(tmp_path: Path) -> None:
    recipe = next(p for p in RECIPES if p.stem == "linear")
    assert (
        CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out"), "-q"]).exit_code == 0
    )
    result = CliRunner().invoke(main, ["undo", str(tmp_path / "out"), "-o", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "is a merge of several models" in result.stderr


def test_a_gradient_in_a_slice_of_one_layer_takes_its_last_value(tmp_path: Path) -> None:
    text = """\
merge_method: passthrough
slices:
  - sources: [{model: models/sft, layer_range: [0, 1]}]
    parameters: {scale: [2, 3, 4]}
  - sources: [{model: models/sft, layer_range: [1, 3]}]
    parameters: {scale: [2, 4]}
"""
    found = coefficients(planned(tmp_path, text))
    name = "model.layers.{}.mlp.up_proj.weight".format
    assert [found[name(i)] for i in range(3)] == [(4.0,), (2.0,), (4.0,)]
    assert found["model.embed_tokens.weight"] == (2.0,)


def test_a_dry_run_shows_weights_of_what_is_weighted(tmp_path: Path) -> None:
    text = "merge_method: {}\nbase_model: models/base\nmodels: [{{model: models/rl{}}}]\n{}"
    for method, own, rest, shown in (
        ("slerp", "", "parameters: {t: 0.5}", "slerp(t=0.5) of base, rl\n"),
        ("ties", ", parameters: {weight: 0.25}", "", " of base, rl times 0.25\n"),
    ):
        file = write(tmp_path, text.format(method, own, rest))
        result = CliRunner().invoke(main, ["merge", str(file), str(tmp_path / "out"), "--dry-run"])
        assert result.exit_code == 0, result.output
        assert shown in result.output
