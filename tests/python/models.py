"""A folder of small models that recipes merge, one of them with tokens of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from reasonvec.family import make_family

NEW_TOKENS = ("<|think|>", "<|/think|>")


def make_models(folder: Path, *, tied: bool = False) -> Path:
    """base, sft, rl, instruct and chatty, under ``folder/models``; ``folder`` again."""
    models = folder / "models"
    make_family(
        models,
        hidden=32,
        intermediate=48,
        layers=4,
        heads=4,
        kv_heads=2,
        vocab=320,
        tied=tied,
        shard_bytes=60_000,
    )
    add_chatty(models)
    return folder


def add_chatty(models: Path) -> Path:
    """`instruct` with two more tokens, two tokens in each other's place, and other padding."""
    chatty = models / "chatty"
    chatty.mkdir()
    for path in (models / "instruct").iterdir():
        if "safetensors" not in path.name:
            shutil.copy(path, chatty / path.name)
    tensors: dict[str, np.ndarray] = {}
    for path in (models / "instruct").glob("*.safetensors"):
        tensors |= load_file(path)
    tokenizer = json.loads((chatty / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = vocab["A"], vocab["B"]
    vocab["A"], vocab["B"] = second, first
    count = max(row["id"] for row in tokenizer["added_tokens"]) + 1
    for number, token in enumerate(NEW_TOKENS, count):
        tokenizer["added_tokens"].append(
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    said = json.loads((chatty / "tokenizer_config.json").read_text(encoding="utf-8"))
    for row in tokenizer["added_tokens"][-len(NEW_TOKENS) :]:
        said["added_tokens_decoder"][str(row["id"])] = {k: v for k, v in row.items() if k != "id"}
    (chatty / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    (chatty / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    rows = count + len(NEW_TOKENS) + 5
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            table = tensors[name][:rows].copy()
            table[[first, second]] = table[[second, first]]
            noise = np.random.default_rng(7).standard_normal(table.shape).astype(np.float32)
            table[count : count + 2] = noise[:2].astype(ml_dtypes.bfloat16)
            tensors[name] = table
    save_file(tensors, chatty / "model.safetensors", {"format": "pt"})
    config = json.loads((chatty / "config.json").read_text())
    (chatty / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return chatty


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, as it is stored."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
