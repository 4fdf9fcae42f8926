"""Google's dialect: `models/NAME:generateContent`."""

from __future__ import annotations

from typing import Any

from fakes_http import Received, event
from vendor_replies import (
    COMPLETION_TOKENS,
    FAILED,
    PROMPT_TOKENS,
    Said,
    Streamed,
    last_text_of,
)

_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
_FINISH = {"stop": "STOP", "length": "MAX_TOKENS", "filter": "SAFETY"}


class GenerateContent:
    """See the module."""

    name = "gemini"

    def wants_stream(self, request: Received) -> bool:
        return ":streamGenerateContent" in request.path

    def last_text(self, body: Any) -> str:
        turns = [turn | {"role": turn.get("role", "user")} for turn in body["contents"]]
        return last_text_of(turns, "parts")

    def whole(self, said: Said) -> Any:
        return self._reply(said, said.text, said.finish, said.reasoning)

    def events(self, said: Said) -> Streamed:
        texts = [event(self._reply(said, piece)) for piece in said.pieces]
        thought = [event(self._reply(said, "", None, said.reasoning))] if said.reasoning else []
        last = event(self._reply(said, "", said.finish))
        return Streamed([*thought, *texts[:1]], [*texts[1:], last])

    def failed(self) -> bytes:
        return event(self.error(500, FAILED, "", None))

    def error(self, status: int, message: str, code: str, retry_after: int | None) -> Any:
        details: list[dict[str, Any]] = []
        if code == "key":
            reason = {"@type": "type.googleapis.com/google.rpc.ErrorInfo"}
            details.append(reason | {"reason": "API_KEY_INVALID"})
        if retry_after is not None:
            retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo"}
            details.append(retry | {"retryDelay": f"{retry_after}s"})
        said = {"code": status, "message": message, "status": _STATUS.get(status, "UNKNOWN")}
        return {"error": said | {"details": details}}

    def _reply(
        self, said: Said, text: str, finish: str | None = None, thought: str = ""
    ) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        if thought:
            parts.append({"text": thought, "thought": True})
        if text:
            parts.append({"text": text})
        candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": parts}}
        if finish:
            candidate["finishReason"] = _FINISH[finish]
        reply: dict[str, Any] = {
            "candidates": [candidate],
            "modelVersion": "stub-model",
            "responseId": "r1",
        }
        if said.usage:
            reply["usageMetadata"] = {
                "promptTokenCount": PROMPT_TOKENS,
                "candidatesTokenCount": COMPLETION_TOKENS,
                "totalTokenCount": PROMPT_TOKENS + COMPLETION_TOKENS,
            }
        return reply
