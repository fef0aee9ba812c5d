"""Pages read back: tags, tables, scripts, text."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>"
    "\"'`&<!--\u202e\x00\n\ud800"
)
VOID = {"meta", "input", "wbr", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Reads a page, refuses one whose tags do not close, and keeps what the tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.text += data
            if self._open[-1:] and ("td" in self._open or "th" in self._open):
                self.tables[-1][-1][-1] += data

    def heat(self) -> list[list[list[str]]]:
        """The tables of the heat maps, strips included."""
        kinds = [attrs.get("class", "") for tag, attrs in self.tags if tag == "table"]
        return [
            table
            for kind, table in zip(kinds, self.tables, strict=True)
            if kind.split()[0] == "heat"
        ]


def skeleton(page: str) -> list[tuple[str, frozenset[str]]]:
    """Tags and attribute names, less the line breaks and titles that follow a string's length."""
    return [(tag, frozenset(attrs) - {"title"}) for tag, attrs in Page(page).tags if tag != "wbr"]
