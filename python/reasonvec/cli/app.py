"""The group, and the commands that it has, in the order of its help; `program` starts it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from reasonvec import __version__
from reasonvec.cli.console import guarded
from reasonvec.cli.options import INPUT

__all__ = ["main"]

# In the order of the help, with the module of each.
_COMMANDS = {
    **dict.fromkeys(("check", "extract", "apply"), "vectors"),
    "merge": "merge",
    "undo": "vectors",
    **dict.fromkeys(("compress", "from-lora", "to-lora", "spectrum", "factors"), "lowrank"),
    **dict.fromkeys(("inspect", "compare", "verify", "diff"), "measures"),
}


class _Commands(click.Group):
    """A group that imports a command when somebody asks for it: the others cost time too."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *(name for name in self.commands if name not in _COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # Whoever mistypes a name is told which ones are like it.
        for name in (cmd_name,) if cmd_name in _COMMANDS else _COMMANDS:
            module = import_module(f"reasonvec.cli.{_COMMANDS[name]}")
            self.add_command(getattr(module, name.replace("-", "_")))
        return super().get_command(ctx, cmd_name)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="reasonvec")
def main() -> None:
    """Capabilities of language models as vectors in weight space.

    Exit codes: 0, done or yes; 1, the answer is no; 2, wrong use or input.
    """


@main.command()
@click.argument("folder", type=INPUT, metavar="[DIR]", default="reasonvec-demo")
def demo(folder: Path) -> None:
    """Make a small family of checkpoints, and run the other commands on it."""
    from reasonvec.cli.demo import run

    with guarded():
        run(folder)
