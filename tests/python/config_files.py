"""Config files that a test writes."""

from __future__ import annotations

from pathlib import Path

import reasonvec as rv
from reasonvec.apply import ApplyPlan


def write(folder: Path, text: str) -> Path:
    """A config file."""
    path = folder / "config.yml"
    path.write_text(text, encoding="utf-8")
    return path


def planned(folder: Path, text: str) -> ApplyPlan:
    """The plan of a config, for an output beside its file."""
    return rv.read_config(write(folder, text)).plan(folder / "out")
