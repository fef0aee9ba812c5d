"""LoRA adapters as PEFT stores them: which tensor of the base each pair of factors changes, by how
much, and what no update of the weights can say.

An adapter changes a matrix by ``scale * B @ A`` (Hu et al. 2021, arXiv 2106.09685, section 4.1),
with ``scale = alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (Kalajdzievski 2023,
arXiv 2312.03732). The product is made tile by tile where it is needed, never as a matrix, and
adapters add as vectors do: no cross terms.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from reasonvec import _reasonvec as core
from reasonvec.compat.layout import FLOATS, Layout, TensorInfo
from reasonvec.compat.problem import Problem, Severity, shorten
from reasonvec.errors import FormatError
from reasonvec.json_values import Json, read_json
from reasonvec.names import is_embedding, is_vocabulary, layer_of
from reasonvec.run import settings

__all__ = ["AdapterFolder", "LowRank", "Update", "Updates", "is_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"


def is_adapter(path: Path) -> bool:
    """Whether a folder is a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


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


class AdapterFolder:
    """An opened PEFT adapter: its config and its header are read, its factors are not.

    Raises:
        FormatError: a file is damaged, or the weights are pickled.
        OSError: a file is missing or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: Json = read_json(path / ADAPTER_CONFIG)
        weights = path / ADAPTER_MODEL
        if not weights.is_file() and (path / "adapter_model.bin").is_file():
            message = (
                f"{path}: has pickled weights (adapter_model.bin), which are never loaded because "
                "they can run code: load the adapter where you trust it and save it again with "
                "save_pretrained(..., safe_serialization=True)"
            )
            raise FormatError(message)
        self.handle = core.Checkpoint(weights)
        self.tensors = {
            name: TensorInfo(name, dtype, tuple(shape), file)
            for name, dtype, shape, file in self.handle.tensors()
        }

    def __eq__(self, other: object) -> bool:
        """A folder that is opened again is the same folder."""
        if not isinstance(other, AdapterFolder):
            return NotImplemented
        return self.path.resolve() == other.path.resolve()

    def __hash__(self) -> int:
        return hash(self.path.resolve())

    @property
    def base_path(self) -> str | None:
        """What the adapter says of its base: a folder, or a name on a hub."""
        said = self.config.get("base_model_name_or_path")
        return said if isinstance(said, str) and said else None

    def fit(self, base: Layout) -> Updates:
        """Lay the adapter onto a base, from headers alone. Every problem is told, not the first."""
        problems = self._config_problems()
        modules, saved = self._modules(problems)
        names = _Names.of([*modules, *(module for module, _ in saved)], base)
        orientation = self._orientation(modules, names, problems)
        updates: dict[str, Update] = {}
        homeless: dict[str, str] = {}

        def put(module: str, leaf: str, part: LowRank | str) -> None:
            name = names.stored(module, leaf)
            if name is None:
                if isinstance(part, LowRank) and part.a is None and names.stored(module, "weight"):
                    homeless[module] = part.b
                else:
                    problems.append(self._missing(module, leaf, base))
                return
            found = self._tie_problem(name, base), self._shape_problem(name, part, base)
            problems.extend(problem for problem in found if problem is not None)
            known = updates.get(name, Update())
            if (known.saved if isinstance(part, str) else known.factors) is not None:
                message = "changes it twice; reasonvec cannot tell which holds"
                problems.append(self._problem(message, name))
            updates[name] = (
                replace(known, saved=part)
                if isinstance(part, str)
                else replace(known, factors=part)
            )

        for module, parts in modules.items():
            scale = self._scale(module, parts, problems)
            if scale is None:
                continue
            if parts.embedding:
                put(module, "weight", LowRank(parts.b, parts.a, scale, parts.rank, transposed=True))
            else:
                turned = orientation(module)
                put(module, "weight", LowRank(parts.b, parts.a, scale, parts.rank, turned))
            if parts.bias is not None:
                put(module, "bias", LowRank(parts.bias, None, scale, 1))
        for (module, leaf), entry in saved.items():
            put(module, leaf, entry)
        return Updates(updates, homeless, list(dict.fromkeys(problems)))

    def copy_problems(
        self, base: Layout, handle: core.Checkpoint, updates: Updates
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
            found = json.loads(core.measure(json.dumps(plan), [self.handle, handle]))
            return bool(found[0]["moved"][0])

        for module, entry in updates.homeless.items():
            source: Json = {"tensor": {"operand": 0, "name": entry}}
            if moved(entry, self.tensors[entry].shape, source):
                problems.append(self._missing(module, "bias", base))
        for name, update in updates.of.items():
            if update.saved is None or update.factors is None:
                continue
            pair = [{"operand": 0, "name": update.saved}, {"operand": 1, "name": name}]
            if moved(name, base.tensors[name].shape, {"difference": pair}):
                message = (
                    f"was trained on top of another tensor than {base.path} has: name the base "
                    "that the factors were trained on; if the tensor itself was trained too, "
                    f"{_MERGE}"
                )
                problems.append(self._problem(message, name))
        return problems

    # ----------------------------------------------------------------------------------------------
    # The config

    def _config_problems(self) -> list[Problem]:
        config = self.config
        problems = []
        kind = config.get("peft_type")
        if kind != "LORA":
            message = f"is an adapter of the kind {shorten(kind)}; only LORA is read: {_MERGE}"
            problems.append(self._problem(message))
        for key, why in _UNREADABLE.items():
            if config.get(key):
                problems.append(self._problem(f"has {key}: {why}"))
        for key, value in config.items():
            if key in _KNOWN or key in _UNREADABLE or not value:
                continue
            message = (
                f"has {shorten(key)}: {shorten(value)}, which this version of reasonvec does not "
                f"know and which may change what the factors mean: {_MERGE}"
            )
            severity: Severity = "error" if key.startswith("use_") else "warning"
            problems.append(Problem("adapter", f"{self.path}: {message}", None, severity))
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
            message = (
                f"was initialised with {shorten(start)}, which moves the base's own weights, so it "
                "does not fit the base as it is: save it with save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"
            )
            problems.append(self._problem(message))
        return problems

    def _problem(self, message: str, tensor: str | None = None) -> Problem:
        where = f"{self.path}: " if tensor is None else f"{self.path}: {tensor}: "
        return Problem("adapter", where + message, tensor)

    def _scale(self, module: str, parts: _Parts, problems: list[Problem]) -> float | None:
        said = self._pattern("rank_pattern", module, self.config.get("r"), problems)
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha"), problems)
        if alpha is None or said is None:
            return None
        if said != parts.rank:
            message = (
                f"adapter_config.json says rank {said:g} (r and rank_pattern), the factors have "
                f"{parts.rank}; the file was changed after it was written: restore it"
            )
            problems.append(self._problem(message, module))
            return None
        root = bool(self.config.get("use_rslora"))
        return alpha / (math.sqrt(parts.rank) if root else parts.rank)

    def _pattern(
        self, key: str, module: str, default: object, problems: list[Problem]
    ) -> float | None:
        """As PEFT's get_pattern_key: the first whose regular expression fits the module's end."""
        patterns = self.config.get(key) or {}
        value: object = default
        if not isinstance(patterns, Mapping):
            problems.append(self._problem(f"{key} is no object; the file is damaged"))
            return None
        for pattern, found in patterns.items():
            if _may_never_end(pattern):
                message = (
                    f"{key} has the expression {shorten(pattern)}, which may never end: {_PLAIN}"
                )
                problems.append(self._problem(message))
                return None
            try:
                fits = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                message = f"{key} has the expression {shorten(pattern)}: {error}; {_PLAIN}"
                problems.append(self._problem(message))
                return None
            if fits:
                value = found
                break
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(float(str(value))):
            what = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}[key]
            message = f"expected {what} to be a number, found {shorten(value)}; the file is damaged"
            problems.append(self._problem(message, module))
            return None
        return float(str(value))

    # ----------------------------------------------------------------------------------------------
    # The tensors

    def _modules(
        self, problems: list[Problem]
    ) -> tuple[dict[str, _Parts], dict[tuple[str, str], str]]:
        """The factors by module, and the tensors that are saved whole by module and leaf."""
        roles: dict[str, dict[str, str]] = {}
        saved: dict[tuple[str, str], str] = {}
        for entry, info in self.tensors.items():
            name = entry.removeprefix("base_model.model.")
            if info.dtype not in FLOATS:
                message = f"is {info.dtype}; factors must be floats: dequantise the adapter first"
                problems.append(self._problem(message, entry))
                continue
            found = _FACTOR.fullmatch(name)
            if found is not None:
                role = found["embedding"] or found["role"]
                if found["leaf"] == "bias":
                    role += ".bias"
                roles.setdefault(found["module"], {})[role] = entry
                continue
            why = next((why for sign, why in _OTHER_PARTS.items() if sign in name), None)
            if why is not None or "lora_" in name:
                message = why or f"is no part of a LoRA that reasonvec knows: {_MERGE}"
                problems.append(self._problem(message, entry))
                continue
            plain = name.replace(".base_layer.", ".")
            plain = re.sub(r"\.modules_to_save(?:\.default)?\.", ".", plain)
            module, _, leaf = plain.rpartition(".")
            saved[module, leaf] = entry
        modules = {}
        for module, parts in roles.items():
            made = self._parts(module, parts, problems)
            if made is not None:
                modules[module] = made
        if not modules and not saved and not problems:
            problems.append(self._problem("holds no factors; it changes nothing"))
        return modules, saved

    def _parts(self, module: str, roles: dict[str, str], problems: list[Problem]) -> _Parts | None:
        embedding = "lora_embedding_A" in roles or "lora_embedding_B" in roles
        stem = "lora_embedding" if embedding else "lora"
        a, b = roles.pop(f"{stem}_A", None), roles.pop(f"{stem}_B", None)
        bias = roles.pop("lora_B.bias", None)
        if a is None or b is None:
            there, gone = ("A", "B") if b is None else ("B", "A")
            message = f"has the factor {there} and no {gone}; the file is incomplete"
            problems.append(self._problem(message, module))
            return None
        if roles:
            message = f"has {shorten(min(roles))}, which reasonvec does not know: {_MERGE}"
            problems.append(self._problem(message, module))
            return None
        shapes = self.tensors[a].shape, self.tensors[b].shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 2:
            message = (
                f"has factors of the shapes {list(shapes[0])} and {list(shapes[1])}: only matrices "
                f"are read, no convolutions: {_MERGE}"
            )
            problems.append(self._problem(message, module))
            return None
        if shapes[0][0] != shapes[1][1] or shapes[0][0] == 0:
            message = (
                f"expected factors [r, in] and [out, r], found {list(shapes[0])} and "
                f"{list(shapes[1])}; the file is damaged"
            )
            problems.append(self._problem(message, module))
            return None
        return _Parts(a, b, bias, shapes[0][0], shapes[1][0], shapes[0][1], embedding)

    def _orientation(
        self, modules: Mapping[str, _Parts], names: _Names, problems: list[Problem]
    ) -> _Orientation:
        flag = self.config.get("fan_in_fan_out") is True
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
                f"among them, whose own nothing tells: {_MERGE}"
            )
            problems.append(self._problem(message))
        return _Orientation(known, inside.pop() if len(inside) == 1 else flag)

    def _missing(self, module: str, leaf: str, base: Layout) -> Problem:
        name = f"{module}.{leaf}"
        if base.ties and is_vocabulary(name):
            message = (
                f"changes {name}, which {base.path} ties to its embeddings and does not store: "
                f"{_UNTIE}"
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
        return Problem("adapter", f"{self.path}: {message}", name)

    def _tie_problem(self, name: str, base: Layout) -> Problem | None:
        """One matrix serves twice in a tied model, an adapter on it only once."""
        if self.config.get("ensure_weight_tying") is True:
            return None
        if not is_vocabulary(name) or layer_of(name) is not None or not base.ties:
            return None
        which = "embeddings" if is_embedding(name) else "head"
        message = (
            f"changes the {which} alone, and {base.path} ties embeddings and head: no checkpoint "
            f"of it computes what the adapter does: {_UNTIE}"
        )
        return self._problem(message, name)

    def _shape_problem(self, name: str, part: LowRank | str, base: Layout) -> Problem | None:
        info = base.tensors[name]
        if info.dtype not in FLOATS:
            message = f"is {info.dtype} in {base.path}; dequantise the checkpoint first"
            return self._problem(message, name)
        if isinstance(part, str):
            shape = self.tensors[part].shape
        elif part.a is None:
            shape = self.tensors[part.b].shape
        else:
            shape = (self.tensors[part.b].shape[0], self.tensors[part.a].shape[1])
            shape = shape[::-1] if part.transposed else shape
        if shape == info.shape:
            return None
        resized = (
            "; the adapter resized the vocabulary: resize the base the same way first"
            if is_vocabulary(name)
            else "; name the base that it was trained on"
        )
        message = (
            f"brings {list(shape)} for a tensor that is {list(info.shape)} in {base.path}{resized}"
        )
        return self._problem(message, name)


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
    names: dict[str, str]
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


_FACTOR = re.compile(
    r"(?P<module>.+)\."
    r"(?:(?P<role>lora_[AB])(?:\.default)?\.(?P<leaf>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.default)?)"
)
_MERGE = (
    "merge it into its base with peft's merge_and_unload, save that as a checkpoint, and take the "
    "difference from the base"
)
_UNTIE = (
    "give the base a head of its own (tie_word_embeddings false, lm_head.weight stored), train "
    "with ensure_weight_tying, or leave the tensor out with --exclude"
)
_PLAIN = "write the modules' names instead"
_LONGEST_PATTERN = 500
_MOST_REPEATS = 3


def _may_never_end(pattern: str) -> bool:
    """Whether a stranger's expression could take for ever: a repeated group, or many repeats."""
    repeats = len(re.findall(r"[*+{]", pattern))
    repeated_group = re.search(r"\)[*+{]", pattern) is not None
    return len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or repeated_group


_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Keys of adapter_config.json under which the weights are no longer base + scale * B @ A.
_UNREADABLE: dict[str, str] = {
    "use_dora": (
        f"DoRA rescales every row by a trained magnitude, which is no sum of factors: {_MERGE}"
    ),
    "use_qalora": f"QALoRA's factors act on pooled inputs: {_MERGE}",
    "use_bdlora": f"the factors are block-diagonal: {_MERGE}",
    "alora_invocation_tokens": (
        "the adapter acts only after certain tokens, so no change of the weights computes the same"
    ),
    "arrow_config": "the adapter is chosen token by token: name one of the routed adapters instead",
    "kasa_config": f"KaSA truncates the base and has singular values of its own: {_MERGE}",
    "monteclora_config": f"the factors are drawn anew in every pass: {_MERGE}",
    "velora_config": f"the factors are compressed: {_MERGE}",
    "layer_replication": f"layers of the base are repeated: {_MERGE}",
    "target_parameters": (
        f"factors of parameters inside a module (packed experts) are not read: {_MERGE}"
    ),
    "trainable_token_indices": f"single rows of the embeddings were trained: {_MERGE}",
}
# Parts of an adapter's file that say the same, whatever its config says.
_OTHER_PARTS: dict[str, str] = {
    "lora_magnitude_vector": _UNREADABLE["use_dora"],
    "trainable_tokens_delta": _UNREADABLE["trainable_token_indices"],
}
# Keys that leave the meaning of the factors alone, or that are read above.
_KNOWN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
