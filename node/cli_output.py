"""What the terminal shows: tables, quiet and loud lines, and nobody's escape sequences.

Data goes to stdout, everything else to stderr. Much of what is shown was written by other machines
or by a model, so control characters are taken out of it wherever a terminal would obey them.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from .config import wants_colour

Style = Literal["dim", "bold", "red", "yellow", "green"]
_CODES: dict[Style, str] = {"dim": "2", "bold": "1", "red": "31", "yellow": "33", "green": "32"}
#: C0 and C1 controls but newline and tab, and the marks that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
GAP = "  "
#: Columns of the terminal that a cut cell takes at least for others to be left out for it.
READABLE = 10


def prepare_streams() -> None:
    """Let no character that the terminal's encoding lacks end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Python may let wrong bytes pass here as half characters, which no prompt can hold.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")


def styled(text: str, style: Style, stream: TextIO) -> str:
    """The text in a colour, where the stream is a terminal and nobody asked for plain text."""
    if not text or not stream.isatty() or not wants_colour():
        return text
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def say(text: str, style: Style | None = None) -> None:
    """A line for the person, beside the data."""
    text = printable(text)
    print(styled(text, style, sys.stderr) if style else text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Something is probably not as it was meant."""
    say(f"promptmesh: {text}", "yellow")


def fail(text: str) -> int:
    """Say why it did not work, and give the exit code of that."""
    say(f"promptmesh: {text}", "red")
    return 1


def printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    # A date in config.toml is the only thing that is not of JSON.
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def read_input(limit: int) -> str:
    """All of standard input. Raises `ValueError` if it is no text, or longer than `limit`."""
    if sys.stdin is None:  # closed (`<&-`)
        return ""
    try:
        text = sys.stdin.read(limit + 1)
    except UnicodeDecodeError:
        raise ValueError("standard input is not text") from None
    if len(text) > limit:
        raise ValueError(f"standard input holds more than {limit} characters")
    return text


@dataclass(frozen=True)
class Column:
    """A column of a table.

    `shrink`: cut when the terminal is too narrow; `optional`: left out when it is still so.
    """

    title: str
    right: bool = False
    shrink: bool = False
    optional: bool = False


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table on stdout; on a terminal the shrinking columns are cut to its width."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for number, line in enumerate(table_lines(columns, rows, width)):
        print(styled(line, "dim", sys.stdout) if number == 0 else line)


def table_lines(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """The table's lines, its titles first. `width` is the terminal's, None for no limit."""
    cells = [[column.title for column in columns]]
    cells += [[" ".join(printable(cell).split()) for cell in row] for row in rows]
    widths = [max(map(cell_width, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        kept = _kept(columns, widths, width)
        columns, widths = [columns[i] for i in kept], [widths[i] for i in kept]
        cells = [[row[i] for i in kept] for row in cells]
        widths = _shrunk(columns, widths, width)
    return [
        GAP.join(
            _fitted(cell, size, column.right)
            for cell, size, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in cells
    ]


def _kept(columns: Sequence[Column], widths: Sequence[int], width: int) -> list[int]:
    """The columns that are shown: optional ones go, the last first, until the rest is readable."""
    kept = list(range(len(columns)))
    for i in reversed(range(len(columns))):
        least = sum(min(widths[k], READABLE) if columns[k].shrink else widths[k] for k in kept)
        if columns[i].optional and least + len(GAP) * (len(kept) - 1) > width:
            kept.remove(i)
    return kept


def _shrunk(columns: Sequence[Column], widths: list[int], width: int) -> list[int]:
    """The widths with what is too much taken from the widest of the shrinking columns."""
    widths = list(widths)
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    while excess > 0:
        able = [
            i for i, column in enumerate(columns) if column.shrink and widths[i] > len(column.title)
        ]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
        excess -= 1
    return widths


def _fitted(cell: str, size: int, right: bool) -> str:
    if cell_width(cell) > size:
        cell = cut(cell, size)
    space = " " * (size - cell_width(cell))
    return space + cell if right else cell + space


def cut(text: str, size: int) -> str:
    """The beginning of the text, with an ellipsis, in `size` columns of the terminal."""
    while text and cell_width(text) > size - 1:
        text = text[:-1]
    return text + "…"


def cell_width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def byte_size(count: float) -> str:
    """`1.5 GB`: thousands, as disks and cards are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.0f} TB" if count >= 100 else f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """`3 h`: one unit is enough for an age."""
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def seconds(value: float | None) -> str:
    """`0.31 s`, `12.0 ms`: how long something took; `-`: nobody knows."""
    if value is None:
        return "-"
    if value < 0.1:
        return f"{value * 1000:.1f} ms" if value else "0 s"
    return f"{value:.2f} s"
