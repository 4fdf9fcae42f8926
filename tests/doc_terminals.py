"""Does what a document tells a person to do, and looks at what is shown.

The rule for what is shown: each line of the document must be among the lines that really came, in
the document's order. Numbers (and so times, ports and sizes) may be others, and any spaces count as
one; `...` and `…` stand for anything. A CID or a peer id stands for the same id each time: it may
be another one than in the document, but where the document shows one twice, it must be the same
twice. Everything else must be there as it is.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import trio
from daemons import ROOT, clean_environment, until
from doc_blocks import CTRL_C, Command

#: Seconds for one command; for a node to be ready; to see that one came or went.
COMMAND_S, READY_S, SETTLE_S = 60, 90, 30
#: The home folder of the person in the documents.
WRITTEN_HOME = "/home/ann"
_WRITTEN_PORT = re.compile(r"(?<=[:/])74\d\d\b")
_STAYS = re.compile(r"^scripts/start\b|promptmesh (--home \S+ )?up\b")
_TOKEN = re.compile(
    r"(?P<cid>\bbafy[a-z2-7]{55}\b)"
    r"|(?P<peer>\b12D3KooW[1-9A-Za-z]{44}\b)"
    r"|…(?P<tail>[1-9A-Za-z]{8}\b)"
    r"|(?P<request>\breq-[0-9a-f]{20}\b)"
    r"|(?P<cut>\.\.\.|…)"
    r"|(?P<number>\d+(\.\d+)?)"
    r"|(?P<space>\s+)"
)
_ANY = {
    "cid": "bafy[a-z2-7]{55}",
    "peer": "12D3KooW[1-9A-Za-z]{44}",
    "tail": "[1-9A-Za-z]{8}",
    "request": "req-[0-9a-f]{20}",
    "cut": ".*",
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
            if line.strip() and not any(self._is(line, real) for real in lines):
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
        if found:
            self._real |= {name: found[f"id{i}"] for i, name in enumerate(names)}
        return found is not None


def _replaced_between(text: str, pattern: object) -> str:
    """The text as a regular expression: its tokens by `pattern`, the rest as it is."""
    assert callable(pattern)
    parts: list[str] = []
    end = 0
    for token in _TOKEN.finditer(text):
        parts += [re.escape(text[end : token.start()]), pattern(token)]
        end = token.end()
    return "".join([*parts, re.escape(text[end:])])


class Ports:
    """A free port for each port of a document, the same one for all who name it."""

    def __init__(self) -> None:
        self._real: dict[str, int] = {}
        self._taken = ExitStack()

    def replaced(self, text: str) -> str:
        """The text with free ports."""
        return _WRITTEN_PORT.sub(lambda found: str(self.of(found[0])), text)

    def of(self, written: str) -> int:
        """The port that stands for the one of the document."""
        if written not in self._real:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._real[written] = probe.getsockname()[1]
        return self._real[written]
