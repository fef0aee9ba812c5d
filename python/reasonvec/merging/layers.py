"""The config of a model whose layers are put together anew."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from reasonvec.compat.layout import Layout, text_config
from reasonvec.json_values import Json
from reasonvec.merging.inputs import Stack

__all__ = ["LayerOrigin", "restacked_config"]

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Lists that name layers by number.
_NUMBERS = frozenset({"mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices"})


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where a layer of the output comes from."""

    layout: Layout
    layer: int


def restacked_config(config: Json, stack: Stack, origins: Sequence[LayerOrigin] | None) -> Json:
    """config.json with the layers counted anew, and every list over layers following them."""
    if origins is None:
        return config
    config = copy.deepcopy(config)
    inner = text_config(config)
    assert isinstance(inner, dict)
    before = stack.layers
    for key in _COUNTS:
        if key in inner:
            inner[key] = len(origins)
    if inner.get("max_window_layers") == before:
        inner["max_window_layers"] = len(origins)
    for key, value in list(inner.items()):
        if not isinstance(value, list):
            continue
        if key in _NUMBERS:
            inner[key] = [i for i, o in enumerate(origins) if o.layer in _list(o, key)]
        elif "layer" in key and len(value) == before:
            inner[key] = [
                theirs[o.layer] if o.layer < len(theirs := _list(o, key)) else value[-1]
                for o in origins
            ]
    return config


def _list(origin: LayerOrigin, key: str) -> list[object]:
    value = text_config(origin.layout.config).get(key)
    return value if isinstance(value, list) else []
