"""What stands before a file's names in the model: the rules, and the table against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_spectral import write

from reasonvec.cli.app import main
from reasonvec.compat.class_prefix import _PREFIXES, class_prefix
from reasonvec.compat.layout import Layout, TensorInfo


def layout(name: str, architecture: str | None, kind: str | None) -> Layout:
    config: dict[str, object] = {"model_type": kind}
    if architecture is not None:
        config["architectures"] = [architecture]
    return Layout(Path("m"), {name: TensorInfo(name, "F32", (4, 4), "m")}, config)


@pytest.mark.parametrize(
    ("name", "architecture", "kind", "prefix"),
    [
        ("transformer.h.0.attn.c_attn.weight", "GPT2LMHeadModel", "gpt2", ""),
        ("h.0.attn.c_attn.weight", "GPT2LMHeadModel", "gpt2", "transformer."),
        ("h.0.attn.c_attn.weight", "GPT2Model", "gpt2", ""),
        ("h.0.attn.c_attn.weight", "GPT2ForSequenceClassification", "gpt2", "transformer."),
        ("h.0.attn.c_attn.weight", None, "gpt2", None),
        ("layers.0.mlp.up_proj.weight", "Qwen3ForCausalLM", "qwen3", "model."),
        ("model.layers.0.mlp.up_proj.weight", "Qwen3ForCausalLM", "qwen3", ""),
        ("layers.0.mlp.up_proj.weight", "OursForCausalLM", "ours", None),
        ("encoder.layer.0.output.dense.weight", "BertForMaskedLM", "bert", "bert."),
        ("decoder.layers.0.fc1.weight", "OPTForCausalLM", "opt", "model."),
        ("backbone.blocks.0.weight", "OursForCausalLM", "ours", ""),
    ],
)
def test_the_prefix(name: str, architecture: str | None, kind: str, prefix: str | None) -> None:
    assert class_prefix(layout(name, architecture, kind)) == prefix


def test_an_unknown_class_is_told(tmp_path: Path) -> None:
    p, n = (
        write(tmp_path / folder, {"h.0.mlp.c_fc.weight": ("F32", values)})
        for folder, values in (("p", np.eye(8, dtype=np.float32)), ("n", np.zeros((8, 8), "f4")))
    )
    vector = p - n
    (warning,) = vector.to_lora(tmp_path / "lora", rank=1).warnings
    assert "not known here" in warning
    assert warning in (tmp_path / "lora" / "README.md").read_text()
    pair = ["--from", str(tmp_path / "p"), str(tmp_path / "n")]
    done = CliRunner().invoke(main, ["to-lora", *pair, "-o", str(tmp_path / "l2"), "--rank", "1"])
    assert done.exit_code == 0, done.output
    assert "warning: " in done.output


@pytest.mark.models
def test_the_table_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = {
        kind: getattr(transformers, names[kind]).base_model_prefix
        for kind in _PREFIXES
        if kind in names
    }
    assert len(found) > 30
    assert found == {kind: _PREFIXES[kind] for kind in found}
