"""The OpenAI chat dialect, inwards: the body of a reply becomes chunks.

No I/O: bytes in, chunks out. Unknown fields are ignored, and missing ones where that is possible.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .base import FinishReason, ToolCallDelta, Usage
from .openai_errors import ErrorReader
from .stream_decoder import StreamDecoder


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


class AnswerDecoder(StreamDecoder):
    """The decoder of `POST /chat/completions`."""

    def __init__(self, errors: ErrorReader) -> None:
        super().__init__(errors)
        self._call_ids: list[str] = []

    def event(self, name: str, data: bytes) -> None:
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
            if reasoning := delta.reasoning_content or delta.reasoning:
                self._add_reasoning(reasoning)
            if text := delta.content or delta.refusal:
                self._add_text(text)
            if choice.logprobs is not None and choice.logprobs.content:
                self._logprobs += choice.logprobs.content
            for call in delta.tool_calls or ():
                self._add_call(self._call(call))
            if self.failure is not None:
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
        return ToolCallDelta(
            index=index,
            id=call.id or "",
            name=function.name or "",
            arguments=function.arguments or "",
        )
