"""The log: readable lines on stderr, or JSON lines for machines."""

from __future__ import annotations

import logging
import sys
import time

import msgspec

#: Foreign libraries that say more than a person running a node wants to read.
_QUIET = {
    "libp2p": logging.ERROR,
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "zeroconf": logging.ERROR,
    "asyncio": logging.WARNING,
}
_OURS = "promptmesh."


def set_up_logging(*, json_lines: bool) -> None:
    """Send all logs to stderr. Call it before a library installs a handler of its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if json_lines else _Lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)


def _area(record: logging.LogRecord) -> str:
    """The room that speaks: `mesh` of `promptmesh.mesh.gossip`."""
    name = record.name
    return name.removeprefix(_OURS).split(".")[0] if name.startswith(_OURS) else name


class _Lines(logging.Formatter):
    """`18:03:11 mesh: words`, with the level where it is not plain information."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{at} {_area(record)}: {level}{_safe(record.getMessage())}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _safe(message: str) -> str:
    """Peers' words may stand in a message: nothing in it may move the cursor or end the line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()
