"""`reasonvec demo`: the whole story on a small family of checkpoints, with the commands that tell
it."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from reasonvec import load, open  # noqa: A004
from reasonvec.check import check
from reasonvec.cli.show import show_apply, show_check, show_extract, show_inspection, show_verify
from reasonvec.errors import ReasonvecError
from reasonvec.family import make_family
from reasonvec.page import inspection_page
from reasonvec.verify import verify

__all__ = ["run"]

_MARK = ".reasonvec-demo"


def run(folder: Path) -> None:
    """Make the family in ``folder`` and walk through check, extract, inspect, apply and verify."""
    console = Console(highlight=False, emoji=False)

    def step(command: str, meaning: str) -> None:
        console.print(
            f"\n[bold cyan]$ reasonvec {escape(command)}[/]\n[dim]{escape(meaning)}[/]",
            soft_wrap=True,
        )

    _clear(folder)
    console.print(
        f"Four small Qwen2-shaped checkpoints are being made in [bold]{escape(str(folder))}[/] ..."
    )
    family = make_family(folder)
    names = {"base": family.base, "sft": family.sft, "rl": family.rl, "instruct": family.instruct}
    meaning = {
        "base": "the pretrained model",
        "sft": "the donor before reinforcement learning",
        "rl": "the donor after it: about 12 % of its elements moved",
        "instruct": "the model that shall learn to reason",
    }
    for name, path in names.items():
        console.print(f"  {path.name:9} {meaning[name]}")

    step("check rl sft instruct", "Do they fit together, and how close are they?")
    positive, negative, target = open(family.rl), open(family.sft), open(family.instruct)
    show_check(check(positive, negative, target))

    step("extract rl sft -o reason", "What reinforcement learning changed, as a vector.")
    show_extract((positive - negative).save(folder / "reason"))
    reason = load(folder / "reason")

    step("inspect reason --html reason.html", "Where it changed what.")
    report = reason.inspect()
    page = folder / "reason.html"
    page.write_text(inspection_page(report), encoding="utf-8")
    show_inspection(report, page)

    step(
        "apply reason --to instruct -o reasoning --alpha 0.8",
        "The vector into another model of the family.",
    )
    show_apply((target + 0.8 * reason).save(folder / "reasoning"))

    step("verify reasoning", "The record says what every byte should be.")
    show_verify(verify(folder / "reasoning"))
    console.print(
        f"\nThe new model is in [bold]{escape(str(folder / 'reasoning'))}[/]; transformers loads "
        "it as it is. reasonvec.json beside it says how it came to be, and "
        f"{escape(str(page))} shows the vector."
    )


def _clear(folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
    elif (folder / _MARK).is_file():
        shutil.rmtree(folder)
        folder.mkdir(parents=True)
    else:
        message = f"{folder}: is not empty, and no earlier demo made it; name another folder"
        raise ReasonvecError(message)
    (folder / _MARK).touch()
