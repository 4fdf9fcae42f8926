"""Anthropic's dialect: Messages."""

from __future__ import annotations

from typing import Any

from fakes_http import Received
from vendor_replies import (
    COMPLETION_TOKENS,
    FAILED,
    PROMPT_TOKENS,
    Said,
    Streamed,
    last_text_of,
    named_event,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_FINISH = {"stop": "end_turn", "length": "max_tokens", "filter": "refusal"}


class Messages:
    """`/v1/messages`."""

    name = "messages"

    def wants_stream(self, request: Received) -> bool:
        return bool(request.json.get("stream"))

    def last_text(self, body: Any) -> str:
        return last_text_of(body["messages"])

    def whole(self, said: Said) -> Any:
        usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": COMPLETION_TOKENS}
        content = [
            *([{"type": "thinking", "thinking": said.reasoning}] if said.reasoning else []),
            *([{"type": "text", "text": said.text}] if said.pieces else []),
        ]
        return self._message() | {
            "content": content,
            "stop_reason": _FINISH[said.finish],
            "usage": usage if said.usage else {"input_tokens": 0, "output_tokens": 0},
        }

    def events(self, said: Said) -> Streamed:
        message = self._message()
        if said.usage:
            message["usage"] = {"input_tokens": PROMPT_TOKENS, "output_tokens": 1}
        begun = [named_event({"type": "message_start", "message": message})]
        if said.reasoning:
            thought = [{"type": "thinking_delta", "thinking": said.reasoning}]
            begun += _block(0, {"type": "thinking", "thinking": "", "signature": ""}, thought)
        rest = []
        if said.pieces:
            texts = [{"type": "text_delta", "text": piece} for piece in said.pieces]
            block = _block(1 if said.reasoning else 0, {"type": "text", "text": ""}, texts)
            begun, rest = begun + block[:2], block[2:]
        stop = {"stop_reason": _FINISH[said.finish], "stop_sequence": None}
        last: dict[str, Any] = {"type": "message_delta", "delta": stop}
        if said.usage:
            last["usage"] = {"output_tokens": COMPLETION_TOKENS}
        return Streamed(begun, [*rest, named_event(last), named_event({"type": "message_stop"})])

    def failed(self) -> bytes:
        return named_event(self.error(529, FAILED, "", None))

    def error(self, status: int, message: str, code: str, retry_after: int | None) -> Any:
        kind = _TYPES.get(status, "api_error")
        error = {"type": kind, "message": message}
        return {"type": "error", "error": error, "request_id": "req_1"}

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "stub-model",
        }
        return message | {"content": [], "stop_reason": None, "stop_sequence": None}


def _block(index: int, empty: dict[str, Any], deltas: list[dict[str, Any]]) -> list[bytes]:
    """The events of a part of the content."""
    return [
        named_event({"type": "content_block_start", "index": index, "content_block": empty}),
        *(
            named_event({"type": "content_block_delta", "index": index, "delta": delta})
            for delta in deltas
        ),
        named_event({"type": "content_block_stop", "index": index}),
    ]
