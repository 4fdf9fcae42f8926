"""What the vendors' servers say to calls that cost nothing."""

from __future__ import annotations

import re
from typing import Any

from fakes_http import Received, json_reply, reply
from vendor_replies import MESSAGES, PROMPT_TOKENS

#: The models that each of them lists.
MODELS = ("stub-model", "stub-model-mini")


#: Whom GitHub says that a token of Copilot's belongs to.
_ACCOUNT = {"login": "stub", "copilot_plan": "individual", "chat_enabled": True}


def free_reply(request: Received, path: str, refusal: int | None) -> bytes:
    """The reply to a request at `path`, its mode taken away."""
    if request.headers.get("upgrade"):
        return reply(426)  # Codex asks for a WebSocket first
    if request.method == "HEAD":
        return reply(200)  # Claude Code asks whether one is there
    if refusal:
        return json_reply(refusal, {"error": {"message": MESSAGES.get(refusal, "it failed")}})
    if path.endswith("/count_tokens"):
        return json_reply(200, {"input_tokens": PROMPT_TOKENS})
    if path.endswith(":countTokens"):
        return json_reply(200, {"totalTokens": PROMPT_TOKENS})
    if "/copilot_internal/" in path:
        return json_reply(200, _ACCOUNT if path.endswith("/user") else {})
    if path.endswith("/models"):
        return json_reply(200, _models(request, path))
    return json_reply(404, {"error": {"message": f"nothing is at {path}"}})


def _models(request: Received, path: str) -> Any:
    if "anthropic-version" in request.headers:
        models: list[dict[str, Any]] = [
            {"type": "model", "id": m, "display_name": m, "created_at": "2026-01-01T00:00:00Z"}
            for m in MODELS
        ]
        return {"data": models, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}
    if path.endswith("/capi/models"):
        return {"object": "list", "data": [_copilot_model(m) for m in MODELS]}
    if re.search(r"/v1beta/models$", path) or "x-goog-api-key" in request.headers:
        methods = ["generateContent", "countTokens"]
        models = [
            {
                "name": f"models/{m}",
                "displayName": m,
                "inputTokenLimit": 32768,
                "outputTokenLimit": 8192,
                "supportedGenerationMethods": methods,
            }
            for m in MODELS
        ]
        return {"models": models}
    models = [{"id": m, "object": "model", "created": 1, "owned_by": "stub"} for m in MODELS]
    return {"object": "list", "data": models}


def _copilot_model(name: str) -> dict[str, Any]:
    limits = {"max_prompt_tokens": 32768, "max_output_tokens": 8192}
    limits["max_context_window_tokens"] = sum(limits.values())
    return {
        "id": name,
        "name": name,
        "object": "model",
        "vendor": "stub",
        "version": name,
        "preview": False,
        "model_picker_enabled": True,
        "policy": {"state": "enabled", "terms": ""},
        "billing": {"is_premium": False, "multiplier": 0},
        "capabilities": {
            "family": name,
            "object": "model_capabilities",
            "tokenizer": "o200k_base",
            "type": "chat",
            "limits": limits,
            "supports": {"streaming": True, "tool_calls": True, "vision": False},
        },
    }
