"""Takes Markdown apart: fenced blocks, the commands in them, tables, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_FENCE = re.compile(r"^```(\w*)[ \t]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")
#: Stands in the document for a key that interrupts what runs in the foreground.
CTRL_C = "^C"


class Block(NamedTuple):
    """A fenced block. `place` is what follows the language: the terminal or machine it is of."""

    language: str
    place: str
    text: str
    line: int


class Command(NamedTuple):
    """What a person types, and the lines that the document shows for it."""

    text: str
    shown: tuple[str, ...]
    place: str
    line: int


def all_blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks in order."""
    for found in _FENCE.finditer(markdown):
        line = markdown.count("\n", 0, found.start()) + 2
        yield Block(found[1], found[2].strip(), found[3], line)


def blocks(markdown: str, language: str) -> list[str]:
    """The texts of the fenced blocks of one language."""
    return [block.text for block in all_blocks(markdown) if block.language == language]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a `console` or `sh` block. A backslash at a line's end goes on."""
    console = block.language == "console"
    typed: str | None = None
    shown: list[str] = []
    begun = block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        if typed is not None and typed.endswith("\\"):
            typed += "\n" + line
        elif not console or line.startswith(("$ ", CTRL_C)):
            if typed is not None:
                yield Command(typed, tuple(shown), block.place, begun)
            typed, shown, begun = line.removeprefix("$ "), [], number
            if line.startswith(CTRL_C):
                typed, shown = CTRL_C, [line.removeprefix(CTRL_C)]
        else:
            shown.append(line)
    if typed is not None:
        yield Command(typed, tuple(shown), block.place, begun)


def prose(markdown: str) -> str:
    """The document without its fenced blocks."""
    return _FENCE.sub("", markdown)


def code_spans(markdown: str) -> list[str]:
    """What stands between backquotes in the text."""
    return _SPAN.findall(prose(markdown))


def links(markdown: str) -> list[str]:
    """Where its links lead."""
    return _LINK.findall(prose(markdown))


def anchors(markdown: str) -> set[str]:
    """The names under which its headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", prose(markdown), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def tables(markdown: str) -> dict[str, list[tuple[str, ...]]]:
    """The rows of the tables, by the title of their first column.

    A cell that is one code span stands without its marks.
    """
    found: dict[str, list[tuple[str, ...]]] = {}
    rows: list[tuple[str, ...]] | None = None
    for line in prose(markdown).splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = tuple(_plain(cell.strip()) for cell in line.strip("|").split("|"))
        if rows is None:
            rows = found.setdefault(cells[0], [])
        elif set("".join(cells)) - set("-: "):
            rows.append(cells)
    return found


def _plain(cell: str) -> str:
    spanned = re.fullmatch(r"`([^`]*)`", cell)
    return spanned[1] if spanned else cell
