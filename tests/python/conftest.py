"""Fixtures for the whole suite."""

from __future__ import annotations

import pytest

from reasonvec.family import Family, make_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Small tied checkpoints of three shards. Every test shares them: read or copy, never write."""
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def untied_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """As `family`, with an lm_head, another seed, and lengths that are no multiple of 16 lanes."""
    return make_family(
        tmp_path_factory.mktemp("untied_family"),
        hidden=72,
        intermediate=185,
        layers=3,
        heads=6,
        kv_heads=3,
        vocab=1999,
        tied=False,
        seed=1,
    )
