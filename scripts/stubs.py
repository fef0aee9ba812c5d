"""From the stub that `maturin generate-stubs` writes to the one that is committed.

    python scripts/stubs.py GENERATED_DIR python/reasonvec/_reasonvec.pyi

Adds what pyo3 cannot say: the buffer protocol, what a shape holds, and the imports of the
annotations that rust/python/ gives as strings. ruff takes those out of their quotes and formats.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

_IMPORTS = (
    "from collections.abc import Callable, Sequence",
    "from typing_extensions import CapsuleType",
)
_EDITS = (
    ("def shape(self, /) -> tuple:", "def shape(self, /) -> tuple[int, ...]:"),
    (
        "    def __dlpack__(",
        "    def __buffer__(self, flags: int, /) -> memoryview: ...\n    def __dlpack__(",
    ),
)


def main(generated: Path, stub: Path) -> None:
    text = (generated / "reasonvec" / "_reasonvec.pyi").read_text(encoding="utf-8")
    for old, new in _EDITS:
        if text.count(old) != 1:
            raise SystemExit(f"expected {old!r} once in the generated stub; correct {__file__}")
        text = text.replace(old, new)
    required = f"lint.isort.required-imports = {list(_IMPORTS)}"
    fix = ["check", "--fix", "--exit-zero", "--extend-select=I002", f"--config={required}"]
    for arguments in (fix, ["format"]):
        text = _ruff([*arguments, "--stdin-filename", "_reasonvec.pyi", "-"], text)
    stub.write_text(text, encoding="utf-8")


def _ruff(arguments: list[str], text: str) -> str:
    ruff = Path(sysconfig.get_path("scripts")) / "ruff"
    done = subprocess.run([ruff, *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
