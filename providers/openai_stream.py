"""The OpenAI chat dialect, inwards: the body of a reply becomes chunks.

No I/O: bytes in, chunks out. Unknown fields are ignored, and missing ones where that is possible.
"""

from __future__ import annotations

from typing import Any

import msgspec

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


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Logprobs(msgspec.Struct, gc=False):
    content: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: _Delta | None = None
    #: In the place of `delta` where the answer is whole.
    message: _Delta | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Reply(msgspec.Struct, gc=False):
    """A chunk of a stream, or a whole answer."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None


_decode_reply = msgspec.json.Decoder(_Reply).decode

#: Reasons in the words of several servers. An answer that ended for another one was broken off.
_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


class AnswerDecoder:
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
        self._call_ids: list[str] = []
        #: Characters so far.
        self._size = 0
        self._given: list[str] = []
        # What is being put together for the next chunk.
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._logprobs: list[dict[str, Any]] = []
        self._ready: list[Chunk] = []

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
            self._event(name, event)
        return self._take()

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
            self._event(name, event)
        self._close()
        return self._take()

    def _event(self, name: str, data: bytes) -> None:
        if self.finished or self.failure is not None:
            return
        if data == b"[DONE]":
            self._close()
            return
        try:
            reply = _decode_reply(data)
        except (ValueError, RecursionError) as error:
            if name == "error":
                self._fail(data)
            else:
                self.failure = self.broken(f"the server sent what cannot be read: {error}")
            return
        if reply.error or name == "error" or reply.object == "error":
            self._fail(data)
            return
        usage = reply.usage
        if usage is not None:
            self._usage = Usage(
                prompt_tokens=max(usage.prompt_tokens or 0, 0),
                completion_tokens=max(usage.completion_tokens or 0, 0),
            )
        if reply.choices:
            self._choice(reply.choices[0])
        elif usage is not None and self._finish is not None:
            self._close()

    def _choice(self, choice: _Choice) -> None:
        if choice.index:
            return  # One answer was asked for.
        delta = choice.delta or choice.message
        if delta is not None:
            text = delta.content or delta.refusal
            reasoning = delta.reasoning_content or delta.reasoning
            if reasoning:
                self._change(self._text, self._calls)
                self._reasoning.append(reasoning)
                self._size += len(reasoning)
                self.pieces += 1
            if text:
                self._change(self._reasoning, self._calls)
                self._text.append(text)
                self._given.append(text)
                self._size += len(text)
                self.pieces += 1
            if choice.logprobs is not None and choice.logprobs.content:
                self._logprobs += choice.logprobs.content
            if delta.tool_calls:
                self._change(self._text, self._reasoning)
                self._calls += map(self._call, delta.tool_calls)
                self.pieces += 1
            if self._size > MAX_ANSWER:
                self.failure = self.broken(f"the answer is longer than {MAX_ANSWER} characters")
                return
        if choice.finish_reason:
            self._finish = _FINISH.get(choice.finish_reason.lower())
            if self._finish is None:
                self.failure = self.broken(f"the server ended it by {choice.finish_reason[:80]!r}")

    def _call(self, call: _Call) -> ToolCallDelta:
        """A piece of a tool call; some servers give no index, but a new id for each call."""
        index = call.index
        if index is None:
            if call.id and call.id not in self._call_ids:
                self._call_ids.append(call.id)
            index = max(len(self._call_ids) - 1, 0)
        function = call.function or _Function()
        delta = ToolCallDelta(
            index=index,
            id=call.id or "",
            name=function.name or "",
            arguments=function.arguments or "",
        )
        # One more, so that empty ones have an end, too.
        self._size += len(delta.id) + len(delta.name) + len(delta.arguments) + 1
        return delta

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

    def _change(self, one: list[Any], other: list[Any]) -> None:
        """Begin another chunk if the present one is of another kind."""
        if one or other:
            self._flush()

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

    def _take(self) -> list[Chunk]:
        self._flush()
        ready, self._ready = self._ready, []
        return ready
