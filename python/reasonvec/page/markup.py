"""Strings from strangers as HTML text.

Every string that a page shows and did not write itself goes through here: what is not seen is
spelled out, what has no end is cut, and the rest is escaped, for text and for quoted attributes.
"""

from __future__ import annotations

import html
import re

from reasonvec.wording import legible, short_digests, shortened

_LONGEST_NAME = 160
_LONGEST_TEXT = 2000


def brief(text: str, limit: int) -> str:
    """The text in at most ``limit`` characters, escaped."""
    return html.escape(shortened(legible(text), limit), quote=True)


def name(text: str, limit: int = _LONGEST_NAME) -> str:
    """A dotted name that may break after its dots, slashes and underscores, escaped."""
    pieces = re.split(r"(?<=[._/])", shortened(legible(text), limit))
    return "<wbr>".join(html.escape(piece, quote=True) for piece in pieces)


def whole_name(text: str) -> str:
    """A ``title`` attribute with the name, where `name` does not show all of it."""
    return "" if len(legible(text)) <= _LONGEST_NAME else f' title="{brief(text, _LONGEST_TEXT)}"'


def quoted(text: str) -> str:
    """A path, recipe or digest: digests are cut, and the ``title`` has what was there."""
    shown = short_digests(text)
    title = "" if shown == text else f' title="{brief(text, _LONGEST_TEXT)}"'
    return f"<span{title}>{brief(shown, _LONGEST_TEXT)}</span>"
