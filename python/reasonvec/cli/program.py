"""The program as a shell starts it: quick to start, and quick to be gone."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress

__all__ = ["run"]


def run() -> None:
    """Run the command that the arguments name, and end the process with its exit code."""
    # What is imported stays: there is nothing to collect in it, now or later.
    gc.disable()
    from reasonvec.cli.app import main

    gc.freeze()
    gc.enable()
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int):
            _leave(end.code)
        raise


def _leave(code: int) -> None:
    """End the process at once: to take the interpreter apart takes longer than many a command."""
    # A reader that has gone away is reported as in every program, by the interpreter.
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
