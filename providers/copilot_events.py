"""What Copilot tells while it answers becomes chunks. No I/O.

Its command prints the same events, one a line, that its runtime sends to the SDK. Both ask again by
themselves where a call failed, and go on where the limit cut an answer. The first sign of either
ends the answer here: whoever reads then ends the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .base import FinishReason, GenerateError, RequestRejected, StreamInterrupted, Usage
from .openai_errors import ErrorReader, ServerError
from .stream_decoder import StreamDecoder

#: The status that a kind of failure without one has with everybody else.
_STATUSES = {
    "authentication": 401,
    "authorization": 401,
    "transient_auth_error": 401,
    "quota": 402,
    "policy": 403,
    "rate_limit": 429,
    "api_error": 500,
}
#: How a model ended an answer, as Copilot calls it.
FINISH: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
}


class _Data(msgspec.Struct, frozen=True, rename="camel"):
    """The `data` of an event, as far as it is of use."""


class _Delta(_Data, frozen=True):
    delta_content: str = ""
    message_id: str = ""


class _Message(_Data, frozen=True):
    content: str = ""
    message_id: str = ""


class _TurnStart(_Data, frozen=True):
    turn_id: str = ""


class _Usage(_Data, frozen=True):
    input_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    content_filter_triggered: bool | None = None


class _CallFailure(_Data, frozen=True):
    status_code: int | None = None
    error_message: str | None = None
    error_code: str | None = None


class _Retry(_Data, frozen=True):
    reason: str | None = None


class _Error(_Data, frozen=True):
    message: str = ""
    error_type: str = ""
    error_code: str | None = None
    status_code: int | None = None


class _Idle(_Data, frozen=True):
    aborted: bool | None = None


class CopilotEvents(StreamDecoder):
    """The decoder of one answer of the runtime, whose events come one by one (`told`)."""

    def __init__(self, errors: ErrorReader, *, now: Callable[[], float] = time.time) -> None:
        """`now` gives Unix time."""
        super().__init__(errors)
        self._now = now
        #: What was streamed of each message that is not whole yet.
        self._streams: dict[str, list[str]] = {}
        self._turn: str | None = None

    @property
    def over(self) -> bool:
        """It needs no more events."""
        return self.finished or self.failure is not None

    def event(self, name: str, data: bytes) -> None:
        """Take an event with its type in it, as a line of the command's output is."""
        try:
            event = msgspec.json.decode(data, type=_Event)
        except (ValueError, RecursionError):
            return  # what else a program writes: it shows by the missing end if that was one
        self.told(event.type, event.data)

    def told(self, kind: str, data: Any) -> None:
        """Take an event; one that is not known here says nothing of the answer."""
        entry = _EVENTS.get(kind)
        if entry is None or self.over:
            return
        type_, read = entry
        try:
            event = msgspec.convert(data, type_)
        except msgspec.ValidationError as error:
            self.failure = self.broken(f"it told what makes no sense ({kind}: {error})")
        else:
            read(self, event)

    # --- each event

    def _delta(self, event: _Delta) -> None:
        if event.delta_content:
            self._streams.setdefault(event.message_id, []).append(event.delta_content)
            self._add_text(event.delta_content)

    def _thought(self, event: _Delta) -> None:
        if event.delta_content:
            self._add_reasoning(event.delta_content)

    def _message(self, event: _Message) -> None:
        """A message is whole: what was not streamed of it is told now."""
        streamed = "".join(self._streams.pop(event.message_id, ()))
        if not event.content.startswith(streamed):
            self.failure = self.broken("it said at last something else than it had begun with")
        elif rest := event.content[len(streamed) :]:
            self._add_text(rest)

    def _turn_start(self, event: _TurnStart) -> None:
        """A second turn, where there are no tools, goes on with what the limit cut."""
        if self._turn is not None and event.turn_id != self._turn:
            self._end("length")
        self._turn = event.turn_id

    def _used(self, event: _Usage) -> None:
        self._usage = usage_of(event.input_tokens, event.output_tokens)
        if event.content_filter_triggered or event.finish_reason == "content_filter":
            self._end("content_filter")
        elif event.finish_reason == "length":
            self._end("length")

    def _call_failed(self, event: _CallFailure) -> None:
        said = self._errors.read((event.error_message or "").encode("utf-8", "replace"))
        status = event.status_code or said.status
        if status:
            kind = f"{said.kind} {event.error_code or ''}".strip()
            self._refused(status, msgspec.structs.replace(said, kind=kind))
        else:
            self.failure = self.broken(said.message or "the whole answer did not come")

    def _retried(self, event: _Retry) -> None:
        reason = event.reason or "no reason given"
        status = _STATUSES.get(reason)
        if status is None:
            self.failure = self.broken(f"it began anew ({self._errors.redact(reason[:100])})")
        else:
            self._refused(status, ServerError(kind=reason))

    def _error(self, event: _Error) -> None:
        said = self._errors.read(event.message.encode("utf-8", "replace"))
        kind = f"{event.error_type} {event.error_code or ''} {said.kind}".strip()
        said = msgspec.structs.replace(said, kind=kind)
        status = event.status_code or _STATUSES.get(event.error_type, 0)
        if status:
            self._refused(status, said)
        else:
            self._failed(self._errors.event(said))

    def _refused(self, status: int, said: ServerError) -> None:
        self._failed(self._errors.reply(status, {}, said, self._now()))

    def _failed(self, error: GenerateError) -> None:
        if self.pieces and not isinstance(error, RequestRejected):
            error = StreamInterrupted(error.message, retry_after=error.retry_after)
        error.partial = self.text
        self.failure = error

    def _aborted(self, event: _Data) -> None:
        self.failure = self.broken("it was ended in the middle")

    def _idle(self, event: _Idle) -> None:
        if event.aborted:
            self._aborted(event)
        else:
            self._end("stop")

    def _end(self, reason: FinishReason) -> None:
        """It has ended so: a whole answer, if there is any text."""
        if reason != "content_filter" and not self.text:
            self.failure = self.broken("an empty answer")
            return
        self._finish = reason
        self._close()


class _Event(msgspec.Struct):
    type: str
    data: Any = None


_Read = Callable[[CopilotEvents, Any], None]
#: By type of event: what is read of it, and by whom.
_EVENTS: Mapping[str, tuple[type[_Data], _Read]] = {
    "assistant.message_delta": (_Delta, CopilotEvents._delta),
    "assistant.reasoning_delta": (_Delta, CopilotEvents._thought),
    "assistant.message": (_Message, CopilotEvents._message),
    "assistant.turn_start": (_TurnStart, CopilotEvents._turn_start),
    "assistant.usage": (_Usage, CopilotEvents._used),
    "model.call_failure": (_CallFailure, CopilotEvents._call_failed),
    "assistant.turn_retry": (_Retry, CopilotEvents._retried),
    "session.error": (_Error, CopilotEvents._error),
    "abort": (_Data, CopilotEvents._aborted),
    "session.idle": (_Idle, CopilotEvents._idle),
}


def usage_of(prompt: int | None, completion: int | None) -> Usage | None:
    """What it says that an answer took; None: it does not say, or nonsense."""
    if prompt is None or completion is None or min(prompt, completion) < 0:
        return None
    return Usage(prompt_tokens=prompt, completion_tokens=completion)
