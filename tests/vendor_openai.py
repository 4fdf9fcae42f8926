"""OpenAI's two dialects: Responses, which Codex speaks, and Chat Completions."""

from __future__ import annotations

from typing import Any

from fakes_http import DONE, Received, delta, event
from vendor_replies import (
    COMPLETION_TOKENS,
    FAILED,
    PROMPT_TOKENS,
    Said,
    Streamed,
    last_text_of,
    named_event,
)

_CODES = {
    401: "invalid_api_key",
    402: "insufficient_quota",
    404: "model_not_found",
    429: "rate_limit_exceeded",
}
_FINISH = {"stop": "stop", "length": "length", "filter": "content_filter"}
#: Why a response is incomplete.
_WHY = {"length": "max_output_tokens", "filter": "content_filter"}


def _error(status: int, message: str, code: str, retry_after: int | None) -> Any:
    named = {"context": "context_length_exceeded", "key": "invalid_api_key"}
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = named.get(code) or _CODES.get(status, "")
    return {"error": {"message": message, "type": kind, "param": None, "code": code or None}}


class Chat:
    """`/v1/chat/completions`."""

    name = "chat"
    error = staticmethod(_error)

    def wants_stream(self, request: Received) -> bool:
        return bool(request.json.get("stream"))

    def last_text(self, body: Any) -> str:
        return last_text_of(body["messages"])

    def whole(self, said: Said) -> Any:
        message: dict[str, Any] = {"role": "assistant", "content": said.text}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        choice = {"index": 0, "message": message, "finish_reason": _FINISH[said.finish]}
        reply = {"id": "c1", "object": "chat.completion", "created": 1, "model": "stub-model"}
        return reply | {"choices": [choice]} | ({"usage": _CHAT_USAGE} if said.usage else {})

    def events(self, said: Said) -> Streamed:
        reasoning = [event(delta(reasoning_content=said.reasoning))] if said.reasoning else []
        texts = [event(delta(piece)) for piece in said.pieces]
        usage = [event({"choices": [], "usage": _CHAT_USAGE})] if said.usage else []
        end = [event(delta(finish=_FINISH[said.finish])), *usage, DONE]
        role = event(delta(role="assistant"))
        return Streamed([role, *reasoning, *texts[:1]], [*texts[1:], *end])

    def failed(self) -> bytes:
        return event(_error(500, FAILED, "", None))


_CHAT_USAGE = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": COMPLETION_TOKENS,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
}


class Responses:
    """`/v1/responses`."""

    name = "responses"
    error = staticmethod(_error)

    def wants_stream(self, request: Received) -> bool:
        return bool(request.json.get("stream"))

    def last_text(self, body: Any) -> str:
        asked = body["input"]
        return asked if isinstance(asked, str) else last_text_of(asked)

    def whole(self, said: Said) -> Any:
        return self._response(said) | {"output": self._items(said)}

    def events(self, said: Said) -> Streamed:
        items = self._items(said)
        where = {"item_id": "m1", "output_index": len(items) - 1, "content_index": 0}
        begun = [named_event({"type": "response.created", "response": {"id": "r1"}})]
        for index, item in enumerate(items[:-1]):
            begun.append(_item_event("done", index, item))
        texts = []
        if said.pieces:
            empty = items[-1] | {"content": []}
            begun.append(_item_event("added", len(items) - 1, empty))
            texts = [
                named_event({"type": "response.output_text.delta", **where, "delta": piece})
                for piece in said.pieces
            ]
        done = [_item_event("done", len(items) - 1, items[-1])] if said.pieces else []
        kind = "completed" if said.finish == "stop" else "incomplete"
        last = named_event({"type": f"response.{kind}", "response": self._response(said)})
        return Streamed([*begun, *texts[:1]], [*texts[1:], *done, last])

    def failed(self) -> bytes:
        error = {"code": "server_error", "message": FAILED}
        response = {"id": "r1", "status": "failed", "error": error}
        return named_event({"type": "response.failed", "response": response})

    def _items(self, said: Said) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        if said.reasoning:
            summary = [{"type": "summary_text", "text": said.reasoning}]
            items.append({"type": "reasoning", "id": "rs1", "summary": summary})
        if said.pieces:
            content = [{"type": "output_text", "text": said.text, "annotations": []}]
            items.append({"type": "message", "id": "m1", "role": "assistant", "content": content})
        return items

    def _response(self, said: Said) -> dict[str, Any]:
        response: dict[str, Any] = {"id": "r1", "object": "response", "created_at": 1}
        response |= {"model": "stub-model", "status": "completed", "output": []}
        if said.finish != "stop":
            response["status"] = "incomplete"
            response["incomplete_details"] = {"reason": _WHY[said.finish]}
        if said.usage:
            response["usage"] = {
                "input_tokens": PROMPT_TOKENS,
                "output_tokens": COMPLETION_TOKENS,
                "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
            }
        return response


def _item_event(what: str, index: int, item: dict[str, Any]) -> bytes:
    return named_event(
        {"type": f"response.output_item.{what}", "output_index": index, "item": item}
    )
