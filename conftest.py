"""Examples in docstrings run too: `family` is there for them, and the current folder is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from reasonvec.family import Family, make_family

# It has no examples, and collecting it imports torch, which the quick checks do without.
collect_ignore = ["python/reasonvec/torch.py"]


@pytest.fixture(scope="session")
def doctest_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The checkpoints that examples open: read, never written."""
    return make_family(tmp_path_factory.mktemp("doctest_family"))


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest) -> None:
    """Give an example its family, and a folder of its own to write into."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    names: dict[str, object] = request.getfixturevalue("doctest_namespace")
    names["family"] = request.getfixturevalue("doctest_family")
    folder: Path = request.getfixturevalue("tmp_path")
    patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    patch.chdir(folder)
