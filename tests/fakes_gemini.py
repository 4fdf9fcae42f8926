"""What Google's Gemini says, for tests that script it byte by byte."""

from __future__ import annotations

from typing import Any

from fakes_http import event

USAGE: dict[str, Any] = {"promptTokenCount": 3, "candidatesTokenCount": 2, "totalTokenCount": 5}


def reply(*parts: Any, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """An event of a stream; a part may be a text."""
    whole = [{"text": part} if isinstance(part, str) else part for part in parts]
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": whole}, "index": 0}
    if finish is not None:
        candidate["finishReason"] = finish
    return {"candidates": [candidate], "modelVersion": "m", "responseId": "r", **fields}


def thought(text: str) -> dict[str, Any]:
    return {"text": text, "thought": True}


def calls(name: str, signature: str | None = None, **call: Any) -> dict[str, Any]:
    part: dict[str, Any] = {"functionCall": {"name": name, **call}}
    return part if signature is None else part | {"thoughtSignature": signature}


def answer(*texts: str, finish: str = "STOP") -> bytes:
    """The events of a whole answer."""
    events = [event(reply(text)) for text in texts]
    return b"".join([*events, event(reply(finish=finish, usageMetadata=USAGE))])


def error(
    code: int, message: str, status: str = "", *details: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    return {"error": {"code": code, "message": message, "status": status, "details": [*details]}}


def detail(kind: str, **fields: Any) -> dict[str, Any]:
    return {"@type": f"type.googleapis.com/google.rpc.{kind}", **fields}
