"""What is wrong with a config file: typos, files that say nothing, files that mean harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from config_files import planned, write
from models import make_models

import reasonvec as rv
from reasonvec.cli.app import main
from reasonvec.config import read_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def messages(path: Path, *, strict: bool = False) -> list[str]:
    return [p.message for p in read_recipe(path, strict=strict).problems]


def test_typos_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
merge_method: ties
base_modle: models/base
base_model: models/base
models:
  - model: models/rl
    paramters: {}
    parameters: {weight: 1, densty: 0.5, gamma: 3}
""",
    )
    told = messages(path)
    assert any("'base_modle' is not known" in m and "'base_model'" in m for m in told)
    assert any("models[0]: the key 'paramters'" in m and "'parameters'" in m for m in told)
    assert any("the parameter of ties 'densty'" in m and "'density'" in m for m in told)
    assert len(told) == 4
    assert {p.severity for p in read_recipe(path).problems} == {"warning"}
    with pytest.raises(rv.MismatchError, match="densty"):
        rv.read_config(path, strict=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("merge_method: linaer\nmodels: [{model: models/sft}]", "did you mean 'linear'"),
        ("models: [{model: models/sft}]", "no merge_method"),
        ("merge_method: linear", "exactly one of models, slices and modules"),
        ("merge_method: linear\nmodels: [{model: models/sft}]\nslices: [{sources: [{model: models/sft, layer_range: [0, 1]}]}]", "found models and slices"),
        ("merge_method: linear\nmodels: []", "a list with something in it"),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "models[0]: has no model"),
        ("merge_method: linear\nmodels: [{model: someone/some-7b@v2, parameters: {weight: 1}}]", "hf download someone/some-7b --revision v2 --local-dir some-7b"),
        ("merge_method: linear\nmodels: [{model: ./nowhere/at-all, parameters: {weight: 1}}]", "no such folder"),
        ("merge_method: linear\nmodels: [{model: models/sft, parameters: {weight: heavy}}]", "expected a finite number, found 'heavy'"),
        ("merge_method: linear\nmodels: [{model: models/sft, parameters: {weight: [1, .nan]}}]", "expected a finite number"),
        ("merge_method: linear\nmodels: [{model: models/sft, parameters: {weight: 1}}]\ndtype: int8", "expected float32, float16 or bfloat16"),
        ("merge_method: linear\nmodels: [{model: models/sft}]\ntokenizer_source: base\ntokenizer: {source: base}", "both tokenizer_source and tokenizer"),
        ("merge_method: linear\nmodels: [{model: models/sft}]\ntokenizer: {pad_to_multiple_of: 0}", "positive whole number"),
        ("merge_method: linear\nmerge_method: ties\nmodels: [{model: models/sft}]", "stands twice"),
        ("merge_method: [", "expected YAML"),
        ("- 1\n- 2", "expected a mapping"),
        ("", "is empty"),
        ("name: a\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]", "made of itself"),
        ("name: a\nmerge_method: linear\nmodels: [{model: models/sft}]\n---\nname: a\nmerge_method: linear\nmodels: [{model: models/sft}]", "two documents are called 'a'"),
    ],
)  # fmt: skip
def test_files_that_say_nothing_useful(tmp_path: Path, text: str, found: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(rv.ReasonvecError) as raised:
        rv.read_config(path)
    assert found in str(raised.value)
    assert str(path) in str(raised.value)


BOMB = "x0: &x0 [1, 1]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 11)
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BOMB + "dtype: *x10\n", "its aliases (*name) repeat parts of it"),
        (BOMB + "parameters: {scale: *x10}\n", "its aliases (*name) repeat parts of it"),
        (f"x: &x {'y' * 60000}\nz: [{', '.join(['*x'] * 100)}]\n", "its aliases (*name) repeat"),
        (f"parameters: {{scale: {'9' * 400}}}\n", "expected a finite number, found 9999"),
        (f"parameters: {{scale: 0x{'f' * 4000}}}\n", "a number has 4002 characters"),
        (f"parameters: {{scale: 1{':00' * 400}.5}}\n", "a number has 1203 characters"),
        (f"parameters: {{scale: 1{':00' * 250}.5}}\n", "expected YAML: int too large"),
        ("base_model: ~nosuchuser/x\n", "~nosuchuser/x: there is no such folder"),
        (f"base_model: {'a' * 5000}\n", "there is no such folder"),
        ('base_model: "a\\0b"\n', "there is no such folder"),
        ('base_model: "\\ud800"\n', "there is no such folder"),
    ],
    ids=range(11),
)
def test_files_that_mean_harm(tmp_path: Path, text: str, found: str) -> None:
    path = write(tmp_path, f"merge_method: passthrough\nmodels: [models/sft]\n{text}")
    with pytest.raises(rv.ReasonvecError) as raised:
        rv.read_config(path)
    assert found in str(raised.value)
    assert str(path) in str(raised.value)


def test_every_problem_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "merge_method: linaer\ndtype: int8\nmodels:\n- {model: org/none}\n- {model: models/sft, parameters: {weight: x}}\n",
    )
    assert len([p for p in read_recipe(path).problems if p.severity == "error"]) == 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("merge_method: ties\nmodels: [{model: models/rl, parameters: {weight: 1}}]", "ties: needs a base"),
        ("merge_method: slerp\nbase_model: models/sft\nmodels: [{model: models/rl}, {model: models/instruct}]\nparameters: {t: 0.5}", "needs exactly 1 model besides the base, found 2"),
        ("merge_method: slerp\nbase_model: models/sft\nmodels: [{model: models/rl}]", "needs the parameter t"),
        ("merge_method: linear\nmodels: [{model: models/sft}, {model: models/rl, parameters: {weight: 1}}]", "sft has no weight"),
        ("merge_method: linear\nmodels: [{model: models/sft, parameters: {weight: 1}}, {model: models/rl, parameters: {weight: -1}}]", "sum to 0"),
        ("merge_method: karcher\nmodels: [models/sft, models/rl]\nparameters: {max_iter: 1000000000}", "expected a whole number from 1 to 10000"),
        ("merge_method: karcher\nmodels: [models/sft, models/rl]\nparameters: {max_iter: 1.5}", "max_iter is 1.5, expected a whole number"),
        ("merge_method: ties\nbase_model: models/base\nmodels: [{model: models/rl, parameters: {weight: 1, density: 1.5}}]", "density is 1.5, expected a share"),
        ("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: models/sft}, {model: models/chatty}]", "tokenizer_source: union"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_run_say_so_once(tmp_path: Path, text: str, found: str) -> None:
    plan = planned(tmp_path, text)
    assert len([p for p in plan.errors if found in p.message]) == 1, [
        p.message for p in plan.errors
    ]
    with pytest.raises(rv.MismatchError):
        plan.run()
    assert not (tmp_path / "out").exists()


def test_a_missing_base_is_one_problem(tmp_path: Path) -> None:
    text = "merge_method: slerp\nmodels: [{model: models/rl}, {model: models/sft}]\nparameters: {t: 0.5}"
    problems = planned(tmp_path, text).problems
    assert [p.kind for p in problems if p.severity == "error"] == ["base"]


def test_typos_are_named_beside_an_error(tmp_path: Path) -> None:
    """A file that describes no merge is answered with all that is wrong in it."""
    text = "merge_method: tyes\nbase_modle: models/base\nmodels: [{model: models/rl}]"
    result = CliRunner().invoke(main, ["merge", str(write(tmp_path, text)), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "did you mean 'ties'?" in result.output
    assert "did you mean 'base_model'?" in result.output
