"""What every page is made of: one file that reads with no script and no network, on a phone, on
paper, in light and dark.

Every string in it that came from a file is escaped, and a content policy names the one script that
may run by its hash, so that even a hole in the escaping would not execute: checkpoints come from
strangers.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources

from reasonvec.page.markup import brief

__all__ = ["cells", "column_titles", "document", "opening"]

# What needs two places of the grid that a row becomes on a phone.
_WIDE = frozenset({"Shape", "Largest change", "Largest value", "Held as"})


def document(title: str, parts: Iterable[str], closing: str, style: str) -> str:
    """A page: the first of its parts is the `opening`, ``style`` what the style sheet cannot
    know."""
    script = _resource("page.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="referrer" content="no-referrer">\n',
            f"<title>{brief(title, 200)}</title>\n<style>\n{_resource('page.css')}",
            f"{style}</style>\n</head>\n<body>\n",
            *parts,
            f"</main>\n<footer><p>Made by reasonvec. {closing}</p></footer>\n",
            f"<script>{script}</script>\n</body>\n</html>\n",
        )
    )


def opening(what: str, title: str, lead: str, figures: Iterable[tuple[str, str, str]]) -> str:
    """What the page is about, the one sentence to take away, and the totals: label, figure, note.
    Only ``title`` is escaped here."""
    rows = "".join(
        f'<div><dt>{label}</dt><dd class="figure">{figure}</dd><dd class="note">{note}</dd></div>\n'
        for label, figure, note in figures
    )
    return (
        f'<header>\n<p class="kicker">{what}</p>\n'
        f"<h1>{brief(title, 200)}</h1>"
        f'\n<p class="lead">{lead}</p>\n</header>\n'
        f'<dl class="totals">\n{rows}</dl>\n<main>\n'
    )


def column_titles(titles: Iterable[str]) -> str:
    """The headings of a table of figures."""
    return "".join(f'<th role="columnheader" scope="col">{title}</th>' for title in titles)


def cells(row: Iterable[tuple[str, str]]) -> str:
    """The cells of a row, each with the label that it has where the table folds into cards."""
    return "".join(
        f'<td role="cell" data-label="{label}"{" class=wide" if label in _WIDE else ""}>{value}'
        "</td>"
        for label, value in row
    )


def _resource(name: str) -> str:
    return resources.files("reasonvec.page").joinpath(name).read_text(encoding="utf-8")
