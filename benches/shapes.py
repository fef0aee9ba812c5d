"""The checkpoints that are measured, made once and kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from reasonvec.family import Family, make_family, sparse_shapes

SHARD_BYTES = 1_000_000_000
_VOCABULARY = frozenset({"model.embed_tokens.weight", "lm_head.weight"})


def qwen_1_5b(cache: Path) -> Family:
    """Qwen2.5-1.5B: 3.1 GB a checkpoint, 467 MB of it one tensor."""
    return _cached(
        cache / "qwen2.5-1.5b",
        lambda folder: make_family(
            folder,
            hidden=1536,
            intermediate=8960,
            layers=28,
            heads=12,
            kv_heads=2,
            vocab=151936,
            shard_bytes=SHARD_BYTES,
            with_base=False,
        ),
    )


def first_layers(cache: Path, layers: int) -> Path:
    """The first layers of both donors of the 1.5B family, without a vocabulary to speak of."""
    folder = cache / f"qwen2.5-1.5b-{layers}-layers"
    if folder.exists():
        return folder
    from safetensors import safe_open
    from safetensors.torch import save_file

    family = qwen_1_5b(cache)
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    for donor in (family.rl, family.sft):
        side = unfinished / donor.name
        side.mkdir(parents=True)
        tensors = {}
        for shard in sorted(donor.glob("*.safetensors")):
            with safe_open(shard, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    _, _, rest = name.partition("layers.")
                    if not rest or int(rest.partition(".")[0]) < layers:
                        rows = slice(0, 1024) if name in _VOCABULARY else slice(None)
                        tensors[name] = opened.get_slice(name)[rows].contiguous()
        save_file(tensors, side / "model.safetensors", {"format": "pt"})
        config = json.loads((donor / "config.json").read_text())
        config |= {"num_hidden_layers": layers, "vocab_size": 1024}
        (side / "config.json").write_text(json.dumps(config, indent=2))
    unfinished.rename(folder)
    return folder


def holes_7b(cache: Path) -> Family:
    """Qwen2.5-7B, every weight a hole in its file: 15 GB to read, next to nothing on disk."""
    return _cached(cache / "qwen2.5-7b", sparse_shapes)


def small(cache: Path) -> Family:
    """95 million parameters, the largest tensor in 128 blocks, so that every schedule differs."""
    return _cached(
        cache / "small",
        lambda folder: make_family(
            folder,
            hidden=1024,
            intermediate=4096,
            layers=4,
            heads=8,
            vocab=32768,
            shard_bytes=50_000_000,
            with_base=False,
        ),
    )


def _cached(folder: Path, make: Callable[[Path], Family]) -> Family:
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)
    return Family(*(folder / member for member in ("base", "sft", "rl", "instruct")))
