"""Outputs in the hands of safetensors and transformers, and the traps that need real folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from shards import Stored, contents, read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec.algebra import Point, Vector
from reasonvec.family import Family, make_family

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")
pytestmark = pytest.mark.models

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ALPHA = 0.8


def donors(family: Family) -> Vector:
    return rv.open(family.rl) - rv.open(family.sft)


def point(family: Family) -> Point:
    return rv.open(family.instruct) + ALPHA * donors(family)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, as the safetensors library reads it."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def merged(family: Family, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same merge in torch: difference, scale and sum in f32, and one rounding."""
    target, rl, sft = (tensors_of(f) for f in (family.instruct, family.rl, family.sft))
    return {
        name: (t.float() + ALPHA * (rl[name].float() - sft[name].float())).to(dtype)
        for name, t in target.items()
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(24).reshape(2, 12) * 11 % 250
    with torch.no_grad():
        return model.eval()(tokens).logits


def load(folder: Path, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("tied", ["family", "untied_family"])
@pytest.mark.parametrize("out_dtype", [None, "float32", "float16"])
def test_logits_are_those_of_a_merge_in_torch(
    tied: str, out_dtype: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Equal weights, bit for bit, and so equal logits, in every dtype, from folder to model."""
    family = request.getfixturevalue(tied)
    point(family).save(tmp_path / "out", out_dtype=out_dtype)
    dtype = getattr(torch, out_dtype or "bfloat16")
    wanted = merged(family, dtype)
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name

    model = load(tmp_path / "out")
    assert model.dtype == dtype
    by_hand = load(family.instruct, dtype)
    by_hand.load_state_dict(wanted, strict=False)
    by_hand.tie_weights()
    assert torch.equal(logits(model), logits(by_hand))
    assert not torch.equal(logits(model), logits(load(family.instruct, dtype)))


def test_a_stored_vector_gives_the_same_model(family: Family, tmp_path: Path) -> None:
    """Through a vector folder, or straight from the donors: the same bytes in every shard."""
    donors(family).save(tmp_path / "reason")
    (rv.open(family.instruct) + ALPHA * rv.load(tmp_path / "reason")).save(tmp_path / "a")
    point(family).save(tmp_path / "b")
    assert read_checkpoint(tmp_path / "a") == read_checkpoint(tmp_path / "b")


def test_sft_plus_the_vector_is_the_rl_model(family: Family, tmp_path: Path) -> None:
    """The exact inverse test, seen from outside: the donor's weights and logits come back."""
    donors(family).save(tmp_path / "reason")
    (rv.open(family.sft) + rv.load(tmp_path / "reason")).save(tmp_path / "out")
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(family.rl)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(family.rl)))


def test_the_vector_itself_opens_with_safetensors(family: Family, tmp_path: Path) -> None:
    """Every part of a vector folder is an ordinary tensor to the plain library."""
    donors(family).save(tmp_path / "reason")
    rows = json.loads((tmp_path / "reason" / "vector_config.json").read_text())["tensors"]
    found = tensors_of(tmp_path / "reason")
    assert {part["entry"] for row in rows for part in row["parts"].values()} == set(found)


# Whatever else is in the target's folder


def side_files(folder: Path) -> dict[str, bytes]:
    skip = ("reasonvec.json", ".safetensors")
    return {name: data for name, data in contents(folder).items() if not name.endswith(skip)}


def test_everything_else_is_the_targets_byte_for_byte(own: Family, tmp_path: Path) -> None:
    """Tokenizer, chat template, generation config, a stranger's file: kept, and loaded as they were."""
    (own.instruct / "chat_template.jinja").write_text("{{ messages }}\r\n")
    (own.instruct / "merges.txt").write_bytes(b"#version: 0.2\n\xff")
    (own.instruct / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (own.instruct / ".cache").write_text("hidden")
    point(own).save(tmp_path / "out")
    wanted = side_files(own.instruct)
    assert {wanted.pop("pytorch_model.bin"), wanted.pop(".cache")} == {b"\x80\x04.", b"hidden"}
    assert side_files(tmp_path / "out") == wanted


def test_shards_keep_their_headers_and_order(family: Family, tmp_path: Path) -> None:
    """Names, order, offsets and metadata of every shard, byte for byte, when no dtype changes."""
    point(family).save(tmp_path / "out")
    for path in family.instruct.glob("*.safetensors"):
        theirs, ours = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        end = 8 + int.from_bytes(theirs[:8], "little")
        assert ours[:end] == theirs[:end]
        assert len(ours) == len(theirs)


def test_config_changes_only_where_the_dtype_did(family: Family, tmp_path: Path) -> None:
    """torch_dtype in config.json, total_size in the index, and nothing else."""
    point(family).save(tmp_path / "out", out_dtype="float32")
    before, after = side_files(family.instruct), side_files(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"config.json", "model.safetensors.index.json"}
    was, now = (json.loads(files["config.json"]) for files in (before, after))
    assert was | {"torch_dtype": "float32"} == now
    assert list(was) == list(now)
    was, now = (json.loads(files["model.safetensors.index.json"]) for files in (before, after))
    assert was["weight_map"] == now["weight_map"]
    assert now["metadata"]["total_size"] == 2 * was["metadata"]["total_size"]


@pytest.mark.parametrize("kept_in", ["field", "file"])
def test_a_chat_template_is_taken_only_on_request(
    own: Family, tmp_path: Path, kept_in: str
) -> None:
    """The donors' template, which differs, comes with chat_template_from and not otherwise."""

    def template(folder: Path) -> object:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return tokenizer.chat_template

    if kept_in == "file":
        (own.rl / "chat_template.jinja").write_text("{{ 'from a file' }}")
    assert template(own.rl) != template(own.instruct)
    point(own).save(tmp_path / "plain")
    assert template(tmp_path / "plain") == template(own.instruct)
    point(own).save(tmp_path / "taken", chat_template_from=own.rl)
    assert template(tmp_path / "taken") == template(own.rl)
    assert (tmp_path / "taken" / "tokenizer.json").read_bytes() == (
        own.instruct / "tokenizer.json"
    ).read_bytes()
    (own.sft / "tokenizer_config.json").unlink()
    with pytest.raises(rv.ReasonvecError, match=f"{at(own.sft)}: has no chat template"):
        point(own).save(tmp_path / "none", chat_template_from=own.sft)
    assert not contents(tmp_path / "none")


# Traps


@pytest.fixture
def own(family: Family, tmp_path: Path) -> Family:
    """A family of a test's own, to be changed."""
    for name in ("sft", "rl", "instruct"):
        shutil.copytree(getattr(family, name), tmp_path / name)
    return Family(tmp_path, tmp_path / "sft", tmp_path / "rl", tmp_path / "instruct")


Change = Callable[[dict[str, Stored]], Mapping[str, Stored]]


def rewrite(folder: Path, change: Change) -> None:
    """Other tensors in the same folder, in one shard."""
    tensors = dict(change(read_checkpoint(folder)))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_checkpoint(folder, tensors)


def adding(name: str, tensor: Stored) -> Change:
    return lambda tensors: tensors | {name: tensor}


def without(name: str) -> Change:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def at(folder: Path) -> str:
    """A path, for a regular expression."""
    return re.escape(str(folder))


def refused(save: Callable[[], object], *said: str) -> str:
    """One MismatchError that says all of it."""
    with pytest.raises(rv.MismatchError) as caught:
        save()
    for words in said:
        assert re.search(words, str(caught.value)), (words, str(caught.value))
    return str(caught.value)


def test_a_padded_vocabulary_is_never_resized(family: Family, tmp_path: Path) -> None:
    """Other rows, same tokens: refused; matched by token, the common rows move and padding stays."""
    padded = make_family(tmp_path / "padded", vocab=5184)
    sum_ = rv.open(padded.instruct) + donors(family)
    refused(
        lambda: sum_.save(tmp_path / "out"),
        f"{EMBED} has 5184 rows, but .* has 5120; the tokens are the same",
        "nothing is resized",
        "--vocab match-tokens",
    )
    report = sum_.save(tmp_path / "matched", vocab="match-tokens")
    assert any("5120 of 5184 rows" in p.message for p in report.warnings)
    target, rl, sft = (tensors_of(f)[EMBED] for f in (padded.instruct, family.rl, family.sft))
    wanted = target.clone()
    wanted[:5120] = (target[:5120].float() + (rl.float() - sft.float())).to(torch.bfloat16)
    assert torch.equal(tensors_of(tmp_path / "matched")[EMBED], wanted)
    assert load(tmp_path / "matched").config.vocab_size == 5184
    sum_.save(tmp_path / "skipped", vocab="skip")
    assert torch.equal(tensors_of(tmp_path / "skipped")[EMBED], target)


def test_every_tensor_is_accounted_for(own: Family, tmp_path: Path) -> None:
    """Missing in one donor, in both, in the target: errors that name it; a policy lets two pass."""
    name = "model.layers.1.mlp.up_proj.weight"
    whole = read_checkpoint(own.instruct)[name]
    rewrite(own.rl, without(name))
    refused(lambda: donors(own).save(tmp_path / "v"), f"{name} is in .*, but not in {at(own.rl)}")
    refused(lambda: point(own).save(tmp_path / "out"), f"{name} is in .*, but not in {at(own.rl)}")
    rewrite(own.sft, without(name))
    refused(lambda: point(own).save(tmp_path / "out"), f"{name} has no delta")
    report = point(own).save(tmp_path / "out", missing="skip")
    assert any(p.tensor == name for p in report.warnings)
    assert read_checkpoint(tmp_path / "out")[name] == whole
    for folder in (own.rl, own.sft):
        rewrite(folder, adding(name, whole))
    rewrite(own.instruct, without(name))
    refused(lambda: point(own).save(tmp_path / "other"), f"{name} .*would be dropped")
    report = point(own).save(tmp_path / "other", missing="skip")
    assert name not in read_checkpoint(tmp_path / "other")


@pytest.mark.parametrize("roles", [("rl",), ("sft",), ("instruct",), ("rl", "sft", "instruct")])
def test_a_head_beside_tied_embeddings_must_be_a_copy(
    own: Family, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    """An equal copy is one matrix with the embeddings and stays one; a different one is refused."""
    for role in roles:
        folder = getattr(own, role)
        rewrite(folder, adding(HEAD, read_checkpoint(folder)[EMBED]))
    point(own).save(tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[EMBED], merged_embeddings(own))
    assert (HEAD in found) == ("instruct" in roles)
    assert HEAD not in found or torch.equal(found[HEAD], found[EMBED])
    assert torch.equal(load(tmp_path / "out").lm_head.weight, found[EMBED])
    if "instruct" not in roles:
        donors(own).save(tmp_path / "reason")
        rows = json.loads((tmp_path / "reason" / "vector_config.json").read_text())["tensors"]
        assert HEAD not in {row["name"] for row in rows}

    folder = getattr(own, roles[-1])
    head = read_checkpoint(folder)[HEAD]
    rewrite(folder, adding(HEAD, stored("BF16", head.bits ^ 1, head.shape)))
    refused(
        lambda: point(own).save(tmp_path / "other"), f"{at(folder)}: .*{HEAD}.*{EMBED}.* differ"
    )
    if folder != own.instruct:
        refused(
            lambda: donors(own).save(tmp_path / "v"), f"{at(folder)}: .*{HEAD}.*{EMBED}.* differ"
        )


def merged_embeddings(family: Family) -> torch.Tensor:
    t, rl, sft = (tensors_of(f)[EMBED] for f in (family.instruct, family.rl, family.sft))
    return (t.float() + ALPHA * (rl.float() - sft.float())).to(torch.bfloat16)


def test_tied_against_untied_is_refused(
    family: Family, untied_family: Family, tmp_path: Path
) -> None:
    """One delta for two matrices, or two for one: never guessed; --vocab skip leaves both out."""
    untied = make_family(tmp_path / "untied", tied=False)
    refused(
        lambda: (rv.open(untied.instruct) + donors(family)).save(tmp_path / "a"),
        f"{at(family.rl)} comes from tied donors .*{at(untied.instruct)} is untied",
    )
    refused(
        lambda: (rv.open(family.instruct) + donors(untied)).save(tmp_path / "b"),
        f"{at(family.instruct)} is tied, one matrix for both",
    )
    (rv.open(untied.instruct) + donors(family)).save(tmp_path / "c", vocab="skip")
    found, target = read_checkpoint(tmp_path / "c"), read_checkpoint(untied.instruct)
    assert {name for name in target if found[name] == target[name]} >= {EMBED, HEAD}


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL"])
def test_integers_pass_if_they_are_equal(own: Family, tmp_path: Path, dtype: str) -> None:
    """Equal everywhere: copied, and zero in the vector. One differs: refused with tensor and index."""
    name = "model.layers.0.counts"
    bits = np.array([1, 0, 1, 1, 0], {"I64": np.int64}.get(dtype, np.uint8))
    for folder in (own.rl, own.sft, own.instruct):
        rewrite(folder, adding(name, stored(dtype, bits)))
    for scale in ("difference", "stored"):
        vector = donors(own) if scale == "difference" else rv.load(tmp_path / "reason")
        if scale == "difference":
            donors(own).save(tmp_path / "reason")
        (rv.open(own.instruct) + vector).save(tmp_path / scale)
        assert read_checkpoint(tmp_path / scale)[name] == stored(dtype, bits)
    other = bits.copy()
    other[3] ^= 1
    for folder in (own.instruct, own.rl):
        rewrite(folder, adding(name, stored(dtype, other)))
        said = f"{name}: .*element 3 .*{dtype} differs"
        refused(lambda: point(own).save(tmp_path / "out", overwrite=True), said)
        assert not list((tmp_path / "out").glob("*.safetensors"))
        rewrite(folder, adding(name, stored(dtype, bits)))
    rewrite(own.rl, adding(name, stored(dtype, other)))
    refused(lambda: donors(own).save(tmp_path / "v"), f"{name}: .*element 3 differs .*--exclude")
    kept = ALPHA * donors(own).where(exclude=["counts"])
    (rv.open(own.instruct) + kept).save(tmp_path / "kept")


@pytest.mark.parametrize("out_dtype", [None, "float32", "float16"])
def test_a_tensor_of_another_dtype_keeps_it(
    own: Family, tmp_path: Path, out_dtype: str | None
) -> None:
    """f32 router biases among bf16: summed in f32, kept as f32, whatever the others become."""
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    rng = np.random.default_rng(0)
    values = {r: rng.normal(size=9).astype(np.float32) for r in ("rl", "sft", "instruct")}
    for role, v in values.items():
        rewrite(getattr(own, role), adding(name, stored("F32", v)))
    donors(own).save(tmp_path / "reason")
    for vector in (donors(own), rv.load(tmp_path / "reason")):
        out = (rv.open(own.instruct) + ALPHA * vector).save(
            tmp_path / "out", out_dtype=out_dtype, overwrite=True
        )
        found = read_checkpoint(out.path)
        assert found[name].dtype == "F32"
        wanted = values["instruct"] + np.float32(ALPHA) * (values["rl"] - values["sft"])
        # A stored vector has second parts where f32 is too short, and is nearer to the truth there.
        np.testing.assert_array_max_ulp(found[name].bits.view(np.float32), wanted, 1)
        others = {t.dtype for n, t in found.items() if n != name}
        assert others == {{None: "BF16", "float32": "F32", "float16": "F16"}[out_dtype]}


@pytest.mark.parametrize("role", ["rl", "sft", "instruct"])
def test_codes_are_refused_by_name(own: Family, tmp_path: Path, role: str) -> None:
    """fp8, packed integers and a quantization_config: never subtracted, the tensor or field named."""
    folder = getattr(own, role)
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = read_checkpoint(folder)[name]
    for dtype in ("F8_E4M3", "I8"):
        codes = stored(dtype, np.zeros(whole.shape, np.uint8))
        rewrite(folder, adding(name, codes))
        refused(
            lambda: point(own).save(tmp_path / "out"),
            f"{at(folder)} is quantised: {name} is",
            dtype,
        )
        if role != "instruct":
            refused(
                lambda: donors(own).save(tmp_path / "v"), f"{at(folder)} is quantised: {name} is"
            )
    rewrite(folder, adding(name, whole))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(
        lambda: point(own).save(tmp_path / "out"), r"quantization_config in config.json \(gptq\)"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_theta", 1e4),
        ("rms_norm_eps", 1e-5),
        ("num_attention_heads", 8),
        ("hidden_act", "gelu"),
    ],
)
@pytest.mark.parametrize("role", ["rl", "instruct"])
def test_the_same_shapes_may_be_another_function(
    own: Family, tmp_path: Path, field: str, value: object, role: str
) -> None:
    """A field of config.json that changes what the weights do is an error that shows both values."""
    path = getattr(own, role) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {field: value}))
    refused(
        lambda: point(own).save(tmp_path / "out"), field.removeprefix("num_"), re.escape(str(path))
    )
    assert not (tmp_path / "out").exists()


def test_other_tokens_in_the_same_rows_are_refused(own: Family, tmp_path: Path) -> None:
    """Two tokens that changed places: strict names one; match-tokens moves their deltas along."""
    path = own.instruct / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    refused(lambda: point(own).save(tmp_path / "out"), "2 tokens have another id", "match-tokens")
    report = point(own).save(tmp_path / "matched", vocab="match-tokens")
    assert any("match-tokens updates" in p.message for p in report.warnings)
    t, rl, sft = (tensors_of(f)[EMBED].float() for f in (own.instruct, own.rl, own.sft))
    delta = ALPHA * (rl - sft)
    rows = torch.arange(len(delta))
    rows[vocab["a"]], rows[vocab["b"]] = vocab["b"], vocab["a"]
    tokens = len(vocab) + len(tokenizer["added_tokens"])
    wanted = (t + delta[rows]).to(torch.bfloat16)
    wanted[tokens:] = t[tokens:].to(torch.bfloat16)
    assert torch.equal(tensors_of(tmp_path / "matched")[EMBED], wanted)


def test_a_stale_index_is_no_truth(own: Family, tmp_path: Path) -> None:
    """Tensors where the index does not have them are found; tensors that are nowhere are an error."""
    path = own.instruct / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    path.write_text(json.dumps(index))
    point(own).save(tmp_path / "out")
    assert set(read_checkpoint(tmp_path / "out")) == set(read_checkpoint(own.instruct))
    index["weight_map"]["model.gone.weight"] = files[0]
    path.write_text(json.dumps(index))
    with pytest.raises(rv.FormatError, match=r"index.json: lists 1 tensors .*model\.gone\.weight"):
        rv.open(own.instruct)
    index["weight_map"]["model.gone.weight"] = "../../secret.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(rv.FormatError, match="do not trust this checkpoint"):
        rv.open(own.instruct)
