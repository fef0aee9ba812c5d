"""The program: one group, and the commands that it has, in the order of its help."""

from __future__ import annotations

from pathlib import Path

import click

from reasonvec import __version__
from reasonvec.cli.console import guarded
from reasonvec.cli.lowrank import compress, factors, from_lora, spectrum, to_lora
from reasonvec.cli.measures import compare, diff, inspect, verify
from reasonvec.cli.merge import merge
from reasonvec.cli.options import INPUT
from reasonvec.cli.vectors import apply, check, extract, undo

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="reasonvec")
def main() -> None:
    """Capabilities of language models as vectors in weight space.

    Exit codes: 0, done or yes; 1, the answer is no; 2, wrong use or input.
    """


for _command in (
    *(check, extract, apply, merge, undo),
    *(compress, from_lora, to_lora, spectrum, factors),
    *(inspect, compare, verify, diff),
):
    main.add_command(_command)


@main.command()
@click.argument("folder", type=INPUT, metavar="[DIR]", default="reasonvec-demo")
def demo(folder: Path) -> None:
    """Make a small family of checkpoints, and run the other commands on it."""
    from reasonvec.cli.demo import run

    with guarded():
        run(folder)
