"""What a LoRA adapter does to a base: which tensor each pair of factors changes, by how much, and
what no update of the weights can say.

An adapter changes a matrix by ``scale * B @ A`` (Hu et al. 2021, arXiv 2106.09685), with
``scale = alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (Kalajdzievski 2023, arXiv
2312.03732). The product is made tile by tile where it is needed, never as a matrix, and
adapters add as vectors do: no cross terms.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from reasonvec import _reasonvec as core
from reasonvec.adapter import AdapterFolder
from reasonvec.adapter_config import MERGE, UNREADABLE, config_problems, scale_of
from reasonvec.compat.layout import FLOATS, Layout, TensorInfo
from reasonvec.compat.problem import Problem, shorten
from reasonvec.json_values import Json
from reasonvec.names import is_embedding, is_vocabulary, layer_of
from reasonvec.run import settings

__all__ = ["LowRank", "Update", "Updates", "copy_problems", "fit"]

_FACTOR = re.compile(
    r"(?P<module>.+)\."
    r"(?:(?P<role>lora_[AB])(?:\.default)?\.(?P<leaf>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.default)?)"
)
_UNTIE = (
    "give the base a head of its own (tie_word_embeddings false, lm_head.weight stored), train "
    "with ensure_weight_tying, or leave the tensor out with --exclude"
)
# Longer than any model's, and short enough for what is matched against them.
_LONGEST_NAME = 500
_MOST_PARTS = 64
# Parts of an adapter's file that say the same, whatever its config says.
_OTHER_PARTS: dict[str, str] = {
    "lora_magnitude_vector": UNREADABLE["use_dora"],
    "trainable_tokens_delta": UNREADABLE["trainable_token_indices"],
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """``scale * B @ A`` onto a matrix, or ``scale * b`` onto a bias.

    ``b`` and ``a`` are names in the adapter's file: B is [out, rank], A is [rank, in]; a bias has
    no ``a``. ``transposed``: the base stores the matrix as [in, out] (GPT-2's Conv1D, embeddings).
    """

    b: str
    a: str | None
    scale: float
    rank: int
    transposed: bool = False

    def as_json(self, operand: int) -> Json:
        """The update for the core, of an adapter that is the operand of this number."""
        return {
            "a": None if self.a is None else {"operand": operand, "name": self.a},
            "b": {"operand": operand, "name": self.b},
            "scale": self.scale,
            "transposed": self.transposed,
        }


@dataclass(frozen=True, slots=True)
class Update:
    """What becomes of a tensor of the base: first the adapter's own copy stands in its place, where
    there is one (``saved``, a name in the adapter's file: modules_to_save, trained biases, the
    embeddings that PEFT stores along), then the factors are added, where there are some."""

    saved: str | None = None
    factors: LowRank | None = None

    def source(self, base: Json, operand: int) -> Json:
        """The adapted tensor as a point, for the core: ``base`` is the base tensor's reference,
        ``operand`` the adapter's number."""
        if self.saved is not None:
            base = {"operand": operand, "name": self.saved}
        if self.factors is None:
            return {"tensor": base}
        return {"adapted": {"tensor": base, "adapters": [self.factors.as_json(operand)]}}


@dataclass(frozen=True)
class Updates:
    """What an adapter does to a base: by the base's tensor names, and everything that stops it."""

    of: dict[str, Update] = field(default_factory=dict)
    homeless: dict[str, str] = field(default_factory=dict)
    """Biases of modules that have none in the base, by module: PEFT stores one for every module or
    for none, so they must be zero."""
    problems: list[Problem] = field(default_factory=list)


def fit(adapter: AdapterFolder, base: Layout) -> Updates:
    """Lay the adapter onto a base, from headers alone. Every problem is told, not the first."""
    return _Fitting(adapter, base).run()


def copy_problems(
    adapter: AdapterFolder, base: Layout, handle: core.Checkpoint, updates: Updates
) -> list[Problem]:
    """What only the numbers can tell. Tensors with factors of which the adapter holds a copy as
    well (PEFT stores embeddings so): as a vector the adapter is the factors, so the copy must
    be the base's own. Biases without a place in the base must be zero."""
    problems = []

    def moved(name: str, shape: Sequence[int], source: Json) -> bool:
        tensor: Json = {
            "name": name,
            "elements": math.prod(shape),
            "quantities": [[{"coefficient": 1.0, "source": source}]],
        }
        plan = {"tensors": [tensor], "allow_nonfinite": True} | settings({})
        found = json.loads(core.measure(json.dumps(plan), [adapter.handle, handle]))
        return bool(found[0]["moved"][0])

    for module, entry in updates.homeless.items():
        source: Json = {"tensor": {"operand": 0, "name": entry}}
        if moved(entry, adapter.tensors[entry].shape, source):
            problems.append(_missing(adapter, module, "bias", base))
    for name, update in updates.of.items():
        if update.saved is None or update.factors is None:
            continue
        pair = [{"operand": 0, "name": update.saved}, {"operand": 1, "name": name}]
        if moved(name, base.tensors[name].shape, {"difference": pair}):
            message = (
                f"was trained on top of another tensor than {base.path} has: name the base "
                "that the factors were trained on; if the tensor itself was trained too, "
                f"{MERGE}"
            )
            problems.append(adapter.problem(message, name))
    return problems


class _Fitting:
    """An adapter and a base, and what has been found out about the two."""

    def __init__(self, adapter: AdapterFolder, base: Layout) -> None:
        self.adapter = adapter
        self.base = base
        self.updates: dict[str, Update] = {}
        self.homeless: dict[str, str] = {}
        self.problems = config_problems(adapter)

    def run(self) -> Updates:
        modules, saved = self._modules()
        names = _Names.of([*modules, *(module for module, _ in saved)], self.base)
        orientation = self._orientation(modules, names)
        for module, parts in modules.items():
            if names.stored(module, "weight") is None:
                self.problems.append(_missing(self.adapter, module, "weight", self.base))
                continue
            scale = scale_of(self.adapter, module, parts.rank, self.problems)
            if scale is None:
                continue
            turned = parts.embedding or orientation(module)
            part = LowRank(parts.b, parts.a, scale, parts.rank, turned)
            self._put(names, module, "weight", part)
            if parts.bias is not None:
                self._put(names, module, "bias", LowRank(parts.bias, None, scale, 1))
        for (module, leaf), entry in saved.items():
            self._put(names, module, leaf, entry)
        return Updates(self.updates, self.homeless, list(dict.fromkeys(self.problems)))

    def _put(self, names: _Names, module: str, leaf: str, part: LowRank | str) -> None:
        name = names.stored(module, leaf)
        if name is None:
            if isinstance(part, LowRank) and part.a is None and names.stored(module, "weight"):
                self.homeless[module] = part.b
            else:
                self.problems.append(_missing(self.adapter, module, leaf, self.base))
            return
        found = self._tie_problem(name), self._shape_problem(name, part)
        self.problems.extend(problem for problem in found if problem is not None)
        known = self.updates.get(name, Update())
        if (known.saved if isinstance(part, str) else known.factors) is not None:
            self._refuse("changes it twice; reasonvec cannot tell which holds", name)
        self.updates[name] = (
            replace(known, saved=part) if isinstance(part, str) else replace(known, factors=part)
        )

    def _refuse(self, message: str, tensor: str | None = None) -> None:
        self.problems.append(self.adapter.problem(message, tensor))

    def _refuse_twice(self, first: str | None, second: str) -> None:
        if first is not None:
            message = f"is the same part as {first}, and nothing tells which holds: remove one"
            self._refuse(message, second)

    def _modules(self) -> tuple[dict[str, _Parts], dict[tuple[str, str], str]]:
        """The factors by module, and the tensors that are saved whole by module and leaf."""
        roles: dict[str, dict[str, str]] = {}
        saved: dict[tuple[str, str], str] = {}
        for entry, info in self.adapter.tensors.items():
            name = entry.removeprefix("base_model.model.")
            if len(name) > _LONGEST_NAME or name.count(".") > _MOST_PARTS:
                message = (
                    f"{shorten(entry)}: expected a tensor's name of at most {_LONGEST_NAME} "
                    f"characters and {_MOST_PARTS} dots, found {len(name)} and {name.count('.')}; "
                    "no model has such a module"
                )
                self._refuse(message)
                continue
            if info.dtype not in FLOATS:
                message = f"is {info.dtype}; factors must be floats: dequantise the adapter first"
                self._refuse(message, entry)
                continue
            found = _FACTOR.fullmatch(name)
            if found is not None:
                role = found["embedding"] or found["role"]
                if found["leaf"] == "bias":
                    role += ".bias"
                known = roles.setdefault(found["module"], {})
                self._refuse_twice(known.get(role), entry)
                known[role] = entry
                continue
            why = next((why for sign, why in _OTHER_PARTS.items() if sign in name), None)
            if why is not None or "lora_" in name:
                message = why or f"is no part of a LoRA that reasonvec knows: {MERGE}"
                self._refuse(message, entry)
                continue
            plain = name.replace(".base_layer.", ".")
            plain = re.sub(r"\.modules_to_save(?:\.default)?\.", ".", plain)
            module, _, leaf = plain.rpartition(".")
            self._refuse_twice(saved.get((module, leaf)), entry)
            saved[module, leaf] = entry
        modules = {}
        for module, parts in roles.items():
            made = self._parts(module, parts)
            if made is not None:
                modules[module] = made
        if not modules and not saved and not self.problems:
            self._refuse("holds no factors; it changes nothing")
        return modules, saved

    def _parts(self, module: str, roles: dict[str, str]) -> _Parts | None:
        embedding = "lora_embedding_A" in roles or "lora_embedding_B" in roles
        stem = "lora_embedding" if embedding else "lora"
        a, b = roles.pop(f"{stem}_A", None), roles.pop(f"{stem}_B", None)
        bias = roles.pop("lora_B.bias", None)
        if a is None or b is None:
            there, gone = ("A", "B") if b is None else ("B", "A")
            message = f"has the factor {there} and no {gone}; the file is incomplete"
            self._refuse(message, module)
            return None
        if roles:
            message = f"has {shorten(min(roles))}, which reasonvec does not know: {MERGE}"
            self._refuse(message, module)
            return None
        shapes = self.adapter.tensors[a].shape, self.adapter.tensors[b].shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2:
            message = (
                f"has factors of the shapes {list(shapes[0])} and {list(shapes[1])}: only matrices "
                f"are read, no convolutions: {MERGE}"
            )
            self._refuse(message, module)
            return None
        if shapes[0][0] != shapes[1][1] or shapes[0][0] == 0:
            message = (
                f"expected factors [r, in] and [out, r], found {list(shapes[0])} and "
                f"{list(shapes[1])}; the file is damaged"
            )
            self._refuse(message, module)
            return None
        return _Parts(a, b, bias, shapes[0][0], shapes[1][0], shapes[0][1], embedding)

    def _orientation(self, modules: Mapping[str, _Parts], names: _Names) -> _Orientation:
        flag = self.adapter.config.get("fan_in_fan_out") is True
        known: dict[str, bool] = {}
        inside: set[bool] = set()
        for module, parts in modules.items():
            info = names.info(module, "weight")
            if info is None or parts.embedding or parts.out == parts.into:
                continue
            if info.shape in ((parts.out, parts.into), (parts.into, parts.out)):
                known[module] = info.shape == (parts.into, parts.out)
                if layer_of(f"{module}.weight") is not None:
                    inside.add(known[module])
        # PEFT keeps one fan_in_fan_out for all, that of the module it saw last: shapes know better.
        if len(inside) == 2 and any(
            parts.out == parts.into and not parts.embedding for parts in modules.values()
        ):
            message = (
                "has factors for matrices of both orientations (fan_in_fan_out), and square ones "
                f"among them, whose own nothing tells: {MERGE}"
            )
            self._refuse(message)
        return _Orientation(known, inside.pop() if len(inside) == 1 else flag)

    def _tie_problem(self, name: str) -> Problem | None:
        """One matrix serves twice in a tied model, an adapter on it only once."""
        if self.adapter.config.get("ensure_weight_tying") is True:
            return None
        if not is_vocabulary(name) or layer_of(name) is not None or not self.base.ties:
            return None
        which = "embeddings" if is_embedding(name) else "head"
        message = (
            f"changes the {which} alone, and {self.base.path} ties embeddings and head: no "
            f"checkpoint of it computes what the adapter does: {_UNTIE}"
        )
        return self.adapter.problem(message, name)

    def _shape_problem(self, name: str, part: LowRank | str) -> Problem | None:
        info = self.base.tensors[name]
        if info.dtype not in FLOATS:
            message = f"is {info.dtype} in {self.base.path}; dequantise the checkpoint first"
            return self.adapter.problem(message, name)
        if isinstance(part, str):
            shape = self.adapter.tensors[part].shape
        elif part.a is None:
            shape = self.adapter.tensors[part.b].shape
        else:
            shape = (self.adapter.tensors[part.b].shape[0], self.adapter.tensors[part.a].shape[1])
            shape = shape[::-1] if part.transposed else shape
        if shape == info.shape:
            return None
        resized = (
            "; the adapter resized the vocabulary: resize the base the same way first"
            if is_vocabulary(name)
            else "; name the base that it was trained on"
        )
        message = (
            f"brings {list(shape)} for a tensor that is {list(info.shape)} in "
            f"{self.base.path}{resized}"
        )
        return self.adapter.problem(message, name)


def _missing(adapter: AdapterFolder, module: str, leaf: str, base: Layout) -> Problem:
    name = f"{module}.{leaf}"
    if base.ties and is_vocabulary(name):
        message = (
            f"changes {name}, which {base.path} ties to its embeddings and does not store: {_UNTIE}"
        )
    elif leaf == "bias":
        message = (
            f"brings a bias for {module}, which {base.path} has none for: a checkpoint of this "
            "architecture cannot hold it; train without lora_bias, or use the adapter in peft"
        )
    else:
        message = (
            f"changes {name}, which {base.path} does not have; name the base that it was "
            "trained on (base_model_name_or_path in adapter_config.json)"
        )
    return Problem("adapter", f"{adapter.path}: {message}", name)


@dataclass(frozen=True, slots=True)
class _Parts:
    a: str
    b: str
    bias: str | None
    rank: int
    out: int
    into: int
    embedding: bool


@dataclass(frozen=True, slots=True)
class _Orientation:
    """Whether a module's matrix is stored as [in, out]: by its shape, for a square one as the
    others of the model are."""

    known: dict[str, bool]
    square: bool

    def __call__(self, module: str) -> bool:
        return self.known.get(module, self.square)


@dataclass(frozen=True)
class _Names:
    """From the adapter's module names to the base's tensor names. A model class may put a prefix
    before every name that its checkpoint lacks (``transformer.``), or the other way round."""

    base: Layout
    names: Mapping[str, str]
    strip: str = ""
    add: str = ""

    @classmethod
    def of(cls, modules: Iterable[str], base: Layout) -> _Names:
        names = base.names()
        plain = cls(base, names)
        inside = [module for module in modules if layer_of(f"{module}.weight") is not None]
        if not inside or any(plain.stored(module, "weight") for module in inside):
            return plain
        parts = inside[0].split(".")
        for at in range(len(parts)):
            tail = ".".join(parts[at:]) + ".weight"
            ends = [name for name in names if name == tail or name.endswith(f".{tail}")]
            if len(ends) == 1 and layer_of(tail) is not None:
                strip = "".join(f"{part}." for part in parts[:at])
                mapped = cls(base, names, strip, ends[0].removesuffix(tail))
                if all(mapped.stored(module, "weight") for module in inside):
                    return mapped
        return plain

    def stored(self, module: str, leaf: str) -> str | None:
        name = f"{module}.{leaf}" if module else leaf
        if not self.strip and not self.add:
            return self._find(name)
        if name.startswith(self.strip):
            found = self._find(self.add + name.removeprefix(self.strip))
            if found is not None:
                return found
        return self._find(name)

    def _find(self, name: str) -> str | None:
        return self.names.get(name, name if name in self.base.tensors else None)

    def info(self, module: str, leaf: str) -> TensorInfo | None:
        name = self.stored(module, leaf)
        return None if name is None else self.base.tensors[name]
