"""What a folder says about itself, from its headers and its small JSON files: never tensor data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from reasonvec.compat.tokenizer import read_tokens
from reasonvec.names import is_embedding, is_vocabulary, layer_of

__all__ = ["FLOATS", "Layout", "TensorInfo", "text_config"]

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

_TEXT = ("text_config", "llm_config", "language_config", "thinker_config")

# How the packers in use name what belongs to their codes. Each is a whole last part of a name, or
# its end, so that no float model of today has one by chance.
_PACKED = re.compile(
    r"(?:\.(?:qweight|qzeros|g_idx|scales|absmax|quant_map|nested_absmax|nested_quant_map|SCB|W_q"
    r"|Qidxs|codebooks|input_scale|weight_format|weight_packed|weight_shape|weight_zero_point)"
    r"|weight_scale(?:_inv|_2)?|_scale_inv|quant_state\.[\w.]+|_proj_(?:blocks|scales))$"
)
_CODES = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})


class TensorInfo(NamedTuple):
    """One row of a shard's header. ``dtype`` is spelt as safetensors does: "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Layout:
    """A checkpoint or a vector, without its numbers.

    ``metadata`` is what the shards' `__metadata__` say together; ``config`` is config.json, empty
    where there is none. For a vector, both are those of its donors.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Path | None:
        """The folder's tokenizer.json, if it has one."""
        path = self.path / "tokenizer.json"
        return path if path.exists() else None

    def tokens(self) -> Mapping[str, int] | None:
        """Token string to id, or None where the folder has no tokenizer.json. Reads it each time.

        Raises FormatError with the path if the file is not one.
        """
        path = self.tokenizer
        return None if path is None else read_tokens(path)

    @property
    def tied(self) -> bool | None:
        """What config.json says of tie_word_embeddings; None if it says nothing, or contradicts
        itself between the model and its text tower."""
        said = {
            value
            for config in (self.config, text_config(self.config))
            if isinstance(value := config.get("tie_word_embeddings"), bool)
        }
        return said.pop() if len(said) == 1 else None

    @property
    def ties(self) -> bool | None:
        """Whether embeddings and head are one matrix: as the config says, else as the files look.
        None for a model without one embedding."""
        embedding, head = self.vocabulary()
        if embedding is None:
            return None
        if self.tied is None or head is not None:
            return head is None
        return self.tied

    @property
    def quantised(self) -> str | None:
        """Why the tensors are codes and not numbers, or None if they are numbers."""
        for config in (self.config, text_config(self.config)):
            for key in ("quantization_config", "compression_config"):
                said = config.get(key)
                if isinstance(said, Mapping) and said:
                    method = str(said.get("quant_method", "no method named"))[:40]
                    return f"{key} in config.json ({method})"
        for name, info in self.tensors.items():
            if info.dtype not in FLOATS and info.dtype.startswith(("F8", "F6", "F4")):
                return f"{name} is {info.dtype}"
            if _PACKED.search(name):
                return f"{name} belongs to packed weights"
            if info.dtype in _CODES and name.endswith(".weight"):
                return f"{name} is a weight of {info.dtype} codes"
        return None

    def names(self) -> Mapping[str, str]:
        """Canonical name to the name in the files, one for each matrix of its own.

        Embeddings and head are one matrix, under the name of the embeddings, where `__metadata__`
        says that one is another name for the other (safetensors' save_model does, and keeps either
        of them), and where a tied model stores its head as well.
        """
        return self._names

    def copies(self) -> Mapping[str, str]:
        """Stored name to the stored name of which it must be an exact copy: the head that a tied
        model lists beside its embeddings. Only the data can tell: whoever reads it must compare
        them, and refuse if they differ, because such a model is loaded untied."""
        return self._copies

    def vocabulary(self) -> tuple[str | None, str | None]:
        """Canonical names of the token embedding and of a head that is a matrix of its own; None
        for what is not there, or not alone."""
        return self._vocabulary

    # All of these are asked again and again, and a mixture has tens of thousands of tensors.

    @cached_property
    def _names(self) -> Mapping[str, str]:
        spellings, copies = self._spellings, self._copies
        return {name: stored for name, stored in spellings.items() if stored not in copies}

    @cached_property
    def _copies(self) -> Mapping[str, str]:
        spellings = self._spellings
        embedding, head = _vocabulary(spellings)
        if not self.tied or embedding is None or head is None:
            return {}
        ours, theirs = self.tensors[spellings[head]], self.tensors[spellings[embedding]]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return {}
        return {ours.name: theirs.name}

    @cached_property
    def _vocabulary(self) -> tuple[str | None, str | None]:
        return _vocabulary(self._names)

    @cached_property
    def _spellings(self) -> Mapping[str, str]:
        embeddings = {
            kept: alias
            for alias, kept in self.metadata.items()
            if alias not in self.tensors and kept in self.tensors
            if is_embedding(alias) and not is_embedding(kept)
        }
        return {embeddings.get(stored, stored): stored for stored in self.tensors}


def _vocabulary(names: Mapping[str, str]) -> tuple[str | None, str | None]:
    # Prediction layers beside the model (DeepSeek's) repeat both inside a layer.
    weights = [
        name
        for name in names
        if is_vocabulary(name) and name.endswith(".weight") and layer_of(name) is None
    ]
    embeddings = [
        name
        for name in weights
        if is_embedding(name) and not name.endswith("embed_tokens_per_layer.weight")
    ]
    heads = [name for name in weights if not is_embedding(name)]
    return (
        embeddings[0] if len(embeddings) == 1 else None,
        heads[0] if len(heads) == 1 else None,
    )


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The language tower's part of a config, the config itself where it has no towers."""
    for key in _TEXT:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            return text_config(inner) if key == "thinker_config" else inner
    return config
