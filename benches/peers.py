"""mergekit, in a virtual environment of its own, doing what our commands do.

Run by itself, it installs that environment.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from measure import Turn, run
from shapes import SHARD_BYTES

CACHE = Path(__file__).parent / ".cache"
VERSION = "0.1.5"
# The pins are its own lower bounds, so that no later release can break the comparison.
_PACKAGES = (f"mergekit=={VERSION}", "pydantic~=2.10.6", "click==8.2.1")


def mergekit(cache: Path) -> Path:
    """The `mergekit-yaml` command, installed under `cache` on the first call."""
    folder = cache / f"mergekit-{VERSION}"
    command = folder / "bin" / "mergekit-yaml"
    if not command.exists():
        python = folder / "bin" / "python"
        uv = shutil.which("uv") or shutil.which("uv", path=sysconfig.get_path("scripts"))
        if uv:
            run([uv, "venv", "--clear", "--python", sys.executable, folder])
            run([uv, "pip", "install", "--compile-bytecode", "--python", python, *_PACKAGES])
        else:
            run([sys.executable, "-m", "venv", "--clear", folder])
            run([python, "-m", "pip", "install", *_PACKAGES])
    run([command, "--help"])  # Brings its libraries into memory, as the inputs are.
    return command


def task_arithmetic(command: Path, p: Path, n: Path, t: Path, alpha: float, output: Path) -> Turn:
    """N + alpha (P - N) + 1 (T - N): target + alpha (P - N), as task arithmetic over base N."""
    recipe = output.parent / "mergekit.yaml"
    recipe.write_text(
        f"""\
merge_method: task_arithmetic
base_model: {n}
models:
  - model: {p}
    parameters: {{weight: {alpha}}}
  - model: {t}
    parameters: {{weight: 1.0}}
parameters: {{normalize: false}}
dtype: bfloat16
"""
    )
    return merge(command, recipe, output, [p, n, t])


def merge(command: Path, recipe: Path, output: Path, inputs: Sequence[Path]) -> Turn:
    """A recipe, run by mergekit."""
    return Turn(
        "mergekit",
        [command, recipe, output, "--quiet", "--out-shard-size", str(SHARD_BYTES)],
        inputs=inputs,
        output=output,
        environment={"HF_HUB_OFFLINE": "1"},
    )


if __name__ == "__main__":
    print(mergekit(CACHE))
