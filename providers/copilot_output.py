"""What the `copilot` command writes for one answer (`--output-format json`). No I/O.

An answer is whole if a `result` says so, there is text, the exit code is 0, and the command's
telemetry says how the model ended it: what a filter cut looks whole in all the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from .copilot_events import FINISH, CopilotEvents, usage_of

#: What it complains of where it does not know who asks.
_UNKNOWN = re.compile(
    r"authentication (information|failed)|could not be validated|Access Tokens \(ghp_\)",
    re.IGNORECASE,
)
#: Without it an answer that was cut would look like a whole one.
NO_TELEMETRY = "its telemetry does not say how the answer ended"


class _Line(msgspec.Struct, rename="camel"):
    type: str
    data: Any = None
    exit_code: int | None = None


class _Chat(msgspec.Struct, frozen=True):
    """What the telemetry says of a request to the model."""

    operation: str = msgspec.field(default="", name="gen_ai.operation.name")
    finish: list[str] = msgspec.field(default_factory=list, name="gen_ai.response.finish_reasons")
    prompt: int | None = msgspec.field(default=None, name="gen_ai.usage.input_tokens")
    completion: int | None = msgspec.field(default=None, name="gen_ai.usage.output_tokens")


class _Span(msgspec.Struct):
    attributes: _Chat = _Chat()


class CopilotOutput(CopilotEvents):
    """The decoder of one run."""

    _result: int | None = None

    def event(self, name: str, data: bytes) -> None:
        """Take a line."""
        if self.over or self._result is not None:
            return
        try:
            line = msgspec.json.decode(data, type=_Line)
        except (ValueError, RecursionError):
            return  # what else a program writes: it shows by the missing result if that was one
        if line.type == "result":
            self._result = -1 if line.exit_code is None else line.exit_code
        else:
            self.told(line.type, line.data)

    def ended(self, code: int | None, errors: str, report: str) -> None:
        """Take the end of the run; `report` is the telemetry."""
        if self.over:
            return
        if self._result != 0 or code != 0:
            if _UNKNOWN.search(errors):
                self._refused(401, self._errors.read(first_line(errors).encode()))
            else:
                why = first_line(errors) or f"it ended without a result ({code})"
                self.failure = self.broken(self._errors.redact(why))
            return
        chats = list(_chats(report))
        finish = FINISH.get(chats[-1].finish[-1]) if chats and chats[-1].finish else None
        if finish is None:
            self.failure = self.broken(NO_TELEMETRY if self.text else "an empty answer")
            return
        self._usage = usage_of(chats[-1].prompt, chats[-1].completion)
        self._end(finish)


def first_line(errors: str) -> str:
    """The first line that says something: the reason stands there, and below it what to try."""
    lines = (line.strip() for line in errors.splitlines())
    return next((line[:300] for line in lines if line), "")


def _chats(report: str) -> Iterator[_Chat]:
    """Its requests to the model, of which there may be more than are read."""
    for line in report.splitlines():
        try:
            found = msgspec.json.decode(line, type=_Span).attributes
        except (ValueError, RecursionError):
            continue  # another record, whose attributes are others
        if found.operation == "chat":
            yield found
