"""Small families of Qwen2-shaped checkpoints, for the demo, the tests and the benches.

A reasoning vector needs two donors and a target of one family, and real ones are gigabytes to
fetch. This module makes related points from random numbers, at any size, with nothing but numpy:

    base ──► sft ──► rl          the donors: a dense change, then a sparse one
      └────► instruct            the target: another dense change

The weights say nothing, but they move as real ones do. Training takes steps of about one size in
every tensor, and bf16 rounds most of a small step away, so reinforcement learning changes 5 to 30 %
of the stored elements (arXiv 2505.11711), mostly by one or a few units in the last place, and
hardly ever a norm weight near 1.

Everything is made a chunk at a time, so the size of a tensor is no limit, and a family of billions
of parameters takes seconds.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Family", "make_family", "sparse_shapes"]

_Bits: TypeAlias = npt.NDArray[np.uint16]
_Floats: TypeAlias = npt.NDArray[np.float32]

_ITEM = 2  # bytes of a bf16
_CHUNK = 2**18  # elements: small enough for the caches, large enough that Python is no cost
_POOL = 2**22  # normal numbers, drawn once: chunks read their noise from them at random offsets
_SAMPLE = 2**17  # elements: enough to tell 12 % moved from 12.3 %
_DEVIATION = 0.02  # of the weights of a matrix, as Qwen2 is initialised
_SFT_STEP = 0.01 * _DEVIATION
_INSTRUCT_STEP = 0.02 * _DEVIATION


@dataclass(frozen=True)
class Family:
    """The checkpoint folders of one family: ``instruct + (rl - sft)`` is the model to make."""

    base: Path
    sft: Path
    rl: Path
    instruct: Path


@dataclass(frozen=True)
class _Architecture:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden {self.hidden} is not an even multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.vocab < len(_tokens()):
            raise ValueError(f"vocab {self.vocab} is less than the {len(_tokens())} tokens")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the module, which decides what lands in which shard."""
        hidden, wide = self.hidden, self.intermediate
        narrow = hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for kind, rows in (("q", hidden), ("k", narrow), ("v", narrow)):
                yield f"{prefix}.self_attn.{kind}_proj.weight", (rows, hidden)
                yield f"{prefix}.self_attn.{kind}_proj.bias", (rows,)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{prefix}.mlp.gate_proj.weight", (wide, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (wide, hidden)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, wide)
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, hidden)

    def config(self) -> dict[str, object]:
        """The config.json of a Qwen2ForCausalLM, as every release of transformers reads it."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": _tokens()["<|endoftext|>"],
            "eos_token_id": _tokens()["<|im_end|>"],
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 32768,
            "max_window_layers": self.layers,
            "model_type": "qwen2",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }


def make_family(
    folder: Path,
    *,
    hidden: int = 64,
    intermediate: int = 176,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 5120,
    tied: bool = True,
    shard_bytes: int = 200_000,
    seed: int = 0,
    moved: float = 0.12,
    with_base: bool = True,
) -> Family:
    """Write four related bf16 checkpoints under `folder` and say where they are.

    The defaults are small (half a million parameters in three shards), but the embedding is larger
    than one block of the streaming grid. A tensor is never split: one larger than `shard_bytes` has
    a shard to itself. A checkpoint that fits in one shard is a lone ``model.safetensors`` with no
    index, as transformers has it. The vocabulary has more rows than the tokenizer has tokens, as
    real ones do.

    `moved` is the share of elements in which the RL donor differs from the SFT donor. The same
    arguments give the same bytes. `with_base` false leaves out the base, which extracting and
    applying never read.

    Raises `ValueError` if the sizes do not fit together, `FileExistsError` if a checkpoint is
    already there.
    """
    if not 0 < moved < 1:
        raise ValueError(f"moved is a share between 0 and 1, not {moved}")
    architecture = _Architecture(hidden, intermediate, layers, heads, kv_heads, vocab, tied)
    family = _family(folder)
    folders = [family.sft, family.rl, family.instruct]
    if with_base:
        folders.append(family.base)
    slots = _lay_out(architecture, folders, shard_bytes)

    pool = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
    rl_step = _step_that_moves(moved, pool)

    def write(slot: _Slot, start: int) -> None:
        count = min(_CHUNK, slot.elements - start)
        dice = np.random.default_rng([seed, zlib.crc32(slot.name.encode()), start])
        base_noise, sft_noise, rl_noise, instruct_noise = (
            pool[offset : offset + count] for offset in dice.integers(_POOL - count, size=4)
        )
        mean, deviation = slot.distribution
        base = _narrow(mean + deviation * base_noise)
        sft = _step(base, _SFT_STEP, sft_noise)
        rl = _step(sft, rl_step, rl_noise)
        instruct = _step(base, _INSTRUCT_STEP, instruct_noise)
        for member, bits in zip(folders, (sft, rl, instruct, base), strict=False):
            with (member / slot.file).open("r+b") as shard:
                shard.seek(slot.offset + _ITEM * start)
                shard.write(bits.data)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        chunks = [(slot, start) for slot in slots for start in range(0, slot.elements, _CHUNK)]
        for _ in threads.map(write, *zip(*chunks, strict=True)):
            pass
    return family


def sparse_shapes(
    folder: Path,
    *,
    hidden: int = 3584,
    intermediate: int = 18944,
    layers: int = 28,
    heads: int = 28,
    kv_heads: int = 4,
    vocab: int = 152064,
    tied: bool = False,
    shard_bytes: int = 4_000_000_000,
) -> Family:
    """Lay out a family whose weights are holes: right headers and sizes, every element zero.

    The defaults are the shapes of Qwen2.5-7B, 15 GB a checkpoint. What has to be measured at that
    size (peak memory, plans, headers) then takes no disk, on file systems that keep holes; Windows
    writes the zeros.

    Raises `ValueError` and `FileExistsError` as `make_family` does.
    """
    architecture = _Architecture(hidden, intermediate, layers, heads, kv_heads, vocab, tied)
    family = _family(folder)
    _lay_out(architecture, [family.base, family.sft, family.rl, family.instruct], shard_bytes)
    return family


def _family(folder: Path) -> Family:
    return Family(folder / "base", folder / "sft", folder / "rl", folder / "instruct")


# --------------------------------------------------------------------------------------------------
# Numbers: bf16 is the upper half of an f32, so integers do all the rounding.


def _widen(bits: _Bits) -> _Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: _Floats) -> _Bits:
    """Round finite `values` to the nearest bf16, ties to even; overwrites them, to save a copy."""
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    bits += odd
    bits += 0x7FFF
    bits >>= 16
    return bits.astype(np.uint16)


def _step(bits: _Bits, size: float, noise: _Floats) -> _Bits:
    values = size * noise
    values += _widen(bits)
    return _narrow(values)


def _step_that_moves(share: float, pool: _Floats) -> float:
    """The step size after which `share` of the weights of a matrix differ in bf16."""
    weights = _narrow(_DEVIATION * pool[:_SAMPLE])
    noise = pool[_SAMPLE : 2 * _SAMPLE]
    low, high = -30.0, 10.0  # powers of two: almost nothing moves, almost everything does
    for _ in range(24):
        middle = (low + high) / 2
        if np.mean(_step(weights, 2.0**middle, noise) != weights) < share:
            low = middle
        else:
            high = middle
    return float(2.0**high)


# --------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class _Slot:
    """Where a tensor's bytes lie: the same place in every member of the family."""

    name: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def distribution(self) -> tuple[float, float]:
        """Mean and standard deviation of the base weights, of the size that real ones have."""
        if self.name.endswith("norm.weight"):
            return 1.0, 0.1
        return 0.0, 0.1 if self.name.endswith(".bias") else _DEVIATION


def _lay_out(architecture: _Architecture, folders: list[Path], shard_bytes: int) -> list[_Slot]:
    """Make `folders` complete but for the weights, which are holes, and say where those go."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in architecture.tensors():
        size = _ITEM * math.prod(shape)
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = shape
        room -= size

    files = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    if len(files) == 1:
        files = ["model.safetensors"]

    slots: list[_Slot] = []
    headers: dict[str, tuple[bytes, int]] = {}
    for file, tensors in zip(files, shards, strict=True):
        header, data_bytes = _header(tensors)
        headers[file] = header, len(header) + data_bytes
        offset = len(header)
        for name, shape in sorted(tensors.items()):
            slots.append(_Slot(name, shape, file, offset))
            offset += _ITEM * math.prod(shape)

    total = sum(slot.elements for slot in slots)
    index = {
        "metadata": {"total_parameters": total, "total_size": _ITEM * total},
        "weight_map": {slot.name: slot.file for slot in sorted(slots, key=lambda slot: slot.name)},
    }
    for folder in folders:
        folder.mkdir(parents=True)
        for file, (header, size) in headers.items():
            with (folder / file).open("wb") as shard:
                shard.write(header)
                shard.truncate(size)
        if len(files) > 1:
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / "config.json", architecture.config())
        chat = folder.name == "instruct"
        _write_json(folder / "generation_config.json", _generation_config(chat))
        _write_json(folder / "tokenizer.json", _tokenizer())
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(chat))
    return slots


def _header(tensors: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The head of a shard, sorted by name as safetensors does, and the bytes of data behind it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(tensors.items()):
        start, end = end, end + _ITEM * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _write_json(path: Path, value: object) -> None:
    # Bytes, not text, so that a family is the same on Windows, newlines and all.
    path.write_bytes(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


# --------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE with Qwen2's rules and special tokens, and a handful of merges.

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = "Ġ t|h e|Ġt he|i n|a n|r e|o n|e r|Ġ a|Ġa n|Ġan d|e n|a t|Ġ w|i s|o r|Ġ o|Ġo f|in g|e d"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
)


def _merges() -> list[str]:
    return _MERGES.split("|")


def _tokens() -> dict[str, int]:
    """Token strings to ids: bytes in GPT-2's printable disguise, merges, special tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    disguised = range(0x100, 0x100 + 256 - len(printable))
    names = [chr(code) for code in (*printable, *disguised)]
    names += [merge.replace(" ", "") for merge in _merges()]
    return {name: number for number, name in enumerate((*names, *_SPECIAL))}


def _added_token(name: str) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": name, **flags, "special": True}


def _tokenizer() -> dict[str, object]:
    tokens = _tokens()
    flags = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)
    byte_level = {"type": "ByteLevel", **flags}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokens[name], **_added_token(name)} for name in _SPECIAL],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {name: number for name, number in tokens.items() if name not in _SPECIAL},
            "merges": _merges(),
        },
    }


def _tokenizer_config(chat: bool) -> dict[str, object]:
    """`chat` sets the target apart from its donors: one can see whose files a merged model has."""
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(_tokens()[name]): _added_token(name) for name in _SPECIAL},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": _SYSTEM + _CHATML if chat else _CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if chat else "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _generation_config(chat: bool) -> dict[str, object]:
    end = _tokens()["<|endoftext|>"]
    config: dict[str, object] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    if chat:
        config["eos_token_id"] = [_tokens()["<|im_end|>"], end]
        config |= {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    return config | {"transformers_version": "4.45.0"}
