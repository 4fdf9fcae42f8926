"""What the decoders of all streamed dialects have in common: a body becomes chunks.

No I/O: bytes in, chunks out. A dialect says what an event means (`event`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from .base import (
    Chunk,
    FinishReason,
    GenerateError,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    ToolCallDelta,
    Usage,
)
from .event_stream import EventStream, EventTooLong
from .openai_errors import ErrorReader

#: The longest answer of a server that answers whole although it was asked for a stream, in bytes.
MAX_WHOLE = 32 * 1024 * 1024
#: Characters of an answer: its text, reasoning and tool calls. Models end after 400,000 tokens, and
#: whoever writes twice as many does not end at all. All of it fits into one frame to a peer.
MAX_ANSWER = 3 * 1024 * 1024


class StreamDecoder(ABC):
    """Takes the body of a reply with status 200, cut anywhere; gives its chunks.

    What arrives together becomes one chunk as far as it is of one kind. `failure` is set where the
    answer broke, and is to be raised after the chunks before it; `finished` is true when the
    closing chunk was given. A body that is one JSON object is a whole answer.
    """

    def __init__(self, errors: ErrorReader) -> None:
        self._errors = errors
        self.failure: GenerateError | None = None
        self.finished = False
        #: Pieces of content so far: about the tokens, where the server does not count them.
        self.pieces = 0
        self._events = EventStream()
        #: The body so far, if it is a whole answer; None until the first byte shows what it is.
        self._whole: bytearray | None = None
        self._streamed = False
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        #: Characters so far.
        self._size = 0
        self._given: list[str] = []
        # What is being put together for the next chunk.
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._logprobs: list[dict[str, Any]] = []
        self._ready: list[Chunk] = []

    @abstractmethod
    def event(self, name: str, data: bytes) -> None:
        """Take an event of the stream, or a whole answer (then `name` is empty)."""

    @property
    def text(self) -> str:
        """The text given so far."""
        return "".join(self._given)

    @property
    def streamed(self) -> bool:
        """Did the server stream, as it was asked?"""
        return self._streamed

    def broken(self, reason: str) -> GenerateError:
        """The failure of an answer that broke off now."""
        if self.pieces:
            return StreamInterrupted(
                f"{self._errors.name} broke off its answer: {reason}", partial=self.text
            )
        return ProviderUnavailable(f"{self._errors.name}: {reason}")

    def feed(self, data: bytes) -> list[Chunk]:
        """Take what arrived."""
        if not self._streamed:
            if self._whole is None:
                data = data.lstrip()
                if not data:
                    return []
            if self._whole is not None or data.startswith(b"{"):
                return self._hold(data)
            self._streamed = True
        try:
            events = self._events.feed(data)
        except EventTooLong as error:
            self.failure = self.broken(str(error))
            return []
        for name, event in events:
            self.event(name, event)
        return self.take()

    def _hold(self, data: bytes) -> list[Chunk]:
        self._whole = self._whole or bytearray()
        self._whole += data
        if len(self._whole) > MAX_WHOLE:
            self.failure = self.broken(f"the answer is longer than {MAX_WHOLE} bytes")
        return []

    def end(self) -> list[Chunk]:
        """Take the end of the body."""
        events = self._events.end() if self._whole is None else [("", bytes(self._whole))]
        for name, event in events:
            self.event(name, event)
        self._close()
        return self.take()

    def take(self) -> list[Chunk]:
        """The chunks that are ready."""
        self._flush()
        ready, self._ready = self._ready, []
        return ready

    # What a dialect calls.

    def _add_text(self, text: str) -> None:
        if self._reasoning or self._calls:
            self._flush()
        self._text.append(text)
        self._given.append(text)
        self._count(len(text))

    def _add_reasoning(self, text: str) -> None:
        if self._text or self._calls:
            self._flush()
        self._reasoning.append(text)
        self._count(len(text))

    def _add_call(self, delta: ToolCallDelta) -> None:
        if self._text or self._reasoning:
            self._flush()
        self._calls.append(delta)
        # One more, so that empty ones have an end, too.
        self._count(len(delta.id) + len(delta.name) + len(delta.arguments) + 1)

    def _count(self, characters: int) -> None:
        self.pieces += 1
        self._size += characters
        if self._size > MAX_ANSWER and self.failure is None:
            self.failure = self.broken(f"the answer is longer than {MAX_ANSWER} characters")

    def _fail(self, data: bytes) -> None:
        """An error in place of more of the answer."""
        error = self._errors.event(self._errors.read(data))
        if self.pieces and not isinstance(error, RequestRejected):
            error = StreamInterrupted(error.message, retry_after=error.retry_after)
        error.partial = self.text
        self.failure = error

    def _close(self) -> None:
        """The answer is over."""
        if self.finished or self.failure is not None:
            return
        if self._finish is None:
            self.failure = StreamInterrupted(
                f"{self._errors.name} ended its answer without the end marker", partial=self.text
            )
            return
        self._flush()
        self._ready.append(Chunk(finish_reason=self._finish, usage=self._usage))
        self.finished = True

    def _flush(self) -> None:
        if self._text or self._reasoning or self._calls or self._logprobs:
            self._ready.append(
                Chunk(
                    text="".join(self._text),
                    reasoning="".join(self._reasoning),
                    tool_calls=tuple(self._calls),
                    logprobs=tuple(self._logprobs),
                )
            )
            self._text, self._reasoning, self._calls, self._logprobs = [], [], [], []
