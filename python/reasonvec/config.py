"""The YAML of mergekit, as a merge: an existing file runs unchanged.

Every problem of a file is found at once; a key that is not known is named with the nearest that
is. Paths are folders on this machine: nothing is downloaded.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from reasonvec.adapter import is_adapter
from reasonvec.algebra import Point, adapter
from reasonvec.algebra import open as open_point
from reasonvec.compat.problem import Problem, demand, shorten
from reasonvec.config_values import ConfigValues
from reasonvec.errors import FormatError, ReasonvecError
from reasonvec.merging.merge import Merge, Model, Module, Slice
from reasonvec.merging.method import Method, field_keys
from reasonvec.merging.methods import METHODS
from reasonvec.merging.vocabulary import Tokenizer, TokenRule

__all__ = ["Recipe", "read_config", "read_recipe"]

_LONGEST = 1 << 20
# What aliases may make of a file: thousands of times what a recipe has.
_MOST = 1 << 17
_LONGEST_NUMBER = 1000
_TOP = ("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype",
        "out_dtype", "tokenizer", "tokenizer_source", "chat_template", "name")  # fmt: skip
_MODEL = ("model", "parameters")
_SOURCE = ("model", "layer_range", "parameters")
_SLICE = ("sources", "parameters")
_MODULE = ("slices", "models", "parameters")
_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
_TOKEN = ("source", "force")
_TOKEN_SOURCE = ("kind", "model", "token", "token_id")
_REFERENCE = ("model", "lora", "path", "revision", "override_architecture")
# Parts of multimodal models, as mergekit calls them, by the names of their tensors.
_VISION = r"(?:^|\.)(?:vision_tower|vision_model|vision_encoder|visual|vit)\."
_PARTS = {
    "text_decoder": (
        r"(?:^|\.)(?:language_model|text_model|lm_head|model\.(?:layers|embed_tokens|norm))(?:\.|$)"
    ),
    "vision_tower": _VISION,
    "vision_encoder": _VISION,
    "audio_tower": r"(?:^|\.)(?:audio_tower|audio_model|audio_encoder)\.",
    "multi_modal_projector": (
        r"(?:^|\.)(?:multi_modal_projector|mm_projector|projector|merger|connector)\."
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A file that was read: the merge, or None where its structure is broken, and every problem."""

    merge: Merge | None
    problems: list[Problem]


def read_config(path: str | PathLike[str], *, strict: bool = False) -> Merge:
    """The merge that a mergekit YAML describes, to be planned or saved.

    Args:
        path: the file.
        strict: whether a key that is not known is an error, and not a warning.

    Raises:
        FormatError: the file is no YAML, or too large to be a config.
        MismatchError: it has errors; all of them are told.
        OSError: it, or a model that it names, cannot be read.

    Examples:
        >>> import reasonvec as rv
        >>> from pathlib import Path
        >>> text = f"merge_method: passthrough\\nmodels:\\n- model: {family.sft}\\n"
        >>> _ = Path("copy.yml").write_text(text)
        >>> print(rv.read_config("copy.yml"))
        passthrough(sft)
    """
    recipe = read_recipe(Path(path), strict=strict)
    demand(recipe.problems)
    if recipe.merge is None:
        raise FormatError(f"{path}: describes no merge")
    return recipe.merge


def read_recipe(path: Path, *, strict: bool = False) -> Recipe:
    """As `read_config`, with the problems in place of an exception.

    Raises:
        FormatError: the file is no YAML, or too large to be a config.
        OSError: it cannot be read.
    """
    if path.stat().st_size > _LONGEST:
        message = f"{path}: expected a YAML file of at most {_LONGEST} bytes; it is no config"
        raise FormatError(message)
    content = path.read_bytes()
    documents = _documents(path, content)
    return _Reading(path, strict, content=content).run(documents)


def _documents(path: Path, content: bytes) -> list[object]:
    import yaml

    # Plain data only, each key once. Made here, so that importing reasonvec imports no parser.
    loader_class = type("_Loader", (yaml.SafeLoader,), {})

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[object, object]:
        loader.flatten_mapping(node)
        found: dict[object, object] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool)):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            found[key] = loader.construct_object(value_node, deep=True)
        return found

    def number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
        # Python takes minutes to read, or refuses to write, what is longer still.
        if len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number has {len(node.value)} characters", node.start_mark
            )
        whole = node.tag.endswith(":int")
        read = loader.construct_yaml_int if whole else loader.construct_yaml_float
        value: int | float = read(node)
        return value

    yaml.add_constructor("tag:yaml.org,2002:map", mapping, loader_class)
    for kind in ("int", "float"):
        yaml.add_constructor(f"tag:yaml.org,2002:{kind}", number, loader_class)
    try:
        documents = [d for d in yaml.load_all(content, loader_class) if d is not None]
        size = _size(documents, {})
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        message = f"{path}: expected YAML: {' '.join(str(error).split())}"
        raise FormatError(message) from None
    if size > _MOST:
        message = (
            f"{path}: expected a config; its aliases (*name) repeat parts of it so often that it "
            f"has more than {_MOST} values"
        )
        raise FormatError(message)
    return documents


def _size(value: object, known: dict[int, int]) -> int:
    """How many values there are in a value where every alias is written out; 16 characters of a
    string count as one."""
    if isinstance(value, (str, bytes)):
        return 1 + len(value) // 16
    if not isinstance(value, (Mapping, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST + 1  # until it is known: what holds itself has no end
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


@dataclass
class _Reading(ConfigValues):
    """One file on its way to a merge."""

    content: bytes = b""
    opened: dict[str, Point] = field(default_factory=dict)
    merges: dict[str, Merge | None] = field(default_factory=dict)
    named: dict[str, Mapping[object, object]] = field(default_factory=dict)
    under_way: list[str] = field(default_factory=list)

    # ---- documents

    def run(self, documents: list[object]) -> Recipe:
        last: Mapping[object, object] | None = None
        unnamed = 0
        for number, document in enumerate(documents):
            where = f"document {number + 1}" if len(documents) > 1 else ""
            config = self.mapping(where, document)
            if config is None:
                continue
            name = config.get("name")
            if name is None:
                unnamed += 1
                last = config
            elif not isinstance(name, str):
                self.error(where, f"name: expected a string, found {shorten(name)}")
            elif name in self.named:
                self.error(where, f"name: two documents are called {name!r}")
            else:
                self.named[name] = config
        if not documents:
            self.error("", "is empty; a config says at least merge_method and models")
        if unnamed > 1:
            self.error("", "several documents have no name; only the last merge needs none")
        if last is None and self.named:
            last = self.named[list(self.named)[-1]]
        if last is None:
            return Recipe(None, self.problems)
        name = next((n for n, config in self.named.items() if config is last), None)
        merge = self.document(last, name)
        for other in self.named:
            if other != name and other not in self.merges:
                self.problems.append(
                    Problem(
                        "key",
                        f"{self.path}: {other}: no other document uses this merge, so it is not "
                        "made",
                        severity="error" if self.strict else "warning",
                    )
                )
        if merge is not None:
            merge = replace(merge, config=self.content)
        return Recipe(merge, list(dict.fromkeys(self.problems)))

    def document(self, config: Mapping[object, object], name: str | None) -> Merge | None:
        if name is not None:
            if name in self.under_way:
                circle = " -> ".join([*self.under_way, name])
                self.error(name, f"is made of itself: {circle}")
                return None
            if name in self.merges:
                return self.merges[name]
            self.under_way.append(name)
        merge = self.merge(config, "" if name is None else name)
        if name is not None:
            self.under_way.pop()
            merge = None if merge is None else replace(merge, label=name)
            self.merges[name] = merge
        return merge

    def merge(self, config: Mapping[object, object], where: str) -> Merge | None:
        before = len(self.problems)
        prefix = f"{where}: " if where else ""
        self.keys(where, config, _TOP)
        method = self.method(config, where)
        base = None
        if config.get("base_model") is not None:
            base = self.reference(f"{prefix}base_model", config["base_model"])
        known = field_keys(method) if method is not None else frozenset()
        settings = self.settings(f"{prefix}parameters", config.get("parameters"), method, known)
        modules = self.modules(config, where, method, known)
        dtype = self.dtype(f"{prefix}dtype", config.get("dtype"))
        out_dtype = self.dtype(f"{prefix}out_dtype", config.get("out_dtype")) or dtype
        tokenizer = self.tokenizer(config, where)
        template = config.get("chat_template")
        if template is not None and not isinstance(template, str):
            self.error(f"{prefix}chat_template", f"expected a string, found {shorten(template)}")
            template = None
        broken = any(p.severity == "error" for p in self.problems[before:])
        if method is None or not modules or broken:
            return None
        return Merge(
            method(), tuple(modules), base, settings, dtype, out_dtype, tokenizer, template
        )

    def method(self, config: Mapping[object, object], where: str) -> type[Method] | None:
        name = config.get("merge_method")
        if name is None:
            self.error(where, "has no merge_method")
            return None
        found = METHODS.get(name) if isinstance(name, str) else None
        if found is None:
            near = difflib.get_close_matches(str(name), list(METHODS), 1, 0.5)
            meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(METHODS)}"
            self.error(where, f"merge_method: {shorten(name)} is not known; {meant}")
        return found

    def modules(
        self,
        config: Mapping[object, object],
        where: str,
        method: type[Method] | None,
        known: frozenset[str],
    ) -> list[Module]:
        prefix = f"{where}: " if where else ""
        given = [key for key in ("models", "slices", "modules") if config.get(key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            self.error(where, f"needs exactly one of models, slices and modules, found {found}")
            return []
        if given[0] != "modules":
            slices = self.slices(config, prefix, method, known)
            return [Module(tuple(slices))] if slices else []
        modules: list[Module] = []
        listed = self.mapping(f"{prefix}modules", config["modules"]) or {}
        for name, value in listed.items():
            at = f"{prefix}modules.{name}"
            module = self.mapping(at, value)
            if module is None:
                continue
            self.keys(at, module, _MODULE)
            inside = [key for key in ("models", "slices") if module.get(key) is not None]
            if len(inside) != 1:
                self.error(at, "needs exactly one of models and slices")
                continue
            slices = self.slices(module, f"{at}.", method, known)
            settings = self.settings(f"{at}.parameters", module.get("parameters"), method, known)
            names = None
            if name != "default":
                names = re.compile(_PARTS.get(str(name), rf"(?:^|\.){re.escape(str(name))}\."))
            modules.append(Module(tuple(slices), settings, str(name), names))
        return modules

    def slices(
        self,
        config: Mapping[object, object],
        prefix: str,
        method: type[Method] | None,
        known: frozenset[str],
    ) -> list[Slice]:
        if config.get("models") is not None:
            at = f"{prefix}models"
            models = [
                model
                for i, value in enumerate(self.items(at, config["models"]))
                if (model := self.model(f"{at}[{i}]", value, _MODEL, method, known)) is not None
            ]
            return [Slice(tuple(models))] if models else []
        slices = []
        for i, value in enumerate(self.items(f"{prefix}slices", config["slices"])):
            at = f"{prefix}slices[{i}]"
            part = self.mapping(at, value)
            if part is None:
                continue
            self.keys(at, part, _SLICE)
            sources = [
                model
                for j, source in enumerate(self.items(f"{at}.sources", part.get("sources")))
                if (model := self.model(f"{at}.sources[{j}]", source, _SOURCE, method, known))
                is not None
            ]
            settings = self.settings(f"{at}.parameters", part.get("parameters"), method, known)
            if sources:
                slices.append(Slice(tuple(sources), settings))
        return slices

    def model(
        self,
        where: str,
        value: object,
        keys: Sequence[str],
        method: type[Method] | None,
        known: frozenset[str],
    ) -> Model | None:
        if isinstance(value, str):
            value = {"model": value}
        entry = self.mapping(where, value)
        if entry is None:
            return None
        self.keys(where, entry, keys)
        if entry.get("model") is None:
            self.error(where, "has no model")
            return None
        point = self.reference(f"{where}.model", entry["model"])
        settings = self.settings(f"{where}.parameters", entry.get("parameters"), method, known)
        layers = None
        if "layer_range" in keys:
            layers = self.layers(f"{where}.layer_range", entry.get("layer_range"))
        return None if point is None else Model(point, settings, layers)

    # ---- models

    def reference(self, where: str, value: object) -> Point | Merge | None:
        """A model: another document, or a folder, perhaps with an adapter."""
        lora: object = None
        if isinstance(value, Mapping):
            self.keys(where, value, _REFERENCE)
            path, lora = value.get("model", value.get("path")), value.get("lora")
            revision = value.get("revision")
            if isinstance(path, Mapping):
                revision = path.get("revision")
                path = path.get("path")
            if isinstance(path, str) and revision is not None:
                path = f"{path}@{revision}"
            if isinstance(lora, Mapping):
                lora = lora.get("path")
            if value.get("override_architecture") is not None:
                self.problems.append(
                    Problem(
                        "key",
                        f"{self.path}: {where}.override_architecture: means nothing here: tensors "
                        "are matched by name",
                        severity="warning",
                    )
                )
        else:
            path = value
        if not isinstance(path, str) or not path:
            self.error(where, f"expected the path of a model, found {shorten(value)}")
            return None
        if path in self.named:
            return self.document(self.named[path], path)
        if lora is None and "+" in path and self.folder(path) is None:
            path, _, lora = path.partition("+")
        if path in self.named:
            self.error(where, f"{path}+{lora}: an adapter goes onto a checkpoint, not onto a merge")
            return None
        folder = self.folder(path)
        if folder is None and "@" in path:
            plain, _, revision = path.partition("@")
            folder = self.folder(plain)
            if folder is not None:
                self.problems.append(
                    Problem(
                        "revision",
                        f"{self.path}: {where}: {plain} is a folder, which has no revisions: "
                        f"{revision!r} was not looked for",
                        severity="warning",
                    )
                )
        if folder is None:
            self.absent(where, path)
            return None
        return self.point(where, folder, lora)

    def folder(self, path: str) -> Path | None:
        """The folder of a path, from here or from where the config is."""
        try:
            named = Path(path).expanduser()
        except RuntimeError:  # ~somebody, who has no home here
            return None
        for start in (Path(), self.path.parent):
            folder = start / named
            # os.path takes a name that no file can have for one that none has.
            if os.path.exists(folder):  # noqa: PTH110
                return folder
        return None

    def absent(self, where: str, path: str) -> None:
        name, _, revision = path.partition("@")
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
            local = name.rsplit("/", 1)[1]
            at = f" --revision {revision}" if revision else ""
            advice = (
                "there is no such folder; if it is a model on the Hugging Face Hub, download it "
                f"first (hf download {name}{at} --local-dir {local}), and name that folder"
            )
        else:
            advice = "there is no such folder, and no document of this file has that name"
        self.error(where, f"{path}: {advice}")

    def point(self, where: str, folder: Path, lora: object) -> Point | None:
        # One checkpoint however often it is named, so that what is the same is seen to be.
        key = f"{folder.resolve()}+{lora or ''}"
        if key in self.opened:
            return self.opened[key]
        try:
            point: Point = open_point(folder)
            if lora is not None:
                point = self.adapted(where, point, lora)
        except ReasonvecError as error:
            self.error(where, str(error))
            return None
        except OSError as error:
            self.error(where, f"{error.filename or folder}: {error.strerror or error}")
            return None
        self.opened[key] = point
        return point

    def adapted(self, where: str, point: Point, lora: object) -> Point:
        if not isinstance(lora, str):
            raise ReasonvecError(f"lora: expected the path of an adapter, found {shorten(lora)}")
        folder = self.folder(lora) or self.folder(lora.partition("@")[0])
        if folder is None:
            raise ReasonvecError(
                f"{lora}: there is no such adapter folder; download it first (hf download "
                f"{lora} --local-dir DIR), and name that folder"
            )
        if not is_adapter(folder):
            raise ReasonvecError(
                f"{folder}: is no adapter: it has no adapter_config.json; a model is named by "
                "itself, not after a +"
            )
        return point + adapter(folder, base=point)

    # ---- tokenizer

    def tokenizer(self, config: Mapping[object, object], where: str) -> Tokenizer | None:
        prefix = f"{where}: " if where else ""
        short, long = config.get("tokenizer_source"), config.get("tokenizer")
        if short is not None and long is not None:
            self.error(where, "has both tokenizer_source and tokenizer; one of them is enough")
        if short is not None:
            source = self.tokenizer_source(f"{prefix}tokenizer_source", short)
            return None if source is None else Tokenizer(source)
        if long is None:
            return None
        at = f"{prefix}tokenizer"
        section = self.mapping(at, long)
        if section is None:
            return None
        self.keys(at, section, _TOKENIZER)
        source = self.tokenizer_source(f"{at}.source", section.get("source", "base"))
        multiple = section.get("pad_to_multiple_of")
        if multiple is not None and not (type(multiple) is int and multiple > 0):
            self.error(
                f"{at}.pad_to_multiple_of",
                f"expected a positive whole number, found {shorten(multiple)}",
            )
            multiple = None
        tokens: dict[str, TokenRule] = {}
        listed = section.get("tokens")
        if listed is not None:
            for token, value in (self.mapping(f"{at}.tokens", listed) or {}).items():
                rule = self.token(f"{at}.tokens.{token}", value)
                if rule is not None:
                    tokens[str(token)] = rule
        if source is None:
            return None
        return Tokenizer(source, tokens, multiple if isinstance(multiple, int) else None)

    def tokenizer_source(self, where: str, value: object) -> object | None:
        if value in ("union", "base"):
            return value
        if isinstance(value, str):
            value = value.removeprefix("model:")
        return self.reference(where, value)

    def token(self, where: str, value: object) -> TokenRule | None:
        entry = self.mapping(where, value)
        if entry is None:
            return None
        self.keys(where, entry, _TOKEN)
        force = entry.get("force", False)
        if not isinstance(force, bool):
            self.error(f"{where}.force", f"expected true or false, found {shorten(force)}")
            force = False
        source = entry.get("source")
        if source is None:
            return TokenRule(force=force)
        if isinstance(source, Mapping) and {"kind", "token", "token_id"} & source.keys():
            self.keys(f"{where}.source", source, _TOKEN_SOURCE)
            if source.get("kind") == "zero":
                return TokenRule(zero=True, force=force)
            token, row = source.get("token"), source.get("token_id")
            if (token is None) == (row is None):
                self.error(f"{where}.source", "needs exactly one of token and token_id")
                return None
            if token is not None and not isinstance(token, str):
                self.error(f"{where}.source.token", f"expected a string, found {shorten(token)}")
                return None
            if row is not None and not (type(row) is int and row >= 0):
                self.error(f"{where}.source.token_id", f"expected a row, found {shorten(row)}")
                return None
            model = self.reference(f"{where}.source.model", source.get("model"))
            if model is None:
                return None
            return TokenRule(model, token, row if isinstance(row, int) else None, force=force)
        if source == "zero":
            return TokenRule(zero=True, force=force)
        model = self.reference(f"{where}.source", source)
        return None if model is None else TokenRule(model, force=force)
