"""The settings of a provider of Gemini, and which way it goes."""

from __future__ import annotations

from typing import Literal

import msgspec

from .options import Seconds, checked_base_url, checked_key

#: Without a version: that is added to it.
BASE_URL = "https://generativelanguage.googleapis.com"
#: The variables that may hold the key, the strongest first, as Google's own SDK takes them.
KEYS = ("GOOGLE_API_KEY", "GEMINI_API_KEY")
NO_KEY = "there is no key: set GEMINI_API_KEY (https://aistudio.google.com/apikey)"

Way = Literal["http", "cli"]


class GeminiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One account. Its key never appears in logs or errors."""

    name: str = "gemini_cli"
    #: `http` needs a key, `cli` the installed command; `auto` is `http` where there is a key.
    mode: Literal["auto", "http", "cli"] = "auto"
    #: None: of GOOGLE_API_KEY, else of GEMINI_API_KEY.
    api_key: str | None = None
    #: Empty: of GOOGLE_GEMINI_BASE_URL, else Google's.
    base_url: str = ""
    #: Empty: by HTTP all that Google lists, by the command its own default.
    models: tuple[str, ...] = ()
    #: The command; one without a slash is looked for in PATH.
    command: str = "gemini"
    #: The variables that it may see, and the command.
    environment: dict[str, str] = {}
    connect_timeout: Seconds = 5.0
    #: The longest silence; generous, because the caller has deadlines of its own.
    read_timeout: Seconds = 600.0

    def __repr__(self) -> str:
        return f"GeminiSettings(name={self.name!r}, mode={self.mode!r})"

    @property
    def key(self) -> str:
        """The key; empty: there is none. Raises `ValueError`."""
        said = (self.api_key, *map(self.environment.get, KEYS))
        return checked_key(next((v.strip() for v in said if v and v.strip()), ""))

    @property
    def url(self) -> str:
        """Where Gemini is. Raises `ValueError`."""
        url = self.base_url or self.environment.get("GOOGLE_GEMINI_BASE_URL", "") or BASE_URL
        checked_base_url(url)
        return url

    @property
    def way(self) -> Way:
        """By HTTP or by the command. Raises `ValueError`."""
        if self.mode == "auto":
            return "http" if self.key else "cli"
        if self.mode == "http" and not self.key:
            raise ValueError(NO_KEY)
        return self.mode
