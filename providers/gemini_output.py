"""What the `gemini` command writes (`-o stream-json`) becomes chunks. No I/O.

An answer is whole if a `result` says `success`, there is text, and the command's telemetry says
that the model ended it: the exit code is 0 for most failures, and `success` is what an answer is
called that was cut at its limit or by a filter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from .base import (
    FinishReason,
    GenerateError,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    Usage,
)
from .gemini_found import NOT_LOGGED_IN
from .openai_errors import ErrorReader, ServerError, blames_key
from .stream_decoder import StreamDecoder

#: The exit code of one that is not logged in.
_NOT_LOGGED_IN = 41
#: What one says that read no prompt.
_NO_INPUT = "No input provided via stdin"
#: Above them, the exit code is an HTTP status modulo 256.
_STATUSES = range(400 - 256, 256)
_RETRY = re.compile(r"Suggested retry after (\d{1,9}(?:\.\d+)?)s")
_DAY = re.compile(r"\bdaily\b|per day|exhausted your", re.IGNORECASE)
_API_ERROR = re.compile(r"\[API Error: (.*)\](?:\n.*)?\Z", re.DOTALL)

#: Characters of an error that are looked at.
MAX_TOLD = 8192
#: Without it an answer that was cut would look like a whole one.
NO_TELEMETRY = "its telemetry does not say how the answer ended"

_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
}


class _Stats(msgspec.Struct):
    input_tokens: int | None = None
    total_tokens: int | None = None


class _Error(msgspec.Struct):
    message: str | None = None


class _Line(msgspec.Struct):
    type: str
    role: str | None = None
    content: str | None = None
    severity: str | None = None
    message: str | None = None
    status: str | None = None
    error: _Error | None = None
    stats: _Stats | None = None


_decode_line = msgspec.json.Decoder(_Line).decode


class GeminiOutput(StreamDecoder):
    """The decoder of one run for an answer of `model`."""

    def __init__(
        self,
        errors: ErrorReader,
        model: str,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`refused` is told where Google does not take the key or the login."""
        super().__init__(errors)
        self._refused = refused
        self._model = model
        self._result: _Line | None = None
        self._complaint = ""

    def event(self, name: str, data: bytes) -> None:
        """Take a line."""
        if self.failure is not None or self._result is not None:
            return
        try:
            line = _decode_line(data)
        except (ValueError, RecursionError):
            return  # what else a program writes: it shows by the missing result if that was one
        match line.type:
            case "message":
                if line.role == "assistant" and line.content:
                    self._add_text(line.content)
            case "error":
                self._complaint = line.message or ""
            case "tool_use":
                # It would be told that there is no such tool, and asked again.
                self.failure = self.broken("the model called a tool, and there is none")
            case "result":
                self._result = line

    def ended(self, code: int | None, errors: str, report: str) -> None:
        """Take the end of the run."""
        if self.failure is not None:
            return
        result = self._result
        if result is None or result.status != "success":
            self.failure = self._failed(code, errors)
            return
        told = _Telemetry(report)
        self._finish = _FINISH.get(told.finish)
        self._usage = _usage(result.stats)
        if fault := self._fault(told):
            self.failure = self.broken(fault)
            return
        self._close()

    def _fault(self, told: _Telemetry) -> str:
        """Why an answer that the command takes for one is none; "": it is one."""
        if not self.pieces:
            return self._complaint or "an empty answer"
        if told.model and told.model != self._model:
            return f"it asked {told.model[:80]!r} instead of {self._model!r}"
        if self._finish is None:
            return f"the model ended it by {told.finish[:80]!r}" if told.finish else NO_TELEMETRY
        return ""

    def _failed(self, code: int | None, errors: str) -> GenerateError:
        if code == _NOT_LOGGED_IN:
            return self._auth()
        if _NO_INPUT in errors:
            # It waits half a second for its input, which is there, but measures that by a clock
            # that runs on while a busy machine lets it do nothing.
            text = f"{self._errors.name} did not come to read the prompt"
            return ProviderUnavailable(text, again=True)
        status = code + 256 if code is not None and code in _STATUSES else 0
        if "ModelNotFoundError" in errors:
            status = 404
        error = self._result.error if self._result is not None else None
        told = (error and error.message) or self._complaint
        if not told:
            return self.broken(_last_line(errors) or f"it ended without a result ({code})")
        said = self._said(told)
        failure = self._errors.reply(status, {}, said, 0.0) if status else self.broken(said.message)
        if blames_key(status, said):
            self._refused(failure.message)
        if self.pieces and not isinstance(failure, RequestRejected | StreamInterrupted):
            failure = StreamInterrupted(failure.message, retry_after=failure.retry_after)
        failure.partial = self.text
        return failure

    def _auth(self) -> GenerateError:
        self._refused(NOT_LOGGED_IN.reason)
        text = f"{self._errors.name}: {NOT_LOGGED_IN.reason}: {NOT_LOGGED_IN.hint}"
        return ProviderUnavailable(text)

    def _said(self, message: str) -> ServerError:
        """What Google said, which the command gives as JSON or as it likes."""
        message = message[:MAX_TOLD]
        inner = _API_ERROR.search(message)
        text = inner[1] if inner else message
        said = self._errors.read(text.encode("utf-8", "replace"))
        if wait := _RETRY.search(message):
            said = msgspec.structs.replace(said, retry_after=float(wait[1]))
        if _DAY.search(message):
            said = msgspec.structs.replace(said, kind=f"{said.kind} PerDay".strip())
        return said


class _Telemetry:
    """What the command wrote of its requests: whom it asked, and how the last answer ended."""

    def __init__(self, report: str) -> None:
        #: Empty: it does not say.
        self.model = ""
        self.finish = ""
        for told in _attributes(report):
            if told.get("role", "main") != "main":
                continue
            if told.get("event.name") == "gemini_cli.api_request":
                self.model = str(told.get("model"))
            elif told.get("event.name") == "gemini_cli.api_response":
                reasons = told.get("finish_reasons")
                self.finish = str(reasons[-1]) if isinstance(reasons, list) and reasons else ""


def _attributes(report: str) -> Iterator[dict[str, Any]]:
    """The attributes of its records: JSON objects, one after the other, that have some."""
    decoder, place = json.JSONDecoder(), 0
    while (place := report.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(report, place)
        except (ValueError, RecursionError):
            return
        found = value.get("attributes")
        if isinstance(found, dict):
            yield found


def _usage(stats: _Stats | None) -> Usage | None:
    if stats is None or stats.input_tokens is None or stats.total_tokens is None:
        return None
    prompt, total = max(stats.input_tokens, 0), max(stats.total_tokens, 0)
    # The difference counts the thoughts, too.
    return Usage(prompt_tokens=prompt, completion_tokens=max(total - prompt, 0))


def _last_line(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
