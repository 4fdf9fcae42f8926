"""Is Codex on this machine, and logged in? As far as files tell; no process is started."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .base import Health
from .cli_found import find

COMMAND = "codex"
NOT_INSTALLED = Health(
    state="unavailable", reason="not installed", hint="npm install -g @openai/codex"
)
NOT_LOGGED_IN = Health(
    state="unavailable", reason="not logged in", hint="type `codex login`, or set CODEX_API_KEY"
)
#: The variable whose key Codex takes by itself.
KEY = "CODEX_API_KEY"


def look(
    environment: Mapping[str, str], command: str = COMMAND, *, needs_login: bool = True
) -> Health:
    """Why it can surely not be asked; otherwise `ready`, as far as files tell."""
    if find(command, environment) is None:
        return NOT_INSTALLED
    if needs_login and not environment.get(KEY) and not _may_be_logged_in(environment):
        return NOT_LOGGED_IN
    return Health()


def home(environment: Mapping[str, str]) -> Path:
    """Where Codex keeps its configuration and its login."""
    said = environment.get("CODEX_HOME")
    return Path(said) if said else Path(environment.get("HOME") or "~").expanduser() / ".codex"


def login_file(environment: Mapping[str, str]) -> Path:
    """Where Codex keeps its login, unless it is told to use the system's keyring."""
    return home(environment) / "auth.json"


def _may_be_logged_in(environment: Mapping[str, str]) -> bool:
    return login_file(environment).exists() or keyring(environment)


def keyring(environment: Mapping[str, str]) -> bool:
    """May the login be in the system's keyring, of which only Codex itself can tell?"""
    try:
        text = (home(environment) / "config.toml").read_text("utf-8", "replace")
    except OSError:
        return False
    return re.search(r"^\s*cli_auth_credentials_store\b", text, re.MULTILINE) is not None


def native_program(path: str) -> str:
    """The program itself, where `path` is the wrapper that npm puts before it: it would cost
    Node.js, and stand between us and the signals."""
    wrapper = Path(path).resolve()
    if wrapper.suffix != ".js":
        return path
    package = wrapper.parent.parent
    for folder in (package / "node_modules" / "@openai", package.parent):
        for found in sorted(folder.glob("codex-*/vendor/*/bin/codex")):
            return str(found)
    return path
