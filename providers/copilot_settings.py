"""What `copilot_cli` and `copilot_sdk` can be told, in `config.toml` and with one request."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .options import Seconds

#: What Copilot's own variables call the settings of a server in place of GitHub's.
_SERVER = {
    "base_url": "COPILOT_PROVIDER_BASE_URL",
    "api_key": "COPILOT_PROVIDER_API_KEY",
    "server": "COPILOT_PROVIDER_TYPE",
    "wire_api": "COPILOT_PROVIDER_WIRE_API",
}
COMMAND = "copilot"
#: The model where nothing says another.
DEFAULT_MODEL = "gpt-4o"


class CopilotSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A way to Copilot. Its key never appears in logs, errors or arguments."""

    name: str
    #: The command; one without a slash is looked for in PATH.
    command: str = COMMAND
    #: Empty: those that the account may use, as far as they are known.
    models: tuple[str, ...] = ()
    #: A server that answers in place of GitHub's, as Copilot allows ("bring your own key").
    base_url: str = ""
    #: The key of that server; without one, a token of GitHub's.
    api_key: str | None = None
    #: Which dialect that server speaks.
    server: Literal["openai", "azure", "anthropic"] = "openai"
    wire_api: Literal["completions", "responses"] = "completions"
    #: The longest silence; generous, because the caller has deadlines of its own.
    read_timeout: Seconds = 600.0
    #: `copilot_sdk`: how long the runtime, which takes some 300 MB, is kept when nobody asks.
    idle_timeout: Seconds = 300.0
    #: The variables that it may see, and the program.
    environment: dict[str, str] = {}
    #: Where Copilot may keep what it unpacks: 235 MB, once for all answers.
    cache_dir: str = ""

    def __repr__(self) -> str:
        return f"CopilotSettings(name={self.name!r}, base_url={self.base_url!r})"


def with_environment(settings: CopilotSettings) -> CopilotSettings:
    """The settings, with what only Copilot's own variables say.

    Raises `msgspec.ValidationError`, a `ValueError`, for a variable that makes no sense.
    """
    said = settings.environment
    found: dict[str, Any] = {}
    if settings.command == COMMAND and "COPILOT_CLI_PATH" in said:
        found["command"] = said["COPILOT_CLI_PATH"]
    if not settings.models and "COPILOT_MODEL" in said:
        found["models"] = (said["COPILOT_MODEL"],)
    # A key that was configured without a server is GitHub's: no variable sends it elsewhere.
    if not settings.base_url and settings.api_key is None:
        for field, variable in _SERVER.items():
            if variable in said:
                found[field] = said[variable]
    return msgspec.convert({**msgspec.structs.asdict(settings), **found}, CopilotSettings)


class CopilotOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may say to Copilot beside what it says to all."""

    #: How long the model thinks; which of them a model takes, Copilot knows.
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    #: A longer context at a higher price, where the model has one.
    context_tier: Literal["default", "long_context"] | None = None
