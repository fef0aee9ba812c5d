"""The tokenizer of a merge: a model's own files, with the tokens that are new to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from reasonvec.folders import CheckpointFolder
from reasonvec.json_values import Json, json_bytes, read_json

if TYPE_CHECKING:
    from reasonvec.merging.inputs import Input
    from reasonvec.merging.vocabulary import Vocabulary

__all__ = ["TOKENIZER_FILES", "tokenizer_files"]

TOKENIZER_FILES = frozenset({
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt",
    "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
})  # fmt: skip
# They list the tokens a second time, and would contradict a tokenizer.json with more of them.
_SECOND_LISTS = frozenset({"added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"})


def tokenizer_files(
    owner: CheckpointFolder, vocabulary: Vocabulary | None
) -> dict[str, Path | bytes]:
    """By name, a file to copy or the bytes to write."""
    paths = {path.name: path for path in owner.files() if path.name in TOKENIZER_FILES}
    written: dict[str, Path | bytes] = dict(paths)
    if vocabulary is None or not vocabulary.added:
        return written
    for name in _SECOND_LISTS:
        written.pop(name, None)
    rows = _new_tokens(vocabulary)
    tokenizer = json.loads(paths["tokenizer.json"].read_bytes())
    tokenizer["added_tokens"] = [*tokenizer.get("added_tokens", []), *rows]
    written["tokenizer.json"] = json.dumps(tokenizer, indent=2, ensure_ascii=False).encode()
    if "tokenizer_config.json" in paths:
        config = read_json(paths["tokenizer_config.json"])
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            for row in rows:
                decoder[str(row["id"])] = {k: v for k, v in row.items() if k != "id"}
            written["tokenizer_config.json"] = json_bytes(config)
    return written


def _new_tokens(vocabulary: Vocabulary) -> list[Json]:
    """Rows of added_tokens, with the flags that their owners give them."""
    flags: dict[int, dict[str, Json]] = {}
    rows: list[Json] = []
    for token, number in vocabulary.added.items():
        owner = vocabulary.owners.get(token)
        said: Json = {}
        if owner is not None:
            if id(owner) not in flags:
                flags[id(owner)] = _flags(owner)
            said = flags[id(owner)].get(token, {})
        row: Json = {"id": number, "content": token}
        for key in ("single_word", "lstrip", "rstrip", "normalized"):
            row[key] = bool(said.get(key, False))
        # A token that no model has was asked for by name, as a mark of its own.
        row["special"] = bool(said.get("special", owner is None))
        rows.append(row)
    return rows


def _flags(owner: Input) -> dict[str, Json]:
    path = owner.layout.tokenizer
    if path is None:
        return {}
    listed = json.loads(path.read_bytes()).get("added_tokens", [])
    return {row["content"]: row for row in listed if isinstance(row, dict) and "content" in row}
