"""The OpenAI dialect, outwards: an answer becomes JSON, whole or as server-sent events."""

from __future__ import annotations

from typing import Any

import msgspec

from ..providers.base import Chunk, Completion, Origin, ToolCallDelta, Usage

_encode = msgspec.json.Encoder().encode
#: Field of the `promptmesh` object -> the header that says the same.
_HEADERS = tuple(
    (name, "x-promptmesh-" + name.replace("_", "-"))
    for name in (
        *("request_id", "peer", "node", "provider", "model"),
        *("cache", "cid", "attempts", "policy"),
    )
)


def origin_fields(origin: Origin, request_id: str, cid: str | None) -> dict[str, Any]:
    """The `promptmesh` object of an answer: who, how, and the CID."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "peer": origin.peer,
        "node": origin.node,
        "provider": origin.provider,
        "model": origin.model,
        "cache": origin.cache,
        "attempts": origin.attempts,
        "policy": origin.policy,
    }
    if cid is not None:
        fields["cid"] = cid
    if origin.begun_by:
        fields["begun_by"] = origin.begun_by
    return fields


def origin_headers(
    origin: Origin, request_id: str, cid: str | None = None
) -> list[tuple[str, str]]:
    """The `x-promptmesh-*` headers of an answer."""
    fields = origin_fields(origin, request_id, cid or origin.cid)
    return [
        (header, _header_value(str(value)))
        for name, header in _HEADERS
        if (value := fields.get(name)) not in (None, "")
    ]


def _header_value(text: str) -> str:
    """Header-safe: a model or node may be named in any script."""
    if text.isascii() and text.isprintable():
        return text
    return text.encode("ascii", "backslashreplace").decode().replace("\r", "").replace("\n", "")


def usage_fields(usage: Usage) -> dict[str, Any]:
    """The `usage` object."""
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
    if usage.cached:
        fields["cached"] = True
    if not usage.exact:
        fields["estimated"] = True
    return fields


def encode_whole(
    completion: Completion, origin: Origin, request_id: str, created: int, cid: str | None
) -> bytes:
    """A `chat.completion` object."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.text}
    if completion.reasoning:
        message["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        message["content"] = completion.text or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in completion.tool_calls
        ]
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "finish_reason": completion.finish_reason,
        "logprobs": {"content": completion.logprobs} if completion.logprobs else None,
    }
    return _encode(
        {
            "id": request_id,
            "object": "chat.completion",
            "created": created,
            "model": origin.model,
            "choices": [choice],
            "usage": usage_fields(completion.usage),
            "promptmesh": origin_fields(origin, request_id, cid),
        }
    )


class StreamEncoder:
    """An answer as server-sent events of `chat.completion.chunk` objects."""

    def __init__(
        self, origin: Origin, request_id: str, created: int, *, include_usage: bool
    ) -> None:
        self._origin = origin
        self._id = request_id
        self._include_usage = include_usage
        # Every event begins and ends alike; only its choice differs.
        head = _encode({"id": request_id, "object": "chat.completion.chunk", "created": created})
        model = _encode({"model": origin.model})
        self._head = b"data: " + head[:-1] + b"," + model[1:-1] + b',"choices":['
        self._none = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._delta = self._head + b'{"index":0,"delta":{"content":'
        self._delta_end = b'},"logprobs":null,"finish_reason":null}' + self._none

    def first(self) -> bytes:
        """The event that opens the message, with the role and who answers."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        fields = origin_fields(self._origin, self._id, self._origin.cid)
        return b"".join(
            (self._head, _encode(choice), b'],"promptmesh":', _encode(fields), self._none[1:])
        )

    def chunk(self, chunk: Chunk) -> bytes:
        """The events of one chunk; of the last one also the end of the stream."""
        out = []
        if chunk.text and not (chunk.logprobs or chunk.tool_calls or chunk.reasoning):
            out.append(self._delta + _encode(chunk.text) + self._delta_end)
        elif chunk.text or chunk.logprobs or chunk.tool_calls or chunk.reasoning:
            out.append(self._head + _encode(_rich_choice(chunk)) + self._none)
        if chunk.finish_reason is not None:
            out.append(self._last(chunk))
        return b"".join(out)

    def _last(self, chunk: Chunk) -> bytes:
        choice = {
            "index": 0,
            "delta": {},
            "logprobs": None,
            "finish_reason": chunk.finish_reason,
        }
        fields = origin_fields(chunk.origin or self._origin, self._id, chunk.cid)
        tail = b'],"promptmesh":' + _encode(fields)
        events = self._head + _encode(choice) + tail + self._none[1:]
        if self._include_usage:
            usage = _encode(usage_fields(chunk.usage or Usage(exact=False)))
            events += self._head + b'],"usage":' + usage + b"}\n\n"
        return events + b"data: [DONE]\n\n"


def _rich_choice(chunk: Chunk) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if chunk.text:
        delta["content"] = chunk.text
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.tool_calls:
        delta["tool_calls"] = [_delta_call(call) for call in chunk.tool_calls]
    logprobs = {"content": chunk.logprobs} if chunk.logprobs else None
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _delta_call(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name:
        function["name"] = call.name
    fields: dict[str, Any] = {"index": call.index, "function": function}
    if call.id:
        fields |= {"id": call.id, "type": "function"}
    return fields
