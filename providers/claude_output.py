"""What the `claude` command writes (`--output-format stream-json`) becomes chunks. No I/O.

An answer is whole if a `result` says that it is no error, and there is text: the exit code is 0
also for what is none, and `subtype` is `success` for all.

The command would go on by itself: it asks for the rest of an answer that was cut at its limit, and
for another one where there was none. So such an answer is over at the first sign.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from .anthropic_stream import MessageDecoder
from .base import FinishReason, GenerateError, ProviderUnavailable
from .claude_found import NOT_LOGGED_IN
from .openai_errors import ErrorReader, ServerError, blames_key

#: How an answer ends after which the command would ask again, or tells of an error of its own.
_AT_ONCE: frozenset[FinishReason] = frozenset({"length", "content_filter"})


class _Line(msgspec.Struct):
    type: str = ""
    subtype: str = ""
    event: msgspec.Raw = msgspec.Raw()
    is_error: bool | None = None
    num_turns: int | None = None
    result: str | None = None
    #: Of an error: what HTTP said, and what kind it is in words of the API and of the command.
    api_error_status: int | None = None
    api_error_type: str | None = None
    api_error: str | None = None
    error_status: int | None = None
    error: str | None = None


class _Type(msgspec.Struct):
    type: str = ""


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_type = msgspec.json.Decoder(_Type).decode


class ClaudeOutput(MessageDecoder):
    """The decoder of one run."""

    def __init__(
        self, errors: ErrorReader, refused: Callable[[str], None] = lambda reason: None
    ) -> None:
        """`refused` is told where the login, or the key, is not taken."""
        super().__init__(errors)
        self._tell_refusal = refused
        self._begun = False
        #: The result says that all is well.
        self._good = False

    def event(self, name: str, data: bytes) -> None:
        """Take a line."""
        if self.finished or self.failure is not None:
            return
        try:
            line = _decode_line(data)
        except (ValueError, RecursionError):
            return  # what is no event of ours is left alone; without a result nothing is whole
        if line.type == "stream_event":
            self._stream_event(bytes(line.event))
        elif line.type == "result":
            self._result(line)
        elif line.type == "system" and line.subtype == "api_retry":
            told = line.error or "it tries again"
            self.failure = self._refused(line.error_status or 0, told, line.error or "")

    def _stream_event(self, data: bytes) -> None:
        try:
            kind = _decode_type(data).type
        except (ValueError, RecursionError):
            kind = ""
        if kind == "message_start" and self._begun:
            self.failure = self.broken("it asked a second time")
            return
        self._begun = self._begun or kind == "message_start"
        if kind == "message_stop":
            if self._finish == "stop" and not self.text:
                self.failure = self.broken("an empty answer")
            return  # whether it is whole, the result says
        super().event("", data)
        if self.failure is None and self._finish in _AT_ONCE:
            self._close()

    def _result(self, line: _Line) -> None:
        if line.is_error is False and line.num_turns and self.text and self._finish:
            self._good = True  # it ends by itself now
        elif line.is_error is not False:
            told, kind = line.result or "an error of its own", line.api_error_type or ""
            self.failure = self._refused(line.api_error_status or 0, told, kind)
        elif not line.num_turns:
            self.failure = self.broken("it took the prompt for a command of its own")
        else:
            self.failure = self.broken("an empty answer")

    def _refused(self, status: int, told: str, kind: str) -> GenerateError:
        """An error that the command tells of."""
        if told.startswith("Not logged in"):
            text = f"{self._errors.name}: {NOT_LOGGED_IN.reason}: {NOT_LOGGED_IN.hint}"
            return ProviderUnavailable(text)
        said = self._errors.read(told.encode("utf-8", "replace"))
        if status and not self.pieces:
            said = msgspec.structs.replace(said, kind=kind)
            failure = self._errors.reply(status, {}, said, 0.0)
            if blames_key(status, said):
                self._tell_refusal(failure.message)
            return failure
        if "Prompt is too long" in told:
            return self._errors.reply(400, {}, ServerError(message=said.message), 0.0)
        return self.broken(said.message or "it ended in an error")

    def ended(self, code: int | None, errors: str, report: str) -> None:
        """It has ended."""
        if self._good:
            self._close()
        if self.finished or self.failure is not None:
            return
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        last = self._errors.redact(lines[-1][:300]) if lines else f"code {code}"
        self.failure = self.broken(f"it ended without a result ({last})")
