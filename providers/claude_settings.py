"""The settings of a provider of Claude, and which way it goes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from .anthropic_messages import ClaudeOptions
from .options import Seconds, checked_base_url, checked_key

#: Without a version: that is added to it.
BASE_URL = "https://api.anthropic.com"
#: The variables with what is sent as `x-api-key`, as a bearer token (which some gateways want), and
#: with the address, as Anthropic's own programs take them.
KEY = "ANTHROPIC_API_KEY"
TOKEN = "ANTHROPIC_AUTH_TOKEN"
URL = "ANTHROPIC_BASE_URL"
NO_KEY = f"there is no key: set {KEY} (https://platform.claude.com/settings/keys)"
#: Tokens of an answer where a request does not say, and the model may make as many.
MAX_TOKENS = 8192

Way = Literal["http", "cli"]


class ClaudeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One account or gateway. Its key and headers never appear in logs or errors."""

    name: str = "claude_code"
    #: `http` needs a key, `cli` the installed command; `auto` is `http` where there is a key.
    mode: Literal["auto", "http", "cli"] = "auto"
    #: None: of ANTHROPIC_API_KEY.
    api_key: str | None = None
    #: Empty: of ANTHROPIC_BASE_URL, else Anthropic's.
    base_url: str = ""
    #: Empty: by HTTP all that Anthropic lists, by the command its own default.
    models: tuple[str, ...] = ()
    #: Sent with each request by HTTP.
    headers: dict[str, str] = {}
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = MAX_TOKENS
    #: What requests are asked with that say nothing else.
    options: ClaudeOptions = ClaudeOptions()
    #: The command; one without a slash is looked for in PATH.
    command: str = "claude"
    #: The variables that it may see, and the command.
    environment: dict[str, str] = {}
    connect_timeout: Seconds = 5.0
    #: The longest silence; generous, because the caller has deadlines of its own.
    read_timeout: Seconds = 600.0

    def __repr__(self) -> str:
        return f"ClaudeSettings(name={self.name!r}, mode={self.mode!r})"

    @property
    def key(self) -> str:
        """Sent as `x-api-key`; empty: there is none. Raises `ValueError`."""
        return checked_key((self.api_key or self.environment.get(KEY, "")).strip())

    @property
    def token(self) -> str:
        """Sent as a bearer token; empty: there is none. Raises `ValueError`."""
        return checked_key(self.environment.get(TOKEN, "").strip(), TOKEN)

    @property
    def url(self) -> str:
        """Where Claude is. Raises `ValueError`."""
        said = self.base_url or self.environment.get(URL, "") or BASE_URL
        url = said.rstrip("/").removesuffix("/v1")
        checked_base_url(url)
        return url

    @property
    def way(self) -> Way:
        """By HTTP or by the command. Raises `ValueError`."""
        keyed = bool(self.key or self.token)
        if self.mode == "auto":
            return "http" if keyed else "cli"
        if self.mode == "http" and not keyed:
            raise ValueError(NO_KEY)
        return self.mode
