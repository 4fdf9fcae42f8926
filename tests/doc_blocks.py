"""Takes Markdown apart: fenced blocks, tables, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the number of its first line."""

    language: str
    text: str
    line: int


def all_blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks in order."""
    for found in _FENCE.finditer(markdown):
        yield Block(found[1], found[2], markdown.count("\n", 0, found.start()) + 2)


def blocks(markdown: str, language: str) -> list[str]:
    """The texts of the fenced blocks of one language."""
    return [block.text for block in all_blocks(markdown) if block.language == language]


def prose(markdown: str) -> str:
    """The document without its fenced blocks."""
    return _FENCE.sub("", markdown)


def links(markdown: str) -> list[str]:
    """Where its links lead."""
    return _LINK.findall(prose(markdown))


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
