"""Compares what a document shows with what really came.

The rule: each line of the document must be among the lines that really came, in the document's
order. Numbers (and so ports and sizes) and times with their units may be others, and any spaces
count as one; `...` and `…` stand for anything. CIDs and peer ids may be others too, but where the
document shows one twice, one must have come twice, and where it shows two, two. Everything else
must be there as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

_TOKEN = re.compile(
    r"(?P<cid>\bbafy[a-z2-7]{55}\b)"
    r"|(?P<peer>\b12D3KooW[1-9A-Za-z]{44}\b)"
    r"|…(?P<tail>[1-9A-Za-z]{8}\b)"
    r"|(?P<stub>\b(bafy|12D3KooW)\w*(…|\.\.\.))"
    r"|(?P<request>\breq-[0-9a-f]{20}\b)"
    r"|(?P<cut>\.\.\.|…)"
    r"|(?P<time>\d+(\.\d+)? (ms|s|min|h|d)\b)"
    r"|(?P<number>\d+(\.\d+)?)"
    r"|(?P<space>\s+)"
)
_ANY = {
    "cid": "bafy[a-z2-7]{55}",
    "peer": "12D3KooW[1-9A-Za-z]{44}",
    "tail": "[1-9A-Za-z]{8}",
    "request": "req-[0-9a-f]{20}",
    "stub": ".*",
    "cut": ".*",
    "time": r"\d+(?:\.\d+)?\s+(?:ms|s|min|h|d)",
    "number": r"\d+(?:\.\d+)?",
    "space": r"\s+",
}
_IDS = ("cid", "peer", "tail", "request")


class Ids:
    """Which real id each id of a document stands for."""

    def __init__(self) -> None:
        self._real: dict[str, str] = {}

    def replaced(self, text: str) -> str:
        """A command of the document with the real ids."""
        for written, real in self._real.items():
            text = text.replace(written, real)
        return text

    def missing(self, shown: Sequence[str], came: Iterable[str]) -> str | None:
        """The first line of the document that did not come in its turn."""
        lines = iter(came)
        for line in shown:
            if line.strip(" .…") and not any(self._is(line, real) for real in lines):
                return line
        return None

    def _is(self, written: str, real: str) -> bool:
        names: list[str] = []

        def pattern(token: re.Match[str]) -> str:
            kind = str(token.lastgroup)
            if kind not in _IDS:
                return _ANY[kind]
            name = token[kind]
            mark = "…" if kind == "tail" else ""
            if name in self._real:
                return mark + re.escape(self._real[name])
            if name in names:
                return f"{mark}(?P=id{names.index(name)})"
            names.append(name)
            return f"{mark}(?P<id{len(names) - 1}>{_ANY[kind]})"

        found = re.fullmatch(_replaced_between(written.strip(), pattern), real.strip())
        if found is None:
            return False
        new = {name: found[f"id{i}"] for i, name in enumerate(names)}
        if len({*self._real.values(), *new.values()}) < len(self._real) + len(new):
            return False  # one real id, where the document shows two
        self._real |= new
        return True


def _replaced_between(text: str, pattern: Callable[[re.Match[str]], str]) -> str:
    """The text as a regular expression: its tokens by `pattern`, the rest as it is."""
    parts: list[str] = []
    end = 0
    for token in _TOKEN.finditer(text):
        parts += [re.escape(text[end : token.start()]), pattern(token)]
        end = token.end()
    return "".join([*parts, re.escape(text[end:])])
