"""The README.md of a merge, for whoever finds it on a model hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reasonvec.wording import legible, shortened

if TYPE_CHECKING:
    from reasonvec.merging.merge import Merge

__all__ = ["merge_card"]


def merge_card(merge: Merge, models: Sequence[str]) -> str:
    """The card as Markdown with YAML front matter, the same text for the same merge."""
    method = merge.called or merge.method.name
    first = (type(merge.method).__doc__ or "").strip().split("\n\n")[0]
    about = " ".join(first.replace("``", "`").split())
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- merge",
        "- mergekit",
        "- reasonvec",
        "---",
        "",
        "# A merge of language models",
        "",
        f"Merged by `{method}`: {about}",
        "",
        "## Models",
        "",
        *(f"- {_code(model)}" for model in dict.fromkeys(models)),
        "",
    ]
    if merge.config is not None:
        text = merge.config.decode("utf-8", errors="replace").rstrip("\n")
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        lines += ["## Configuration", "", f"{fence}yaml", text, fence, ""]
    else:
        lines += ["## Recipe", "", _code(str(merge)), ""]
    lines += [
        "`reasonvec.json` beside the weights records the recipe and a digest of every tensor that "
        "was read and written; `reasonvec verify` checks them.",
        "",
    ]
    return "\n".join(lines)


def _code(text: str) -> str:
    shown = shortened(legible(text), 2000)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if len(fence) > 1 else f"`{shown}`"
