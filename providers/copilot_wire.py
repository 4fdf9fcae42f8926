"""What Copilot's runtime and its SDKs say to each other: JSON-RPC 2.0 in frames. Pure.

GitHub's SDKs in five languages speak it, and the runtime has its schema among its files
(`schemas/api.schema.json`); version 3 of it is spoken here. What is sent is what the SDK for Python
sends in its mode "empty", in which an agent is left with nothing but a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .copilot_settings import CopilotOptions, CopilotSettings
from .json_rpc import WireError, read

#: The version of the protocol, which the runtime tells at the first request.
PROTOCOL = 3
#: The longest frame, in bytes. The longest of all has a prompt twice, with each character escaped.
MAX_FRAME = 64 << 20

#: The flags of a runtime that talks on its pipes and does nothing by itself.
FLAGS = ("--headless", "--stdio", "--no-auto-update", "--log-level", "none")
#: The variable that the token comes in, and the flag that says so.
TOKEN_VARIABLE = "COPILOT_SDK_AUTH_TOKEN"
TOKEN_FLAGS = ("--auth-token-env", TOKEN_VARIABLE)
#: Where nobody was named, or a server of one's own answers.
NO_LOGIN_FLAG = "--no-auto-login"

_encode = msgspec.json.Encoder().encode


class Event(msgspec.Struct, frozen=True):
    """What happens in a session."""

    type: str
    data: Any = None


class SessionEvent(msgspec.Struct, frozen=True, rename="camel"):
    """The `params` of an event, with the session that it happens in."""

    session_id: str
    event: Event


class Connected(msgspec.Struct, frozen=True, rename="camel"):
    """The answer to `connect`."""

    protocol_version: int
    version: str = ""


def frame(message: Mapping[str, Any]) -> bytes:
    """A message as it is sent."""
    body = _encode({"jsonrpc": "2.0", **message})
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def length_in(header: bytes) -> int | None:
    """The length that a line of a frame's head tells; None: another line. Raises `WireError`."""
    name, _, value = header.partition(b":")
    if name.strip().lower() != b"content-length":
        return None
    text = value.strip()
    if not text.isdigit() or len(text) > 12 or int(text) > MAX_FRAME:
        raise WireError(f"a frame of {text[:40]!r} bytes")
    return int(text)


def is_authenticated(result: msgspec.Raw) -> bool:
    """Does `auth.getStatus` say that somebody is logged in? Raises `WireError`."""
    return read(result, _AuthStatus).is_authenticated


def listed_models(result: msgspec.Raw) -> tuple[tuple[str, int | None], ...]:
    """The models that the account may use, with the lengths of their contexts. Raises `WireError`.

    Not `auto`, which would be another model each time.
    """
    usable = (m for m in read(result, _Models).models if m.policy.state != "disabled")
    return tuple((m.id, m.capabilities.limits.context) for m in usable if m.id not in ("", "auto"))


class _AuthStatus(msgspec.Struct, frozen=True, rename="camel"):
    is_authenticated: bool = False


class _Limits(msgspec.Struct, frozen=True):
    max_context_window_tokens: int | None = None
    max_prompt_tokens: int | None = None

    @property
    def context(self) -> int | None:
        known = [n for n in (self.max_prompt_tokens, self.max_context_window_tokens) if n]
        return min(known, default=None)


class _Capabilities(msgspec.Struct, frozen=True):
    limits: _Limits = _Limits()


class _Policy(msgspec.Struct, frozen=True):
    state: str = ""


class _Model(msgspec.Struct, frozen=True):
    id: str
    capabilities: _Capabilities = _Capabilities()
    policy: _Policy = _Policy()


class _Models(msgspec.Struct, frozen=True):
    models: list[_Model] = []


def new_session(
    settings: CopilotSettings,
    options: CopilotOptions,
    *,
    id_: str,
    model: str,
    system: str,
    folder: str,
    max_tokens: int | None,
) -> dict[str, Any]:
    """The parameters of `session.create`: a model alone, without tools, memory or instructions."""
    asked: dict[str, Any] = {
        "sessionId": id_,
        "model": model,
        "systemMessage": {"mode": "replace", "content": system},
        "workingDirectory": folder,
        "streaming": True,
        **_EMPTY,
    }
    if options.reasoning_effort is not None:
        asked["reasoningEffort"] = options.reasoning_effort
    if options.context_tier is not None:
        asked["contextTier"] = options.context_tier
    if settings.base_url:
        asked["provider"] = _server(settings, max_tokens)
    return asked


def _server(settings: CopilotSettings, max_tokens: int | None) -> dict[str, Any]:
    said: dict[str, Any] = {"type": settings.server, "baseUrl": settings.base_url}
    if settings.server != "anthropic":
        said["wireApi"] = settings.wire_api
    if settings.api_key:
        said["apiKey"] = settings.api_key
    if max_tokens is not None:
        said["maxOutputTokens"] = max_tokens
    return said


#: The mode "empty" of the SDK, and no server of tools either.
_EMPTY: dict[str, Any] = {
    "availableTools": [],
    "toolFilterPrecedence": "excluded",
    "disabledMcpServers": ["github-mcp-server"],
    "requestPermission": False,
    "requestElicitation": False,
    "requestExitPlanMode": False,
    "requestAutoModeSwitch": False,
    "includeSubAgentStreamingEvents": False,
    "enableSessionTelemetry": False,
    "isExperimentalMode": False,
    "mcpOAuthTokenStorage": "in-memory",
    "embeddingCacheStorage": "in-memory",
    "envValueMode": "direct",
    "customAgentsLocalOnly": True,
    "skipEmbeddingRetrieval": True,
    "enableOnDemandInstructionDiscovery": False,
    "enableFileHooks": False,
    "enableHostGitOperations": False,
    "enableSessionStore": False,
    "enableSkills": False,
    "memory": {"enabled": False},
}
#: What the SDK sends after it, in `session.options.update`.
EMPTY_OPTIONS: dict[str, Any] = {
    "coauthorEnabled": False,
    "customAgentsLocalOnly": True,
    "includedBuiltinSkills": [],
    "installedPlugins": [],
    "manageScheduleEnabled": False,
    "skipCustomInstructions": True,
}
