"""The settings of a provider of Codex, and the options of one request."""

from __future__ import annotations

from typing import Literal

import msgspec

from .codex_found import COMMAND, KEY
from .options import Seconds, checked_base_url, checked_key

#: Where a key of OpenAI's is good. (A login finds its own place.)
OPENAI = "https://api.openai.com/v1"


class CodexSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One account, or one server. Its key never appears in logs, errors or arguments."""

    name: str = "codex_cli"
    #: The command; one without a slash is looked for in PATH.
    command: str = COMMAND
    #: Empty: those that Codex lists; of an own server none, and any is asked for.
    models: tuple[str, ...] = ()
    #: None: of CODEX_API_KEY; without that the login of `codex login`.
    api_key: str | None = None
    #: A server that speaks OpenAI's responses; it usually ends in /v1. Empty: OpenAI's own.
    base_url: str = ""
    #: `exec` starts a process for each answer, and does not stream; `auto` does only where Codex is
    #: too old to be kept.
    mode: Literal["auto", "exec"] = "auto"
    #: The longest silence; generous, because the caller has deadlines of its own.
    read_timeout: Seconds = 600.0
    #: Seconds after which a process that nobody asks is ended.
    idle_timeout: Seconds = 300.0
    #: The variables that it may see, and the command.
    environment: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"CodexSettings(name={self.name!r})"

    @property
    def key(self) -> str:
        """The key; empty: there is none. Raises `ValueError`."""
        return checked_key((self.api_key or self.environment.get(KEY) or "").strip())

    @property
    def url(self) -> str:
        """Where it asks; empty: where the login is good. Raises `ValueError`."""
        if self.base_url:
            checked_base_url(self.base_url)
        return self.base_url or (OPENAI if self.key else "")

    @property
    def needs_login(self) -> bool:
        """Can it be asked only with the login of `codex login`?"""
        return not self.url

    @property
    def lists_models(self) -> bool:
        """Are its models those that Codex lists?"""
        return not self.models and not self.base_url


class CodexOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may say to Codex beside what it says to all."""

    #: How long it thinks; which of them a model knows its vendor says.
    reasoning_effort: (
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None
    ) = None
    #: What it tells of its thoughts.
    reasoning_summary: Literal["auto", "concise", "detailed", "none"] | None = None
