"""The hand-over to torch: shared memory one way, vectors on live modules the other."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from shards import contents, numbers, read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec.family import Family

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from reasonvec.torch import add_, subtract_  # noqa: E402 - it imports torch

pytestmark = pytest.mark.models

NAME = "model.layers.0.mlp.up_proj.weight"
ALPHA = 0.8


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def state(module: torch.nn.Module) -> dict[str, bytes]:
    """The bits of everything that a checkpoint of the module would hold."""
    return {
        name: tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in module.state_dict().items()
    }


@pytest.fixture(scope="module", params=["family", "untied_family"])
def some(request: pytest.FixtureRequest) -> Family:
    found: Family = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def applied(some: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `apply` makes of the same expression."""
    out = tmp_path_factory.mktemp("applied") / "out"
    (rv.open(some.instruct) + ALPHA * reason(some)).save(out, sync=False)
    return out


@pytest.fixture(scope="module")
def loaded(some: Family) -> torch.nn.Module:
    return load(some.instruct)


@pytest.fixture
def model(loaded: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A copy for every test, which has to leave it as it was."""
    module = copy.deepcopy(loaded)
    yield module
    assert state(module) == state(loaded)


def reason(family: Family) -> rv.Vector:
    return rv.open(family.rl) - rv.open(family.sft)


# -- tensors of a checkpoint


def test_dlpack_shares_memory_and_keeps_bf16(family: Family) -> None:
    checkpoint = rv.open(family.rl)
    files = read_checkpoint(family.rl)
    for name, tensor in checkpoint.items():
        found = torch.from_dlpack(tensor)
        assert found.dtype == torch.bfloat16
        assert found.device.type == "cpu"
        assert tuple(found.shape) == tensor.shape == files[name].shape
        assert found.is_contiguous()
        assert found.view(torch.uint8).numpy().tobytes() == files[name].data
    again = torch.from_dlpack(checkpoint[NAME])
    first = torch.from_dlpack(checkpoint[NAME])
    assert again.data_ptr() == first.data_ptr()
    seen = np.asarray(memoryview(checkpoint[NAME]))
    assert seen.__array_interface__["data"][0] == first.data_ptr()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16),
        ("BF16", torch.bfloat16), ("I64", torch.int64), ("I32", torch.int32),
        ("I16", torch.int16), ("I8", torch.int8), ("U8", torch.uint8), ("BOOL", torch.bool),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 1)], ids=str)
def test_every_dtype_and_shape(
    tmp_path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    from shards import SIZE, Stored

    data = (np.arange(math.prod(shape) * SIZE[name]) % 2).astype(np.uint8).tobytes()
    folder = write_checkpoint(tmp_path / "c", {"weight": Stored(name, shape, data)})
    tensor = rv.open(folder)["weight"]
    found = torch.from_dlpack(tensor)
    assert found.dtype == dtype
    assert tuple(found.shape) == shape
    assert found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == data
    assert tensor.nbytes == len(data)


def test_writing_never_changes_the_file(family: Family, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family.rl, tmp_path / "copy"))
    before = contents(folder)
    checkpoint = rv.open(folder)
    found = torch.from_dlpack(checkpoint[NAME])
    found.zero_()
    found.add_(1)
    assert contents(folder) == before
    del found, checkpoint
    assert contents(folder) == before
    assert torch.from_dlpack(rv.open(folder)[NAME]).abs().sum() > 0


def test_what_is_written_is_not_read_by_a_pass(family: Family, tmp_path: Path) -> None:
    """A pass reads the file, whatever somebody wrote into the private pages of a tensor."""
    checkpoint = rv.open(family.instruct)
    torch.from_dlpack(checkpoint[NAME]).zero_()
    (checkpoint + ALPHA * reason(family)).save(tmp_path / "a", sync=False)
    (rv.open(family.instruct) + ALPHA * reason(family)).save(tmp_path / "b", sync=False)
    assert read_checkpoint(tmp_path / "a") == read_checkpoint(tmp_path / "b")


def test_a_tensor_outlives_its_checkpoint(family: Family) -> None:
    found = torch.from_dlpack(rv.open(family.rl)[NAME])
    view = memoryview(rv.open(family.rl)[NAME])
    assert found.view(torch.uint8).numpy().tobytes() == read_checkpoint(family.rl)[NAME].data
    assert bytes(view) == read_checkpoint(family.rl)[NAME].data


def test_buffers_are_read_only(family: Family) -> None:
    tensor = rv.open(family.rl)[NAME]
    view = memoryview(tensor)
    assert view.readonly
    assert view.format == "H"
    assert view.shape == tensor.shape
    seen = np.asarray(tensor)
    assert not seen.flags.writeable
    assert seen.dtype == np.uint16
    assert seen.shape == tensor.shape
    with pytest.raises(ValueError, match="read-only"):
        seen[0] = 0
    with pytest.raises(TypeError):
        view[0, 0] = 0


def test_dlpack_of_what_it_has_no_name_for(tmp_path: Path) -> None:
    from shards import Stored

    folder = write_checkpoint(tmp_path / "c", {"weight": Stored("F8_E4M3", (3,), b"abc")})
    with pytest.raises(BufferError, match="memoryview"):
        torch.from_dlpack(rv.open(folder)["weight"])
    assert bytes(memoryview(rv.open(folder)["weight"])) == b"abc"


# -- vectors on a module


def test_add_is_apply(some: Family, model: torch.nn.Module, applied: Path) -> None:
    vector = reason(some)
    add_(model, vector, ALPHA)
    found, wanted = state(model), read_checkpoint(applied)
    for name, tensor in wanted.items():
        assert found[name] == tensor.data, name
    subtract_(model, vector, ALPHA)


def test_the_same_expression_made_twice(
    some: Family, model: torch.nn.Module, tmp_path: Path
) -> None:
    """Folders opened again are the same folders."""
    add_(model, reason(some), ALPHA)
    subtract_(model, reason(some), ALPHA)
    reason(some).save(tmp_path / "v", sync=False)
    add_(model, rv.load(tmp_path / "v").ramp(0, 1), ALPHA)
    subtract_(model, rv.load(tmp_path / "v").ramp(0, 1), ALPHA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_modules_of_another_dtype(some: Family, tmp_path: Path, dtype: torch.dtype) -> None:
    """A model loaded in another dtype than the vector's is what `apply --out-dtype` makes of it."""
    name = str(dtype).removeprefix("torch.")
    (rv.open(some.instruct) + ALPHA * reason(some)).save(
        tmp_path / "out",
        out_dtype=name,  # type: ignore[arg-type]
        sync=False,
    )
    model = load(some.instruct, dtype)
    before = state(model)
    vector = reason(some)
    add_(model, vector, ALPHA)
    found, wanted = state(model), read_checkpoint(tmp_path / "out")
    if dtype == torch.float32:
        for name, tensor in wanted.items():
            assert found[name] == tensor.data, name
    assert found != before
    subtract_(model, vector, ALPHA)
    assert state(model) == before


def test_sums_controls_and_selections(some: Family, model: torch.nn.Module, tmp_path: Path) -> None:
    """Whatever `apply` takes, a module takes, with the same bits."""
    v, w = reason(some), rv.open(some.rl) - rv.open(some.base)
    for vector in (
        v - 0.25 * w,
        v.ramp(0.2, 1.5).alpha_for({"norm": 2}),
        v.where(include=["mlp"]),
        v.control("random", seed=5),
        w.control("shuffle", seed=6) + v,
    ):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        (rv.open(some.instruct) + 1.5 * vector).save(out, sync=False)
        add_(model, vector, 1.5)
        found = state(model)
        for name, tensor in read_checkpoint(out).items():
            assert found[name] == tensor.data, (str(vector), name)
        subtract_(model, vector, 1.5)


def test_a_sweep_restores_every_time(some: Family, model: torch.nn.Module) -> None:
    vector, before = reason(some), state(model)
    for alpha in (0.1, 0.7, 1.0, -1.0, 30.0, 0.0):
        add_(model, vector, alpha)
        assert (state(model) == before) == (alpha == 0)
        subtract_(model, vector, alpha)
        assert state(model) == before


def test_nested_adds(some: Family, model: torch.nn.Module) -> None:
    v, w = reason(some), rv.open(some.sft) - rv.open(some.base)
    steps = [state(model)]
    for vector, alpha in ((v, 1.0), (w, -0.5), (v, 1.0)):
        add_(model, vector, alpha)
        steps.append(state(model))
    for vector, alpha in ((v, 1.0), (w, -0.5), (v, 1.0)):
        assert state(model) == steps.pop()
        subtract_(model, vector, alpha)
    assert state(model) == steps.pop()


def test_the_wrong_order_is_refused(some: Family, model: torch.nn.Module) -> None:
    v, w = reason(some), rv.open(some.sft) - rv.open(some.base)
    with pytest.raises(rv.MismatchError, match="there was none"):
        subtract_(model, v, 1.0)
    add_(model, v, 1.0)
    add_(model, w, 0.5)
    between = state(model)
    for vector, alpha in ((v, 1.0), (w, 1.0), (w, -0.5), (-w, 0.5), (v, 0.5)):
        with pytest.raises(rv.MismatchError, match=r"the last was 0\.5 \*"):
            subtract_(model, vector, alpha)
    assert state(model) == between
    subtract_(model, w, 0.5)
    subtract_(model, v, 1.0)
    with pytest.raises(rv.MismatchError, match="add_"):
        subtract_(model, v, 1.0)


def test_an_overflow_puts_everything_back(some: Family, model: torch.nn.Module) -> None:
    vector, before = reason(some), state(model)
    add_(model, vector, 1.0)
    added = state(model)
    with pytest.raises(rv.NonFiniteError, match="smaller alpha"):
        add_(model, vector, 1e41)
    assert state(model) == added
    subtract_(model, vector, 1.0)
    assert state(model) == before


def test_an_overflow_in_a_later_tensor(some: Family, model: torch.nn.Module) -> None:
    """What was changed before the tensor that failed is put back too."""
    last = "model.norm.weight" if "lm_head.weight" not in rv.open(some.rl) else "lm_head.weight"
    vector = reason(some)
    spoiled = (rv.open(some.rl) - rv.open(some.base)).where(include=[last]) * 1e41
    before = state(model)
    with pytest.raises(rv.NonFiniteError, match=last):
        add_(model, vector + spoiled, 1.0)
    assert state(model) == before


def test_tied_weights_are_changed_once(family: Family) -> None:
    model = load(family.instruct)
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embed.data_ptr() == head.data_ptr()
    vector = reason(family)
    before = embed.detach().clone()
    add_(model, vector, 1.0)
    wanted = read_checkpoint(family.rl)["model.embed_tokens.weight"]
    assert wanted.shape == tuple(embed.shape)
    update = torch.from_dlpack(rv.open(family.rl)["model.embed_tokens.weight"]).float()
    update -= torch.from_dlpack(rv.open(family.sft)["model.embed_tokens.weight"]).float()
    assert torch.equal(embed, (before.float() + update).to(torch.bfloat16))
    assert embed.data_ptr() == head.data_ptr()
    assert embed is model.get_input_embeddings().weight
    subtract_(model, vector, 1.0)
    assert torch.equal(embed, before)


def test_a_vector_that_does_not_fit(
    family: Family, untied_family: Family, some: Family, model: torch.nn.Module
) -> None:
    other = untied_family if some is family else family
    before = state(model)
    with pytest.raises(rv.MismatchError) as caught:
        add_(model, reason(other), 1.0)
    assert len(str(caught.value).splitlines()) > 2, "every problem at once"
    assert state(model) == before


def test_generation_changes_and_comes_back(family: Family) -> None:
    model = load(family.instruct)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        before = model(tokens).logits
        add_(model, reason(family), 1.0)
        added = model(tokens).logits
        subtract_(model, reason(family), 1.0)
        after = model(tokens).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, added)


class Plain(torch.nn.Module):
    """A module that no library made: parameters and buffers, one of them transposed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        dice = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(7, 5, generator=dice).to(dtype).t())
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.register_buffer("mean", torch.randn(3, generator=dice).to(dtype))
        self.register_buffer("steps", torch.tensor([7]))
        self.register_buffer("mask", torch.full((4,), -math.inf), persistent=False)


def plain_vector(folder: Path, name: str = "F32") -> rv.Vector:
    dice = np.random.default_rng(3)
    kind = {"F32": np.float32, "F64": np.float64}[name]
    shapes: dict[str, tuple[int, ...]] = {"weight": (5, 7), "scale": (), "mean": (3,)}
    donors = []
    for label in ("p", "n"):
        tensors = {
            key: stored(name, np.asarray(dice.normal(size=shape)).astype(kind))
            for key, shape in shapes.items()
        }
        tensors["steps"] = stored("I64", np.array([7]))
        donors.append(rv.open(write_checkpoint(folder / label, tensors)))
    return donors[0] - donors[1]


def test_any_module(tmp_path: Path) -> None:
    """Parameters that are not contiguous, scalars, buffers."""
    module, vector = Plain(), plain_vector(tmp_path)
    assert not module.weight.is_contiguous()
    before = {name: t.detach().clone() for name, t in module.state_dict().items()}
    pointers = [p.data_ptr() for p in module.parameters()]
    add_(module, vector, 0.5)
    p, n = (read_checkpoint(tmp_path / label) for label in ("p", "n"))
    for name in ("weight", "scale", "mean"):
        one, other = (np.frombuffer(t[name].data, np.float32) for t in (p, n))
        update = (np.float32(0.5) * (one - other)).reshape(before[name].shape)
        wanted = before[name].numpy() + update
        np.testing.assert_array_equal(module.state_dict()[name].numpy(), wanted, err_msg=name)
    assert torch.equal(module.steps, before["steps"])
    assert [p.data_ptr() for p in module.parameters()] == pointers
    subtract_(module, vector, 0.5)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_float64_comes_back(tmp_path: Path) -> None:
    module, vector = Plain(torch.float64), plain_vector(tmp_path, "F64")
    before = state(module)
    add_(module, vector, 0.3)
    assert state(module) != before
    subtract_(module, vector, 0.3)
    assert state(module) == before


def test_float64_is_apply(tmp_path: Path) -> None:
    module, vector = Plain(torch.float64), plain_vector(tmp_path, "F64")
    tensors = {
        name: stored("F64" if t.is_floating_point() else "I64", t.contiguous().numpy())
        for name, t in module.state_dict().items()
    }
    target = rv.open(write_checkpoint(tmp_path / "t", tensors))
    (target + 0.3 * vector).save(tmp_path / "out", sync=False)
    add_(module, vector, 0.3)
    found = state(module)
    for name, tensor in read_checkpoint(tmp_path / "out").items():
        assert found[name] == tensor.data, name


@pytest.mark.parametrize(
    "kind",
    ["live", "stored"],
)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_numbers_of_every_size(tmp_path: Path, dtype: str, kind: str) -> None:
    """Donors whose difference float32 does not hold: a stored vector has second parts for those."""
    p, n = (
        rv.open(write_checkpoint(tmp_path / name, {"weight": numbers(dtype, seed)}))
        for seed, name in enumerate("pn")
    )
    vector = p - n
    if kind == "stored":
        assert sum(row.wide for row in vector.save(tmp_path / "v", sync=False).rows) > 0
        vector = rv.load(tmp_path / "v")
    (n + vector).save(tmp_path / "out", sync=False)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.from_dlpack(n["weight"]).clone())
    before = state(module)
    add_(module, vector, 1.0)
    found = state(module)["weight"]
    subtract_(module, vector, 1.0)
    assert state(module) == before
    assert found == read_checkpoint(tmp_path / "out")["weight"].data


def test_gradients_are_left_alone(tmp_path: Path) -> None:
    module, vector = Plain(), plain_vector(tmp_path)
    module.weight.sum().backward()
    gradient = module.weight.grad
    add_(module, vector, 1.0)
    assert module.weight.grad is gradient
    assert module.weight.requires_grad
    assert module.weight.grad_fn is None
    subtract_(module, vector, 1.0)


def test_a_forgotten_module_is_forgotten(tmp_path: Path) -> None:
    """Originals are kept as long as the module lives, and no longer."""
    from reasonvec.torch import _kept

    module, vector = Plain(), plain_vector(tmp_path)
    count = len(_kept)
    add_(module, vector, 1.0)
    assert len(_kept) == count + 1
    del module
    assert len(_kept) == count
