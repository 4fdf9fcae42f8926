"""What the vendors' CLIs said, recorded from the real ones, and a program that says it again.

A recording is `tests/recorded/VENDOR/CASE.jsonl`: a line that says what was run, one for each line
that the program wrote, and one that says how it ended. `scripts/record-clis` makes them, with
`recording_program` in the place of the real program; nothing of this machine and of that time is
left in them. Tests put `playing_program` in its place, which needs neither Node.js nor a server.

The case is that of the vendors' stub whose address the program was given (`/m/CASE/`), or, for a
command that asks no server, what it is asked for: `version`, `auth-status`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"
_PROGRAMS = Path(__file__).parent / "programs"
#: The options after which the path of a file stands that the program writes, and the variables
#: that hold such a path.
WRITES = (
    "--usage-output-file",
    "GEMINI_TELEMETRY_OUTFILE",
    "COPILOT_OTEL_FILE_EXPORTER_PATH",
)


@dataclass(frozen=True)
class Recording:
    """What a program did."""

    argv: tuple[str, ...]
    #: Each line, after the stream it was written to.
    lines: tuple[tuple[str, str], ...]
    #: None: it ran on, and was ended.
    exit: int | None
    #: What it wrote into the files of `WRITES`.
    files: Mapping[str, str] = field(default_factory=dict)
    #: How it ended when it was told to.
    stopped: int | None = None

    def dump(self) -> str:
        """As the text of a file."""
        values: list[dict[str, Any]] = [{"argv": self.argv, "files": dict(self.files)}]
        values += [{stream: line} for stream, line in self.lines]
        values.append({"exit": self.exit, "stopped": self.stopped})
        return "".join(json.dumps(value) + "\n" for value in values)


def load(text: str) -> Recording:
    """Read such a file."""
    head, *lines, last = map(json.loads, text.splitlines())
    said = tuple(next(iter(line.items())) for line in lines)
    return Recording(tuple(head["argv"]), said, last["exit"], head["files"], last["stopped"])


def recordings(vendor: str) -> dict[str, Recording]:
    """All of a vendor's, by case."""
    return {path.stem: load(path.read_text()) for path in sorted((RECORDED / vendor).iterdir())}


def case_of(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Which case a program is run for."""
    for text in [*argv, *environment.values()]:
        if match := re.search(r"127\.0\.0\.1:\d+/m/([\w-]+)", text):
            return match[1]
    words = [word.lstrip("-") for word in argv]
    return "-".join(word for word in words if re.fullmatch(r"[a-z]{2,10}", word)) or "none"


def written_to(name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """Which file of `WRITES` a program is told to write."""
    if name in argv:
        return Path(argv[argv.index(name) + 1])
    return Path(environment[name]) if name in environment else None


def requests_of(telemetry: str) -> str:
    """What the telemetry of Gemini's command says of its requests, which is a tenth of it."""
    decoder, place, kept = json.JSONDecoder(), 0, []
    while (place := telemetry.find("{", place)) >= 0:
        record, place = decoder.raw_decode(telemetry, place)
        attributes = record.get("attributes") or {}
        if str(attributes.get("event.name")).startswith("gemini_cli.api_"):
            kept.append(json.dumps({"attributes": attributes}, indent=2) + "\n")
    return "".join(kept)


def chats_of(telemetry: str) -> str:
    """What Copilot's telemetry says of how its requests to the model ended, and what they took."""
    spans = [json.loads(line).get("attributes") or {} for line in telemetry.splitlines()]
    words = ("operation.name", "response.finish_reasons", "usage.input_tokens")
    names = [f"gen_ai.{word}" for word in (*words, "usage.output_tokens")]
    chats = [span for span in spans if span.get("gen_ai.operation.name") == "chat"]
    kept = [{name: chat[name] for name in names if name in chat} for chat in chats]
    return "".join(json.dumps({"attributes": each}) + "\n" for each in kept)


#: What of a file is kept; of the others all.
KEPT: Mapping[str, Callable[[str], str]] = {
    "GEMINI_TELEMETRY_OUTFILE": requests_of,
    "COPILOT_OTEL_FILE_EXPORTER_PATH": chats_of,
}


# --- what changes from run to run ---

_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_TIME = re.compile(r"\b20\d\d-\d\d-\d\d([T ])\d\d[:-]\d\d[:-]\d\d([.-]\d+)?(Z|\+00:00)?")
_SECONDS = re.compile(
    r'("(?:\w*_ms|\w*Ms|\w*DurationMs|duration\w*|ttft\w*|startedAt|completedAt)": ?)\d+(?:\.\d+)?'
)
_PORT = re.compile(r"\b(127\.0\.0\.1:|(?:local|remote)Port: )\d+")


class Normal:
    """Takes out of texts what another run, or another machine, would say otherwise."""

    def __init__(self, places: Iterable[tuple[str, str]]) -> None:
        #: Folders and what stands for them, the longest first: one may be in another.
        self._places = sorted((p for p in places if len(p[0]) > 1), key=lambda p: -len(p[0]))
        self._uuids: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        for place, name in self._places:
            text = text.replace(place, name)
        text = _UUID.sub(self._uuid, text)
        text = _TIME.sub(r"2026-01-01\g<1>00:00:00.000Z", text)
        text = _SECONDS.sub(r"\g<1>1", text)
        return _PORT.sub(r"\g<1>1", text)

    def _uuid(self, match: re.Match[str]) -> str:
        number = self._uuids.setdefault(match[0], str(len(self._uuids) + 1))
        return f"00000000-0000-4000-8000-{number:>012}"


# --- the programs ---


def playing_program(folder: Path, vendor: str, name: str) -> Path:
    """A program of that name in `folder` that says what the vendor's said."""
    return _program(folder, name, "play_recording.py", str(RECORDED / vendor))


def recording_program(folder: Path, real: Path, to: Path) -> Path:
    """A program like the real one, which also writes down in `to` what it says."""
    return _program(folder, real.name, "make_recording.py", str(real), str(to))


def _program(folder: Path, name: str, script: str, *arguments: str) -> Path:
    """`-S -E`: it starts in 20 ms, and the environment of the caller has no part in it."""
    path = folder / name
    words = " ".join(f"'{w}'" for w in (sys.executable, "-S", "-E", _PROGRAMS / script, *arguments))
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(0o755)
    return path


def places(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """The folders of the machine and of the run that a program knows."""
    found = [(os.getcwd(), "/private/work"), (str(Path.cwd().parent), "/private")]
    named = {"HOME": "/home/user", "TMPDIR": "/private/tmp"}
    return found + [(environment[n], name) for n, name in named.items() if environment.get(n)]
