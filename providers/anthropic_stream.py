"""The dialect of Anthropic's Messages API, inwards: events become chunks.

The same events come over HTTP and, one a line, from the `claude` program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from .base import FinishReason, ProviderUnavailable, ToolCallDelta, Usage
from .openai_errors import ErrorReader
from .stop_strings import StopScanner
from .stream_decoder import StreamDecoder


class _Usage(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None


class _Block(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None


class _Delta(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Message(msgspec.Struct, gc=False):
    """The beginning of a message, or a whole one."""

    content: list[_Block] | None = None
    stop_reason: str | None = None
    usage: _Usage | None = None


class _Event(_Message, gc=False):
    type: str = ""
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None


_decode_event = msgspec.json.Decoder(_Event).decode

#: An answer that ended for another reason was broken off.
_FINISH: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class MessageDecoder(StreamDecoder):
    """The decoder of `POST /v1/messages`.

    `prefix` is what it continues. The white space at its end could not be sent: what of that the
    model writes again is left out. `stops` are strings that the model was not told.
    """

    def __init__(self, errors: ErrorReader, prefix: str = "", stops: Sequence[str] = ()) -> None:
        super().__init__(errors)
        self._scanner = StopScanner(stops)
        self._continues = bool(prefix)
        self._after = prefix[len(prefix.rstrip()) :]
        self._counted = _Usage()
        #: The number of each tool call, by the index of its block.
        self._numbers: dict[int, int] = {}
        #: What a tool call began with, until a piece of its arguments comes.
        self._inputs: dict[int, Any] = {}

    @property
    def finish(self) -> FinishReason | None:
        """How the answer ended, once its end is known."""
        return self._finish

    @property
    def usage(self) -> Usage | None:
        """The tokens as counted so far; what was read from a cache or written to one included."""
        counted = self._counted
        if counted == _Usage():
            return None
        prompt = (
            counted.input_tokens,
            counted.cache_creation_input_tokens,
            counted.cache_read_input_tokens,
        )
        return Usage(
            prompt_tokens=sum(max(tokens or 0, 0) for tokens in prompt),
            completion_tokens=max(counted.output_tokens or 0, 0),
        )

    def event(self, name: str, data: bytes) -> None:
        if self.finished or self.failure is not None:
            return
        try:
            event = _decode_event(data)
        except (ValueError, RecursionError) as error:
            if name == "error":
                self._fail(data)
            else:
                self.failure = self.broken(f"the server sent what cannot be read: {error}")
            return
        if event.type == "error" or name == "error":
            self._fail(data)
        elif event.type == "message":
            self._whole_message(event)
        else:
            self._read(event)

    def _read(self, event: _Event) -> None:
        delta = event.delta
        if event.type == "content_block_delta" and delta is not None:
            self._delta(event.index, delta)
        elif event.type == "content_block_start" and event.content_block is not None:
            self._block(event.index, event.content_block)
        elif event.type == "content_block_stop":
            self._block_ends(event.index)
        elif event.type == "message_start" and event.message is not None:
            self._count_tokens(event.message.usage)
        elif event.type == "message_delta":
            self._count_tokens(event.usage)
            if delta is not None and delta.stop_reason:
                self._stopped(delta.stop_reason)
        elif event.type == "message_stop":
            self._close()

    def _whole_message(self, message: _Message) -> None:
        self._count_tokens(message.usage)
        for index, block in enumerate(message.content or ()):
            self._block(index, block)
            self._block_ends(index)
        if message.stop_reason:
            self._stopped(message.stop_reason)

    def _delta(self, index: int, delta: _Delta) -> None:
        if delta.text:
            self._add_text(delta.text)
        elif delta.thinking:
            self._add_reasoning(delta.thinking)
        elif delta.partial_json and index in self._numbers:
            self._inputs.pop(index, None)
            number = self._numbers[index]
            self._add_call(ToolCallDelta(index=number, arguments=delta.partial_json))

    def _block(self, index: int, block: _Block) -> None:
        if block.text:
            self._add_text(block.text)
        elif block.thinking:
            self._add_reasoning(block.thinking)
        elif block.type == "tool_use":
            number = self._numbers[index] = len(self._numbers)
            self._inputs[index] = block.input or {}
            self._add_call(ToolCallDelta(index=number, id=block.id or "", name=block.name or ""))

    def _block_ends(self, index: int) -> None:
        """The text that might have become a stop string, and the arguments of a tool call that came
        with its beginning, or not at all."""
        if held := self._scanner.flush():
            super()._add_text(held)
        if index in self._inputs:
            arguments = msgspec.json.encode(self._inputs.pop(index)).decode()
            self._add_call(ToolCallDelta(index=self._numbers[index], arguments=arguments))

    def _count_tokens(self, usage: _Usage | None) -> None:
        """Each event tells what it knows, of all so far."""
        for field in _Usage.__struct_fields__ if usage is not None else ():
            if (tokens := getattr(usage, field)) is not None:
                setattr(self._counted, field, tokens)
        self._usage = self.usage

    def _stopped(self, reason: str) -> None:
        self._finish = _FINISH.get(reason)
        if self._finish is None:
            self.failure = self.broken(f"the server ended it by {reason[:80]!r}")

    def _add_text(self, text: str) -> None:
        while self._after and text and text[0] == self._after[0]:
            self._after, text = self._after[1:], text[1:]
        if text:
            self._after = ""
        if text := self._scanner.feed(text):
            super()._add_text(text)
        if self._scanner.found:
            # What all of it took is told at the end, for which nobody waits.
            self._finish, self._usage = "stop", None
            self._close()

    def _close(self) -> None:
        expected = self.pieces or self._continues or self._scanner.found
        if self._finish == "stop" and not expected and self.failure is None:
            self.failure = ProviderUnavailable(f"{self._errors.name} gave an empty answer")
        super()._close()
